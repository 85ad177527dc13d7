"""``twofold run script.py``: run an unmodified script as graphs.

The script sees what ``python script.py`` would show it: it is ``__main__``, with its own ``sys.argv``,
``sys.path[0]`` and ``__file__`` (so pickling and multiprocessing work), its exceptions leave with its own
traceback, and its exit status is kept. Exit status 2 with one line on stderr means that the command itself
was wrong; nothing has run then.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import twofold
from twofold.errors import TwofoldError
from twofold.options import CHOICES, Options

logger = logging.getLogger("twofold")

PACKAGE = str(Path(__file__).parent) + os.sep


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``twofold`` command. Does not return normally where the script does not."""
    parsed = _parser().parse_args(arguments)
    options = {name: value for name, value in vars(parsed).items() if name in _OPTION_NAMES and value is not None}
    try:
        Options.make(**options)
    except TwofoldError as error:
        _refuse(str(error))
    script = Path(parsed.script)
    if not script.is_file():
        what = "is a folder, not a script" if script.is_dir() else "does not exist"
        _refuse(f"{parsed.script} {what}: give the path of a Python script")
    for target in (parsed.report, parsed.timeline):
        if target is not None and not target.absolute().parent.is_dir():
            _refuse(f"cannot write {target}: make the folder {target.parent} first")
    _run(script, parsed.arguments, options, parsed.report, parsed.timeline)


_OPTION_NAMES = ("engine", "backend", "numerics", "warm_up")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _refuse(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="twofold", description="Run imperative PyTorch programs as graphs.", allow_abbrev=False)
    run = parser.add_subparsers(dest="command", required=True, parser_class=_Parser).add_parser(
        "run",
        help="run an unmodified script",
        description="Run an unmodified script; each iteration, up to optimizer.step(), runs as one graph.",
        usage="twofold run [options] script.py [script arguments]",
        allow_abbrev=False,
    )
    for name, choices in CHOICES.items():
        run.add_argument(f"--{name}", metavar="NAME", help=f"{', '.join(choices)} (default {choices[0]})")
    run.add_argument("--warm-up", type=int, metavar="N", help="iterations recorded before the first graph (default 2)")
    run.add_argument("--report", type=Path, metavar="FILE", help="write what ran where and why, as an HTML page")
    run.add_argument(
        "--timeline", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )
    run.add_argument("script", help="path of the script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script finds in sys.argv")
    return parser


def _refuse(message: str) -> NoReturn:
    print(f"twofold: {message}", file=sys.stderr)
    sys.exit(2)


def _run(
    script: Path, arguments: list[str], options: dict[str, Any], report: Path | None, timeline: Path | None
) -> None:
    progress = _show_progress() if sys.stderr.isatty() else None
    running = None
    try:
        with twofold.program(**options) as running:
            _run_as_main(script, arguments)
    except SystemExit:
        raise
    except BaseException:
        _hide_own_frames()
        raise
    finally:
        # However the script leaves, what ran until then is reported.
        if progress:
            progress.close()
        if running is not None:
            _write(running, report, timeline)


def _run_as_main(script: Path, arguments: list[str]) -> None:
    """Execute ``script`` the way the interpreter does, in a fresh ``__main__``."""
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(__file__=str(script.absolute()), __builtins__=__builtins__, __cached__=None)
    # It stays __main__ after the script: exit handlers and worker processes still look names up in it.
    # Worker processes send instances of its classes back under the second name.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module
    sys.argv = [str(script), *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    code = compile(script.read_bytes(), str(script.absolute()), "exec", dont_inherit=True)
    exec(code, main_module.__dict__)


def _write(program: object, report: Path | None, timeline: Path | None) -> None:
    if report is None and timeline is None:
        return
    account = twofold.report(program)
    for write, target in ((account.to_html, report), (account.timeline, timeline)):
        if target is not None:
            _write_one(write, target)


def _write_one(write: Callable[[Path], None], target: Path) -> None:
    try:
        write(target)
    except OSError as error:
        # The script has run, and its exit status is worth more than ours.
        print(f"twofold: could not write {target}: {error.strerror}", file=sys.stderr)


def _hide_own_frames() -> None:
    """Make the interpreter print the exception on its way out without this package's frames.

    They are taken out where the exception is printed, because re-raising would add them again.
    """
    show = sys.excepthook

    def show_without_own_frames(
        kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
    ) -> None:
        if not isinstance(error, TwofoldError):
            logger.debug("full traceback", exc_info=(kind, error, traceback))
            for shown in _chain(error):
                shown.__traceback__ = _without_own_frames(shown.__traceback__)
        show(kind, error, error.__traceback__)

    sys.excepthook = show_without_own_frames


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and those that led to it, each once."""
    chain = [error]
    for entry in chain:
        for earlier in (entry.__cause__, entry.__context__):
            if earlier is not None and not any(earlier is known for known in chain):
                chain.append(earlier)
    return chain


def _without_own_frames(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """``traceback`` from the script's outermost frame on, without frames of this package in between."""
    kept: list[types.TracebackType] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code is _run_as_main.__code__:
            kept.clear()
        elif not code.co_filename.startswith(PACKAGE):
            kept.append(traceback)
        traceback = traceback.tb_next
    result: types.TracebackType | None = None
    for entry in reversed(kept):
        result = types.TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


class _Progress(logging.Handler):
    """Shows what Twofold decides while the first graphs are made, one terminal line a decision.

    A line that rewrites itself would be torn apart by what the script prints.
    """

    LINES = 12

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.left = self.LINES

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.isEnabledFor(record.levelno):
            root.handle(record)
        if self.left > 0:
            self.left -= 1
            more = "" if self.left else " (further decisions: --report)"
            text = f"twofold: {record.getMessage()}{more}".replace("\n", " ")
            print(text[: shutil.get_terminal_size().columns - 1], file=sys.stderr)

    def close(self) -> None:
        logger.removeHandler(self)
        logger.propagate = True
        super().close()


def _show_progress() -> _Progress:
    progress = _Progress()
    logger.addHandler(progress)
    logger.setLevel(min(logging.INFO, logger.level or logging.INFO))
    # The handler passes records on by the root's level: INFO must not leak into the script's own log.
    logger.propagate = False
    return progress

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twofold import cli
from twofold.errors import InternalError

TWOFOLD = ["-m", "twofold", "run"]


def python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command refuses ``arguments``."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("twofold: ")
    assert output.err.count("\n") == 1
    return output.err


SCRIPTS = {
    "main_module": """
        import multiprocessing, pickle, sys
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int
        def double(point):
            return Point(2 * point.x)
        if __name__ == "__main__":
            import __main__
            print(__name__, sys.argv, sys.path[0], __file__, __spec__, __main__.Point is Point, __doc__)
            print(pickle.loads(pickle.dumps(Point(3))))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [Point(1), Point(2)]))
        """,
    "sibling_import": """
        import sibling
        print(sibling.value)
        """,
    "exit_handler": """
        import atexit, pickle
        class Kept: pass
        atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Kept()))).__module__))
        """,
    "chained_error": """
        def inner():
            raise KeyError("key")
        def outer():
            try:
                inner()
            except KeyError as error:
                raise ValueError("value") from error
        outer()
        """,
    "syntax_error": "def f(:\n",
    "own_hook": """
        import sys, traceback
        def hook(kind, error, trace):
            print("hook", kind, error, len(traceback.extract_tb(trace)))
        sys.excepthook = hook
        1 / 0
        """,
    "status": "import sys; sys.exit(3)",
    "message": "import sys; sys.exit('gone')",
    "interrupt": "raise KeyboardInterrupt",
    "own_log": """
        import logging
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("mine").warning("kept")
        """,
}
COMMAND = ["script.py", "--epochs", "3", "--", "-x", "--report"]
IN_A_PROCESS_OF_ITS_OWN = ["main_module", "chained_error"]
FORKED = [name for name in SCRIPTS if name not in IN_A_PROCESS_OF_ITS_OWN]
# What `python -m twofold run` does after importing PyTorch, which takes 2 s, in a child for each folder.
FORK_EACH = """
import gc, os, runpy, sys
import twofold.cli
gc.freeze()  # else each child walks through all of it at its end
folders, arguments = sys.argv[1].split(os.pathsep), sys.argv[2:]
for folder in folders:
    child = os.fork()
    if not child:
        os.chdir(folder)
        for descriptor, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["-m", *arguments]
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(os.path.join(folder, "status"), "w") as file:
        file.write(str(status))
else:
    sys.exit()
runpy._run_module_as_main("twofold")
"""


def written(name: str, folder: Path) -> Path:
    (folder / "script.py").write_text("\n".join(SCRIPTS[name].split("\n        ")))
    (folder / "sibling.py").write_text("value = 7\n")
    return folder


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of `FORKED`, in which their scripts have run."""
    folders = {name: written(name, tmp_path_factory.mktemp(name)) for name in FORKED}
    code = ["-c", FORK_EACH, os.pathsep.join(map(str, folders.values())), *TWOFOLD[2:], *COMMAND]
    python(code, Path.cwd()).check_returncode()
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", FORKED)
def test_script_behaves_as_under_plain_python(name: str, forked: dict[str, Path]):
    plain = python(COMMAND, forked[name])
    under = [(forked[name] / what).read_text() for what in ("stdout", "stderr", "status")]
    assert under == [plain.stdout, plain.stderr, str(plain.returncode)]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_PROCESS_OF_ITS_OWN)
def test_process_behaves_as_under_plain_python(name: str, tmp_path: Path):
    plain = python(COMMAND, written(name, tmp_path))
    under = python([*TWOFOLD, *COMMAND], tmp_path)
    assert (under.stdout, under.stderr, under.returncode) == (plain.stdout, plain.stderr, plain.returncode)


@pytest.mark.slow
def test_reports_are_written_when_the_script_raises(tmp_path: Path):
    (tmp_path / "script.py").write_text("import torch\ntorch.ones(2).sum()\nraise ValueError('x')\n")
    done = python([*TWOFOLD, "--report", "r.html", "--timeline", "t.json", "script.py"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: x\n")
    assert "<h1>Twofold report" in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_missing_script(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "missing.py does not exist" in refused(capsys, "run", str(tmp_path / "missing.py"))
    assert "is a folder" in refused(capsys, "run", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["walk"], "invalid choice: 'walk'"),
        (["run"], "the following arguments are required: script"),
        (["run", "--engin", "auto", "script.py"], "--engin"),
        (["run", "--backend", "inductr", "script.py"], "did you mean 'inductor'?"),
        (["run", "--warm-up", "many", "script.py"], "invalid int value: 'many'"),
        (["run", "--warm-up", "0", "script.py"], "warm_up must be a whole number of at least 1"),
    ],
)
def test_bad_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refused(capsys, *arguments)


def test_backend_without_its_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refused(capsys, "run", "--backend", "cuda_graph", "script.py")


def test_report_into_a_missing_folder_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError")
    target = tmp_path / "missing" / "report.html"
    assert f"make the folder {target.parent} first" in refused(capsys, "run", "--report", str(target), str(script))


def test_errors_of_this_package_keep_their_frames(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    cli._hide_own_frames()
    for error, own in ((InternalError("broken"), True), (ValueError("theirs"), False)):
        try:
            cli._write_one(_raises(error), Path())
        except (InternalError, ValueError) as caught:
            sys.excepthook(type(caught), caught, caught.__traceback__)
        assert ("in _write_one" in capsys.readouterr().err) == own


def _raises(error: Exception):
    def write(path: Path) -> None:
        raise error

    return write


def test_progress_goes_to_a_terminal_only_and_leaves_the_log_of_the_script_alone(
    capsys: pytest.CaptureFixture[str],
):
    logger = logging.getLogger("twofold")
    before = logger.level
    passed_on: list[logging.LogRecord] = []
    root_handler = logging.Handler()
    root_handler.emit = passed_on.append
    logging.getLogger().addHandler(root_handler)
    progress = cli._show_progress()
    try:
        for number in range(progress.LINES + 5):
            logger.info("decision %d", number)
        logger.warning("a warning")
    finally:
        progress.close()
        logger.setLevel(before)
        logging.getLogger().removeHandler(root_handler)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == progress.LINES
    assert lines[0] == "twofold: decision 0"
    assert "--report" in lines[-1]
    assert [record.getMessage() for record in passed_on] == ["a warning"]


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal(tmp_path: Path):
    (tmp_path / "script.py").write_text("import logging\nlogging.getLogger('twofold').info('first graph')\n")
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, *TWOFOLD, "script.py"], cwd=tmp_path, stderr=writer, timeout=120, check=True)
    os.close(writer)
    assert b"twofold: first graph" in os.read(reader, 1 << 16)
    os.close(reader)

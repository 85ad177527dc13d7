"""Compiling beside the program: artifacts, failures, and what becomes of the tier below."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import twofold
from tests.unit.capture.recording import recorded_path
from twofold.api import wait_for_compilation
from twofold.backends import compilation
from twofold.backends.compilation import MAX_DEATHS, Compiler
from twofold.backends.inductor import CompileFailed, piece_key
from twofold.options import Options
from twofold.run import builder as builder_module
from twofold.run.account import Account
from twofold.run.builder import Builder
from twofold.run.pace import Pace

TWO_OPERATIONS = """\
graph piece0(%x: f32[3]):
  %0: f32[3] = call aten.exp.default(%x)
  %1: f32[3] = call aten.add.Tensor(%0, 1)
  return %1
"""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    made = Compiler()
    monkeypatch.setattr(compilation, "_compiler", made)
    yield made
    made.close()


def prepared(options: Options) -> tuple[Any, Builder, Account]:
    """A path prepared by a builder: what a unit would run as next."""
    x = torch.ones(3)
    path = recorded_path(lambda: x.exp() + 1)
    account = Account("test", "coexecution")
    builder = Builder(options, account, Pace(account, is_kept=False))
    builder.prepare(path, accelerator=False)
    return path, builder, account


def fail(*_: Any) -> None:
    raise CompileFailed("no such kernel")


def fallback_codes(account: Account) -> list[str]:
    return [code for code, _, _ in account.fallbacks]


def test_a_failed_compile_keeps_the_lower_tier(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "compile_to_file", fail)
    monkeypatch.setattr(builder_module, "has_cpp_compiler", lambda: True)
    path, builder, account = prepared(Options(background=False))
    assert path.executable.executable.backend == "replay"
    (order,) = builder.orders()
    assert isinstance(order.exception(), CompileFailed)
    while builder.is_timing(path):
        builder.choose(path)
        if path.executable is None:
            builder.note_eager(path, 1.0)
        else:
            builder.note_graph(path, 0.001)
    builder.poll(path, accelerator=False)
    assert path.executable.executable.backend == "replay"
    assert path.blocked is None
    assert list(account.fallbacks) == [("compile_failed", "no such kernel", None)]
    builder.poll(path, accelerator=False)
    assert list(account.fallbacks.values()) == [1]
    assert builder.orders() == []


def test_a_bug_in_the_compiler_is_a_failed_compile(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    def raise_something(*_: Any) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(compilation, "compile_to_file", raise_something)
    order = compiler.order("key", TWO_OPERATIONS, background=False)
    assert str(order.exception()) == "ZeroDivisionError: deep inside"
    with pytest.raises(CompileFailed):
        compiler.artifact("key")


def test_an_artifact_that_does_not_load_is_a_failed_compile(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    def write_nonsense(_text: str, path: str, _threads: int) -> None:
        with open(path, "wb") as file:  # noqa: PTH123 - as an artifact is written
            file.write(b"nonsense")

    monkeypatch.setattr(compilation, "compile_to_file", write_nonsense)
    assert isinstance(compiler.order("key", TWO_OPERATIONS, background=False).exception(), CompileFailed)


def test_equal_pieces_are_compiled_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def count(text: str, path: str, threads: int) -> None:
        calls.append(text)
        fail()

    monkeypatch.setattr(compilation, "compile_to_file", count)
    orders = [compiler.order("key", TWO_OPERATIONS, background=False) for _ in range(3)]
    assert len({id(order) for order in orders}) == len(calls) == 1


def test_a_missing_compiler_is_said_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder_module, "has_cpp_compiler", lambda: False)
    path, builder, account = prepared(Options(background=False))
    assert path.executable.executable.backend == "replay"
    x = torch.ones(3)
    builder.prepare(recorded_path(lambda: x.sin() + 1), accelerator=False)
    assert fallback_codes(account) == ["no_compiler"]
    assert list(account.fallbacks.values()) == [1]
    assert builder.orders() == []


@pytest.mark.parametrize("options", [Options(numerics="exact"), Options(backend="replay")])
def test_nothing_is_compiled_where_nothing_is_wanted(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, options: Options
):
    monkeypatch.setattr(compilation, "compile_to_file", fail)
    path, builder, account = prepared(options)
    assert path.executable.executable.backend == "replay"
    assert builder.orders() == []
    assert account.fallbacks == {}


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def planted(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> Path:
    """Have each new Python process run `code` before anything else; return the file it is in."""
    file = folder / "sitecustomize.py"
    file.write_text(f"import os, sys\nif 'twofold.backends.compile_process' in sys.orig_argv:\n    {code}\n")
    monkeypatch.syspath_prepend(str(folder))
    return file


KILLED = "os.kill(os.getpid(), 9)"
ENDED = "os._exit(7)"
NO_MEMORY = """
    import twofold.backends.inductor as inductor
    def raise_memory_error(_):
        raise MemoryError
    inductor.rewrite_for_inductor = raise_memory_error
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "code", "reason"),
    [
        (KILLED, "out_of_memory", "the compile process was killed, as it is where memory runs out"),
        (ENDED, "compile_failed", "the compile process ended with status 7"),
        (NO_MEMORY, "out_of_memory", "MemoryError"),
    ],
)
def test_a_compile_process_that_ends_or_has_no_memory_left(
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    plant: str,
    code: str,
    reason: str,
):
    """The program goes on on the tier below, is what it is in eager execution, and is told once."""
    monkeypatch.setattr(builder_module, "has_cpp_compiler", lambda: True)
    planted(monkeypatch, tmp_path, plant)
    weight, expected = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def step(parameter: torch.Tensor) -> torch.Tensor:
        loss = parameter.exp().sum()
        loss.backward()
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad  # type: ignore[operator]
            parameter.grad = None
        return loss.detach()

    run = twofold.function(step, numerics="fused")
    with caplog.at_level("INFO", logger="twofold"):
        for number in range(60):
            assert torch.equal(run(weight), step(expected)), number
            wait_for_compilation(run, timeout=60)
    assert torch.equal(weight, expected)
    report = twofold.report(run).to_dict()
    entries = [entry for entry in report["fallbacks"] if entry["code"] == code]
    assert [entry["reason"] for entry in entries] == [reason]
    assert [line["text"] for line in report["decisions"] if code in line["text"]] == [
        f"fell back to replay ({code}): {reason}"
    ]
    assert len([line for line in caplog.messages if reason in line]) == 1


def test_a_killed_compile_process_is_a_failed_compile(compiler: Compiler):
    order = compiler.order("key", TWO_OPERATIONS, background=True)
    wait_until(lambda: compiler._process is not None)
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGKILL)
    error = order.exception(timeout=20)
    assert isinstance(error, CompileFailed)
    assert "the compile process" in str(error)


def test_compiling_is_given_up_after_several_deaths(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    planted(monkeypatch, tmp_path, KILLED)
    orders = [compiler.order(f"key{number}", TWO_OPERATIONS, background=True) for number in range(MAX_DEATHS + 2)]
    errors = [order.exception(timeout=60) for order in orders]
    assert all(isinstance(error, CompileFailed) for error in errors)
    assert ["killed" in str(error) for error in errors] == [True] * MAX_DEATHS + [False] * 2
    assert ["given up" in str(error) for error in errors] == [False] * MAX_DEATHS + [True] * 2
    assert compiler._process is None


def test_memory_that_ran_out_is_told_from_other_failures():
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("no more")
    cases = [
        MemoryError(),
        wrapped,
        OSError(errno.ENOMEM, "fork"),
        RuntimeError("Killed signal terminated program cc1plus"),
    ]
    assert [CompileFailed.of(error).code for error in cases] == ["out_of_memory"] * 4
    assert str(CompileFailed.of(MemoryError())) == "MemoryError"
    other = CompileFailed.of(OSError(errno.ENOENT, "none"))
    assert (other.code, str(other)) == ("compile_failed", "FileNotFoundError: [Errno 2] none")


@pytest.mark.slow
def test_a_piece_is_compiled_in_the_background(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By another process, if the first was killed over another piece."""
    file = planted(monkeypatch, tmp_path, KILLED)
    assert isinstance(compiler.order("other", TWO_OPERATIONS, background=True).exception(timeout=60), CompileFailed)
    file.unlink()
    order = compiler.order(piece_key(TWO_OPERATIONS), TWO_OPERATIONS, background=True)
    run = order.result(timeout=90)
    x = torch.tensor([0.0, 1.0, -1.0])
    (result,) = run(x)
    torch.testing.assert_close(result, x.exp() + 1)
    assert compiler.artifact(piece_key(TWO_OPERATIONS)) is run
    assert compiler.seconds_of(piece_key(TWO_OPERATIONS)) > 0

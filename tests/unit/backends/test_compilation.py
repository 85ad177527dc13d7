"""Compiling beside the program: artifacts, failures, and what becomes of the tier below."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import recorded_path
from twofold.backends import compilation
from twofold.backends.compilation import Compiler
from twofold.backends.inductor import CompileFailed, piece_key
from twofold.options import Options
from twofold.run import builder as builder_module
from twofold.run.account import Account
from twofold.run.builder import Builder

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
    builder = Builder(options, account)
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


def test_a_killed_compile_process_is_a_failed_compile(compiler: Compiler):
    order = compiler.order("key", TWO_OPERATIONS, background=True)
    wait_until(lambda: compiler._process is not None)
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGKILL)
    error = order.exception(timeout=20)
    assert isinstance(error, CompileFailed)
    assert "the compile process" in str(error)


@pytest.mark.slow
def test_a_piece_is_compiled_in_the_background(compiler: Compiler):
    order = compiler.order(piece_key(TWO_OPERATIONS), TWO_OPERATIONS, background=True)
    run = order.result(timeout=90)
    x = torch.tensor([0.0, 1.0, -1.0])
    (result,) = run(x)
    torch.testing.assert_close(result, x.exp() + 1)
    assert compiler.artifact(piece_key(TWO_OPERATIONS)) is run
    assert compiler.seconds_of(piece_key(TWO_OPERATIONS)) > 0

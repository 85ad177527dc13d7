"""Which tier a path runs on: judged by made-up times, against eager execution and the tier below."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, merge, recorded_path
from twofold.backends.replay import ReplayExecutable
from twofold.capture.trace_graph import Path, TraceGraph
from twofold.options import Options
from twofold.run import builder as builder_module
from twofold.run.account import Account
from twofold.run.builder import MAX_REBUILDS, MIXED_SAMPLES, SAMPLES, WARM_UP_UNITS, Builder
from twofold.run.pace import Pace


def make_path() -> Path:
    x = torch.ones(3)
    return recorded_path(lambda: x.exp() + 1)


def make_builder(**options: Any) -> Builder:
    options.setdefault("numerics", "exact")
    account = Account("test", "coexecution")
    return Builder(Options(**options), account, Pace(account, is_kept=False))


def backend(path: Path) -> str | None:
    return None if path.executable is None else path.executable.executable.backend


def try_out(builder: Builder, path: Path, seconds: float, reference: float) -> list[str]:
    """Run units of made-up length until the tier on trial is judged; return what each ran on."""
    taken: list[str] = []
    tried = backend(path)
    while builder.is_timing(path):
        builder.choose(path)
        taken.append(backend(path) or "eager")
        if taken[-1] == "eager":
            builder.note_eager(path, reference)
        else:
            first = taken.count(tried) <= WARM_UP_UNITS
            builder.note_graph(path, 100.0 if first else seconds if taken[-1] == tried else reference)
    return taken


class _AsInductor(ReplayExecutable):
    backend = "inductor"

    def __init__(self, program: Any, _artifact: Any) -> None:
        super().__init__(program)


def test_a_faster_graph_is_kept():
    builder, path = make_builder(), make_path()
    builder.prepare(path, accelerator=False)
    assert builder.is_timing(path)
    assert try_out(builder, path, 0.001, 0.002) == ["replay"] * WARM_UP_UNITS + ["replay", "eager"] * SAMPLES
    assert backend(path) == "replay"
    assert path.blocked is None
    assert builder.account.backend == "replay"
    assert not builder.is_timing(path)
    assert builder.account.decisions[-1].text == "kept replay: 1.000 ms a unit, eager 2.000 ms"


def test_a_slower_graph_is_dropped():
    builder, path = make_builder(), make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.003, 0.002)
    assert path.executable is None
    assert path.blocked == "not_faster"
    assert builder.account.backend == "eager"
    assert [code for code, _, _ in builder.account.fallbacks] == ["not_faster"]
    assert builder.account.decisions[-1].text == "dropped replay: 3.000 ms a unit, eager 2.000 ms"


def test_a_gain_within_noise_is_no_gain():
    builder, path = make_builder(), make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.00198, 0.002)
    assert backend(path) is None


def two_paths(builder: Builder) -> list[Path]:
    """Build two paths that begin alike."""
    x = torch.ones(3)
    graph = TraceGraph()
    paths: list[Path] = []
    for power in (1, 4):

        def program(power: int = power) -> torch.Tensor:
            y = x
            for _ in range(power):
                y = y.exp()
            return y + 1

        path = merge(graph, program)
        assert path is not None
        builder.prepare(path, accelerator=False)
        paths.append(path)
    return paths


@pytest.mark.parametrize(("graph_seconds", "expected"), [(0.5, "replay"), (1.5, None)])
def test_paths_that_begin_alike_are_judged_together(graph_seconds: float, expected: str | None):
    """Eager units of such a program take 1 or 9 ms, whichever path is likely; only their mean can be compared."""
    builder = make_builder()
    paths = two_paths(builder)
    for index in range(4 * (MIXED_SAMPLES + 2 * WARM_UP_UNITS)):
        taken, seconds = paths[index // 2 % 2], (0.001, 0.009)[index // 2 % 2]
        builder.choose(paths[1])
        if not builder.is_timing(paths[1]):
            break
        if paths[1].executable is None:
            builder.note_eager(paths[1], seconds)
        else:
            builder.note_graph(taken, seconds * graph_seconds)
    assert [backend(path) for path in paths] == [expected, expected]


def test_one_unit_that_took_far_too_long_does_not_decide():
    """Two paths, whose units take 1 ms as graphs and 7 eagerly; Python collects its garbage in one of them, for 130."""
    builder = make_builder()
    paths = two_paths(builder)
    for index in range(4 * (MIXED_SAMPLES + 2 * WARM_UP_UNITS)):
        path = paths[index % 2]
        builder.choose(path)
        if not builder.is_timing(path):
            break
        if path.executable is None:
            builder.note_eager(path, 0.007)
        else:
            builder.note_graph(path, 0.130 if index == 20 else 0.001)
    assert [backend(path) for path in paths] == ["replay", "replay"]


def test_a_named_backend_is_not_judged():
    builder, path = make_builder(backend="replay"), make_path()
    builder.prepare(path, accelerator=False)
    assert not builder.is_timing(path)
    builder.choose(path)
    builder.note_graph(path, 100.0)
    assert backend(path) == "replay"
    assert builder.account.backend == "replay"


class Orders:
    """Stands for the compiler: one order that the test completes, and kernels that are replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.future: Future[Any] = Future()
        monkeypatch.setattr(builder_module, "has_cpp_compiler", lambda: True)
        monkeypatch.setattr(builder_module, "piece_texts", lambda _program: {"key": "text"})
        monkeypatch.setattr(builder_module, "compiler", lambda: self)
        monkeypatch.setattr(builder_module, "InductorExecutable", _AsInductor)

    def order(self, _key: str, _text: str, _background: bool) -> Future[Any]:
        return self.future

    def artifact(self, key: str) -> Any:
        raise AssertionError(f"{key} is not wanted here")

    def seconds_of(self, _key: str) -> float:
        return 1.5


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    return Orders(monkeypatch)


def on_replay(builder: Builder) -> Path:
    path = make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.001, 0.002)
    assert backend(path) == "replay"
    return path


@pytest.mark.parametrize(("seconds", "expected"), [(0.0005, "inductor"), (0.0015, "replay")])
def test_kernels_that_arrive_are_kept_if_they_are_faster_than_replay(orders: Orders, seconds: float, expected: str):
    builder = make_builder(numerics="fused")
    path = on_replay(builder)
    builder.poll(path, accelerator=False)
    assert backend(path) == "replay"
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    assert backend(path) == "inductor"
    assert set(try_out(builder, path, seconds, 0.001)) == {"inductor", "replay"}
    assert backend(path) == expected
    assert builder.account.backend == expected
    assert path.blocked is None
    assert builder.compile_seconds() == 1.5


def test_a_path_is_settled_when_nothing_is_due(orders: Orders):
    builder = make_builder(numerics="fused")
    path = on_replay(builder)
    assert not builder.settled, "kernels are not ordered yet"
    builder.poll(path, accelerator=False)
    builder.choose(path)
    assert not builder.settled, "kernels are awaited"
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    builder.choose(path)
    assert not builder.settled, "a tier is on trial"
    try_out(builder, path, 0.0005, 0.001)
    assert builder.settled == {path}
    builder.prepare(make_path(), accelerator=False)
    assert not builder.settled, "there is another path"


def test_a_slow_replay_leaves_the_path_open_for_kernels(orders: Orders):
    builder, path = make_builder(numerics="fused"), make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.003, 0.002)
    assert path.executable is None
    assert path.blocked is None
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    assert backend(path) == "inductor"
    try_out(builder, path, 0.003, 0.002)
    assert path.blocked == "not_faster"


def test_a_path_built_again_and_again_is_given_up():
    builder, path = make_builder(), make_path()
    for _ in range(MAX_REBUILDS):
        path.stale = True
        builder.prepare(path, accelerator=False)
        assert backend(path) == "replay"
    path.stale = True
    builder.prepare(path, accelerator=False)
    assert path.blocked == "argument_changes"


def test_a_path_that_is_not_stale_is_left_alone():
    builder, path = make_builder(), make_path()
    builder.prepare(path, accelerator=False)
    executable = path.executable
    builder.prepare(path, accelerator=False)
    assert path.executable is executable


def test_a_path_that_cannot_be_a_graph_is_blocked_with_its_reason():
    weight = torch.ones(3, requires_grad=True)
    path = merge(TraceGraph(), lambda: weight.exp())
    assert path is not None
    builder = make_builder()
    builder.prepare(path, accelerator=False)
    assert path.blocked == "history_escapes"
    assert [code for code, _, _ in builder.account.fallbacks] == ["history_escapes"]


def test_a_path_whose_optimizer_makes_its_state_waits():
    net = Linear(lambda parameters: torch.optim.Adam(parameters))
    path = merge(TraceGraph(), lambda: net.step(torch.ones(4, 3)))
    assert path is not None
    builder = make_builder()
    builder.prepare(path, accelerator=False)
    assert path.blocked is None
    assert path.stale
    assert builder.account.fallbacks == {}


def test_too_large_a_unit_is_not_compiled(orders: Orders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder_module, "MAX_COMPILED_NODES", 1)
    builder, path = make_builder(numerics="fused", background=False), make_path()
    builder.prepare(path, accelerator=False)
    assert [code for code, _, _ in builder.account.fallbacks] == ["too_large"]
    assert builder.orders() == []
    assert backend(path) == "replay"


def test_a_capture_counts_as_no_write(monkeypatch: pytest.MonkeyPatch):
    """It runs the operations of a graph, which compute nothing then, and yet are counted."""

    class Captured(ReplayExecutable):
        backend = "cuda_graph"

        def __init__(self, program: Any, inner: Any, given: Any, _warm_up: bool) -> None:
            super().__init__(program)
            for index in range(len(program.segments)):
                inner.launch(index, given)

    monkeypatch.setattr(builder_module, "CudaGraphExecutable", Captured)
    net = Linear()
    path = recorded_path(lambda: net.step(torch.ones(4, 3)))
    before = net.weight._version
    builder = make_builder(backend="auto")
    builder.prepare(path, accelerator=True)
    assert backend(path) == "cuda_graph"
    assert net.weight._version == before

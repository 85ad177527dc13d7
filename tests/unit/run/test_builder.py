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
from twofold.run.builder import MAX_REBUILDS, WARM_UP_UNITS, Builder
from twofold.run.contest import LAST_TRIAL_AFTER, MAX_MISSED, MIXED_SAMPLES, MOST_SAMPLES, SAMPLES
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


def test_units_that_lack_the_tier_on_trial_become_rare_and_put_it_off():
    """The likely path has it, and each unit takes the other, on a tier that was dropped."""
    builder = make_builder()
    paths = two_paths(builder)
    builder._states[paths[0]].tiers.clear()
    on_tier = units = 0
    while builder.is_timing(paths[1]):
        units += 1
        builder.choose(paths[1])
        if paths[1].executable is None:
            builder.note_eager(paths[1], 0.001)
        else:
            on_tier += 1
            paths[0].executable = paths[1].executable
            builder.note_graph(paths[0], 0.002)
    assert 10 < on_tier <= MAX_MISSED < 4 * on_tier < units
    builder.poll(paths[1], accelerator=False, units=LAST_TRIAL_AFTER - 1)
    assert not builder.is_timing(paths[1])
    builder.poll(paths[1], accelerator=False)
    assert builder.is_timing(paths[1]), "it is tried again"


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
        monkeypatch.setattr(builder_module, "piece_texts", lambda program: {str(id(program)): "text"})
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
    assert not builder.settled, "it is tried once more"
    rest(builder, path)
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
    assert path.blocked is None
    rest(builder, path)
    try_out(builder, path, 0.003, 0.002)
    assert path.blocked == "not_faster"


def rest(builder: Builder, path: Path) -> None:
    """Let units pass until the compiled tier is tried once more."""
    for _ in range(LAST_TRIAL_AFTER):
        assert not builder.is_timing(path)
        builder.poll(path, accelerator=False)
        builder.choose(path)
    assert builder.is_timing(path)


def test_units_between_two_looks_count_until_the_compiled_tier_is_tried_once_more(orders: Orders):
    builder = make_builder(numerics="fused")
    path = on_kernels(builder, orders, 0.0015)
    for _ in range(2):
        assert not builder.is_timing(path)
        builder.poll(path, accelerator=False, units=LAST_TRIAL_AFTER // 2)
        builder.choose(path)
    assert builder.is_timing(path)


def on_kernels(builder: Builder, orders: Orders, seconds: float) -> Path:
    """Have kernels judged whose units take so long, against 1 ms of replay and 2 of eager execution."""
    path = on_replay(builder)
    builder.poll(path, accelerator=False)
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    try_out(builder, path, seconds, 0.001)
    return path


@pytest.mark.parametrize(("later", "expected"), [(0.0005, "inductor"), (0.0015, "replay")])
def test_kernels_that_were_dropped_are_tried_once_more(orders: Orders, later: float, expected: str):
    """They were judged as soon as they came, when much else may have been going on."""
    builder = make_builder(numerics="fused")
    path = on_kernels(builder, orders, 0.0015)
    assert backend(path) == "replay"
    rest(builder, path)
    assert set(try_out(builder, path, later, 0.001)) == {"inductor", "replay"}
    assert backend(path) == expected
    assert builder.account.backend == expected
    assert builder.settled == {path}


@pytest.mark.parametrize(("later", "expected"), [(0.0005, "inductor"), (0.0025, "replay")])
def test_kernels_that_were_kept_are_compared_with_eager_execution_later(orders: Orders, later: float, expected: str):
    builder = make_builder(numerics="fused")
    path = on_kernels(builder, orders, 0.0005)
    assert backend(path) == "inductor"
    rest(builder, path)
    assert set(try_out(builder, path, later, 0.002)) == {"inductor", "eager"}
    assert backend(path) == expected
    assert builder.settled == {path}


@pytest.mark.parametrize(("seconds", "expected"), [(0.0015, "inductor"), (0.0025, None)])
def test_what_was_kept_is_compared_with_eager_execution_where_units_take_longer(
    orders: Orders, seconds: float, expected: str | None
):
    """Speculation was given up: the units that were judged ran without their Python."""
    builder = make_builder(numerics="fused")
    path = on_kernels(builder, orders, 0.0005)
    rest(builder, path)
    try_out(builder, path, 0.0005, 0.002)
    assert builder.settled == {path}
    builder.judge_again()
    assert set(try_out(builder, path, seconds, 0.002)) == {"inductor", "eager"}
    assert backend(path) == expected
    assert path.blocked == (None if expected else "not_faster")


def compiles(monkeypatch: pytest.MonkeyPatch, is_compiling: bool) -> None:
    monkeypatch.setattr(builder_module, "is_compiling", lambda: is_compiling)


def test_nothing_is_judged_just_after_a_compiler_was_at_work(orders: Orders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder_module, "QUIET_SECONDS", 1e9)
    builder = make_builder(numerics="fused")
    path = on_replay(builder)
    builder.poll(path, accelerator=False)
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    compiles(monkeypatch, True)
    for _ in range(WARM_UP_UNITS + 1):
        builder.choose(path)
        builder.note_graph(path, 100.0)
    compiles(monkeypatch, False)
    for _ in range(4 * MOST_SAMPLES):
        builder.choose(path)
        builder.note_graph(path, 100.0)
    assert not builder.is_timing(path)
    assert not any("dropped inductor" in text for _, text in builder.account.decisions)


@pytest.mark.parametrize("is_kept", [True, False])
def test_units_run_on_what_was_kept_while_a_trial_waits(orders: Orders, monkeypatch: pytest.MonkeyPatch, is_kept: bool):
    """A program of many paths, whose kernels came one by one, ran at 0.4 of eager's speed for as long as they came."""
    builder = make_builder(numerics="fused")
    path = make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.001 if is_kept else 0.003, 0.002)
    builder.poll(path, accelerator=False)
    orders.future.set_result(None)
    builder.poll(path, accelerator=False)
    builder.choose(path)
    assert backend(path) == "inductor"
    compiles(monkeypatch, True)
    builder.choose(path)
    assert backend(path) == ("replay" if is_kept else None)


@pytest.mark.parametrize(("seconds", "expected"), [(0.003, "replay"), (0.007, None)])
def test_a_dropped_replay_may_pay_while_kernels_are_compiled(
    orders: Orders, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: str | None
):
    """On one thread it leaves the compiler a core; eager execution, on all threads, takes 6 ms then."""
    monkeypatch.setattr(builder_module, "has_core_to_spare", lambda: False)
    builder, path = make_builder(numerics="fused"), make_path()
    builder.prepare(path, accelerator=False)
    try_out(builder, path, 0.003, 0.002)
    assert backend(path) is None
    builder.poll(path, accelerator=False)
    assert not builder.is_timing(path), "the compiler has not begun"
    compiles(monkeypatch, True)
    builder.choose(path)
    for _ in range(4 * SAMPLES):
        builder.choose(path)
        if backend(path) is None:
            builder.note_eager(path, 0.006)
        else:
            builder.note_graph(path, seconds)
    assert not builder.is_timing(path)
    assert backend(path) == expected
    compiles(monkeypatch, False)
    orders.future.set_result(None)
    builder.choose(path)
    assert backend(path) is None


def test_where_a_core_is_to_spare_all_paths_are_compiled(orders: Orders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder_module, "has_core_to_spare", lambda: True)
    assert ordered_paths(make_builder(numerics="fused"), [0.0, 0.0]) == [True, True]


@pytest.mark.parametrize(("seconds", "is_ordered"), [(0.1, False), (1.0, True)])
def test_else_all_but_the_first_path_have_to_take_long(
    orders: Orders, monkeypatch: pytest.MonkeyPatch, seconds: float, is_ordered: bool
):
    """The kernels of the first took 1.5 s to compile."""
    monkeypatch.setattr(builder_module, "has_core_to_spare", lambda: False)
    orders.future.set_result(None)
    assert ordered_paths(make_builder(numerics="fused"), [0.0, seconds]) == [True, is_ordered]


def test_a_path_whose_pieces_others_had_compiled_need_not_take_long(orders: Orders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder_module, "has_core_to_spare", lambda: False)
    monkeypatch.setattr(builder_module, "piece_texts", lambda _program: {"key": "text"})
    orders.future.set_result(None)
    assert ordered_paths(make_builder(numerics="fused"), [0.0, 0.0]) == [True, True]


def ordered_paths(builder: Builder, seconds: list[float]) -> list[bool]:
    """Poll for paths whose units took so long; return which were ordered."""
    paths = two_paths(builder)
    for path, taken in zip(paths, seconds, strict=True):
        path.seconds = taken
        builder._contest(path).trial = None
        builder._contest(path).paths = [path]
        builder.poll(path, accelerator=False)
    return [builder._states[path].has_ordered for path in paths]


def on_kernels_of_one_path(builder: Builder, orders: Orders) -> list[Path]:
    """Two paths that begin alike and run as replay. Kernels of the first alone have come and are on trial."""
    paths = two_paths(builder)
    contest = builder._contest(paths[0])
    contest.trial = None
    contest.accepted = ["replay"]
    orders.future.set_result(None)
    builder._order(paths[0], builder._states[paths[0]], accelerator=False)
    builder._states[paths[1]].has_ordered = True
    builder.poll(paths[0], accelerator=False)
    assert [backend(path) for path in paths] == ["inductor", "replay"]
    return paths


def test_kernels_that_come_while_others_are_on_trial_join_them(orders: Orders):
    """The path whose kernels came first may be one that hardly a unit takes."""
    builder = make_builder(numerics="fused")
    paths = on_kernels_of_one_path(builder, orders)
    builder._states[paths[1]].orders = [orders.future]
    for _ in paths:
        builder.poll(paths[0], accelerator=False)
    assert [backend(path) for path in paths] == ["inductor", "inductor"]


@pytest.mark.parametrize(("inductor", "expected"), [(0.0008, "inductor"), (0.0012, "replay")])
def test_tiers_are_compared_path_by_path(orders: Orders, inductor: float, expected: str):
    """Every ninth unit takes the other path and 50 ms, most often when it is the turn of the kernels."""
    builder = make_builder(numerics="fused")
    paths = on_kernels_of_one_path(builder, orders)
    for index in range(200):
        path = paths[1] if index % 9 == 0 else paths[0]
        builder.choose(paths[0])
        if not builder.is_timing(paths[0]):
            break
        times = {"inductor": inductor, "replay": 0.001} if path is paths[0] else {"replay": 0.050}
        builder.note_graph(path, times[backend(path) or "eager"])
    assert backend(paths[0]) == expected
    assert backend(paths[1]) == "replay"


def test_a_path_without_the_tier_that_pays_is_followed_all_the_same(orders: Orders):
    """An eager unit does not show its path, so once it is the likely one, all units would be eager."""
    builder = make_builder(numerics="fused")
    paths = on_kernels_of_one_path(builder, orders)
    contest = builder._contest(paths[0])
    contest.trial = None
    contest.accepted = ["inductor"]
    for path in paths:
        builder.choose(path)
    assert [backend(path) for path in paths] == ["inductor", "replay"]
    contest.begin_trial("inductor")
    turns: list[tuple[str | None, ...]] = []
    for _ in range(2):
        builder.choose(paths[1])
        turns.append(tuple(map(backend, paths)))
        builder.note_graph(paths[0], 0.001) if backend(paths[0]) else builder.note_eager(paths[1], 0.002)
        builder._states[paths[0]].units["inductor"] = WARM_UP_UNITS
    assert ("inductor", "replay") in turns


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

        def __init__(self, program: Any, inner: Any, given: Any, *_how: bool) -> None:
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

"""Merging traces, and the compiled checks that the skeleton runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, event_names, merge, record
from twofold.capture.trace_graph import MAX_SITE_VARIANTS, Bound, Path, PathNode, TraceGraph, equal_templates


def merged(graph: TraceGraph, program: Callable[[], Any]) -> Path:
    path = merge(graph, program)
    assert path is not None
    return path


def test_common_prefixes_are_shared():
    graph = TraceGraph()
    x = torch.ones(2)

    def program(plus: bool) -> torch.Tensor:
        hidden = (x * 2).exp()
        return hidden + 1 if plus else hidden - 1

    left, right, again = (merged(graph, lambda p=plus: program(p)) for plus in (True, False, True))
    assert left is again
    assert left.seen == 2
    assert left.nodes[:2] == right.nodes[:2]
    assert left.nodes[2] is not right.nodes[2]
    assert graph.paths == [left, right]
    assert graph.root(graph.signature()).latest is left


@pytest.mark.parametrize(
    ("first", "second"),
    [(1.0, 2.0), (0.0, -0.0), (True, 1), (1, 1.0), (math.nan, math.inf)],
    ids=["values", "signs of zero", "bool and int", "int and float", "nan and inf"],
)
def test_different_constants_fork(first: Any, second: Any):
    graph = TraceGraph()
    x = torch.ones(2)
    paths = [merged(graph, lambda c=constant: torch.mul(x, c)) for constant in (first, second, first)]
    assert len(graph.paths) == 2
    assert paths[0] is paths[2]


def test_nan_is_nan():
    graph = TraceGraph()
    x = torch.ones(2)
    assert merged(graph, lambda: x * math.nan) is merged(graph, lambda: x * float("nan"))


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ([1, (2, {"a": 3})], [1, (2, {"a": 3})], True),
        ([1], (1,), False),
        (slice(0, 2), slice(0, 2), True),
        (slice(0, 2), slice(0, 3), False),
        ({"a": 1}, {"b": 1}, False),
        ((1, 2), (1, 2, 3), False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, False),
        ([0.0], [-0.0], False),
        ({1}, {1}, False),
    ],
)
def test_equal_templates(left: Any, right: Any, equal: bool):
    assert equal_templates(left, right) is equal


def test_a_mode_forks():
    graph = TraceGraph()
    weight = torch.ones(2, requires_grad=True)

    def program(enabled: bool) -> None:
        with torch.set_grad_enabled(enabled):
            weight.exp()

    assert merged(graph, lambda: program(True)) is merged(graph, lambda: program(True))
    assert merged(graph, lambda: program(True)) is not merged(graph, lambda: program(False))


def test_another_batch_becomes_a_feed_and_makes_paths_stale():
    graph = TraceGraph()
    net = Linear()
    first, second = torch.ones(4, 3), torch.zeros(4, 3)
    merged(graph, lambda: net.step(first))
    path = merged(graph, lambda: net.step(first))  # gradients exist from the second step on
    linear = path.nodes[1]
    assert linear.fed == ()
    path.stale = False
    assert merged(graph, lambda: net.step(first)) is path
    assert not path.stale
    assert merged(graph, lambda: net.step(second)) is path
    assert path.stale
    assert linear.fed == (0,)
    assert [role.tensor is None for role in linear.roles] == [True, False]


def test_another_shape_forks_and_another_parameter_too():
    graph = TraceGraph()
    x = torch.ones(2)
    one, other = (torch.nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(2))
    assert merged(graph, lambda: x * 2) is not merged(graph, lambda: torch.ones(3) * 2)
    assert merged(graph, lambda: one * 3) is merged(graph, lambda: one * 3)
    assert merged(graph, lambda: one * 3) is not merged(graph, lambda: other * 3)


def test_units_that_begin_otherwise_have_other_roots():
    graph = TraceGraph()
    net = Linear()
    batch = torch.ones(4, 3)
    with_none = merged(graph, lambda: net.step(batch))
    with_gradient = merged(graph, lambda: net.step(batch))
    assert with_none is not with_gradient
    net.weight.grad = None
    assert merged(graph, lambda: net.step(batch)) is with_none
    before = graph.signature()
    net.weight.requires_grad_(False)
    assert graph.signature() != before


def test_a_line_with_ever_new_constants_becomes_a_host_site():
    graph = TraceGraph()
    x = torch.ones(2)
    constants = iter(range(100))

    def program() -> torch.Tensor:
        mask = torch.full((2,), float(next(constants)))
        return x * mask

    for _ in range(MAX_SITE_VARIANTS - 1):
        merged(graph, program)
    assert merge(graph, program) is None
    assert graph.paths == []
    ((function, origin),) = graph.host_sites
    assert function is torch.full
    assert origin is not None
    assert origin.function == "program"
    trace = record(program, graph.host_sites)
    assert event_names(trace) == event_names(trace)[-1:]
    assert len(trace.externals) == 2
    path = merged(graph, program)
    assert merged(graph, program) is path
    assert path.nodes[0].fed == (1,)


def test_a_site_that_computes_with_the_unit_is_none():
    graph = TraceGraph()
    x = torch.ones(2)
    for constant in range(MAX_SITE_VARIANTS + 2):
        merged(graph, lambda c=constant: x.exp().roll(c))
    assert graph.host_sites == frozenset()
    assert len(graph.paths) == MAX_SITE_VARIANTS + 2


def test_a_number_that_changes_becomes_a_feed():
    graph = TraceGraph()
    x = torch.ones(2)
    numbers = iter(range(100))

    def program() -> torch.Tensor:
        hidden = x.exp() * next(numbers)
        return (hidden + 0.5) - next(numbers)

    for _ in range(MAX_SITE_VARIANTS - 1):
        merged(graph, program)
    assert merge(graph, program) is None
    assert graph.paths == []
    functions = {function for function, _ in graph.number_sites}
    assert functions == {torch.Tensor.mul, torch.Tensor.sub}, "the numbers further on are learned with the first"
    path = merged(graph, program)
    assert merged(graph, program) is path
    assert [len(node.fed) for node in path.nodes] == [0, 1, 0, 1]
    assert path.trace.fed_numbers == {1, 2}


def test_a_number_and_a_tensor_in_its_place_are_two_paths():
    graph = TraceGraph()
    x = torch.ones(2)
    given = (*range(MAX_SITE_VARIANTS), 2, 3, torch.tensor(2.0), torch.tensor(3.0))
    *_, first, second, third, fourth = [merge(graph, lambda factor=factor: x * factor) for factor in given]
    assert first is second is not None
    assert third is fourth is not None
    assert len(graph.paths) == 2


def test_few_numbers_stay_constants():
    graph = TraceGraph()
    x = torch.ones(2)
    for number in (0.5, 2.0, 0.5, 2.0, 0.5):
        merged(graph, lambda n=number: x.exp() * n)
    assert graph.number_sites == frozenset()
    assert len(graph.paths) == 2


# ---- build_match -----------------------------------------------------------------------------------------------


def last_node(program: Callable[[], Any], *others: Callable[[], Any]) -> PathNode:
    """The last event of a program that was seen often enough for its batch to be a feed."""
    graph = TraceGraph()
    path = merged(graph, program)
    for other in others:
        assert merged(graph, other) is path
    return path.nodes[-1]


def accepts(node: PathNode, *arguments: Any, slots: Any = (), bound: Bound | None = None, **keywords: Any) -> bool:
    assert node.event is not None
    return bool(node.match(node.event.function, arguments, keywords, list(slots), {} if bound is None else bound))


def test_match_of_function_and_modes():
    x = torch.ones(2)
    node = last_node(lambda: torch.exp(x))
    assert node.match(torch.exp, (x,), {}, [], {})
    assert not node.match(torch.log, (x,), {}, [], {})
    with torch.no_grad():
        assert not node.match(torch.exp, (x,), {}, [], {})
    with torch.autocast("cpu"):
        assert not node.match(torch.exp, (x,), {}, [], {})
        cast = last_node(lambda: torch.exp(x))
        assert cast.match(torch.exp, (x,), {}, [], {})
    assert not cast.match(torch.exp, (x,), {}, [], {})
    with torch.autocast("cpu", torch.float16):
        assert not cast.match(torch.exp, (x,), {}, [], {})


def test_match_of_a_number():
    x = torch.ones(4)
    graph = TraceGraph()
    for number in (0.5, 1.5, 2.5, 3.5):
        path = merge(graph, lambda n=number: x.exp() * n)
    assert path is not None
    node = path.nodes[-1]
    hidden = torch.ones(4)
    bound: Bound = {}
    assert accepts(node, hidden, 7.25, slots=[hidden], bound=bound)
    assert list(bound.values()) == [7.25]
    assert accepts(node, hidden, 3, slots=[hidden])
    for other in (True, 1j, "1", None, torch.tensor(1.0), 2**60):
        assert not accepts(node, hidden, other, slots=[hidden])


def test_match_of_constants():
    x = torch.ones(4)
    node = last_node(lambda: torch.sum(x, 0, keepdim=True))
    assert accepts(node, x, 0, keepdim=True)
    assert not accepts(node, x, 0)
    assert not accepts(node, x, 0, keepdim=1)
    assert not accepts(node, x, 0, keepdim=False)
    assert not accepts(node, x, False, keepdim=True)
    assert not accepts(node, x, 0.0, keepdim=True)
    assert not accepts(node, x, 0, dtype=None)
    assert not accepts(node, x.clone(), 0, keepdim=True)


@pytest.mark.parametrize(
    ("recorded", "same", "others"),
    [
        (0.0, [0.0], [-0.0, 0, False]),
        (math.nan, [float("nan")], [0.0]),
        (1, [1], [True, 1.0]),
        (2.5, [2.5], [2.4, 2]),
    ],
)
def test_match_tells_numbers_apart(recorded: Any, same: list[Any], others: list[Any]):
    x = torch.ones(4)
    node = last_node(lambda: torch.mul(x, recorded))
    assert all(accepts(node, x, number) for number in same)
    assert not any(accepts(node, x, number) for number in others)


def test_match_of_slots_and_containers():
    x = torch.ones(2)

    def program() -> torch.Tensor:
        return torch.stack([x + 1, x + 2, x], dim=0)

    node = last_node(program)
    first, second = torch.ones(2), torch.ones(2)
    slots = [first, second]
    assert accepts(node, [first, second, x], dim=0, slots=slots)
    assert not accepts(node, [second, first, x], dim=0, slots=slots)
    assert not accepts(node, (first, second, x), dim=0, slots=slots)
    assert not accepts(node, [first, second], dim=0, slots=slots)
    assert not accepts(node, [first, second, x.clone()], dim=0, slots=slots)


def test_match_of_slices():
    x = torch.ones(4, 4)
    node = last_node(lambda: x[1:3, ..., None])
    assert accepts(node, x, (slice(1, 3), ..., None))
    assert not accepts(node, x, (slice(1, 2), ..., None))
    assert not accepts(node, x, (slice(1, 3, 1), ..., None))
    assert not accepts(node, x, (slice(1, 3), None, ...))


def test_match_binds_feeds():
    a, b = torch.ones(3), torch.zeros(3)
    node = last_node(lambda: torch.add(a, a), lambda: torch.add(b, b))
    bound: Bound = {}
    c, d = torch.ones(3), torch.ones(3)
    assert accepts(node, c, c, bound=bound)
    assert bound == {0: c}
    assert not accepts(node, c, d)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(4),
        torch.ones(3, dtype=torch.float64),
        torch.ones(6)[::2],
        torch.ones(3, requires_grad=True),
        torch.ones(3, requires_grad=True) * 2,
        torch.ones(3, device="meta"),
        [1.0, 1.0, 1.0],
        1.0,
        None,
    ],
    ids=["shape", "dtype", "stride", "leaf", "history", "device", "list", "number", "none"],
)
def test_match_rejects_what_cannot_be_fed(wrong: Any):
    a, b = torch.ones(3), torch.zeros(3)
    node = last_node(lambda: torch.exp(a), lambda: torch.exp(b))
    assert accepts(node, torch.ones(3))
    assert not accepts(node, wrong)


def test_match_rejects_a_feed_in_memory_that_units_write_to():
    graph = TraceGraph()
    buffer = torch.zeros(6)
    a, b = torch.ones(3), torch.zeros(3)

    def program(x: torch.Tensor) -> None:
        buffer.add_(1)
        torch.exp(x)

    path = merged(graph, lambda: program(a))
    merged(graph, lambda: program(b))
    assert accepts(path.nodes[1], torch.ones(3))
    assert not accepts(path.nodes[1], buffer[:3])
    assert graph.writes_to(buffer[3:])
    assert not graph.writes_to(a)


def test_match_of_a_fetch_checks_tensors_alone():
    x = torch.ones(2)
    node = last_node(lambda: f"{(x + 1).sum():.3f}")
    slot = torch.ones(())
    slots = [torch.ones(2), slot]
    assert node.kind == "fetch"
    assert accepts(node, slot, ".1f", slots=slots)
    assert not accepts(node, torch.ones(()), ".1f", slots=slots)

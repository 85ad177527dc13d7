"""The compiled checks that the skeleton runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import merge, merged
from twofold.capture.match import Bound, equal_templates
from twofold.capture.trace_graph import PathNode, TraceGraph


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

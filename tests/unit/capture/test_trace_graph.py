"""Merging traces."""

import math
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, event_names, merge, merged, record
from twofold.capture.trace import External
from twofold.capture.trace_graph import MAX_SITE_VARIANTS, Path, TraceGraph


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


def test_gradients_that_are_dropped_first_do_not_matter():
    graph = TraceGraph()
    net = Linear()
    batch = torch.ones(4, 3)
    with_none = merged(graph, lambda: net.step(batch))
    assert merged(graph, lambda: net.step(batch)) is with_none
    net.weight.grad = None
    assert with_none.can_begin()
    assert merged(graph, lambda: net.step(batch)) is with_none
    assert not any(node.event is not None and node.event.presence for node in with_none.nodes)


def test_gradients_fork_where_an_event_first_depends_on_them():
    graph = TraceGraph()
    net = Linear()
    batch = torch.ones(4, 3)

    def accumulate() -> None:
        torch.nn.functional.linear(batch, net.weight).sum().backward()
        net.optimizer.step()

    with_none = merged(graph, accumulate)
    assert not with_none.can_begin()
    with_gradient = merged(graph, accumulate)
    assert with_gradient is not with_none
    assert with_gradient.nodes[:2] == with_none.nodes[:2]
    assert with_gradient.nodes[2].event is not None
    assert with_gradient.nodes[2].event.presence == ((net.weight, True),)
    fork = with_none.nodes[1]
    assert fork.latest is with_gradient
    assert graph.likely(fork) is with_gradient
    net.weight.grad = None
    assert graph.likely(fork) is with_none
    assert not with_gradient.can_begin()


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


def placed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, y)


def is_fed(path: Path) -> list[bool]:
    return [role.tensor is None for role in path.nodes[0].roles]


def test_what_changes_at_a_place_is_a_feed_on_each_new_path_there():
    """The last, smaller batch of an epoch is no static either: its first graph holds for the next epoch's."""
    graph = TraceGraph()
    scale = torch.ones(())
    batches = [torch.ones(4), torch.zeros(4), torch.ones(3), torch.zeros(3)]
    merged(graph, lambda: placed(batches[0], scale))
    first = merged(graph, lambda: placed(batches[1], scale))
    assert is_fed(first) == [True, False]
    small = merged(graph, lambda: placed(batches[2], scale))
    assert is_fed(small) == [True, False]
    assert small.seen == 1
    small.stale = False
    assert merged(graph, lambda: placed(batches[3], scale)) is small
    assert not small.stale


def test_a_static_elsewhere_is_none_the_less_static_at_a_place_that_changes():
    graph = TraceGraph()
    scale, known = torch.ones(()), torch.ones(3)
    merged(graph, lambda: known.exp())
    for batch in (torch.ones(4), torch.zeros(4)):
        merged(graph, lambda batch=batch: placed(batch, scale))
    assert is_fed(merged(graph, lambda: placed(known, scale))) == [False, False]


@pytest.mark.parametrize("is_owned", [False, True])
def test_what_the_unit_writes_to_or_an_optimizer_owns_is_static_at_a_place_that_changes(is_owned: bool):
    """As a feed it would be refused."""
    graph = TraceGraph()
    scale, state = torch.ones(()), torch.ones(3, requires_grad=is_owned)
    optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True), state], lr=0.0)
    for batch in (torch.ones(4), torch.zeros(4)):
        merged(graph, lambda batch=batch: placed(batch, scale))

    def program() -> Any:
        result = placed(state, scale)
        return optimizer.zero_grad() if is_owned else state.add_(result)

    assert is_fed(merged(graph, program))[:2] == [False, False]


def test_a_leaf_that_changes_is_a_feed_with_its_gradient():
    graph = TraceGraph()
    scale = torch.ones(())

    def program(leaf: torch.Tensor) -> torch.Tensor:
        result = placed(leaf, scale)
        result.sum().backward()
        return result

    for leaf in (torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)):
        path = merged(graph, lambda leaf=leaf: program(leaf))
    assert is_fed(path) == [True, False]
    assert (path.seen, path.fed_presence) == (2, {0: False})
    assert [gradient.leaf for gradient in path.trace.gradients] == [External(0)]
    assert list(graph.leaves()) == [scale]


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
    merged(graph, lambda: net.step(torch.ones(4, 3)))
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

"""The history behind live outputs: what it reaches, its backward without going beyond the unit, who holds a tensor."""

import weakref
from typing import Any

import torch

from twofold.capture.history import (
    Watch,
    differentiate,
    example_tangents,
    fits_outputs,
    held_by_python,
    layout_of,
    reach,
)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


class Loud(torch.autograd.Function):
    """Says that its backward ran."""

    ran = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        Loud.ran += 1
        return gradients[0] * 2


def test_each_use_of_an_input_is_an_edge_latest_first():
    weight, bias = leaf(3), leaf(3)
    output = ((weight * weight) + bias) * weight
    reached = reach([output], [bias, weight])
    assert list(reached.edges.values()) == [1, 0, 1, 1]
    assert len(reached.nodes) == 3
    assert reached.foreign is None


def test_history_from_before_the_unit_is_a_boundary():
    weight = leaf(3)
    before = Loud.apply(weight)
    output = before.exp() * weight
    reached = reach([output], [before, weight])
    assert sorted(reached.edges.values()) == [0, 1]
    assert reached.foreign is None


def test_what_makes_history_foreign():
    weight, unknown = leaf(3), leaf(3)
    assert "leaf" in str(reach([weight * unknown], [weight]).foreign)
    assert "Loud" in str(reach([Loud.apply(weight)], [weight]).foreign)


def test_differentiate_stops_at_the_boundary_and_accumulates_nothing():
    weight = leaf(3)
    before = Loud.apply(weight)
    output = before.exp() * weight
    tangent = torch.randn(3)
    expected = torch.autograd.grad(output, [before], tangent, retain_graph=True)[0]
    Loud.ran = 0
    found = differentiate([output], [tangent], [before, weight])
    assert Loud.ran == 0
    assert weight.grad is None
    reached = reach([output], [before, weight])
    gradients = {reached.edges[edge]: gradient for edge, gradient in found.items()}
    torch.testing.assert_close(gradients[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], tangent * before.exp().detach(), rtol=0, atol=0)
    output.backward(tangent)  # the program's own backward still can
    assert Loud.ran == 1


def test_differentiate_gives_contributions_and_not_sums():
    weight = leaf(3)
    output = (weight * 2) + (weight * 3)
    found = list(differentiate([output], [torch.ones(3)], [weight]).values())
    assert [gradient.tolist() for gradient in found if gradient is not None] == [[3.0] * 3, [2.0] * 3]


def test_differentiate_some_of_the_outputs():
    left, right = leaf(3), leaf(3)
    outputs = [left.exp(), right.exp()]
    found = differentiate(outputs, [None, torch.ones(3)], [left, right])
    assert len(found) == 1


def test_layouts():
    outputs = [torch.zeros(2, 3), torch.zeros(4)]
    layout = layout_of([torch.ones(()).expand(2, 3), None])
    assert layout == ((0, 0), None)
    assert fits_outputs(layout, outputs)
    assert not fits_outputs(layout, outputs[:1])
    assert not fits_outputs(layout, outputs[::-1])
    first, second = example_tangents(((1, 2), None), outputs)
    assert second is None
    assert first is not None
    assert first.stride() == (1, 2)
    assert first.tolist() == [[1.0] * 3] * 2


def test_watch_hears_layout_and_create_graph():
    weight = leaf(3)
    outputs = [weight.exp(), weight * 2]
    watch = Watch(outputs)
    assert watch.layout is None
    outputs[1].sum().backward()
    assert watch.layout == (None, (0,))
    assert not watch.create_graph
    torch.autograd.grad(outputs[0].sum(), weight, create_graph=True)
    assert watch.create_graph


def test_who_holds_a_tensor():
    weight = leaf(3)

    def make(kept: bool, saved: bool) -> tuple[Any, ...]:
        hidden = weight * 2
        product = hidden * hidden if saved else hidden + 1
        return weakref.ref(hidden), product, hidden if kept else None

    for kept in (False, True):
        for saved in (False, True):
            reference, *_others = make(kept, saved)
            assert (held_by_python(reference) is not None) == kept, (kept, saved)

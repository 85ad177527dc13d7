"""The derivative of what a unit hands out, recorded while the unit still runs eagerly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import record
from twofold.capture.trace import Trace

WEIGHT = torch.ones(3, requires_grad=True)


def with_history(program: Callable[[], Any]) -> Trace:
    return record(program, with_history=True)


def test_each_use_of_an_input_has_a_gradient():
    trace = with_history(lambda: WEIGHT.exp() * WEIGHT)
    assert trace.refusal is None
    assert trace.history is not None
    assert trace.history.outputs == (1,)
    assert [trace.externals[index] is WEIGHT for index in trace.history.inputs] == [True, True]
    ((layout, backward),) = trace.history.backwards.items()
    assert layout == ((1,),)
    assert len(backward.gradients) == 2
    assert len(set(backward.gradients)) == 2
    made = {number for operation in backward.operations for number in operation.results}
    assert set(backward.gradients) <= made
    assert WEIGHT.grad is None


def test_its_operations_are_none_of_the_events():
    trace = with_history(lambda: WEIGHT.exp())
    assert trace.history is not None
    (backward,) = trace.history.backwards.values()
    forward = [str(operation.target) for event in trace.events for operation in event.operations]
    assert "aten.mul.Tensor" in [str(operation.target) for operation in backward.operations]
    assert "aten.mul.Tensor" not in forward


@pytest.mark.parametrize(
    "program",
    [lambda: WEIGHT.detach().exp(), lambda: WEIGHT.exp().sum().item(), lambda: WEIGHT.exp().sum().backward()],
    ids=["no history", "not held", "backward inside"],
)
def test_nothing_to_differentiate_later(program: Callable[[], Any]):
    trace = with_history(program)
    WEIGHT.grad = None
    assert trace.refusal is None
    assert trace.history is None


def test_history_from_before_the_unit_is_an_input():
    before = WEIGHT.exp()
    trace = with_history(lambda: before * 2)
    assert trace.history is not None
    assert [trace.externals[index] is before for index in trace.history.inputs] == [True]


def test_a_hook_on_such_an_input_is_refused():
    before = WEIGHT.exp()
    before.register_hook(lambda gradient: gradient)
    refusal = with_history(lambda: before * 2).refusal
    assert refusal is not None
    assert (refusal.code, refusal.reason.split(": ")[1]) == (
        "history_escapes",
        "a tensor that the unit is given has a gradient hook",
    )

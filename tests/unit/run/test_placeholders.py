"""Placeholders: what they show before their value is known, and that they become it."""

import weakref
from typing import Any

import pytest
import torch

from twofold.capture.match import Placeholders
from twofold.capture.trace import Made
from twofold.graph import TensorSpec
from twofold.run.placeholders import escaped, fill_placeholder, make_placeholder, recycle, with_freed_history

TENSORS = {
    "row-major": torch.ones(2, 3),
    "turned": torch.ones(2, 3).t(),
    "expanded": torch.ones(3).expand(2, 3),
    "whole numbers": torch.ones(4, dtype=torch.int64),
    "scalar": torch.ones(()),
    "empty": torch.ones(0, 3),
    "channels last": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def made(tensor: torch.Tensor, grad_function: str | None = None) -> Made:
    return Made(TensorSpec.of(tensor), tensor.is_leaf, grad_function)


@pytest.mark.parametrize("name", TENSORS)
def test_metadata_is_true_and_there_is_no_memory(name: str):
    tensor = TENSORS[name]
    known: Placeholders = {}
    placeholder = make_placeholder(made(tensor), known)
    assert placeholder.shape == tensor.shape
    assert placeholder.stride() == tensor.stride()
    assert (placeholder.dtype, placeholder.device) == (tensor.dtype, tensor.device)
    assert placeholder.is_contiguous() == tensor.is_contiguous()
    assert placeholder.untyped_storage().nbytes() == 0
    assert known[id(placeholder)][0] is placeholder


def test_filling_keeps_the_object():
    known: Placeholders = {}
    placeholder = make_placeholder(made(torch.ones(3)), known)
    identity = id(placeholder)
    value = torch.arange(3.0)
    memory = value.data_ptr()
    described = fill_placeholder(placeholder, value, known)
    assert described.spec.shape == (3,)
    assert known == {}
    assert id(placeholder) == identity
    assert torch.equal(placeholder, torch.arange(3.0))
    assert placeholder.data_ptr() == memory
    assert placeholder + 1 is not None


def test_filling_keeps_weak_references():
    known: Placeholders = {}
    placeholder = make_placeholder(made(torch.ones(3)), known)
    reference = weakref.ref(placeholder)
    fill_placeholder(placeholder, torch.arange(3.0), known)
    assert reference() is placeholder


def test_filling_keeps_a_live_history():
    weight = torch.ones(3, requires_grad=True)
    known: Placeholders = {}
    placeholder = make_placeholder(made(weight * 2, "MulBackward0"), known)
    fill_placeholder(placeholder, weight * 2, known)
    assert type(placeholder.grad_fn).__name__ == "MulBackward0"
    placeholder.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_the_object_used_up_serves_again():
    known: Placeholders = {}
    placeholder = make_placeholder(made(torch.ones(3)), known)
    value = torch.arange(3.0)
    described = fill_placeholder(placeholder, value, known)
    again = recycle(value, described, known)
    assert again is value
    assert again.untyped_storage().nbytes() == 0
    assert known[id(again)][0] is again
    assert recycle(torch.ones(3), described, known) is None


# ---- history that was freed ------------------------------------------------------------------------------------


def backward_error(tensor: torch.Tensor) -> str:
    with pytest.raises(RuntimeError) as raised:
        tensor.sum().backward()
    return str(raised.value)


def test_freed_history_is_eagers():
    weight = torch.ones(3, requires_grad=True)
    eager = weight.exp()
    eager.sum().backward()
    ours = with_freed_history(torch.full((3,), 2.0), "ExpBackward0")
    assert ours.requires_grad
    assert not ours.is_leaf
    assert type(ours.grad_fn).__name__ == type(eager.grad_fn).__name__
    assert backward_error(ours) == backward_error(eager)
    assert torch.equal(ours.detach(), torch.full((3,), 2.0))


def test_freed_history_is_made_in_any_mode_and_shares_memory():
    value = torch.ones(3)
    with torch.no_grad():
        ours = with_freed_history(value, "AddBackward0")
    assert ours.requires_grad
    assert ours.data_ptr() == value.data_ptr()


def test_a_result_of_freed_history_has_freed_history():
    ours = with_freed_history(torch.ones(3), "ExpBackward0")
    assert "second time" in backward_error(ours * 2)


# ---- who still holds a placeholder -----------------------------------------------------------------------------


def skeleton(count: int) -> tuple[list[torch.Tensor], Placeholders, list[torch.Tensor | None]]:
    """Placeholders as the skeleton has them: in its node's list, in the table, and in the unit's list."""
    known: Placeholders = {}
    nodes: list[torch.Tensor | None] = [make_placeholder(made(torch.ones(3)), known) for _ in range(count)]
    return [node for node in nodes if node is not None], known, nodes


def test_what_nobody_holds_has_not_escaped():
    slots, _known, _nodes = skeleton(3)
    assert escaped(slots) == []


def test_what_python_holds_has_escaped():
    slots, _known, _nodes = skeleton(4)
    held: dict[str, Any] = {"loss": slots[1]}
    listed = [slots[3]]
    assert escaped(slots) == [1, 3]
    held.clear()
    assert escaped(slots) == [3]
    listed.pop()
    assert escaped(slots) == []


def test_what_has_attributes_has_escaped():
    slots, _known, _nodes = skeleton(2)
    slots[0].note = "mine"  # type: ignore[attr-defined]
    assert escaped(slots) == [0]


def test_a_closure_holds_too():
    slots, _known, _nodes = skeleton(2)

    def closing(tensor: torch.Tensor) -> Any:
        return lambda: tensor

    kept = closing(slots[1])
    assert escaped(slots) == [1]
    del kept
    assert escaped(slots) == []

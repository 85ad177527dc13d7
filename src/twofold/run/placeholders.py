"""Placeholders: tensor objects that stand for results Python does not have yet.

A placeholder has the dtype, shape, strides and device of what it stands for, and no memory. When its value is
known, the object itself becomes the real tensor: PyTorch can swap what is behind two tensor objects, and a
placeholder was never saved by autograd nor viewed, because no operation ever ran on it.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from twofold.capture.match import Placeholders
from twofold.capture.placeholders import make_placeholder
from twofold.capture.trace import Made
from twofold.graph import TensorSpec

__all__ = ["escaped", "fill_placeholder", "make_placeholder", "recycle", "with_freed_history"]


def fill_placeholder(placeholder: torch.Tensor, value: torch.Tensor, known: Placeholders) -> Made:
    """Turn a placeholder object into `value`, whose own object is used up; return what it stood for."""
    _, made = known.pop(id(placeholder))
    torch._C._swap_tensor_impl(placeholder, value)  # type: ignore[attr-defined]
    return made


def recycle(used_up: torch.Tensor, made: Made, known: Placeholders) -> torch.Tensor | None:
    """Return the object that `fill_placeholder` used up as a new placeholder; None if it cannot serve as one."""
    if used_up.requires_grad or used_up.untyped_storage().nbytes() != 0:
        return None
    known[id(used_up)] = used_up, made
    return used_up


FREED_MESSAGE = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already "
    "been freed). Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). "
    "Specify retain_graph=True if you need to backward through the graph a second time or if you need to access "
    "saved tensors after calling backward."
)


@functools.cache
def _freed_history(name: str) -> Any:
    """Return `apply` of an autograd function whose node has eager's name and, like eager's, nothing to differentiate.

    PyTorch's own, without the Python around it, which looks for what is not there: defaults, `setup_context`.
    """

    class Freed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: list[torch.Tensor], _leaf: torch.Tensor) -> torch.Tensor:
            return hidden[0]  # of an input it would make a view, which the program could not change in place

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(FREED_MESSAGE)

    Freed._backward_cls.__name__ = name  # type: ignore[attr-defined]
    return super(torch.autograd.Function, Freed).apply  # type: ignore[misc]


@functools.cache
def _leaf() -> torch.Tensor:
    return torch.zeros((), requires_grad=True)


def with_freed_history(value: torch.Tensor, name: str) -> torch.Tensor:
    """Make of `value` a tensor that requires a gradient and whose graph was freed, as after `backward()`.

    Its object is used up, and returned.
    """
    if torch.is_grad_enabled():
        return _freed_history(name)([value], _leaf())
    with torch.enable_grad():
        return _freed_history(name)([value], _leaf())


def _reference_counts(tensors: list[torch.Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


def _calibrate() -> int:
    held = torch.empty(0)
    known: Placeholders = {id(held): (held, Made(TensorSpec.of(held), True, None))}
    listed = [known[id(held)][0]]
    return _reference_counts(listed)[0]


UNKNOWN_TO_PYTHON = _calibrate()
"""References to a placeholder while only the skeleton knows it: from its node, the table and the unit's list."""


def escaped(placeholders: list[torch.Tensor]) -> list[int]:
    """Return the indices of the placeholders that Python still holds, or has put attributes on."""
    counts = _reference_counts(placeholders)
    return [index for index, count in enumerate(counts) if count > UNKNOWN_TO_PYTHON or placeholders[index].__dict__]

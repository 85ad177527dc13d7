"""What differentiated graphs call: the entry to a straight-line region, its derivative, and what is kept for it.

A region is differentiated by PyTorch itself. What it reads enters as leaves of autograd, its nodes run as they
are, and `pullback` asks autograd for the derivative of exactly these nodes. So formulas, views and autocast are
eager's own, unknown shapes and host values need nothing, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from twofold.errors import DifferentiationError


class Residuals(tuple[Any, ...]):
    """What the forward graph keeps for its backward graph. No pytree: its depth is that of the recursion."""

    __slots__ = ()


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as a leaf of autograd, cut from the history that it came with."""
    return tensor.detach().requires_grad_()


def constant(thing: Any, name: str) -> Any:
    """Return an object that no gradient flows through, as it is.

    Raises `DifferentiationError` if it holds a tensor with autograd history, which would be lost.
    """
    if any(isinstance(held, torch.Tensor) and held.requires_grad for held in pytree.tree_leaves(thing)):
        raise DifferentiationError(
            f"the object %{name} holds a tensor whose gradient would be lost where it enters a body or leaves"
            " one: pass the tensor as a value of its own"
        )
    return thing


def pullback(
    outputs: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the gradient of each leaf of a region, given those of its outputs; zeros where there is none.

    May be called again on the same region.
    """
    reached = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not reached:
        return tuple(torch.zeros_like(entered) for entered in leaves)
    ends, given = zip(*reached, strict=True)
    return torch.autograd.grad(ends, tuple(leaves), given, retain_graph=True, materialize_grads=True)

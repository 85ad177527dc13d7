"""Python numbers that change: calls that may take theirs as a tensor, with no bit of difference.

An annealed loss weight is another constant in every unit, so each unit would be a path of its own. Elementwise
arithmetic computes the same from a 0-dimensional tensor of the operand's dtype and device as from the number:
PyTorch converts a number to that dtype before it computes, and such a tensor promotes nothing. Then the number is
fed. Backward follows by itself, since it is recorded with the tensor in it.

Left out, because the bits or the name of the autograd node would differ: float16 and bfloat16 (a number is not
rounded to them), `number - tensor` and `**`, and on CUDA division by a number (it multiplies by the reciprocal).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from twofold.graph import TensorSpec

from .trace import Event

_DIVISIONS: Final[frozenset[Any]] = frozenset(
    getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("div", "divide", "true_divide")
) | {torch.Tensor.div_, torch.Tensor.divide_, torch.Tensor.true_divide_}
ARITHMETIC: Final[frozenset[Any]] = _DIVISIONS | {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("add", "sub", "subtract", "mul", "multiply", "lt", "le", "gt", "ge", "eq", "ne")
} | {
    torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.subtract_, torch.Tensor.mul_, torch.Tensor.multiply_,
    torch.Tensor.__eq__, torch.Tensor.__ne__, torch.Tensor.__rdiv__,
}  # fmt: skip
"""Functions of a tensor and a number that do the same with a tensor in the number's place."""

_EXACT_IN_FLOAT64: Final = 2**53


def is_number(value: Any) -> bool:
    """Whether PyTorch takes a value for a real number in arithmetic; truth values are left out."""
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def fits(value: Any, dtype: torch.dtype) -> bool:
    """Whether a Python value may be fed as a tensor of `dtype`."""
    if not is_number(value):
        return False
    whole = int(value) if isinstance(value, int | np.integer) else None
    if dtype is torch.int64:
        return whole is not None and -(2**63) <= whole < 2**63
    return dtype in (torch.float32, torch.float64) and (whole is None or abs(whole) <= _EXACT_IN_FLOAT64)


def number_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a number that fits as a tensor of shape []. Waits for no device."""
    whole = dtype is torch.int64
    return torch.tensor(int(value) if whole else float(value), dtype=dtype).to(device, non_blocking=True)


def number_as_tensor(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor | None:
    """Return the tensor that may stand for the second argument of a call; None if it must stay what it is."""
    if function not in ARITHMETIC or len(arguments) != 2 or keywords:
        return None
    operand, number = arguments
    if not isinstance(operand, torch.Tensor) or not _may_be_fed(function, number, operand.dtype, operand.device):
        return None
    return number_tensor(number, operand.dtype, operand.device)


def _may_be_fed(function: Any, number: Any, dtype: torch.dtype, device: torch.device) -> bool:
    is_left_out = device.type == "cuda" and function in _DIVISIONS
    return fits(number, dtype) and device.type in ("cpu", "cuda") and not is_left_out


def is_feedable(event: Event, specs: Sequence[TensorSpec]) -> bool:
    """Whether the number of recorded arithmetic may be fed; `specs` are those of its trace."""
    operand = next((specs[index] for operation in event.operations for index in operation.reads()), None)
    return operand is not None and _may_be_fed(event.function, event.arguments[1], operand.dtype, operand.device)


def differ_in_number(left: Event, right: Event) -> bool:
    """Whether two events are one call of arithmetic with different numbers."""
    return (
        left.function == right.function
        and left.function in ARITHMETIC
        and left.origin == right.origin
        and left.ambient == right.ambient
        and len(left.arguments) == len(right.arguments) == 2
        and not left.keywords
        and not right.keywords
        and is_number(left.arguments[1])
        and is_number(right.arguments[1])
        and left.arguments[0] == right.arguments[0]
        and repr(left.arguments[1]) != repr(right.arguments[1])
    )

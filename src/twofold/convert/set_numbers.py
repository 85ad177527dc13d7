"""Numbers that `x[i] = number` hands to a device: PyTorch makes a tensor of the number, on the CPU wherever `x` is.

A graph of the device cannot read it there, but as the number is a constant of the path, it can be made on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from twofold.capture.trace import Event, Number, Operation, Trace, map_leaves, numbers_in
from twofold.graph import Ambient, Node, Value

aten: Any = torch.ops.aten

_VALUE_AT = {aten.fill_.Tensor: 1, aten.copy_.default: 1, aten.index_put_.default: 2}
"""The operations that write such a tensor, each with its position among the arguments."""


def number_on_device(event: Event, operation: Operation, trace: Trace, name: str) -> tuple[Node, Operation] | None:
    """Return a node that makes such a tensor on the device, and the operation that reads that one.

    None if the operation writes none. `name` is the value's, behind the number of the tensor on the CPU.
    """
    number = _set_number(event, operation, trace)
    if number is None:
        return None
    spec = replace(trace.specs[number], device=trace.specs[operation.arguments[0].index].device)
    value = Value(f"{number}_{name}", spec)
    arguments = ([], trace.hidden[number].item())
    keywords = (("dtype", spec.dtype), ("device", spec.device))
    node = Node("call", aten.full.default, arguments, keywords, (value,), origin=event.origin, ambient=Ambient(False))
    given = map_leaves(operation.arguments, Number, lambda n: value if n.index == number else n)
    return node, replace(operation, arguments=given)


def _set_number(event: Event, operation: Operation, trace: Trace) -> int | None:
    """Return the value number of such a tensor.

    A write through a mask is left out: with the number on the device, PyTorch would have to count what it selects.
    """
    position = _VALUE_AT.get(operation.target)
    if event.function is not torch.Tensor.__setitem__ or position is None:
        return None
    if not isinstance(event.arguments[2], bool | int | float | complex):
        return None
    target, value = operation.arguments[0], operation.arguments[position]
    if not isinstance(value, Number) or value.index not in trace.hidden:
        return None
    indices = list(numbers_in(operation.arguments[1])) if position == 2 else []
    if any(trace.specs[index].dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    spec = trace.specs[value.index]
    if spec.shape or spec.device.type != "cpu" or trace.specs[target.index].device.type == "cpu":
        return None
    return value.index

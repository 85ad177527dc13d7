"""What a graph needs so that its outputs can be differentiated outside the unit.

The recorded backwards are segments after those of the unit itself, launched only if the program asks: the same
operations as eager's, on what the forward segments kept. What those segments read of the forward are its residuals.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from twofold.capture.history import Layout
from twofold.graph import Value

from .segments import Segment


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """One way in which a backward may come: the segment, the tangent of each output, the gradient of each input."""

    segment: int
    tangents: tuple[Value | None, ...]
    gradients: tuple[Value | None, ...]


@dataclass(frozen=True, eq=False)
class HistoryPlan:
    """The history that a unit hands out: from `outputs` (slots) back to `inputs` (externals)."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    externals: tuple[torch.Tensor | None, ...]
    """The tensors that the unit is given, None for feeds."""
    residuals: tuple[Value, ...]
    backwards: dict[Layout, BackwardPlan]


def residuals_of(
    segments: Sequence[Segment], plans: Collection[BackwardPlan], unchecked: Collection[Value]
) -> tuple[Value, ...]:
    """Return what the segments of some backwards read, tangents left out.

    `unchecked` are left out too: running statistics, which batch norm is given again in backward and which may
    change in between without autograd's taking offence.
    """
    read = {value: None for plan in plans for value in segments[plan.segment].inputs}
    tangents = {tangent for plan in plans for tangent in plan.tangents}
    return tuple(value for value in read if value not in tangents and value not in unchecked)

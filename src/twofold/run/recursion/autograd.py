"""A run of a batch as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twofold.run.placeholders import FREED_MESSAGE

from .requests import Exits


class Computation(Protocol):
    """A batch as it can be computed: a `Run`, or one that was captured. What it returns belongs to the caller."""

    def forward(self) -> list[Tensor]:
        """Compute all invocations; return the results that leave, rows for each `Leaving`."""
        ...

    def backward(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradient of each parameter, by id, from those of the results that left."""
        ...

    def host_gradient(self, group: int, host: int) -> Tensor | None:
        """Return the gradient of a column of host tensors, behind `backward`."""
        ...


class Recursion(torch.autograd.Function):
    """Tensors given: the parameters, then those columns of host values that require a gradient."""

    @staticmethod
    def forward(ctx: Any, run: Computation, exits: Exits, places: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.places, ctx.exits = run, places, exits
        ctx.save_for_backward(*tensors[: len(tensors) - len(places)])
        ctx.set_materialize_grads(False)
        outputs = exits.outputs(run.forward())
        flags = zip(outputs, exits.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, differentiable in flags if not differentiable))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.run is None:
            raise RuntimeError(FREED_MESSAGE)
        parameters = ctx.saved_tensors
        run: Computation = ctx.run
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            ctx.run = None
        found = run.backward(ctx.exits.gradients(gradients))
        columns = [run.host_gradient(group, index) for group, index in ctx.places]
        return None, None, None, *(found.get(id(parameter)) for parameter in parameters), *columns


def differentiable_run(
    run: Computation,
    exits: Exits,
    parameters: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor]],
    differentiate: bool,
) -> Sequence[Tensor]:
    """Run a batch; the tensors returned carry autograd history if `differentiate`."""
    if not differentiate:
        with torch.no_grad():
            return exits.outputs(run.forward())
    places = [(g, i) for g, held in enumerate(columns) for i, column in enumerate(held) if column.requires_grad]
    sources = [columns[group][index] for group, index in places]
    return Recursion.apply(run, exits, places, *parameters, *sources)  # type: ignore[no-any-return]

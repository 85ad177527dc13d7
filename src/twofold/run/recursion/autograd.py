"""A run of a batch as one node of autograd's graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twofold.run.placeholders import FREED_MESSAGE

from .execute import Request, Run


@dataclass(frozen=True)
class Bundles:
    """What leaves a batch, and as how many tensors: of `sizes[i]` requests, one with a row each; for None, of one."""

    requests: Sequence[Request]
    sizes: Sequence[int | None]

    @classmethod
    def singly(cls, requests: Sequence[Request]) -> Bundles:
        """Have each request be a tensor of its own."""
        return cls(requests, [None] * len(requests))

    def tied(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that leave from those of the requests."""
        rest = iter(tensors)
        return [next(rest) if size is None else torch.stack(list(itertools.islice(rest, size))) for size in self.sizes]

    def untied(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the requested tensors from those of the tensors that left."""
        found: list[Tensor | None] = []
        for size, gradient in zip(self.sizes, gradients, strict=True):
            if size is None:
                found.append(gradient)
            else:
                found.extend([None] * size if gradient is None else gradient.unbind())
        return found


class Recursion(torch.autograd.Function):
    """Tensors given: the parameters, then those columns of host values that require a gradient."""

    @staticmethod
    def forward(ctx: Any, run: Run, bundles: Bundles, places: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.places, ctx.bundles = run, places, bundles
        ctx.save_for_backward(*tensors[: len(tensors) - len(places)])
        ctx.set_materialize_grads(False)
        outputs = bundles.tied(run.forward(bundles.requests))
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.run is None:
            raise RuntimeError(FREED_MESSAGE)
        parameters = ctx.saved_tensors
        run: Run = ctx.run
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            ctx.run = None
        found = run.backward(ctx.bundles.untied(gradients))
        columns = [run.host_gradient(group, index) for group, index in ctx.places]
        return None, None, None, *(found.get(id(parameter)) for parameter in parameters), *columns


def differentiable_run(
    run: Run,
    bundles: Bundles,
    parameters: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor]],
    differentiate: bool,
) -> Sequence[Tensor]:
    """Run a batch; the tensors returned carry autograd history if `differentiate`."""
    if not differentiate:
        with torch.no_grad():
            return bundles.tied(run.forward(bundles.requests))
    places = [(g, i) for g, held in enumerate(columns) for i, column in enumerate(held) if column.requires_grad]
    sources = [columns[group][index] for group, index in places]
    return Recursion.apply(run, bundles, places, *parameters, *sources)  # type: ignore[no-any-return]

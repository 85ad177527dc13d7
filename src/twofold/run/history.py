"""The history of what a unit hands out: one autograd node whose backward runs a segment of the unit's graph.

What the segment reads is saved with autograd, so that freeing, `retain_graph` and the check for tensors changed in
place are PyTorch's own, and gradients accumulate, and hooks run, where they always do. A backward that no segment
was made for (other outputs, other strides of their tangents, `create_graph`) runs the unit's calls again, eagerly,
from the state in which the unit began.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from twofold.capture.history import Layout, layout_of
from twofold.capture.intercept import unheard
from twofold.capture.trace import External, Slot, leaves, map_leaves
from twofold.capture.trace_graph import Path
from twofold.convert.histories import HistoryPlan
from twofold.graph import ambient_context

from .graph_runner import GraphRunner, RandomState

_TENSOR = torch.Tensor

CHANGED = (
    "Twofold cannot differentiate this output of a graph: the way of this backward is new, so that the forward has to"
    " run again, but a tensor that it reads was changed in place since. Decorate the whole training step, or run with"
    " TWOFOLD_ENGINE=eager."
)


class History:
    """The backward of one unit, as far as it may come. Holds no computed value: autograd does."""

    def __init__(self, path: Path, run: GraphRunner, unknown: Callable[[Path, Layout | None], None]) -> None:
        """`run` has launched the unit. `unknown` is told of a layout that has no segment; None: `create_graph`."""
        assert run.program.history is not None
        self.plan: HistoryPlan = run.program.history
        self._path = path
        self._unknown = unknown
        self._installed = run.installed
        self._given = run.given_externals()
        self._before, self._random = run.state_before()
        kept = [tensor for value, tensor in run.program.statics.items() if value not in self._before]
        read = [*kept, *(given for given in self._given.values() if isinstance(given, _TENSOR))]
        self._versions = [(tensor, tensor._version) for tensor in read if not tensor.is_inference()]

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that gradients are for, each as often as the unit uses it."""
        return [self._external(index) for index in self.plan.inputs]

    def _external(self, index: int) -> Any:
        tensor = self.plan.externals[index]
        return self._given[index] if tensor is None else tensor

    # ---- by the graph ------------------------------------------------------------------------------------

    def backward(self, saved: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None]) -> Sequence[Any]:
        """Return the gradient of each input; `saved` are the residuals."""
        plain = all(tangent is None or tangent.layout is torch.strided for tangent in tangents)
        layout = layout_of(tangents) if plain else None
        plan = None if layout is None else self.plan.backwards.get(layout)
        if plan is None or torch.is_grad_enabled():
            gradients = self._again(tangents)
            self._unknown(self._path, None if torch.is_grad_enabled() else layout)
            return gradients
        environment = dict(self._installed.statics)
        environment.update((value, tensor.detach()) for value, tensor in zip(self.plan.residuals, saved, strict=True))
        for value, tangent in zip(plan.tangents, tangents, strict=True):
            if value is not None and tangent is not None:
                environment[value] = tangent.detach()
        with unheard(), torch.no_grad():
            self._installed.executable.launch(plan.segment, environment)
            return [None if v is None else self._installed.value(v, environment) for v in plan.gradients]

    # ---- eagerly -----------------------------------------------------------------------------------------

    def _again(self, tangents: Sequence[torch.Tensor | None]) -> Sequence[Any]:
        """Differentiate a second, eager run of the unit's calls."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(CHANGED)
        further = torch.is_grad_enabled()
        with unheard(), torch.enable_grad():
            # Aliases: hooks on the inputs themselves run where autograd goes on from here.
            aliases = {index: self._external(index).view_as(self._external(index)) for index in self.plan.inputs}
            with self._random_before():
                slots = self._call_again({**self._written_before(), **aliases})
            pairs = [(slots[s], t) for s, t in zip(self.plan.outputs, tangents, strict=True) if t is not None]
            outputs, seeds = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, list(aliases.values()), seeds, create_graph=further, allow_unused=True)
        sums = dict(zip(aliases, found, strict=True))
        return [sums.pop(index, None) for index in self.plan.inputs]

    def _written_before(self) -> dict[int, torch.Tensor]:
        """Return copies of what the unit wrote to, by external, as it was before: they are written to instead."""
        statics = {id(self._installed.program.statics[value]): copy for value, copy in self._before.items()}
        externals = range(len(self.plan.externals))
        return {i: statics[id(t)].clone() for i in externals if id(t := self._external(i)) in statics}

    def _call_again(self, externals: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        slots: dict[int, torch.Tensor] = {}

        def resolve(reference: Slot | External) -> Any:
            if isinstance(reference, Slot):
                return slots[reference.index]
            return externals[reference.index] if reference.index in externals else self._external(reference.index)

        for node in self._path.nodes:
            event = node.event
            if event is None or event.kind != "call":
                continue
            arguments, keywords = map_leaves((event.arguments, event.keywords), (Slot, External), resolve)
            with ambient_context(event.ambient):
                result = event.function(*arguments, **keywords)
            made: list[Any] = leaves(result, _TENSOR)
            for reference, tensor in zip(leaves(event.outcome, (Slot, External)), made, strict=True):
                if isinstance(reference, Slot):
                    slots[reference.index] = tensor
        return slots

    @contextmanager
    def _random_before(self) -> Generator[None]:
        """Go back to the random generators as they were when the unit began, and return."""
        now = None if self._random is None else RandomState.take(self._random.cpu is None)
        try:
            if self._random is not None:
                self._random.restore()
            yield
        finally:
            if now is not None:
                now.restore()


@functools.cache
def _node(name: str) -> Any:
    """Return an autograd function whose node has eager's name."""

    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, history: History, residuals: list[Any], outputs: list[Any], *_inputs: Any
        ) -> tuple[Any, ...]:
            ctx.set_materialize_grads(False)
            ctx.history = history
            ctx.save_for_backward(*residuals)
            return tuple(outputs)

        @staticmethod
        def backward(ctx: Any, *tangents: Any) -> Any:
            saved = ctx.saved_tensors if ctx.history.plan.residuals else ()
            return None, None, None, *ctx.history.backward(saved, tangents)

    Outside._backward_cls.__name__ = name  # type: ignore[attr-defined]
    return Outside


@functools.cache
def _renaming(name: str) -> Any:
    """Return an autograd function that does nothing but show eager's name on one of several outputs."""

    class Renamed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
            ctx.set_materialize_grads(False)
            return output.detach()

        @staticmethod
        def backward(ctx: Any, *tangents: Any) -> Any:
            return tangents[0]

    Renamed._backward_cls.__name__ = name  # type: ignore[attr-defined]
    return Renamed


def with_history(
    history: History, run: GraphRunner, outputs: list[torch.Tensor], names: list[str]
) -> list[torch.Tensor]:
    """Return `outputs` as tensors that can be differentiated; `names` are those of their autograd nodes in eager."""
    residuals = [run.residual(value) for value in history.plan.residuals]
    with torch.enable_grad():
        made = _node(names[0]).apply(history, residuals, outputs, *history.inputs())
        if len(set(names)) == 1:
            return list(made)
        return [_renaming(name).apply(output) for name, output in zip(names, made, strict=True)]

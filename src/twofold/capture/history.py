"""The history of what outlives a unit: which inputs a later backward would reach, and by which operations.

A forward-only unit hands out tensors that the program differentiates later. Its derivative is recorded like all
else, from one real run over the history that eager execution made, with tangents of ones and the history retained.
Nothing accumulates, so the program cannot tell.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Layout = tuple[tuple[int, ...] | None, ...]
"""How a backward reaches the live outputs of a unit: the strides of each one's tangent, None for an unused output.
Both choose which operations eager execution would run."""


Edge = tuple[Any, int]
"""An autograd node and the position of one of its gradients."""


class Reach(NamedTuple):
    """What lies behind live outputs."""

    nodes: set[Any]
    """The autograd nodes that the unit made."""
    edges: dict[Edge, int]
    """Where they hand a gradient on to a tensor that the unit was given (its position among the external tensors),
    in the order in which PyTorch's engine gets to them."""
    foreign: str | None
    """What makes the history other than that of the unit's own operations, if anything does."""


def reach(outputs: Sequence[torch.Tensor], externals: Sequence[torch.Tensor]) -> Reach:
    """Walk the history of `outputs` back to the tensors that the unit was given."""
    given = {(t.grad_fn, t.output_nr): i for i, t in enumerate(externals) if t.grad_fn is not None}
    leaves = {id(t): i for i, t in enumerate(externals) if t.is_leaf and t.requires_grad}
    outside = {function for function, _ in given}
    pending: list[Any] = list(dict.fromkeys(output.grad_fn for output in outputs))
    nodes = set(pending)
    edges: dict[Edge, int] = {}
    foreign = None
    while pending:
        function = pending.pop()
        if function in outside:
            foreign = "it goes on into history made before the unit"
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            foreign = f"{type(function).__name__} runs Python in it"
        for position, following in enumerate(function.next_functions):
            if following[0] is None:
                continue
            variable = getattr(following[0], "variable", None)
            index = given.get(following) if variable is None else leaves.get(id(variable))
            if index is not None:
                edges[function, position] = index
            elif variable is not None:
                foreign = "it reaches a leaf that the unit was not given"
            elif following[0] not in nodes:
                nodes.add(following[0])
                pending.append(following[0])
    latest_first = sorted(edges, key=lambda edge: (-edge[0]._sequence_nr(), edge[1]))
    return Reach(nodes, {edge: edges[edge] for edge in latest_first}, foreign)


class _Done(Exception):
    """All nodes of the unit have run: the engine shall not go on into history from before it."""


def differentiate(
    outputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None], externals: Sequence[torch.Tensor]
) -> dict[Edge, torch.Tensor | None]:
    """Run the backward of the unit's own nodes; return what they hand on at each edge. Accumulates nothing.

    One gradient an edge and not their sums: where a tensor is used again outside the unit, PyTorch's engine adds
    them up one by one, and the order of additions is in the bits of the result.
    """
    used, seeds = zip(*[(o, t) for o, t in zip(outputs, tangents, strict=True) if t is not None], strict=True)
    reached = reach(used, externals)
    waiting = set(reached.nodes)
    found: dict[Edge, torch.Tensor | None] = dict.fromkeys(reached.edges)

    def note(node: Any, gradients: tuple[torch.Tensor | None, ...], _arrived: Any) -> None:
        found.update(((node, i), g) for i, g in enumerate(gradients) if (node, i) in found)
        waiting.discard(node)
        if not waiting:
            raise _Done

    handles = [node.register_hook(functools.partial(note, node)) for node in reached.nodes]
    try:
        inputs = [externals[index] for index in dict.fromkeys(reached.edges.values())]
        torch.autograd.grad(used, inputs, seeds, retain_graph=True, create_graph=False, allow_unused=True)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class Watch:
    """Hears how a backward reaches the live outputs of a unit that ran eagerly."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.create_graph = False
        """Whether a backward that made history of its own came by."""
        self._strides: list[tuple[int, ...] | None] = [None] * len(outputs)
        for position, output in enumerate(outputs):
            node: Any = output.grad_fn
            node.register_prehook(functools.partial(self._hear, position, output.output_nr))

    def _hear(self, position: int, number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        self.create_graph = self.create_graph or torch.is_grad_enabled()
        gradient = gradients[number]
        if gradient is not None and gradient.layout is torch.strided:
            self._strides[position] = gradient.stride()

    @property
    def layout(self) -> Layout | None:
        """How it came; None if it did not."""
        return tuple(self._strides) if any(strides is not None for strides in self._strides) else None


def layout_of(tangents: Sequence[torch.Tensor | None]) -> Layout:
    """Describe the tangents that reached a unit's outputs."""
    return tuple(None if tangent is None else tangent.stride() for tangent in tangents)


def fits_outputs(layout: Layout, outputs: Sequence[torch.Tensor]) -> bool:
    """Whether tangents of such a layout can reach `outputs`."""
    return len(layout) == len(outputs) and all(
        strides is None or len(strides) == output.dim() for strides, output in zip(layout, outputs, strict=True)
    )


def example_tangents(layout: Layout, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return tangents of ones in a layout."""
    return [
        None if strides is None else _ones(output, strides) for strides, output in zip(layout, outputs, strict=True)
    ]


def _ones(output: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    last = sum((size - 1) * stride for size, stride in zip(output.shape, strides, strict=True))
    memory = torch.ones(max(last, 0) + 1, dtype=output.dtype, device=output.device)
    return memory.as_strided(output.shape, strides)


def following_nodes(node: Any) -> list[Any]:
    """Return the autograd nodes that a node hands gradients on to."""
    return [following for following, _ in node.next_functions if following is not None]


@functools.cache
def saves_tensors(kind: type) -> bool:
    """Whether autograd nodes of a type save tensors for backward."""
    return any(name.startswith("_raw_saved_") for name in dir(kind))


def held_by_python(reference: weakref.ref[torch.Tensor]) -> torch.Tensor | None:
    """Return a tensor if the program holds it, and None if it is gone or kept by autograd alone.

    A tensor that PyTorch's own code refers to keeps its Python object alive by one more reference.
    """
    tensor = reference()
    return tensor if tensor is not None and _references(tensor) > _UNHELD else None


_use_count = getattr(torch.Tensor, "_use_count", None)


def _references(tensor: torch.Tensor) -> int:
    return sys.getrefcount(tensor) - (_use_count is not None and _use_count(tensor) > 1)


def _calibrate() -> int:
    """Count on a tensor that only autograd holds; 0, so that all count as held, where PyTorch does not tell."""

    def make() -> list[torch.Tensor]:
        saved = torch.ones((), requires_grad=True) * 1
        return [saved, saved * saved]

    def count(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else _references(tensor)

    kept = make()
    reference = weakref.ref(kept[0])
    held = count(reference())
    kept[0] = kept[1]
    unheld = count(reference())
    return unheld if held > unheld else 0


_UNHELD = _calibrate()

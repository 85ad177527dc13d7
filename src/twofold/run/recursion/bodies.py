"""Straight-line bodies on values: one operation after the other."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twofold.convert.from_source import line_of
from twofold.graph import Constant, Node, SubGraph, Value, count_reads, evaluate


def run_body(body: SubGraph, values: Sequence[Any], targets: Mapping[Any, Any]) -> list[Any]:
    """Run straight-line code on values of its inputs; `targets` are calls to be replaced.

    What an operation raises carries the user's line as a note.
    """
    environment: dict[Value, Any] = dict(zip(body.inputs, values, strict=True))
    grad = torch.is_grad_enabled()
    for node in body.nodes:
        try:
            if grad and not node.ambient.grad:
                with torch.no_grad():
                    environment[node.results[0]] = _run_node(node, environment, targets)
            else:
                environment[node.results[0]] = _run_node(node, environment, targets)
        except Exception as error:
            if node.origin is not None:
                error.add_note(f"in {node.origin.function}, {node.origin}: {line_of(node.origin).strip()}")
            raise
    return [evaluate(output, environment) for output in body.outputs]


def _run_node(node: Node, environment: Mapping[Value, Any], targets: Mapping[Any, Any]) -> Any:
    arguments = [evaluate(argument, environment) for argument in node.arguments]
    if node.op == "get_attr":
        return getattr(*arguments)
    if node.op == "get_item":
        return arguments[0][arguments[1]]
    keywords = {name: evaluate(argument, environment) for name, argument in node.keywords}
    target: Any = targets.get(node.target, node.target)
    return target(*arguments, **keywords)


def without_writes(body: SubGraph) -> SubGraph:
    """Return a body in which `a += b` on a tensor that nothing else sees is `a + b`."""
    reads = count_reads(body)
    fresh: set[Value] = set()
    nodes: list[Node] = []
    for node in body.nodes:
        plain = _OUT_OF_PLACE.get(node.target)
        if plain is not None and node.arguments[0] in fresh and reads[node.arguments[0]] == 1:  # type: ignore[index]
            node = replace(node, target=plain)
        if node.target in _FRESH:
            fresh.update(node.results)
        nodes.append(node)
    return replace(body, nodes=tuple(nodes))


_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_FRESH: frozenset[Any] = frozenset(
    {*_OUT_OF_PLACE.values(), torch.zeros, torch.ones, torch.zeros_like, torch.ones_like}
)


def tensors_of(body: SubGraph) -> list[Tensor]:
    """Return the tensors from outside that a body computes with, those of modules included."""
    arguments = [argument for node in body.nodes for argument in (*node.arguments, *(a for _, a in node.keywords))]
    found: dict[int, Tensor] = {}
    for constant in (c for argument in (*arguments, *body.outputs) for c in _constants(argument)):
        held = constant.object
        tensors = held.parameters() if isinstance(held, torch.nn.Module) else [held]
        found.update((id(tensor), tensor) for tensor in tensors if isinstance(tensor, Tensor))
    return list(found.values())


def _constants(argument: Any) -> list[Constant]:
    if isinstance(argument, Constant):
        return [argument]
    if isinstance(argument, tuple | list):
        return [constant for item in argument for constant in _constants(item)]
    if isinstance(argument, dict):
        return [constant for item in argument.values() for constant in _constants(item)]
    return []

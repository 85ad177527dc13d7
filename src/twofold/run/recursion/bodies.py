"""Straight-line bodies on values: one operation after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twofold.convert.from_source import line_of
from twofold.graph import Constant, Node, SubGraph, Value, count_reads


class Steps:
    """Straight-line code ready to be run on values of its inputs, one operation after the other.

    Constants have places beside those of values, and containers are made by steps of their own, so that a step is one
    call on what lies in some places: a first batch, which runs one by one, takes little longer than plain Python.
    """

    def __init__(self, body: SubGraph, targets: Mapping[Any, Any]) -> None:
        """`targets` are calls to be replaced."""
        self._held: list[Any] = [None] * len(body.inputs)
        self._places: dict[Value, int] = {value: place for place, value in enumerate(body.inputs)}
        self._steps: list[tuple[Callable[..., Any], Callable[[list[Any]], Iterable[Any]], int, Node | None]] = []
        for node in body.nodes:
            keywords = dict(node.keywords)
            places = [self._place(argument) for argument in (*node.arguments, *keywords.values())]
            function = _function(node, targets)
            function = function if node.ambient.grad else _without_grad(function)
            function = _named(function, tuple(keywords)) if keywords else function
            self._places[node.results[0]] = self._add(function, places, node)
        self._taken = _taker([self._place(output) for output in body.outputs])

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Return the outputs. What an operation raises carries the user's line as a note."""
        held = self._held.copy()
        held[: len(values)] = values
        for function, taken, place, node in self._steps:
            try:
                held[place] = function(*taken(held))
            except Exception as error:
                if node is not None and node.origin is not None:
                    error.add_note(f"in {node.origin.function}, {node.origin}: {line_of(node.origin).strip()}")
                raise
        return list(self._taken(held))

    def _add(self, function: Callable[..., Any], places: Sequence[int], node: Node | None) -> int:
        self._held.append(None)
        self._steps.append((function, _taker(places), len(self._held) - 1, node))
        return len(self._held) - 1

    def _place(self, argument: Any) -> int:
        """Return where what an argument stands for will lie."""
        kind = type(argument)
        if kind is Value:
            return self._places[argument]
        if kind in (tuple, list):
            return self._add(lambda *items: kind(items), [self._place(item) for item in argument], None)
        if kind is dict:
            names = tuple(argument)
            made = [self._place(item) for item in argument.values()]
            return self._add(lambda *items: dict(zip(names, items, strict=True)), made, None)
        if kind is slice:
            parts = argument.start, argument.stop, argument.step
            return self._add(slice, [self._place(part) for part in parts], None)
        self._held.append(argument.object if kind is Constant else argument)
        return len(self._held) - 1


def _taker(places: Sequence[int]) -> Callable[[list[Any]], Iterable[Any]]:
    """Return what takes the items at some places, in order, without a line of Python."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _function(node: Node, targets: Mapping[Any, Any]) -> Callable[..., Any]:
    match node.op:
        case "get_attr":
            return getattr
        case "get_item":
            return operator.getitem
        case _:
            target: Any = targets.get(node.target, node.target)
            return target


def _without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return function(*arguments, **keywords)

    return run


def _named(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Have the last arguments given by name."""

    def run(*arguments: Any) -> Any:
        first = len(arguments) - len(names)
        return function(*arguments[:first], **dict(zip(names, arguments[first:], strict=True)))

    return run


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

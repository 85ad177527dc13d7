"""What every backend produces, and the lowering that they share."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from twofold.graph import Graph, Node, Value, map_values, values_in

Environment = dict[Value, Any]
"""The tensors (and settings) of one unit by value: given ones at first, computed ones as segments run."""


class Executable(Protocol):
    """A program made runnable. Called from one thread; under `torch.no_grad`, with no mode of ours active."""

    backend: str
    reuses_outputs: bool
    """Whether the next launch writes to the tensors that this one put into the environment."""
    lends_outputs: bool
    """Whether nothing else but that writes to them, if it does, so that a program may hold them until then."""

    def launch(self, index: int, environment: Environment) -> None:
        """Run segment `index`, reading what it needs from the environment and adding its outputs."""


def lower_to_fx(graph: Graph) -> torch.fx.GraphModule:
    """Write a straight-line body as an `fx.GraphModule` over its inputs in order, returning its outputs as a list.

    Intermediate tensors are freed after their last use, as in eager execution.
    """
    lowered = torch.fx.Graph()
    environment: dict[Value, Any] = {}
    for index, value in enumerate(graph.inputs):
        environment[value] = lowered.placeholder(f"input{index}")
    for node in graph.nodes:
        _lower_node(lowered, node, environment)
    lowered.output([environment[value] for value in graph.outputs if isinstance(value, Value)])
    return torch.fx.GraphModule(torch.nn.Module(), lowered)


def lower_to_function(graph: Graph) -> Callable[..., list[Any]]:
    """Write a straight-line body as a Python function that calls its operations, from inputs to the list of outputs.

    It does what the module of `lower_to_fx` does, and is made in a third of the time, for which the program waits.
    """
    return _FunctionWriter().function(graph)


class _FunctionWriter:
    def __init__(self) -> None:
        self._names: dict[Value, str] = {}
        self._objects: dict[str, Any] = {}
        self._targets: dict[Any, str] = {}

    def function(self, graph: Graph) -> Callable[..., list[Any]]:
        last_use: dict[Value, int] = {}
        for index, node in enumerate(graph.nodes):
            last_use.update(dict.fromkeys((*node.results, *node.operands), index))
        last_use.update((value, -1) for output in graph.outputs for value in values_in(output))
        spent: dict[int, list[Value]] = defaultdict(list)
        for value, index in last_use.items():
            spent[index].append(value)
        lines = [f"def run({', '.join(map(self._name, graph.inputs))}):"]
        for index, node in enumerate(graph.nodes):
            lines += self._call(node)
            if spent[index]:
                lines.append(f" del {', '.join(map(self._name, spent[index]))}")
        lines.append(f" return {self._text([value for value in graph.outputs if isinstance(value, Value)])}")
        exec(compile("\n".join(lines), "<graph>", "exec"), self._objects)
        return self._objects["run"]

    def _call(self, node: Node) -> Iterator[str]:
        arguments = [*map(self._text, node.arguments)]
        arguments += [f"{name}={self._text(argument)}" for name, argument in node.keywords]
        call = f"{self._target(node.target)}({', '.join(arguments)})"
        if not node.results:
            yield f" {call}"
            return
        paths = _result_paths(node)
        if paths == [()]:
            yield f" {self._name(node.results[0])} = {call}"
            return
        yield f" made = {call}"
        for value, path in zip(node.results, paths, strict=True):
            yield f" {self._name(value)} = made{''.join(f'[{step}]' for step in path)}"
        yield " del made"

    def _target(self, target: Any) -> str:
        if target not in self._targets:
            name = self._targets[target] = f"f{len(self._targets)}"
            # An overload is a Python object that calls this one.
            self._objects[name] = target._op if isinstance(target, torch._ops.OpOverload) else target
        return self._targets[target]

    def _name(self, value: Value) -> str:
        return self._names.setdefault(value, f"v{len(self._names)}")

    def _text(self, argument: Any) -> str:
        kind = type(argument)
        if kind is Value:
            return self._name(argument)
        if kind is list:
            return f"[{', '.join(map(self._text, argument))}]"
        if kind is tuple:
            return f"({''.join(f'{self._text(item)}, ' for item in argument)})"
        if kind in (int, bool, type(None)):
            return repr(argument)
        name = f"c{len(self._objects)}"
        self._objects[name] = argument
        return name


def _lower_node(lowered: torch.fx.Graph, node: Node, environment: dict[Value, Any]) -> None:
    arguments = map_values(node.arguments, environment.__getitem__)
    keywords = {name: map_values(argument, environment.__getitem__) for name, argument in node.keywords}
    assert callable(node.target)
    made = lowered.call_function(node.target, arguments, keywords)
    if not node.results:
        return
    for value, path in zip(node.results, _result_paths(node), strict=True):
        item = made
        for step in path:
            item = lowered.call_function(operator.getitem, (item, step))
        environment[value] = item


def _result_paths(node: Node) -> list[tuple[int, ...]]:
    """Return where each tensor result stands in what the operation returns: itself, an item, an item of a list."""
    returns = getattr(node.target, "_schema").returns  # noqa: B009 - only operations with a schema have results
    if len(returns) == 1 and "[]" not in str(returns[0].type) and "List" not in str(returns[0].type):
        return [()][: len(node.results)]
    if len(returns) == 1:
        return [(index,) for index in range(len(node.results))]
    paths: list[tuple[int, ...]] = []
    tensors = [i for i, result in enumerate(returns) if str(result.type) == "Tensor"]
    if len(node.results) < len(tensors) == len(returns):
        return [(index,) for index in _asked_for(node, len(returns))]
    lists = [i for i, result in enumerate(returns) if "List" in str(result.type)]
    if not lists:
        return [(index,) for index in tensors[: len(node.results)]]
    each = (len(node.results) - len(tensors)) // len(lists)
    for index, result in enumerate(returns):
        paths += [(index, j) for j in range(each)] if "List" in str(result.type) else [(index,)]
    return paths


def _asked_for(node: Node, count: int) -> list[int]:
    """Return which results a backward operation was asked for, by its `output_mask`; else the first ones."""
    given = (*node.arguments, *(argument for _, argument in node.keywords))
    for mask in given:
        if isinstance(mask, list) and len(mask) == count and all(isinstance(item, bool) for item in mask):
            positions = [index for index, wanted in enumerate(mask) if wanted]
            if len(positions) == len(node.results):
                return positions
    return list(range(len(node.results)))

"""What rewrites of straight-line graphs share: where values are made and used, and new nodes in the place of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from twofold.graph import Graph, Node, TensorSpec, Value, values_in

from .segments import root_of, view_nodes, writes_of

aten: Any = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Change:
    """Nodes that take the place of others: put in before the node at `position`, which may be one of those dropped."""

    position: int
    nodes: tuple[Node, ...]
    dropped: frozenset[int]


def rewritten(graph: Graph, changes: Iterable[Change]) -> Graph:
    """Make changes to a graph; all other nodes keep their order."""
    added: dict[int, list[Node]] = defaultdict(list)
    dropped: set[int] = set()
    for change in changes:
        added[change.position] += change.nodes
        dropped |= change.dropped
    nodes: list[Node] = []
    for index, node in enumerate(graph.nodes):
        nodes += added[index]
        if index not in dropped:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


class Flow:
    """Where each value of a graph is made, read and written to, by positions of nodes."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self.makers = {result: index for index, node in enumerate(graph.nodes) for result in node.results}
        self.readers: dict[Value, list[int]] = defaultdict(list)
        self.outputs = {value for output in graph.outputs for value in values_in(output)}
        self._views = view_nodes(graph.nodes)
        self._writes: dict[Value, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            for value in dict.fromkeys(node.operands):
                self.readers[value].append(index)
            for value in writes_of(node) if node.op == "call" else ():
                self._writes[root_of(value, self._views)].append(index)

    def maker(self, value: Value, target: Any) -> Node | None:
        """Return the node that makes a value, if it calls `target`."""
        index = self.makers.get(value)
        return self.nodes[index] if index is not None and self.nodes[index].target is target else None

    def is_read_once(self, value: Value) -> bool:
        return len(self.readers[value]) == 1 and value not in self.outputs

    def first_reader(self, value: Value) -> int:
        return min(self.readers[value], default=len(self.nodes))

    def is_written(self, value: Value, first: int | None = None, last: int | None = None) -> bool:
        """Whether the memory of a value is written to, at all or by a node between two positions."""
        positions = self._writes[root_of(value, self._views)]
        if first is None or last is None:
            return bool(positions)
        return any(first < position < last for position in positions)


class Emitter:
    """Makes the nodes that are put in before one position; concatenations of rows are made once for all positions."""

    def __init__(self, flow: Flow, position: int, names: Iterator[str], joined: Rows) -> None:
        self.position = position
        self.nodes: list[Node] = []
        self._flow = flow
        self._names = names
        self._joined = joined

    def call(self, target: Any, arguments: tuple[Any, ...], *results: Result) -> tuple[Value, ...]:
        """Append a call and return its results; one that is given by its spec gets a name of its own."""
        made = tuple(r if isinstance(r, Value) else Value(next(self._names), r) for r in results)
        like = self._flow.nodes[min(self.position, len(self._flow.nodes) - 1)]
        self.nodes.append(replace(like, op="call", target=target, arguments=arguments, keywords=(), results=made))
        return made

    def join_rows(self, values: Sequence[Value]) -> Value:
        """Return the rows of all values in one, joined for someone else if they were."""
        key = tuple(values)
        known = self.joined(key)
        if known is not None and known.position <= self.position:
            return known.value
        rows = sum(shape_of(value)[0] for value in values)
        spec = replace(spec_of(values[0]), shape=(rows, *shape_of(values[0])[1:]), stride=None)
        (joined,) = self.call(aten.cat.default, ([*values],), spec)
        self._joined[key] = Joined(joined, self.position)
        return joined

    def joined(self, values: tuple[Value, ...]) -> Joined | None:
        """Return the rows that were joined for someone else, if they hold here what they held there."""
        known = self._joined.get(values)
        if known is None:
            return None
        first, last = sorted((known.position, self.position))
        return None if any(self._flow.is_written(value, first - 1, last) for value in values) else known

    def transpose(self, value: Value) -> Value:
        rows, columns = shape_of(value)
        spec = replace(spec_of(value), shape=(columns, rows), stride=(1, columns))
        return self.call(aten.t.default, (value,), spec)[0]

    def change(self, dropped: Iterable[int]) -> Change:
        return Change(self.position, tuple(self.nodes), frozenset(dropped))


@dataclass(frozen=True)
class Joined:
    """Rows that were concatenated before the node at a position."""

    value: Value
    position: int


Rows = dict[tuple[Value, ...], Joined]


def joined_rows(graph: Graph) -> Rows:
    """Return the rows that a graph joins already."""
    return {
        node.operands: Joined(node.results[0], index + 1)
        for index, node in enumerate(graph.nodes)
        if node.target is aten.cat.default and len(node.arguments) == 1
    }


Result = Value | TensorSpec


def spec_of(value: Value) -> TensorSpec:
    """Return the spec of a value that has one, as all tensors of a unit have."""
    assert value.spec is not None
    return value.spec


def shape_of(value: Value) -> tuple[int, ...]:
    """Return the shape of such a value."""
    return tuple(size or 0 for size in spec_of(value).shape)

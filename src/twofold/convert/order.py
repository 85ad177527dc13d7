"""The order of a straight-line graph: which nodes may change places, and the order after some of them became one."""

from __future__ import annotations

import functools
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from twofold.capture.functions import is_random
from twofold.graph import Graph, Node, Value, has_effect

from .segments import root_of, view_nodes, writes_of

_OUTSIDE = None
"""The memory of all that a graph is given, taken for one: what of it overlaps is not known."""


def dependencies(graph: Graph) -> list[set[int]]:
    """Return for each node the earlier ones that it has to follow.

    A node follows those that made or wrote what it reads, and those that read or wrote what it writes. What draws
    random numbers keeps its order, in place or not. Nothing passes a node that is no call.
    """
    views = view_nodes(graph.nodes)
    makers = {result: index for index, node in enumerate(graph.nodes) for result in node.results}
    writers: dict[Any, int] = {}
    readers: dict[Any, list[int]] = defaultdict(list)
    barrier = draw = -1
    follows: list[set[int]] = []

    @functools.cache
    def memory(value: Value) -> Any:
        root = root_of(value, views)
        return root if root in makers else _OUTSIDE

    for index, node in enumerate(graph.nodes):
        read = set(map(memory, node.operands))
        written = set(map(memory, writes_of(node))) if node.op == "call" else set[Any]()
        before = {makers[value] for value in node.operands if value in makers}
        before |= {writers[place] for place in read | written if place in writers}
        before |= {reader for place in written for reader in readers[place]}
        if node.op != "call":
            before |= set(range(max(barrier, 0), index))
            barrier = index
        else:
            before.add(barrier)
        if _draws(node) or (has_effect(node) and not written):
            before.add(draw)
            draw = index
        before.discard(-1)
        follows.append(before)
        for place in read:
            readers[place].append(index)
        for place in written:
            writers[place], readers[place] = index, []
    return follows


def _draws(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and is_random(node.target)


class Order:
    """An order of the nodes of a straight-line graph, by position, that changes as some of them become one. Mutable."""

    def __init__(self, graph: Graph) -> None:
        self.sequence = list(range(len(graph.nodes)))
        self._follows = dict(enumerate(dependencies(graph)))

    def independent(self, members: Collection[int]) -> list[list[int]]:
        """Part nodes into groups of which none depends on another of its group, those first that depend on none."""
        depths: dict[int, int] = {}
        groups: dict[int, list[int]] = defaultdict(list)
        for index in self.sequence:
            depth = max((depths[other] + (other in members) for other in self._follows[index]), default=0)
            depths[index] = depth
            if index in members:
                groups[depth].append(index)
        return [sorted(groups[depth]) for depth in sorted(groups)]

    def join(self, groups: Iterable[Sequence[int]]) -> None:
        """Make one node of each group of `independent`, in the place of its last; what depends on it moves behind it.

        All else keeps its order.
        """
        last_of = {index: group[-1] for group in groups for index in group}
        follows: dict[int, set[int]] = defaultdict(set)
        for index, before in self._follows.items():
            follows[last_of.get(index, index)].update(last_of.get(other, other) for other in before)
        self._follows = follows
        self.sequence = _sorted(follows)


def _sorted(follows: dict[int, set[int]]) -> list[int]:
    behind: dict[int, list[int]] = defaultdict(list)
    for index, before in follows.items():
        for other in before:
            behind[other].append(index)
    left = {index: len(before) for index, before in follows.items()}
    ready = [index for index, count in left.items() if not count]
    heapq.heapify(ready)
    sequence: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        sequence.append(index)
        for other in behind[index]:
            left[other] -= 1
            if not left[other]:
                heapq.heappush(ready, other)
    assert len(sequence) == len(follows), "nodes became one that depend on one another"
    return sequence

"""The order of a straight-line graph: which nodes may change places, and the order after some of them became one."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from twofold.graph import Graph, Node, Value, has_effect

from .rewriting import Change
from .segments import root_of, view_nodes, writes_of

_OUTSIDE = None
"""The memory of all that a graph is given, taken for one: what of it overlaps is not known."""


def dependencies(graph: Graph) -> list[set[int]]:
    """Return for each node the earlier ones that it has to follow.

    A node follows those that made or wrote what it reads, and those that read or wrote what it writes. What draws
    random numbers keeps its order. Nothing passes a node that is no call.
    """
    views = view_nodes(graph.nodes)
    makers = {result: index for index, node in enumerate(graph.nodes) for result in node.results}
    writers: dict[Any, int] = {}
    readers: dict[Any, list[int]] = defaultdict(list)
    barrier = draw = -1
    follows: list[set[int]] = []

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
        if has_effect(node) and not written:
            before.add(draw)
            draw = index
        before.discard(-1)
        follows.append(before)
        for place in read:
            readers[place].append(index)
        for place in written:
            writers[place], readers[place] = index, []
    return follows


def independent(follows: list[set[int]], members: Collection[int]) -> list[list[int]]:
    """Part nodes into groups of which none depends on another of its group, those first that depend on none."""
    depths: list[int] = []
    groups: dict[int, list[int]] = defaultdict(list)
    for index, before in enumerate(follows):
        depth = max((depths[other] + (other in members) for other in before), default=0)
        depths.append(depth)
        if index in members:
            groups[depth].append(index)
    return [groups[depth] for depth in sorted(groups)]


def reordered(graph: Graph, follows: list[set[int]], changes: Iterable[Change]) -> Graph:
    """Make changes to a graph, each in the place of the nodes that it drops; what depends on these moves behind it.

    All else keeps its order. The nodes that one change drops must not depend on one another.
    """
    in_place_of = {index: change for change in changes for index in change.dropped}

    def task(index: int) -> int:
        change = in_place_of.get(index)
        return index if change is None else change.position

    waits: dict[int, set[int]] = defaultdict(set)
    for index, before in enumerate(follows):
        waits[task(index)].update(map(task, before))
    behind: dict[int, list[int]] = defaultdict(list)
    for index, before in waits.items():
        for other in before:
            behind[other].append(index)
    left = {index: len(before) for index, before in waits.items()}
    ready = [index for index, count in left.items() if not count]
    heapq.heapify(ready)
    nodes: list[Node] = []
    while ready:
        index = heapq.heappop(ready)
        change = in_place_of.get(index)
        nodes += [graph.nodes[index]] if change is None else change.nodes
        for other in behind[index]:
            left[other] -= 1
            if not left[other]:
                heapq.heappush(ready, other)
    assert not any(left.values()), "a change drops nodes that depend on one another"
    return replace(graph, nodes=tuple(nodes))

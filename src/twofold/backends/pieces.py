"""Pieces: the runs of a segment's nodes that are compiled, or called as they are, one after the other."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from twofold.convert.from_traces import Program
from twofold.convert.repeats import Piece, find_repeats, is_only_views, shared_pieces
from twofold.convert.segments import bytes_of, carve, root_of
from twofold.graph import Node, Value, map_values

MAX_PIECE_NODES = 1500
"""Beyond this a piece is cut: Inductor's scheduling grows faster than linearly (35-step LSTM loop as one graph of
2,500 nodes: more than 5 minutes; in two halves: about 13 s each)."""

LITTLE = 0.2
"""The share of what compiling gains that a run beside loops is compiled for: it takes as long as a loop's body, and a
loop of varying length has others for each. The head of an LSTM over 10,000 words gains half of all."""
_REDUCING = ("softmax", "nll_loss", "norm")

_LEFT_ALONE = ("_fused_", "_amp_", "_foreach_", "bernoulli", "scatter.value", "scatter_.value")
"""Where a number is scattered into zeros, Inductor compares each place with the index, and an index out of range raises
no error. Inductor of torch 2.13 may compute what reads the result of `bernoulli_` before it has been drawn, in one
kernel with what `empty_like` left: dropout behind a layer norm gave NaN on a CPU."""


def is_left_alone(node: Node) -> bool:
    """Whether a call stays one of eager's kernels."""
    return getattr(node.target, "__name__", str(node.target)).removeprefix("aten.").startswith(_LEFT_ALONE)


def split_pieces(program: Program) -> list[list[Piece]]:
    """Return, for each segment, what is compiled or replayed one after the other."""
    finals = {value for segment in program.segments for value in segment.outputs}
    splitter = _Splitter({v: n for v, n in program.views.items() if v not in finals})
    for segment in program.segments:
        splitter.add(segment.graph.nodes, segment.outputs, with_repeats=not program.on_accelerator)
    segments: list[list[Piece]] = [[] for _ in program.segments]
    for piece, owner in splitter.pieces(finals):
        segments[owner].append(piece)
    return segments


def spent_values(segments: Sequence[Sequence[Piece]], kept: Collection[Value]) -> list[list[Value]]:
    """Return for each piece, in order, which of the pieces' outputs are no longer read when it has run.

    `kept`: what segments hand out, whoever reads it. The rest, such as what one body of a loop leaves to the next,
    would else stay until the unit ends.
    """
    read_later = set(kept)
    spent: list[list[Value]] = []
    for piece in reversed([piece for pieces in segments for piece in pieces]):
        read = {*piece.inputs, *piece.outputs}
        spent.append([*(read - read_later)])
        read_later |= read
    made = {value for pieces in segments for piece in pieces for value in piece.outputs}
    return [[value for value in values if value in made] for values in reversed(spent)]


@dataclass(frozen=True, eq=False)
class _Run:
    """Nodes of one segment in a row. `repeat`: which loop they are a body of."""

    nodes: Sequence[Node]
    segment: int
    is_compiled: bool
    repeat: int | None = None


class _Splitter:
    def __init__(self, views: dict[Value, Node]) -> None:
        self._views = views
        self._copies: dict[Value, Value] = {}
        """Views that the bodies of loops are given, by those that they would make themselves."""
        self._makers: dict[Value, Node] = {}
        self._runs: list[_Run] = []
        self._segments = itertools.count()
        self._repeats = itertools.count()

    def add(self, nodes: Sequence[Node], outputs: Sequence[Value], with_repeats: bool) -> None:
        """Split the nodes of a segment."""
        segment = next(self._segments)
        self._copies.clear()  # a segment is given what the one before hands out, and nothing that its pieces make
        for alone, group in itertools.groupby(nodes, is_left_alone):
            together = list(group)
            repeats = [] if alone or not with_repeats else find_repeats(together, self._views, outputs)
            begin = 0
            for repeat in repeats:
                if repeat.bounds[1] - repeat.bounds[0] > MAX_PIECE_NODES:
                    continue
                self._add_run(together[begin : repeat.bounds[0]], segment, not alone)
                self._add_bodies([together[first:last] for first, last in repeat.bodies], segment)
                begin = repeat.bounds[-1]
            self._add_run(together[begin:], segment, not alone)

    def _add_run(self, nodes: Sequence[Node], segment: int, is_compiled: bool) -> None:
        for begin in range(0, len(nodes), MAX_PIECE_NODES):
            self._runs.append(_Run(nodes[begin : begin + MAX_PIECE_NODES], segment, is_compiled))

    def _add_bodies(self, bodies: list[Sequence[Node]], segment: int) -> None:
        """Add a run for each body; views of what a body does not make itself are made before it, or before all."""
        repeat = next(self._repeats)
        own_of_all = {result for body in bodies for node in body for result in node.results}
        first: list[Node] = []
        runs: list[_Run] = []
        for body in bodies:
            own = {result for node in body for result in node.results}
            made: list[Node] = []

            def given(value: Value, own: set[Value] = own, made: list[Node] = made) -> Value:
                if value not in self._views or root_of(value, self._views) in own:
                    return value
                return self._copy(value, first if root_of(value, self._views) not in own_of_all else made)

            nodes = [_with_values(node, given) for node in body if not self._shows_others(node, own)]
            runs.append(_Run(made, segment, is_compiled=False))
            runs.append(_Run(nodes, segment, is_compiled=True, repeat=repeat))
        runs.insert(0, _Run(first, segment, is_compiled=False))
        self._runs += [run for run in runs if run.nodes]

    def _shows_others(self, node: Node, own: set[Value]) -> bool:
        """Whether a node is a view of what a body does not make, which is made outside."""
        return is_only_views(node, self._views) and root_of(node.results[0], self._views) not in own

    def _copy(self, value: Value, made: list[Node]) -> Value:
        """Return a view under another name; what makes it, and was not made, is added to `made`."""
        if value not in self._views:
            return value
        if value not in self._copies:
            node = self._views[value]
            copy = _with_values(node, lambda other: self._copy(other, made))
            results = tuple(Value(f"{result.name}.", result.spec) for result in node.results)
            self._copies.update(zip(node.results, results, strict=True))
            made.append(replace(copy, results=results))
            self._makers.update(dict.fromkeys(results, made[-1]))
        return self._copies[value]

    def pieces(self, finals: set[Value]) -> Iterator[tuple[Piece, int]]:
        """Yield the pieces of all runs, each with the index of its segment."""
        self._leave_what_is_little()
        nothing: list[set[Value]] = [set() for _ in self._runs]
        bodies = carve([run.nodes for run in self._runs], nothing, self._views, finals, "piece")
        loops: dict[int, list[int]] = defaultdict(list)
        for index, run in enumerate(self._runs):
            if run.repeat is not None:
                loops[run.repeat].append(index)
        views = self._views | self._makers
        shared: dict[int, Piece] = {}
        for members in loops.values():
            shared.update(zip(members, shared_pieces([bodies[index] for index in members], views), strict=True))
        for index, (body, run) in enumerate(zip(bodies, self._runs, strict=True)):
            yield shared[index] if index in shared else Piece.of(body, run.is_compiled), run.segment

    def _leave_what_is_little(self) -> None:
        """Beside loops, leave alone what gains next to nothing."""
        if all(run.repeat is None for run in self._runs):
            return
        gains = [sum(map(_gain, run.nodes)) for run in self._runs]
        for index, run in enumerate(self._runs):
            if run.repeat is None and gains[index] < LITTLE * sum(gains):
                self._runs[index] = replace(run, is_compiled=False)


def _gain(node: Node) -> float:
    """Return about how many microseconds a kernel takes less than a call: its overhead, and what it writes."""
    return 3.0 + sum(map(bytes_of, node.results)) / 5_000 if _is_fused(node.target) else 0.0


@functools.cache
def _is_fused(target: Any) -> bool:
    is_pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return is_pointwise or any(word in str(target) for word in _REDUCING)


def _with_values(node: Node, function: Callable[[Value], Value]) -> Node:
    now = {value: function(value) for value in node.operands}
    if all(now[value] is value for value in now):
        return node
    arguments, keywords = map_values((node.arguments, node.keywords), now.__getitem__)
    return replace(node, arguments=arguments, keywords=keywords)

"""Bodies of loops that Python unrolled, found again: runs of nodes that repeat, of which one is compiled for all.

What a compiler takes for a graph grows with its nodes: the two pieces of an LSTM of 35 steps took 155 s of a
processor's time, one step of each of its loops takes three. A graph does not say where a loop was: it is found as
a sequence of operations that comes again at one distance, whatever its operands are; what they are, for all repetitions
together, says what a body is given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twofold.graph import Graph, Node, Value, eliminate_dead_code, map_values, values_in

from .segments import bytes_of, root_of, view_nodes, writes_of

FEWEST_BODIES = 3
FEWEST_SAVED = 100
"""Nodes that need not be compiled. A node takes some 50 ms to compile, a body launched apart some 20 µs a step."""
_GRAM = 4
"""Operations in a row that have to come again for their distance to be looked at."""


@dataclass(frozen=True)
class Repeat:
    """`count` runs of nodes, one behind the other: each from one of `bounds` up to the next."""

    bounds: tuple[int, ...]

    @property
    def bodies(self) -> Iterator[tuple[int, int]]:
        return zip(self.bounds, self.bounds[1:], strict=False)


def find_repeats(nodes: Sequence[Node], views: dict[Value, Node], read_later: Collection[Value]) -> list[Repeat]:
    """Return runs of nodes that repeat, in order and apart from each other.

    Views do not count: which slice of a tensor a step reads differs. `read_later`: what others than these nodes read.
    """
    steps = [index for index, node in enumerate(nodes) if not is_only_views(node, views)]
    known: dict[Any, int] = {}
    letters = [known.setdefault(_letter(nodes[index]), len(known)) for index in steps]
    taken: list[tuple[int, int]] = []
    readers = _last_readers(nodes, views, read_later)
    found: list[Repeat] = []
    for saved, period, first, last in sorted(_stretches(letters), key=lambda one: (-one[0], one[1:])):
        if saved < FEWEST_SAVED:
            break
        if any(first < end and begin < last for begin, end in taken):
            continue
        taken.append((first, last))
        bounds = [*steps[first:last], steps[last] if last < len(steps) else len(nodes)]
        found.append(Repeat(_best_phase(nodes, bounds, period, views, readers)))
    return sorted(found, key=lambda repeat: repeat.bounds)


def is_only_views(node: Node, views: Mapping[Value, Node]) -> bool:
    """Whether all that a node makes is made again where it is read."""
    return bool(node.results) and all(result in views for result in node.results)


def _letter(node: Node) -> Any:
    """Return what tells a node from others, whatever its operands are. (1 and 1.0 are told apart later.)"""
    arguments, keywords = map_values((node.arguments, node.keywords), lambda value: value.spec)
    return node.target, _hashable(arguments), _hashable(keywords), tuple([result.spec for result in node.results])


def _hashable(argument: Any) -> Any:
    if type(argument) in (tuple, list):
        return tuple([_hashable(item) for item in argument])
    return repr(argument) if type(argument) in (dict, slice) else argument


def _stretches(letters: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield sequences that equal themselves at a distance: letters saved, the distance, first letter, and end."""
    distances: Counter[int] = Counter()
    seen: dict[tuple[int, ...], int] = {}
    for index in range(len(letters) - _GRAM + 1):
        gram = tuple(letters[index : index + _GRAM])
        if gram in seen:
            distances[index - seen[gram]] += 1
        seen[gram] = index
    for period, votes in distances.items():
        if votes < FEWEST_SAVED / 2:
            continue
        first: int | None = None
        for index in range(len(letters) - period + 1):
            if index + period < len(letters) and letters[index] == letters[index + period]:
                first = index if first is None else first
            elif first is not None:
                end = index + period
                count = (end - first) // period
                if count >= FEWEST_BODIES:
                    yield (count - 1) * period, period, first, end
                first = None


def _last_readers(
    nodes: Sequence[Node], views: dict[Value, Node], read_later: Collection[Value]
) -> dict[Value, list[int]]:
    """Return the positions of the nodes that read a value or a view of it, those that come later behind the last."""
    readers: dict[Value, list[int]] = defaultdict(list)
    views = dict(views)
    for index, node in enumerate(nodes):
        if not is_only_views(node, views):
            for value in node.operands:
                readers[root_of(value, views)].append(index)
    for value in read_later:
        readers[root_of(value, views)].append(len(nodes))
    return readers


def _best_phase(
    nodes: Sequence[Node],
    steps: Sequence[int],
    period: int,
    views: dict[Value, Node],
    readers: Mapping[Value, list[int]],
) -> tuple[int, ...]:
    """Return the bounds of bodies that begin where least is handed on from one to the next."""
    length = len(steps) - 1

    def handed_on(phase: int) -> tuple[int, int]:
        begin = phase + (length - phase) // period // 2 * period
        first, last = steps[begin], steps[begin + period] if begin + period <= length else steps[-1]
        made = [value for node in nodes[first:last] if not is_only_views(node, views) for value in node.results]
        handed = {value for value in made if any(not first <= r < last for r in readers.get(value, ()))}
        read = {root_of(value, views) for node in nodes[first:last] for value in node.operands}
        return sum(map(bytes_of, handed)) + sum(map(bytes_of, read.difference(made))), phase

    phases = range(min(period, length - FEWEST_BODIES * period + 1))
    _, phase = min(map(handed_on, phases))
    return tuple(steps[index] for index in range(phase, length + 1, period))


@dataclass(frozen=True, eq=False)
class Piece:
    """A straight-line graph, what it is run on, and what its outputs are called."""

    graph: Graph
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    is_compiled: bool = True

    @classmethod
    def of(cls, graph: Graph, is_compiled: bool = True) -> Piece:
        """Return a graph with its own inputs and outputs."""
        return cls(graph, graph.inputs, tuple(v for v in graph.outputs if isinstance(v, Value)), is_compiled)


def shared_pieces(graphs: Sequence[Graph], views: dict[Value, Node]) -> list[Piece]:
    """Return a piece for each graph; those that are equal but for their operands have one graph.

    It is given all that is not the same in each of them, so that operands that are one in some and two in others are
    two, and hands out whatever one of them does. `views` makes views that the graphs are given.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    forms = [_Form(eliminate_dead_code(graph)) for graph in graphs]  # of views that others make again
    for index, form in enumerate(forms):
        groups[form.key].append(index)
    pieces: dict[int, Piece] = {}
    for members in groups.values():
        columns = list(zip(*(forms[index].given for index in members), strict=True))
        positions = sorted({position for index in members for position in forms[index].outputs})
        shared = forms[members[0]].graph(columns, positions)
        slots = list(dict.fromkeys(columns))
        written = [shared.inputs.index(value) for value in _written(shared)]
        for row, index in enumerate(members):
            inputs = tuple(slot[row] for slot in slots)
            roots = [root_of(value, views) for value in inputs]
            if any(roots.count(roots[slot]) > 1 for slot in written):
                pieces[index] = Piece.of(graphs[index])
            else:
                pieces[index] = Piece(shared, inputs, tuple(forms[index].made[position] for position in positions))
    return [pieces[index] for index in range(len(graphs))]


def _written(graph: Graph) -> set[Value]:
    made = view_nodes(graph.nodes)
    return {root_of(value, made) for node in graph.nodes for value in writes_of(node)} & set(graph.inputs)


class _Form:
    """A graph, and apart from it what tells it from others that do the same."""

    def __init__(self, graph: Graph) -> None:
        self.given: list[Value] = []
        """The inputs, at each place where one is read."""
        self.made = [result for node in graph.nodes for result in node.results]
        position = {value: index for index, value in enumerate(self.made)}
        self.outputs = [position[value] for output in graph.outputs for value in values_in(output)]
        self._graph = graph
        lines: list[Any] = []

        def seen(value: Value) -> Any:
            if value in position:
                return f"made {position[value]}"
            self.given.append(value)
            return value.spec

        for node in graph.nodes:
            arguments = map_values((node.arguments, [*node.keywords]), seen)
            lines.append((node.op, str(node.target), node.ambient, arguments, [result.spec for result in node.results]))
        self.key = repr(lines)

    def graph(self, given: Sequence[tuple[Value, ...]], outputs: Sequence[int]) -> Graph:
        """Return the graph with one input for each that differs in `given`, and outputs by position."""
        inputs: dict[tuple[Value, ...], Value] = {}
        for places in given:
            inputs.setdefault(places, Value(f"input{len(inputs)}", places[0].spec))
        in_order = iter(given)
        now: dict[Value, Value] = {}

        def renamed(value: Value) -> Value:
            return now[value] if value in now else inputs[next(in_order)]

        nodes: list[Node] = []
        for node in self._graph.nodes:
            arguments, keywords = map_values((node.arguments, node.keywords), renamed)
            results = tuple(Value(str(len(now) + index), value.spec) for index, value in enumerate(node.results))
            now.update(zip(node.results, results, strict=True))
            nodes.append(replace(node, arguments=arguments, keywords=keywords, results=results, origin=None))
        return Graph("piece", tuple(inputs.values()), tuple(nodes), tuple(now[self.made[index]] for index in outputs))

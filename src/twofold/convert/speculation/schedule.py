"""When each node of a host graph is done: before the launches, between them, or after the last.

In the order of the program, effects, checks and tensor work alternate. Here all that may find a call to be another
than was foreseen comes first, and all that cannot be undone last:

1. *guards*: checks and feeds that need nothing from the unit. Where one fails, nothing has been launched.
2. what waits for a fetch, in the program's order. Where a check fails here, the launched segments are undone.
3. `launch`: all that is left of the unit; then the tensors that it hands out, and checks that need these, if any.
4. `commit`; after it, values that only effects and results need, and the effects, in the program's order.

A node that may raise (a division, a look-up) is done early though only an effect needs it, so that the call can still
be given back to Python, which raises at the user's own line.
"""

from __future__ import annotations

import math
import operator
import types
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from twofold.convert.from_traces import Program
from twofold.convert.segments import root_of, written_roots
from twofold.graph import Constant, Graph, Node, Value, verify
from twofold.graph.effects import target_has_effect

from .library import is_pure
from .speculation import (
    READ_BY_UNHOOKED,
    apart,
    change,
    commit,
    draw,
    equal,
    give,
    inherits,
    instance,
    launch,
    metadata,
    put,
    read,
    settled,
    step,
    tensor,
    unhooked,
)

GUARD, BETWEEN, AFTER_LAUNCH = range(3)
"""The stages of what may still find that the call is another one."""

NEVER_RAISES: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.neg, operator.pos, operator.not_, operator.truth,
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.is_, operator.is_not,
        type, isinstance, len, abs, min, max, bool, str, repr, format, tuple, list, dict, set, id, equal, instance,
        read, settled, tensor,
    }
)  # fmt: skip
"""Calls that do not raise for the kinds of values they are made with: numbers that are read, texts, what was built."""

_ON_UNIT = frozenset({draw, give, put, read, step, tensor, settled, launch, commit})
_OF_IDENTITY = frozenset({operator.is_, operator.is_not, type, isinstance, id, inherits})
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_BY_REFERENCE = frozenset(
    {apart, give, instance, metadata, put, settled, step, tensor, tuple, list, dict, len} | _OF_IDENTITY
)
_DIVISIONS = frozenset({operator.truediv, operator.floordiv, operator.mod})


class Unschedulable(Exception):
    """A check needs what an effect makes or changes. `node` is what it needs."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


def reads_in_place(program: Program) -> frozenset[int]:
    """Return the fetches that must be answered where the program makes them: later segments write to what they read.

    On an accelerator these are also all values that are not copied to the host for themselves.
    """
    found: set[int] = set()
    for event, values in program.fetches.items():
        later = program.segments[program.positions[event] : program.unit_segments]
        written = {root for segment in later for root in written_roots(segment, program.views)}
        overwritten = not written.isdisjoint(root_of(value, program.views) for value in values)
        if overwritten or (program.on_accelerator and event not in program.number_reads):
            found.add(event)
    return frozenset(found)


def schedule(graph: Graph, in_place: Collection[int] = (), data: Collection[Value] = frozenset()) -> Graph:
    """Return a host graph with its nodes in the order of a call, `launch` and `commit` among them.

    `in_place`: the fetches that cannot wait; `data`: see `Speculation`. Raises `Unschedulable`.
    """
    return _Schedule(graph, in_place, frozenset(data)).ordered()


def is_effect(node: Node) -> bool:
    """Whether a node of a host graph is done for its effect on the heap or the world: a write, or an unknown call."""
    if node.op in ("set_attr", "set_item") or node.target is change:
        return True
    if node.op != "call" or node.target in _ON_UNIT:
        return False
    target: Any = node.target
    return not node.results or (not is_pure(target) and target_has_effect(target))


class _Schedule:
    def __init__(self, graph: Graph, in_place: Collection[int], data: frozenset[Value]) -> None:
        self.graph = graph
        self.in_place = in_place
        self.data = [i for i, node in enumerate(graph.nodes) if node.target is change or _looks_into(node, data)]
        """The nodes that change arrays or look into them: they stay in the order of the program."""
        self.makers = {value: i for i, node in enumerate(graph.nodes) for value in node.results}
        self.readers: dict[Value, list[int]] = {}
        for index, node in enumerate(graph.nodes):
            for value in node.operands:
                self.readers.setdefault(value, []).append(index)
        self.stages = [_own_stage(node) for node in graph.nodes]
        drawn = looked = GUARD
        looking = set(self.data) if any(self._changes_data(i) for i in self.data) else set()
        for index, node in enumerate(graph.nodes):
            for maker in self._makers_of(node):
                self.stages[index] = max(self.stages[index], self.stages[maker])
            if node.target is draw:  # in the order of the program
                drawn = self.stages[index] = max(self.stages[index], drawn)
            if index in looking:
                looked = self.stages[index] = max(self.stages[index], looked)
        self.passes = _Passing(graph.nodes)
        self.early: set[int] = set()

    def ordered(self) -> Graph:
        nodes = self.graph.nodes
        for index, node in enumerate(nodes):
            if self._must_be_early(node):
                self._require(index)
        for index, node in enumerate(nodes):
            if node.target is put:
                self._read_before(index, node)
        for index, node in enumerate(nodes):
            if index not in self.early and self._should_be_early(index, node):
                self._require(index)
        stages = [[n for i, n in enumerate(nodes) if i in self.early and self.stages[i] == s] for s in range(3)]
        late = [node for index, node in enumerate(nodes) if index not in self.early]
        unit = self.graph.inputs[0]
        may_undo = any(node.op == "assert" or node.target is draw for node in stages[AFTER_LAUNCH])
        whole = Node("call", launch, (unit, may_undo), (), ())
        done = Node("call", commit, (unit,), (), ())
        ordered = (*stages[GUARD], *stages[BETWEEN], whole, *stages[AFTER_LAUNCH], done, *late)
        graph = replace(self.graph, nodes=ordered)
        verify(graph)
        return graph

    def _must_be_early(self, node: Node) -> bool:
        return node.op == "assert" or node.target in (draw, give, put, step, tensor) or _is_read_of(node, self.in_place)

    def _read_before(self, index: int, node: Node) -> None:
        """Have what reads an optimizer's setting in the program before it is set there read it before it is set."""
        if self.stages[index] != GUARD:  # parts of the unit are launched by then, on an accelerator perhaps all
            raise Unschedulable("an optimizer is set by what the unit computes", node)
        _, holder, key, _ = node.arguments
        for other, reading in enumerate(self.graph.nodes[:index]):
            if reading.op == "set_item" or reading.target is put or holder not in reading.operands:
                continue
            if reading.op != "get_item" or isinstance(reading.arguments[1], Value) or reading.arguments[1] == key:
                self._require(other)

    def _should_be_early(self, index: int, node: Node) -> bool:
        """Whether a node may raise, and can be done before anything that it could notice has been changed."""
        if is_effect(node) or not _may_raise(node):
            return False
        needed = self._closure(index)
        return all(self.stages[i] < AFTER_LAUNCH and not self.passes.may_notice(i) for i in needed)

    def _require(self, index: int) -> None:
        for needed in self._closure(index):
            node = self.graph.nodes[needed]
            if is_effect(node) and node.target is not change:
                raise Unschedulable("a check needs what an effect returns", node)
            if node.op != "assert" and self.passes.notices(needed):
                raise Unschedulable("a check reads what an effect before it has changed", node)
            if node.target in (give, step) and self.stages[needed] == AFTER_LAUNCH:
                raise Unschedulable("tensor work needs what the unit hands out", node)
            self.early.add(needed)

    def _closure(self, index: int) -> set[int]:
        """Return a node and what comes before it, as far as that is not early anyhow."""
        found = {index}
        pending = [index]
        while pending:
            needed = pending.pop()
            for before in (*self._makers_of(self.graph.nodes[needed]), *self._data_before(needed)):
                if before not in found and before not in self.early:
                    found.add(before)
                    pending.append(before)
        return found

    def _data_before(self, index: int) -> Iterable[int]:
        """Yield what a node that looks into arrays must come behind, and what one that changes them must."""
        position = bisect_left(self.data, index)
        if self.data[position : position + 1] == [index]:
            yield from (i for i in self.data[:position] if self._changes_data(index) or self._changes_data(i))

    def _changes_data(self, index: int) -> bool:
        node = self.graph.nodes[index]
        return is_effect(node) and node.target is not print

    def _makers_of(self, node: Node) -> Iterable[int]:
        return (self.makers[value] for value in node.operands if value in self.makers)


def _looks_into(node: Node, data: frozenset[Value]) -> bool:
    """Whether a node looks into arrays, and does not only hand them on."""
    if data.isdisjoint(node.operands) or node.op in ("get_attr", "set_attr", "set_item", "assert"):
        return False
    is_kept = isinstance(node.target, types.MethodDescriptorType) and node.target.__objclass__ in _CONTAINERS
    return not (is_kept and is_effect(node)) and node.target not in _BY_REFERENCE


def _own_stage(node: Node) -> int:
    if node.target in (read, step):
        return BETWEEN
    return AFTER_LAUNCH if node.target in (tensor, settled) else GUARD


def _is_read_of(node: Node, events: Collection[int]) -> bool:
    return node.target is read and node.arguments[1] in events


def _may_raise(node: Node) -> bool:
    if node.op in ("get_attr", "get_item"):
        return True
    if node.op != "call" or node.target in NEVER_RAISES:
        return False
    if node.target in _DIVISIONS:
        divisor = node.arguments[1]
        return not (type(divisor) in (int, float) and divisor != 0)
    return True


ARITHMETIC: frozenset[Any] = _DIVISIONS | {
    function for name, function in vars(math).items() if callable(function) and not name.startswith("_")
} | {
    operator.add, operator.sub, operator.mul, operator.neg, operator.pos, operator.pow, abs, min, max, float, int, bool,
    round, str, repr, format,
}  # fmt: skip
"""Functions that make numbers or texts of numbers."""


class _Passing:
    """Whether a node, done before all effects, would see another state than in the program's order."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self._nodes = nodes
        self._effects = [i for i, node in enumerate(nodes) if is_effect(node) and node.target is not print]
        self._plain: set[Value] = set()
        """Fetched values, and what arithmetic makes of them: nothing else can change them."""
        for node in nodes:
            plain = node.target in ARITHMETIC and self._plain.issuperset(node.operands)
            if plain or node.target in (read, tensor):
                self._plain.update(node.results)
        self._changed: dict[Value, list[int]] = {}
        for index in self._effects:
            # A method changes the object that it belongs to, and so does a write.
            if nodes[index].target is change:
                continue  # the schedule keeps these in order with all that looks
            is_method = nodes[index].op != "call" or isinstance(nodes[index].target, types.MethodDescriptorType)
            for value in nodes[index].operands[: 1 if is_method else None]:
                self._changed.setdefault(value, []).append(index)

    def notices(self, index: int) -> bool:
        """Whether an effect before a node changes what the node reads, as far as one object has one name."""
        node = self._nodes[index]
        if node.target in _OF_IDENTITY or (node.op == "call" and self._plain.issuperset(node.results)):
            return False
        return any(
            effect < index and not _elsewhere(self._nodes[effect], node)
            for value in node.operands
            for effect in self._changed.get(value, ())
        )

    def may_notice(self, index: int) -> bool:
        """The same where the object may have another name: unless it reads nothing but numbers."""
        is_plain = self._plain.issuperset(self._nodes[index].results)
        return bool(self._effects) and self._effects[0] < index and not is_plain


def _elsewhere(effect: Node, reading: Node) -> bool:
    """Whether an effect writes to another attribute or item than a node reads."""
    if reading.target is operator.contains and effect.op == "set_item":
        written, asked = effect.arguments[1], reading.arguments[1]
        return not isinstance(written, Value | Constant) and not isinstance(asked, Value) and written != asked
    if effect.op == "set_attr" and reading.target in (unhooked, hasattr):
        asked = READ_BY_UNHOOKED if reading.target is unhooked else reading.arguments[1:]
        return effect.arguments[1] not in asked
    pairs = {("set_attr", "get_attr"), ("set_item", "get_item")}
    if (effect.op, reading.op) not in pairs:
        return {effect.op, reading.op} in ({"set_attr", "get_item"}, {"set_item", "get_attr"})
    written, read_at = effect.arguments[1], reading.arguments[1]
    if isinstance(written, Value | Constant) or isinstance(read_at, Value | Constant):
        return False
    if isinstance(written, int) and isinstance(read_at, int) and (written < 0) != (read_at < 0):
        return False  # one item counted from both ends
    return written != read_at

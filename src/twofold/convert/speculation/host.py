"""Writing a host graph: nodes, assumptions, and which values are known too late to decide anything."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch

from twofold.capture.trace_graph import Path
from twofold.convert.refusals import Refusal, Refused
from twofold.graph import (
    SCALAR_TYPES,
    Ambient,
    Argument,
    Constant,
    Graph,
    GraphBuilder,
    Node,
    Origin,
    Value,
    values_in,
)

from .items import Dynamic, Instance, Item, Known, Outside, Place, Tensor
from .items import Mapping as Mapped
from .items import Sequence as Listed
from .library import is_pure
from .speculation import (
    Assumption,
    AssumptionKind,
    Speculation,
    apart,
    change,
    draw,
    equal,
    give,
    instance,
    put,
    read,
    settled,
    step,
    tensor,
)

_DEFAULT = Ambient()
_OF_UNIT = (change, draw, give, put, step)
"""Calls that show none of the program's objects to anything but the unit."""
_MADE = (dict, OrderedDict, defaultdict)
"""Kinds of dictionaries that a call may make and hand out."""


class Host:
    """Collects what must be done anew in each call. Mutable; `finish` ends its life."""

    def __init__(self, name: str, relaxed: frozenset[Hashable]) -> None:
        self._graph = GraphBuilder(name)
        self.relaxed = relaxed
        self.unit = self._graph.input("unit", None)
        self.arguments = self._graph.input("arguments", None)
        self.keywords = self._graph.input("keywords", None)
        self.origin: Origin | None = None
        self.assumptions: list[Assumption] = []
        self.late: set[Value] = set()
        """Values that effects of the call come before."""
        self.data: set[Value] = set()
        """See `Speculation.data`."""
        self.from_unit: set[Value] = set()
        """Values that are known only when the unit has run to its end."""
        self._roots: dict[int, tuple[Value, Any]] = {}
        self._assumed: set[Hashable] = set()
        self._types: dict[Value, Value] = {}
        self._handed: dict[int, Value] = {}
        self._given: set[int] = set()
        self._settled: dict[Value, Value] = {}
        self._replaceable: set[tuple[str, Value, Hashable]] = set()

    # ---- nodes -------------------------------------------------------------------------------------------

    def root(self, name: str, held: Any) -> Value:
        """Return the input for an object that is always the same one."""
        known = self._roots.get(id(held))
        if known is None:
            plain = "".join(letter if letter.isalnum() else "_" for letter in name)
            known = self._roots[id(held)] = self._graph.input(plain, None), held
        return known[0]

    def call(
        self,
        target: Callable[..., Any],
        *arguments: Argument,
        late: bool = False,
        ambient: Ambient = _DEFAULT,
        keywords: Mapping[str, Argument] | None = None,
    ) -> Value:
        """Append a call that returns one object. Its ambient counts for calls of torch functions alone."""
        (made,) = self._graph.node("call", target, arguments, keywords, (None,), origin=self.origin, ambient=ambient)
        return self._note(made, late, arguments, tuple((keywords or {}).values()))

    def effect(
        self,
        target: Callable[..., Any],
        *arguments: Argument,
        ambient: Ambient = _DEFAULT,
        keywords: Mapping[str, Argument] | None = None,
    ) -> None:
        """Append a call for what it does."""
        self._graph.node("call", target, arguments, keywords, origin=self.origin, ambient=ambient)

    def fetch(self, op: str, holder: Argument, key: Argument, late: bool = False) -> Value:
        """Append a `get_attr` or `get_item`."""
        (made,) = self._graph.node(op, None, (holder, key), None, (None,), origin=self.origin)
        return self._note(made, late, (holder, key))

    def store(self, op: str, holder: Argument, key: Argument, value: Argument, replaces: bool = False) -> None:
        """Append a `set_attr` or `set_item`. `replaces`: there was something before the call."""
        if replaces and isinstance(holder, Value) and isinstance(key, int | str):
            self._replaceable.add((op, holder, key))
        self._graph.node(op, None, (holder, key, value), origin=self.origin)

    def _note(self, made: Value, late: bool, *arguments: Argument) -> Value:
        operands = set(values_in(arguments))
        if late or not operands.isdisjoint(self.late):
            self.late.add(made)
        if not operands.isdisjoint(self.from_unit):
            self.from_unit.add(made)
        return made

    # ---- the unit ----------------------------------------------------------------------------------------

    def give(self, index: int, given: Argument) -> None:
        """Append the supply of a feed."""
        if index not in self._given:
            self._given.add(index)
            if isinstance(given, Value):
                self._require_early(given)
            if given in self.from_unit:
                raise Refused(Refusal("several_units", "tensor work needs what the unit before it made", self.origin))
            self.effect(give, self.unit, index, given)

    def read(self, event: int, function: Any, rest: tuple[Any, ...]) -> Value:
        """Append the read of a fetch."""
        return self.call(read, self.unit, event, Constant(function), *[constant(item) for item in rest])

    def draw(
        self, number: int, generator: Value, name: str, arguments: list[Argument], keywords: Mapping[str, Argument]
    ) -> Value:
        """Append a draw from a generator of Python or NumPy. It is made early, so that it may steer the call."""
        for value in values_in((generator, *arguments, *keywords.values())):
            self._require_early(value)
        return self.call(draw, self.unit, number, generator, name, *arguments, keywords=keywords)

    def change(
        self, function: Callable[..., Any], array: Value, arguments: list[Argument], keywords: Mapping[str, Argument]
    ) -> None:
        """Append a change of an array in place."""
        self.effect(change, self.unit, Constant(function), array, *arguments, keywords=keywords)

    def put(self, holder: Value, key: str, value: Argument) -> None:
        """Append the setting of an optimizer that steps in this call."""
        for needed in values_in((value,)):
            self._require_early(needed)
        self.effect(put, self.unit, holder, key, value)

    def step(self, event: int) -> None:
        """Append the step of an optimizer that steps by itself."""
        self.effect(step, self.unit, event)

    def handed_out(self, slot: int) -> Value:
        """Return the tensor of a slot, for Python to keep."""
        known = self._handed.get(slot)
        if known is None:
            known = self._handed[slot] = self.call(tensor, self.unit, slot)
            self.from_unit.add(known)
        return known

    def settled(self, value: Value) -> Value:
        """Return a tensor from outside as the unit leaves it."""
        known = self._settled.get(value)
        if known is None:
            known = self._settled[value] = self.call(settled, self.unit, value)
            self.from_unit.add(known)
            if value in self.data:
                self.data.add(known)
        return known

    # ---- assumptions -------------------------------------------------------------------------------------

    def assume(self, kind: AssumptionKind, place: Place, expected: str, predicate: Value) -> None:
        """Append an assertion."""
        self._require_early(predicate)
        index = len(self.assumptions)
        self.assumptions.append(Assumption(kind, place.name, expected, self.origin, place.location))
        self._graph.node("assert", None, (predicate,), {"message": str(index)}, origin=self.origin)

    def _is_new(self, *key: Hashable) -> bool:
        is_new = key not in self._assumed
        self._assumed.add(key)
        return is_new

    def assume_value(self, value: Value, expected: Any, place: Place) -> None:
        """Assume that a value is the one seen."""
        if not self._is_new("value", value):
            return
        if expected is None or isinstance(expected, bool):
            predicate = self.call(operator.is_, value, expected)
        else:
            # By reference, because the check begins with identity; but keys, the tuple of which is made each time.
            is_kept = type(expected) is tuple and not all(type(item) is str for item in expected)
            predicate = self.call(equal, value, Constant(expected) if is_kept else constant(expected))
        self.assume("value", place, shown(expected), predicate)

    def assume_identity(self, value: Value, expected: Any, place: Place, kind: AssumptionKind = "identity") -> None:
        """Assume that a value is one object."""
        if self._is_new("identity", value):
            self.assume(kind, place, shown(expected), self.call(operator.is_, value, Constant(expected)))

    def assume_type(self, value: Value, expected: type, place: Place) -> None:
        """Assume that a value is of exactly one type."""
        if self._is_new("type", value):
            predicate = self.call(operator.is_, self.call(type, value), Constant(expected))
            self.assume("type", place, expected.__qualname__, predicate)

    def assume_length(self, value: Value, expected: int, place: Place) -> None:
        """Assume how many items a value has."""
        if self._is_new("length", value):
            predicate = self.call(operator.eq, self.call(len, value), expected)
            self.assume("length", place, str(expected), predicate)

    def assume_same(self, left: Value, right: Value, is_same: bool, place: Place) -> None:
        """Assume that two values are one object, or are not."""
        if left is not right and self._is_new("same", frozenset((left, right))):
            predicate = self.call(operator.is_ if is_same else operator.is_not, left, right)
            self.assume("identity", place, "the same object" if is_same else "an object of its own", predicate)

    def assume_branch(self, value: Value, taken: bool, place: Place) -> None:
        """Assume which way a predicate goes."""
        if self._is_new("branch", value):
            self.assume("branch", place, str(taken), self.call(operator.truth if taken else operator.not_, value))

    def assume_absent(self, holder: Value, name: str, place: Place) -> None:
        """Assume that a namespace does not have a name."""
        if self._is_new("absent", place.location):
            found = self.call(operator.contains, holder, name)
            self.assume("branch", place, "true", self.call(operator.not_, found))

    def assume_once(self, place: Place, predicate: Callable[..., Any], value: Value, *rest: Argument) -> None:
        """Assume that a predicate holds of a value."""
        if self._is_new("once", place.location):
            self.assume("identity", place, "true", self.call(predicate, value, *rest))

    def assume_apart(self, array: Value, given: Value, place: Place) -> None:
        """Assume that an array that the call changes is none that a tensor of the unit shows."""
        if self._is_new("apart", array, given):
            self.assume("branch", place, "memory of its own", self.call(apart, array, given))

    def assume_tensor(self, described: Value, expected: tuple[Any, ...], place: Place) -> None:
        """Assume that what is described of a tensor is what was seen."""
        self.assume("tensor", place, shown(expected), self.call(equal, described, constant(expected)))

    def _require_early(self, value: Value) -> None:
        if value in self.late:
            text = "what the call does next depends on something that the call itself changes in place"
            raise Refused(Refusal("late_decision", text, self.origin))

    # ---- items as arguments ------------------------------------------------------------------------------

    def argument(self, item: Item) -> Argument:
        """Return what stands for an item in the arguments of a node; containers of the call are made here."""
        match item:
            case Known():
                return constant(item.object)
            case Dynamic() | Outside():
                return item.value
            case Tensor():
                if item.slot is not None:
                    return self.handed_out(item.slot)
                assert item.value is not None
                return item.value
            case Listed() if item.kind is tuple and item.value is None:
                return tuple(self.argument(inner) for inner in item.items)
            case Listed() | Mapped() | Instance() if item.kind in _MADE or not issubclass(item.kind, dict):
                if item.value is None:
                    item.value = self._make(item)
                    if isinstance(item, Mapped):
                        for name, inner in item.attributes.items():
                            self.store("set_attr", item.value, name, self.argument(inner))
                return item.value
            case _:
                text = f"{type(item).__name__.lower()} made by the call is kept or given to library code"
                raise Refused(Refusal("unsupported_object", f"a {text}", self.origin))

    def nested(self, item: Item) -> Argument:
        """Return what stands for an item in the arguments of a function that keeps none of them."""
        match item:
            case Listed() if item.kind in (list, tuple) and item.value is None:
                return item.kind(self.nested(inner) for inner in item.items)
            case Mapped() if (
                item.kind is dict and item.value is None and all(type(k) in SCALAR_TYPES for k in item.entries)
            ):
                return {key: self.nested(inner) for key, inner in item.entries.items()}
            case _:
                return self.argument(item)

    def _make(self, item: Listed | Mapped | Instance) -> Value:
        match item:
            case Listed():
                items = [self.argument(inner) for inner in item.items]
                if item.kind in (list, tuple, torch.Size) or item.kind.__module__ == "torch.return_types":
                    return self.call(item.kind, items)
                return self.call(item.kind, *items)  # a named tuple
            case Mapped():
                entries = {key: self.argument(inner) for key, inner in item.entries.items()}
                if item.kind is set:
                    return self.call(set, list(entries))
                if not all(type(key) in SCALAR_TYPES for key in entries):
                    pairs: list[Argument] = [(constant(key), inner) for key, inner in entries.items()]
                    return self.call(item.kind, pairs)
                return self.call(item.kind, entries)
            case Instance():
                attributes = {name: self.argument(inner) for name, inner in item.attributes.items()}
                return self.call(instance, Constant(item.kind), attributes)

    # ---- the end -----------------------------------------------------------------------------------------

    def finish(self, result: Item, path: Path) -> Speculation:
        """Return the finished speculation."""
        graph = drop_unread(drop_overwritten(self._graph.finish((self.argument(result),)), self._replaceable))
        roots = dict(self._roots.values())
        return Speculation(graph, roots, path, tuple(self.assumptions), frozenset(self.data))


def drop_overwritten(graph: Graph, replaceable: Collection[tuple[str, Value, Hashable]]) -> Graph:
    """Drop writes to a place that is written again before any effect could show it. The order of keys stays."""
    later: set[tuple[str, Value, Hashable]] = set()
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op in ("set_attr", "set_item"):
            holder, key, _ = node.arguments
            place = None
            if isinstance(holder, Value) and isinstance(key, int | str):
                place = str(node.op), holder, key
            if place in later:
                continue
            if place is not None and place in replaceable:
                later.add(place)
        elif node.op == "call" and not (node.results and is_pure(node.target)) and node.target not in _OF_UNIT:
            later.clear()
        else:
            later = {place for place in later if not _reads(node, place)}
            if node.target is list and node.results:
                node = _without_overwritten(node, later)
        kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)))


def _without_overwritten(node: Node, later: Collection[tuple[str, Value, Hashable]]) -> Node:
    """Return the making of a list without the items that others take the place of: these need not be kept."""
    (items,) = node.arguments
    if not isinstance(items, list):
        return node
    kept = [None if ("set_item", node.results[0], index) in later else item for index, item in enumerate(items)]
    return replace(node, arguments=(kept,))


def _reads(node: Node, place: tuple[str, Value, Hashable]) -> bool:
    """Whether a node without an effect may see what is written to a place."""
    if node.op in ("get_attr", "get_item") and node.arguments[0] is place[1]:
        key = node.arguments[1]
        return isinstance(key, Value | Constant) or key == place[2] or (isinstance(key, int) and key < 0)
    return node.op != "assert" and place[1] in node.operands


def drop_unread(graph: Graph) -> Graph:
    """Drop the nodes that only read or compute what nobody asks for."""
    live = {value for output in graph.outputs for value in values_in(output)}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        is_read = node.op in ("get_attr", "get_item") or (node.op == "call" and node.results and is_pure(node.target))
        if is_read and live.isdisjoint(node.results):
            continue
        live.update(node.operands)
        kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)))


def constant(held: Any) -> Argument:
    """Return an object as an argument: a literal where it is one."""
    kind = type(held)
    if kind in SCALAR_TYPES and not (kind is float and not math.isfinite(held)):
        return held
    if kind is tuple:
        return tuple(constant(item) for item in held)
    if kind is slice:
        return slice(constant(held.start), constant(held.stop), constant(held.step))
    return Constant(held)


def shown(held: Any) -> str:
    """Return a short text for an object."""
    if isinstance(held, torch.Tensor):
        return f"a tensor of shape {tuple(held.shape)}"
    if isinstance(held, bool | int | float | complex | str | tuple | type(None)):
        return repr(held)[:80]
    return getattr(held, "__qualname__", None) or f"a {type(held).__qualname__}"

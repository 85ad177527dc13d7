"""Which part of a converted function Python computes, and which part tensors.

Every value gets a kind. *Fixed* values are read from outside and the same for all invocations: parameters, sizes.
*Host* values are computed by Python while it walks the structure. *Tensor* values are computed afterwards, for all
invocations together. *Mixed* values are Python containers made inside the function that hold tensors: both slices have
them. Kinds only grow (fixed < host < mixed < tensor), so repeating the pass until nothing changes ends at the least
assignment.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from twofold.convert.refusals import Refusal, Refused, line_of
from twofold.convert.targets import apply, fail, method
from twofold.graph import Argument, Graph, Node, Origin, SubGraph, Value, evaluate, values_in

from .convert import Converted
from .functions import Function, Outer
from .operations import (
    ARITHMETIC,
    CONTAINERS,
    FETCHES,
    KEEPERS,
    NUMBERS,
    RANDOM,
    RANDOM_MODULES,
    READING_METHODS,
    SEVERAL,
    SEVERAL_MODULES,
    UNREADABLE,
    has_hook,
    is_torch,
    without_effect,
)


class Kind(IntEnum):
    """Where a value is computed."""

    FIXED = 0
    HOST = 1
    MIXED = 2
    TENSOR = 3


@dataclass
class Slices:
    """The kind of each value; the objects of fixed ones; and what must be what it was for these to hold."""

    kinds: dict[Value, Kind] = field(default_factory=dict[Value, Kind])
    fixed: dict[Value, Any] = field(default_factory=dict[Value, Any])
    assumed: list[Outer] = field(default_factory=list[Outer])
    exports: set[int] = field(default_factory=set[int])
    """Nodes, by id, at which the host is handed tensors that it keeps."""
    fetches: set[int] = field(default_factory=set[int])
    """Nodes, by id, at which the host reads the values of tensors."""
    effects: bool = False
    """Whether the host slice does more than read Python objects: then it must be run in the program's order."""

    def kind(self, argument: Argument) -> Kind:
        """Return the greatest kind in an argument."""
        return max((self.kinds.get(value, Kind.FIXED) for value in values_in(argument)), default=Kind.FIXED)

    def is_tensor(self, argument: Argument) -> bool:
        """Say whether there is a tensor in an argument, one from outside included."""
        if self.kind(argument) is Kind.TENSOR:
            return True
        return any(isinstance(self.fixed.get(value), torch.Tensor) for value in values_in(argument))

    def given(self, argument: Argument) -> Kind:
        """Return the kind that an argument gives to what it is bound to, which no longer is fixed."""
        return Kind.TENSOR if self.is_tensor(argument) else max(self.kind(argument), Kind.HOST)

    def known(self, argument: Argument) -> Any:
        """Return the object that a fixed argument stands for."""
        return evaluate(argument, self.fixed)


def slice_graph(converted: Converted, varying: frozenset[tuple[Any, ...]]) -> Slices:
    """Give every value its kind. Raises `Refused`.

    `varying` are the keys of outer values that were seen to change, which are not to be relied on.
    """
    analysis = _Analysis(converted, varying)
    while analysis.step():
        pass
    analysis.check_fetches()
    return analysis.slices


class _Analysis:
    def __init__(self, converted: Converted, varying: frozenset[tuple[Any, ...]]) -> None:
        self._graph: Graph = converted.graph
        self._converted = converted
        self.slices = slices = Slices()
        self._changed = False
        for value, outer in converted.outer.items():
            if isinstance(outer.object, (*NUMBERS, torch.Tensor, torch.nn.Module)) or callable(outer.object):
                if outer.key in varying:
                    slices.kinds[value] = Kind.HOST
                else:
                    slices.kinds[value], slices.fixed[value] = Kind.FIXED, outer.object
                    slices.assumed.append(outer)
            else:
                slices.kinds[value] = Kind.HOST
        for name in converted.functions:
            slices.kinds.update(dict.fromkeys(converted.graph.subgraphs[name].inputs, Kind.HOST))

    def step(self) -> bool:
        """Go through all bodies once; say whether a kind changed."""
        self._changed = False
        for body in self._graph.subgraphs.values():
            self._body(body)
        return self._changed

    def _raise_to(self, value: Value, kind: Kind) -> None:
        if kind > self.slices.kinds.get(value, -1):
            self.slices.kinds[value] = kind
            self._changed = True
        if kind is not Kind.FIXED:
            self.slices.fixed.pop(value, None)

    def _body(self, body: SubGraph) -> None:
        for node in body.nodes:
            match node.op:
                case "if":
                    self._note_fetch(node, self.slices.kind(node.arguments[0]) is Kind.TENSOR)
                    for side in node.subgraphs:
                        self._body(side)
                    for index, result in enumerate(node.results):
                        self._raise_to(result, max(self.slices.given(side.outputs[index]) for side in node.subgraphs))
                case "loop":
                    self._loop(node)
                case "while":
                    self._while(node)
                case "invoke":
                    self._invoke(node)
                case _:
                    self._plain(node)

    def _while(self, node: Node) -> None:
        condition, body = node.subgraphs
        for number, first in enumerate(node.arguments):
            kind = max(self.slices.given(first), self.slices.given(body.outputs[number]))
            for value in (condition.inputs[number], body.inputs[number], node.results[number]):
                self._raise_to(value, kind)
        self._body(condition)
        self._note_fetch(node, self.slices.kind(condition.outputs[0]) is Kind.TENSOR)
        self._body(body)

    def _loop(self, node: Node) -> None:
        if self.slices.is_tensor(node.arguments[0]):
            raise self._refused("tensor_fetch", "a loop over the rows of a tensor", node)
        (body,) = node.subgraphs
        index, *inputs = body.inputs
        self._raise_to(index, Kind.HOST)
        for value, first, last in zip(inputs, node.arguments[1:], body.outputs, strict=True):
            self._raise_to(value, max(self.slices.given(first), self.slices.given(last)))
        self._body(body)
        for result, value in zip(node.results, inputs, strict=True):
            self._raise_to(result, self.slices.kinds[value])

    def _invoke(self, node: Node) -> None:
        callee = self._graph.subgraphs[str(node.target)]
        for argument, value in zip(node.arguments, callee.inputs, strict=True):
            given = self.slices.given(argument)
            mixed = any(self.slices.kinds.get(v) is Kind.MIXED for v in values_in(argument))
            if given is Kind.MIXED or mixed or (given is Kind.TENSOR and _has_list(argument)):
                raise self._refused("tensor_argument", "a list with tensors in it is passed down", node)
            self._raise_to(value, given)
        for result, output in zip(node.results, callee.outputs, strict=True):
            self._raise_to(result, self.slices.given(output))

    def _plain(self, node: Node) -> None:
        operands = [*node.arguments, *(argument for _, argument in node.keywords)]
        kind = max((self.slices.kind(operand) for operand in operands), default=Kind.FIXED)
        if any(self.slices.is_tensor(operand) for operand in operands):
            kind = Kind.TENSOR
        result = self._kind_of(node, kind)
        for value in node.results:
            self._raise_to(value, result)

    def _kind_of(self, node: Node, kind: Kind) -> Kind:
        """Return the kind of a node's results, from the greatest kind of its operands."""
        match node.op:
            case "get_attr" | "get_item":
                return self._read(node, kind)
            case "set_attr" | "set_item":
                return self._write(node, kind)
            case _:
                return self._called(node, kind)

    def _read(self, node: Node, kind: Kind) -> Kind:
        holder = node.arguments[0]
        if node.op == "get_item" and not self.slices.is_tensor(holder) and kind is Kind.TENSOR:
            if self.slices.kind(holder) is Kind.MIXED:
                raise self._refused("tensor_fetch", "a tensor is an index of a list with tensors in it", node)
            self._note_fetch(node, True)
            return Kind.HOST
        if self.slices.kind(holder) is Kind.MIXED:
            return Kind.TENSOR
        return kind if kind is Kind.TENSOR else Kind.HOST

    def _write(self, node: Node, kind: Kind) -> Kind:
        holder, key, _ = node.arguments
        if self.slices.is_tensor(holder) or self.slices.is_tensor(key):
            raise self._refused("unsupported_call", "a tensor is written to by index or attribute", node)
        if kind >= Kind.MIXED and self.slices.kind(holder) <= Kind.HOST:
            self.slices.exports.add(id(node))
        return Kind.HOST

    def _called(self, node: Node, kind: Kind) -> Kind:
        target: Any = node.target
        if target in (operator.is_, operator.is_not) and kind >= Kind.MIXED:
            raise self._refused("tensor_fetch", "identity of a tensor", node)
        if target in CONTAINERS and kind >= Kind.MIXED:
            whole = any(isinstance(a, Value) and self.slices.kinds.get(a) is Kind.TENSOR for a in node.arguments)
            return Kind.TENSOR if whole else Kind.MIXED
        if target is list and not node.arguments:
            return Kind.HOST
        if target is list.append:
            return self._kept(node, node.arguments[0], node.arguments[1], kind)
        if target is method and not self.slices.is_tensor(node.arguments[0]):
            return self._host_method(node, kind)
        if target is len and kind is Kind.MIXED:
            return Kind.HOST
        if kind >= Kind.MIXED or self._computes_tensors(node):
            return self._tensor_call(node)
        if kind is Kind.FIXED and target in ARITHMETIC:
            self.slices.fixed[node.results[0]] = target(*map(self.slices.known, node.arguments))
            return Kind.FIXED
        return Kind.HOST

    def _computes_tensors(self, node: Node) -> bool:
        target: Any = node.target
        if target is apply:
            callee = self._callee(node)
            return isinstance(callee, torch.nn.Module) or (callee is not None and is_torch(callee))
        return is_torch(target)

    def _callee(self, node: Node) -> Any:
        callee = node.arguments[0] if node.target is apply else None
        return self.slices.fixed.get(callee) if isinstance(callee, Value) else None

    def _tensor_call(self, node: Node) -> Kind:
        target: Any = node.target
        self._check_repeatable(node)
        if (target is method and node.arguments[1] in FETCHES) or target in (bool, int, float, operator.not_):
            self._note_fetch(node, True)
            return Kind.HOST
        if target is method and node.arguments[1] in UNREADABLE:
            raise self._refused("tensor_fetch", "the memory of a tensor is read", node)
        if target is apply and not self._computes_tensors(node):
            raise self._refused("unsupported_call", "a function that cannot be converted is given tensors", node)
        builtin = type(target) is type or getattr(target, "__module__", None) == "builtins"
        if builtin and target not in (sum, max, min, abs, pow, slice):
            raise self._refused("unsupported_call", f"{target.__name__} is given tensors", node)
        return Kind.TENSOR

    def _check_repeatable(self, node: Node) -> None:
        """Refuse what draws random numbers, or writes to what is outside."""
        target: Any = node.target
        name = _name_of(node)
        callee = self._callee(node) if target is apply else None
        modules = list(callee.modules()) if isinstance(callee, torch.nn.Module) else []
        if name in RANDOM or any(isinstance(m, RANDOM_MODULES) and m.training for m in modules):
            raise self._refused("random", "random numbers are drawn, or statistics updated", node)
        if any(has_hook(module) for module in modules):
            raise self._refused("module_hook", f"{type(callee).__name__} has a hook", node)
        writes = isinstance(name, str) and name.endswith("_") and not name.endswith("__")
        receiver = node.arguments[0] if node.arguments else None
        in_place = name in ("iadd", "isub", "imul", "itruediv")
        if (writes or in_place) and isinstance(receiver, Value) and receiver in self.slices.fixed:
            raise self._refused("unsupported_call", "a tensor from outside is written to", node)

    def _host_method(self, node: Node, kind: Kind) -> Kind:
        receiver, name, *arguments = node.arguments
        if self.slices.kind(receiver) is Kind.MIXED or kind < Kind.MIXED:
            return max(kind, Kind.HOST)
        if name not in KEEPERS:
            raise self._refused("unsupported_call", f"a method of a Python object, {name}, is given tensors", node)
        return self._kept(node, receiver, arguments[-1], kind)

    def _kept(self, node: Node, receiver: Argument, argument: Argument, kind: Kind) -> Kind:
        """A container is handed something: one made in this function becomes mixed, others are handed an export."""
        if kind >= Kind.MIXED or self.slices.is_tensor(argument):
            if any(self.slices.kinds.get(value) is Kind.MIXED for value in values_in(argument)):
                raise self._refused("unsupported_call", "a list with tensors in it is kept by a Python object", node)
            if isinstance(receiver, Value) and receiver in self._local_lists():
                self._raise_to(receiver, Kind.MIXED)
            else:
                self.slices.exports.add(id(node))
        return Kind.HOST

    def _local_lists(self) -> set[Value]:
        if not hasattr(self, "_lists"):
            self._lists: set[Value] = set()
            for body in self._graph.subgraphs.values():
                self._collect_lists(body)
        return self._lists

    def _collect_lists(self, body: SubGraph) -> None:
        for node in body.nodes:
            if node.op == "call" and node.target in (list, dict):
                self._lists.update(node.results)
            for nested in node.subgraphs:
                self._collect_lists(nested)

    def _note_fetch(self, node: Node, fetches: bool) -> None:
        (self.slices.fetches.add if fetches else self.slices.fetches.discard)(id(node))

    def check_fetches(self) -> None:
        """Refuse what cannot be fetched, and find out whether the host slice has effects."""
        nodes = [node for body in self._graph.subgraphs.values() for node in _all_nodes(body)]
        self.slices.effects = any(self._has_effect(node) for node in nodes)
        for function in self._converted.functions.values():
            self._check_results(function)
        for node in nodes:
            if id(node) in self.slices.fetches and any(
                self.slices.kinds.get(value) is Kind.MIXED for value in node.operands
            ):
                raise self._refused("tensor_fetch", "the truth of a list with tensors in it", node)

    def _check_results(self, function: Function) -> None:
        body = self._graph.subgraphs[function.name]
        makers = {value: node for node in _all_nodes(body) for value in node.results}
        for output in body.outputs:
            node = makers.get(output) if isinstance(output, Value) else None
            name = None if node is None else _name_of(node)
            several = name in SEVERAL or (node is not None and isinstance(self._callee(node), SEVERAL_MODULES))
            if self.slices.kind(output) is Kind.MIXED or several:
                construct = "several tensors in one object are returned"
                origin = function.source.origin(function.source.definition) if node is None else node.origin
                raise refused("result_structure", construct, origin)

    def _has_effect(self, node: Node) -> bool:
        """Say whether the host does more at a node than read."""
        host = not node.results or self.slices.kinds[node.results[0]] in (Kind.HOST, Kind.MIXED)
        if node.op in ("set_attr", "set_item"):
            return self.slices.kind(node.arguments[0]) is not Kind.MIXED
        if node.op != "call" or not host or node.target in (list.append, fail):
            return False
        if node.target is method:
            return node.arguments[1] not in READING_METHODS
        return not without_effect(node.target) and not isinstance(node.target, type)

    def _refused(self, code: str, construct: str, node: Node) -> Refused:
        return refused(code, construct, node.origin)


def refused(code: str, construct: str, origin: Origin | None) -> Refused:
    """Return the exception that refuses what comes from a line."""
    return Refused(Refusal(code, construct, origin, line_of(origin) if origin else ""))


def _all_nodes(body: SubGraph) -> Iterator[Node]:
    for node in body.nodes:
        yield node
        for nested in node.subgraphs:
            yield from _all_nodes(nested)


def _has_list(argument: Argument) -> bool:
    return isinstance(argument, list | dict) or (isinstance(argument, tuple) and any(map(_has_list, argument)))


def _name_of(node: Node) -> Any:
    """Return the name of the function or method that a node calls."""
    return node.arguments[1] if node.target is method else getattr(node.target, "__name__", "")

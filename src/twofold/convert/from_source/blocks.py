"""Blocks: what tensors compute in one invocation, as straight-line code.

The host decides, invocation by invocation, which side of each choice is taken and how often each loop runs. One
sequence of decisions makes one block: choices resolved, loops unrolled, helpers inlined. All invocations with the same
decisions run the same block, and so can run it together.

`Walk` defines the order in which decisions, operands and host values occur; the planner that `planner` generates
follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from twofold.convert.targets import method
from twofold.graph import Argument, Constant, Node, SubGraph, Value, map_values, values_in

from .convert import Converted
from .slices import Kind, Slices


@dataclass(frozen=True)
class Operand:
    """A tensor that a block takes: result number `result` of its invocation number `invocation`, a call of `callee`."""

    invocation: int
    callee: str
    result: int


@dataclass(frozen=True)
class Block:
    """Straight-line tensor code of one sequence of decisions.

    The inputs of `body` are one value for each of `operands`, then one for each host value. Its outputs are the
    function's tensor results, then the tensors that the host is handed to keep; `results` numbers them: the former as
    the function lists them, the latter -1, -2, ...
    """

    function: str
    decisions: tuple[Any, ...]
    body: SubGraph
    operands: tuple[Operand, ...]
    hosts: int
    results: tuple[int, ...]
    callees: tuple[str, ...]
    """The function called by each invocation, in order."""


def in_tensor_slice(node: Node, slices: Slices) -> bool:
    """Say whether a plain node belongs to the tensor slice."""
    if node.results and slices.kinds[node.results[0]] >= Kind.MIXED:
        return True
    if id(node) in slices.exports:
        return False
    return (
        bool(node.arguments) and slices.kind(node.arguments[0]) is Kind.MIXED and node.target in (list.append, method)
    )


def in_host_slice(node: Node, slices: Slices) -> bool:
    """Say whether a plain node belongs to the host slice."""
    return not node.results or slices.kinds[node.results[0]] in (Kind.HOST, Kind.MIXED)


def matters(body: SubGraph, slices: Slices) -> bool:
    """Say whether anything in a body, or its outputs, concerns the tensor slice."""
    return any(
        node.op == "invoke"
        or id(node) in slices.exports
        or (
            any(matters(nested, slices) for nested in node.subgraphs)
            if node.subgraphs
            else in_tensor_slice(node, slices)
        )
        for node in body.nodes
    ) or any(slices.kind(output) >= Kind.MIXED for output in body.outputs)


def decides(node: Node, slices: Slices) -> bool:
    """Say whether a choice or loop is one of a block's decisions."""
    joined = any(slices.kinds[result] is Kind.TENSOR for result in node.results)
    return joined or any(matters(body, slices) for body in node.subgraphs)


def host_values(node: Node, slices: Slices) -> Iterator[Value]:
    """Yield the host values that a node of the tensor slice takes, in order."""
    for value in node.operands:
        if slices.kinds[value] is Kind.HOST:
            yield value


def handed_over(node: Node, slices: Slices) -> list[Value]:
    """Return the tensors that the host is handed at a node."""
    return [value for value in node.operands if slices.kinds[value] is Kind.TENSOR]


def tensor_results(body: SubGraph, slices: Slices) -> tuple[int, ...]:
    """Return which outputs of a function's body are tensors."""
    return tuple(index for index, output in enumerate(body.outputs) if slices.given(output) is Kind.TENSOR)


def make_block(converted: Converted, slices: Slices, function: str, decisions: tuple[Any, ...]) -> Block:
    """Build the block of a function for one sequence of decisions."""
    return _Walk(converted, slices, function, decisions).block()


@dataclass
class _Walk:
    converted: Converted
    slices: Slices
    function: str
    decisions: tuple[Any, ...]
    bound: dict[Value, Argument] = field(default_factory=dict[Value, Argument])
    nodes: list[Node] = field(default_factory=list[Node])
    operands: dict[Operand, Value] = field(default_factory=dict[Operand, Value])
    hosts: list[Value] = field(default_factory=list[Value])
    exports: list[Argument] = field(default_factory=list[Argument])
    callees: list[str] = field(default_factory=list[str])
    names: int = 0

    def block(self) -> Block:
        """Walk the function's body."""
        body = self.converted.graph.subgraphs[self.function]
        self._rest = iter(self.decisions)
        self._body(body)
        results = tensor_results(body, self.slices)
        outputs = [self._joined(body.outputs[index]) for index in results]
        used = {value for node in self.nodes for value in node.operands}
        used.update(value for output in (*outputs, *self.exports) for value in values_in(output))
        operands = {operand: value for operand, value in self.operands.items() if value in used}
        name = f"{self.function}.{'.'.join(str(decision) for decision in self.decisions)}".rstrip(".")
        linear = SubGraph(name, (*operands.values(), *self.hosts), tuple(self.nodes), (*outputs, *self.exports))
        numbers = (*results, *(-1 - index for index in range(len(self.exports))))
        return Block(
            self.function, self.decisions, linear, tuple(operands), len(self.hosts), numbers, tuple(self.callees)
        )

    def _fresh(self) -> Value:
        self.names += 1
        return Value(str(self.names), None)

    def _body(self, body: SubGraph) -> None:
        for node in body.nodes:
            match node.op:
                case "if":
                    self._if(node)
                case "loop":
                    self._loop(node)
                case "invoke":
                    for index, result in enumerate(node.results):
                        operand = Operand(len(self.callees), str(node.target), index)
                        self.bound[result] = self.operands[operand] = self._fresh()
                    self.callees.append(str(node.target))
                case _:
                    self._plain(node)

    def _if(self, node: Node) -> None:
        if not decides(node, self.slices):
            return
        side = node.subgraphs[0 if next(self._rest) else 1]
        self._body(side)
        for result, output in zip(node.results, side.outputs, strict=True):
            self._bind(result, output)

    def _loop(self, node: Node) -> None:
        if not decides(node, self.slices):
            return
        (body,) = node.subgraphs
        carried = body.inputs[1:]
        held = node.arguments[1:]
        for value, first in zip(carried, held, strict=True):
            self._bind(value, first)
        for _ in range(next(self._rest)):
            self._body(body)
            after = [self._value(value, output) for value, output in zip(carried, body.outputs, strict=True)]
            self.bound.update((v, a) for v, a in zip(carried, after, strict=True) if a is not None)
        for result, value in zip(node.results, carried, strict=True):
            if value in self.bound:
                self.bound[result] = self.bound[value]

    def _bind(self, value: Value, argument: Argument) -> None:
        held = self._value(value, argument)
        if held is not None:
            self.bound[value] = held

    def _value(self, value: Value, argument: Argument) -> Argument | None:
        """Return what a value of the tensor slice is bound to; None if it is the host's."""
        if self.slices.kinds[value] is Kind.TENSOR:
            return self._joined(argument)
        return self._argument(argument) if self.slices.kinds[value] is Kind.MIXED else None

    def _joined(self, argument: Argument) -> Argument:
        """Return an argument that becomes a tensor value: a host value among its sources is an input of the block."""
        if isinstance(argument, Value) and self.slices.kinds[argument] is Kind.HOST:
            return self._host()
        return self._argument(argument)

    def _host(self) -> Value:
        value = self._fresh()
        self.hosts.append(value)
        return value

    def _plain(self, node: Node) -> None:
        if id(node) in self.slices.exports:
            self.exports += [self._argument(value) for value in handed_over(node, self.slices)]
        if not in_tensor_slice(node, self.slices):
            return
        taken = {value: self._host() for value in dict.fromkeys(host_values(node, self.slices))}

        def rename(argument: Argument) -> Argument:
            return map_values(argument, lambda value: taken[value] if value in taken else self._argument(value))

        results = tuple(self._fresh() for _ in node.results)
        arguments = tuple(rename(argument) for argument in node.arguments)
        keywords = tuple((name, rename(argument)) for name, argument in node.keywords)
        self.nodes.append(replace(node, arguments=arguments, keywords=keywords, results=results))
        self.bound.update(zip(node.results, results, strict=True))

    def _argument(self, argument: Argument) -> Argument:
        return map_values(argument, self._bound)

    def _bound(self, value: Value) -> Argument:
        if value in self.bound:
            return self.bound[value]
        held = self.slices.fixed[value]
        return held if type(held) in (int, float, bool, str, type(None)) else Constant(held)

"""The host slice as generated Python: planners, which walk the structure and compute no tensors.

Each function gets two. `walk_f` is an ordinary recursive function, for the upper levels. `plan_f`, which it goes over
to where they end, is a generator function: where the function calls a recursive one it yields that function's planner
and is sent its result, and last it yields its own, so that depth is bounded by memory alone. The result is the number
of the invocation, or a tuple of that number and the results that are Python objects.

A planner tells of each invocation: its block, the numbers of the invocations it made, the host values that tensors
are computed from, and the tensors that the host keeps:

    emit(block, invocations, host_values, kept)

Where all decisions are choices, the code after a choice is written once for each side, and the block of each way
through is known in advance. Otherwise decisions are collected in a list and the block is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from twofold.convert.python_text import operation
from twofold.graph import Argument, Constant, Node, SubGraph, Value

from .blocks import decides, handed_over, host_values, in_host_slice, in_tensor_slice, tensor_results
from .convert import Converted
from .slices import Kind, Slices

MOST_WAYS = 32
"""Ways through a function up to which the code after a choice is repeated for each side."""


@dataclass(frozen=True)
class PlannerSource:
    """The text of a function's planner, and what the names in it stand for."""

    text: str
    objects: dict[str, Any]


def planner_source(
    converted: Converted,
    slices: Slices,
    function: str,
    block_of: Callable[[tuple[Any, ...]], Any],
    runtime: dict[str, Any],
) -> PlannerSource:
    """Return the planners of a function.

    `block_of` returns what `emit` is to be told for a sequence of decisions. `runtime` has `emit`; `keep`, which
    makes the object that the host keeps in place of a tensor that is not there yet; and `drive`, which runs a
    generator planner.
    """
    objects: dict[str, Any] = dict(runtime)
    texts = [
        _Generator(converted, slices, function, block_of, objects, recursive).text() for recursive in (True, False)
    ]
    return PlannerSource("\n".join(texts), objects)


@dataclass(frozen=True)
class _Way:
    """What is known, while code is generated, of one way through a function. All are names in the generated code."""

    decisions: tuple[int, ...] = ()
    invocations: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass
class _Generator:
    converted: Converted
    slices: Slices
    function: str
    block_of: Callable[[tuple[Any, ...]], Any]
    objects: dict[str, Any]
    recursive: bool
    lines: list[str] = field(default_factory=list[str])
    depth: int = 1
    names: dict[Value, str] = field(default_factory=dict[Value, str])
    handed: dict[Value, str] = field(default_factory=dict[Value, str])
    count: int = 0

    def text(self) -> str:
        """Generate the planner."""
        body = self.converted.graph.subgraphs[self.function]
        self.looked_up = _has_loop(body, self.slices) or _ways(body, self.slices) > MOST_WAYS
        parameters = [self._name(v) for v in body.inputs if self.slices.kinds[v] is not Kind.TENSOR]
        if self.recursive:
            self._line("if not levels:")
            self._line(f"    return drive(plan_{self.function}({', '.join(parameters)}))")
        if self.looked_up:
            self._line("decisions = []; invocations = []; hosts = []; kept = []")
        self._continue([(body, 0, self._finish)], _Way())
        if self.recursive:
            head = f"def walk_{self.function}({', '.join([*parameters, 'levels'])}):\n"
        else:
            head = f"def plan_{self.function}({', '.join(parameters)}):\n"
        return head + "\n".join(self.lines) + "\n"

    # Names and lines.

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _name(self, value: Value) -> str:
        if value not in self.names:
            self.names[value] = self._new("v")
        return self.names[value]

    def _new(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def _object(self, held: Any) -> str:
        for name, known in self.objects.items():
            if known is held:
                return name
        name = f"c{len(self.objects)}"
        self.objects[name] = held
        return name

    def _text(self, argument: Argument) -> str:
        """Return the expression of an argument; tensors are None."""
        if isinstance(argument, Value):
            return self._value(argument)
        if isinstance(argument, tuple):
            return f"({''.join(self._text(item) + ', ' for item in argument)})"
        if isinstance(argument, list):
            return f"[{', '.join(self._text(item) for item in argument)}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{self._text(k)}: {self._text(v)}' for k, v in argument.items())}}}"
        if isinstance(argument, slice):
            return f"slice({self._text(argument.start)}, {self._text(argument.stop)}, {self._text(argument.step)})"
        if isinstance(argument, Constant):
            return self._object(argument.object)
        return repr(argument) if type(argument) in (int, str, bool, type(None)) else self._object(argument)

    def _value(self, value: Value) -> str:
        if self.slices.kinds[value] is Kind.TENSOR:
            return self.handed.get(value, "None")
        if value in self.slices.fixed:
            held = self.slices.fixed[value]
            return repr(held) if type(held) in (int, str, bool, type(None)) else self._object(held)
        if value in self.converted.outer:
            return f"{self._object(self.converted.outer[value].read)}()"
        return self._name(value)

    # Bodies. What follows a node is a list of (body, next node, what to do at its end).

    def _continue(self, work: list[tuple[SubGraph, int, Any]], way: _Way) -> None:
        """Generate what is left to do, the innermost body first."""
        while work:
            body, index, at_end = work[-1]
            if index == len(body.nodes):
                work = work[:-1]
                way = at_end(way)
                continue
            node = body.nodes[index]
            work = [*work[:-1], (body, index + 1, at_end)]
            if node.op == "if":
                if decides(node, self.slices) and not self.looked_up:
                    self._fork(node, work, way)
                    return
                way = self._choice(node, way)
            elif node.op == "loop":
                way = self._loop(node, way)
            elif node.op == "invoke":
                way = self._invoke(node, way)
            else:
                way = self._plain(node, way)

    def _fork(self, node: Node, work: list[tuple[SubGraph, int, Any]], way: _Way) -> None:
        """Generate both sides of a choice, each with all that follows."""
        self._line(f"if {self._text(node.arguments[0])}:")
        for side, decision in zip(node.subgraphs, (1, 0), strict=True):
            if decision == 0:
                self._line("else:")
            self.depth += 1

            def at_end(way: _Way, side: SubGraph = side) -> _Way:
                return self._assign(node.results, side.outputs, way)

            decided = replace(way, decisions=(*way.decisions, decision))
            self._continue([*work, (side, 0, at_end)], decided)
            self.depth -= 1

    def _choice(self, node: Node, way: _Way) -> _Way:
        """Generate a choice whose sides meet again."""
        self._line(f"if {self._text(node.arguments[0])}:")
        for side, decision in zip(node.subgraphs, (1, 0), strict=True):
            if decision == 0:
                self._line("else:")
            self.depth += 1
            self._line("pass")
            if decides(node, self.slices):
                self._line(f"decisions.append({decision})")
            self._continue([(side, 0, lambda way, side=side: self._assign(node.results, side.outputs, way))], way)
            self.depth -= 1
        return way

    def _loop(self, node: Node, way: _Way) -> _Way:
        (body,) = node.subgraphs
        index, *carried = body.inputs
        count, *first = node.arguments
        way = self._assign(carried, first, way)
        if decides(node, self.slices):
            self._line(f"decisions.append({self._text(count)})")
        self._line(f"for {self._name(index)} in range({self._text(count)}):")
        self.depth += 1
        self._line("pass")
        self._continue([(body, 0, lambda way: self._assign(carried, body.outputs, way))], way)
        self.depth -= 1
        held = [value for value in carried if self.slices.kinds[value] is not Kind.TENSOR]
        results = [r for r, value in zip(node.results, carried, strict=True) if value in held]
        return self._assign(results, held, way)

    def _assign(self, values: Any, arguments: Any, way: _Way) -> _Way:
        """Give values what an inner body or a loop hands out; those of the host all at once."""
        targets: list[str] = []
        sources: list[str] = []
        for value, argument in zip(values, arguments, strict=True):
            if self.slices.kinds[value] is Kind.TENSOR:
                if isinstance(argument, Value) and self.slices.kinds[argument] is Kind.HOST:
                    way = self._host(argument, way)
            else:
                targets.append(self._name(value))
                sources.append(self._text(argument))
        if targets:
            self._line(f"{', '.join(targets)} = {', '.join(sources)}")
        return way

    def _host(self, value: Value, way: _Way) -> _Way:
        """Note a host value that tensors are computed from."""
        if self.looked_up:
            self._line(f"hosts.append({self._text(value)})")
            return way
        return replace(way, hosts=(*way.hosts, self._text(value)))

    def _invoke(self, node: Node, way: _Way) -> _Way:
        callee = self.converted.graph.subgraphs[str(node.target)]
        arguments = [
            self._text(argument)
            for argument, value in zip(node.arguments, callee.inputs, strict=True)
            if self.slices.kinds[value] is not Kind.TENSOR
        ]
        number = self._new("i")
        tensors = set(tensor_results(callee, self.slices))
        hosts = [self._name(result) for index, result in enumerate(node.results) if index not in tensors]
        targets = ", ".join([number, *hosts])
        if self.recursive:
            self._line(f"{targets} = walk_{node.target}({', '.join([*arguments, 'levels - 1'])})")
        else:
            self._line(f"{targets} = yield plan_{node.target}({', '.join(arguments)})")
        if self.looked_up:
            self._line(f"invocations.append({number})")
            return way
        return replace(way, invocations=(*way.invocations, number))

    def _plain(self, node: Node, way: _Way) -> _Way:
        if in_tensor_slice(node, self.slices):
            for value in dict.fromkeys(host_values(node, self.slices)):
                way = self._host(value, way)
        if id(node) in self.slices.exports:
            way = self._keep(node, way)
        elif in_host_slice(node, self.slices):
            text = self._operation(node)
            result = f"{self._name(node.results[0])} = " if node.results else ""
            self._line(result + text)
        return way

    def _keep(self, node: Node, way: _Way) -> _Way:
        """Generate a node at which the host is handed tensors that it keeps."""
        for value in handed_over(node, self.slices):
            name = self.handed[value] = self._new("k")
            self._line(f"{name} = keep()")
            if self.looked_up:
                self._line(f"kept.append({name})")
            else:
                way = replace(way, kept=(*way.kept, name))
        self._line(self._operation(node))
        self.handed.clear()
        return way

    def _operation(self, node: Node) -> str:
        arguments = [self._text(argument) for argument in node.arguments]
        keywords = [f"{name}={self._text(argument)}" for name, argument in node.keywords]
        return operation(node, arguments, keywords, self._object)

    def _finish(self, way: _Way) -> _Way:
        body = self.converted.graph.subgraphs[self.function]
        tensors = set(tensor_results(body, self.slices))
        hosts = [self._text(output) for index, output in enumerate(body.outputs) if index not in tensors]
        for index, output in enumerate(body.outputs):
            if index in tensors and isinstance(output, Value) and self.slices.kinds[output] is Kind.HOST:
                way = self._host(output, way)
        if self.looked_up:
            told = "find(tuple(decisions)), invocations, hosts, kept"
            self.objects["find"] = self.block_of
        else:
            block = self._object(self.block_of(way.decisions))
            told = ", ".join([block, *map(_display, (way.invocations, way.hosts, way.kept))])
        emitted = f"emit({told})"
        handed = f"({', '.join([emitted, *hosts])})" if hosts else emitted
        self._line(f"{'return' if self.recursive else 'yield'} {handed}")
        return way


def _display(names: tuple[str, ...]) -> str:
    return f"({''.join(name + ', ' for name in names)})"


def _has_loop(body: SubGraph, slices: Slices) -> bool:
    return any(
        (node.op == "loop" and decides(node, slices)) or any(_has_loop(nested, slices) for nested in node.subgraphs)
        for node in body.nodes
    )


def _ways(body: SubGraph, slices: Slices) -> int:
    """Return how many ways there are through a body without loops."""
    ways = 1
    for node in body.nodes:
        if node.op == "if" and decides(node, slices):
            ways *= sum(_ways(side, slices) for side in node.subgraphs)
    return ways

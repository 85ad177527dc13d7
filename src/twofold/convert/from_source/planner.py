"""The host slice as generated Python: planners, which walk the structure and compute no tensors.

Each function gets two. `walk_f` is an ordinary recursive function, for the upper levels. `plan_f`, which it goes over
to where they end, is a generator function: where the function calls a recursive one it yields that function's planner
and is sent its result, and last it yields its own, so that depth is bounded by memory alone. The result is the number
of the invocation, or a tuple of that number and the results that are Python objects.

A planner tells of each invocation: its block, the numbers of the invocations it made, the host values that tensors
are computed from, and the tensors that the host keeps:

    emit(block, invocations, host_values, kept)

Where all decisions are choices, the code after a choice is written once for each side, and the block of each way
through is known in advance; its invocations are added to what waits without that call. Otherwise, and where a function
is cut, decisions are collected in a list and the block is looked up. `cut` emits the pieces and arguments that a call
is given.

Where the host reads values of tensors there is a third form, `wave_f`, alone: a generator function that also waits for
these. A call is then handed a frame at once, whose results are waited for where they are used, so that calls next to
one another get on together.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

from twofold.graph import Argument, Node, SubGraph, Value, values_in

from .blocks import (
    decides,
    handed_over,
    host_values,
    in_host_slice,
    in_tensor_slice,
    is_cut,
    read_by_host,
    tensor_parameters,
    tensor_results,
)
from .convert import Converted
from .functions import Source
from .planner_text import PLAIN, PlannerText, Waiting
from .slices import Kind, Slices

MOST_WAYS = 32
"""Ways through a function up to which the code after a choice is repeated for each side."""


@dataclass(frozen=True)
class PlannerSource:
    """The text of a function's planners, what the names in it stand for, and the line of the function for each line."""

    text: str
    objects: dict[str, Any]
    positions: list[int]

    def compiled(self, source: Source) -> CodeType:
        """Return the text as code whose lines are those of the function: they are what a traceback shows."""
        tree = ast.parse(self.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword | ast.excepthandler):
                node.lineno = node.end_lineno = self.positions[node.lineno - 1]
                node.col_offset = node.end_col_offset = 0
        return compile(tree, source.file, "exec", dont_inherit=True)


def planner_source(
    converted: Converted,
    slices: Slices,
    function: str,
    block_of: Callable[[tuple[Any, ...]], Waiting],
    runtime: dict[str, Any],
) -> PlannerSource:
    """Return the planners of a function.

    `block_of` returns what `emit` is to be told for a sequence of decisions. `runtime` has `emit`, and `heights`, the
    level of each invocation emitted; `keep`, which makes the object that the host keeps in place of a tensor that is
    not there yet; `drive`, which runs a generator planner; and `cut`, `fetch` and `finish`, see `run.recursion.pieces`.
    """
    objects: dict[str, Any] = {**runtime, "plain": PLAIN}
    forms = ("wave",) if slices.fetches else ("walk", "plan")
    writers = [_Generator(converted, slices, function, objects, form, block_of=block_of) for form in forms]
    text = "".join(writer.planner() for writer in writers)
    return PlannerSource(text, objects, [line for writer in writers for line in writer.positions])


@dataclass(frozen=True)
class _Way:
    """What is known, while code is generated, of one way through a function. All are names in the generated code."""

    decisions: tuple[int, ...] = ()
    invocations: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass
class _Generator(PlannerText):
    block_of: Callable[[tuple[Any, ...]], Waiting] = field(kw_only=True)

    def planner(self) -> str:
        """Generate the planner."""
        body = self.converted.graph.subgraphs[self.function]
        self.cut = is_cut(self.converted, self.slices, body) or self.form == "wave"
        self.looked_up = self.cut or _has_loop(body, self.slices) or _ways(body, self.slices) > MOST_WAYS
        self.position = self.converted.functions[self.function].source.function.__code__.co_firstlineno
        parameters = [self.name(v) for v in body.inputs if self.slices.kinds[v] is not Kind.TENSOR]
        given = ["given"] if tensor_parameters(body, self.slices) else []
        parameters += given
        if self.form == "walk":
            self.line("if not levels:")
            self.line(f"    return drive(plan_{self.function}({', '.join(parameters)}))")
        if self.looked_up:
            self.line(f"decisions = []; invocations = [{', '.join(given)}]; hosts = []; kept = []")
        if self.form == "wave":
            self.line("if False: yield")
        self._continue([(body, 0, self._finish)], _Way())
        self.positions.insert(0, self.positions[0])
        levels = ["levels"] if self.form == "walk" else []
        head = f"def {self.form}_{self.function}({', '.join([*parameters, *levels])}):\n"
        return head + "\n".join(self.lines) + "\n"

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
            self.come_to(node)
            work = [*work[:-1], (body, index + 1, at_end)]
            if node.op == "if":
                if decides(node, self.slices) and not self.looked_up:
                    self._fork(node, work, way)
                    return
                way = self._choice(node, way)
            elif node.op == "loop":
                way = self._loop(node, way)
            elif node.op == "while":
                way = self._while(node, way)
            elif node.op == "invoke":
                way = self._invoke(node, way)
            else:
                way = self._plain(node, way)

    def _fork(self, node: Node, work: list[tuple[SubGraph, int, Any]], way: _Way) -> None:
        """Generate both sides of a choice, each with all that follows."""
        self.line(f"if {self.text(node.arguments[0])}:")
        for side, decision in zip(node.subgraphs, (1, 0), strict=True):
            if decision == 0:
                self.line("else:")
            self.depth += 1

            def at_end(way: _Way, side: SubGraph = side) -> _Way:
                return self._assign(node.results, side.outputs, way)

            decided = replace(way, decisions=(*way.decisions, decision))
            self._continue([*work, (side, 0, at_end)], decided)
            self.depth -= 1

    def _choice(self, node: Node, way: _Way) -> _Way:
        """Generate a choice whose sides meet again."""
        self._fetch(node)
        test = self.text(node.arguments[0])
        self.handed.clear()
        self.line(f"if {test}:")
        for side, decision in zip(node.subgraphs, (1, 0), strict=True):
            if decision == 0:
                self.line("else:")
            self.depth += 1
            self.line("pass")
            if decides(node, self.slices):
                self.line(f"decisions.append({decision})")
            self._continue([(side, 0, lambda way, side=side: self._assign(node.results, side.outputs, way))], way)
            self.depth -= 1
        return way

    def _loop(self, node: Node, way: _Way) -> _Way:
        (body,) = node.subgraphs
        index, *carried = body.inputs
        count, *first = node.arguments
        way = self._assign(carried, first, way)
        if decides(node, self.slices):
            self.line(f"decisions.append({self.text(count)})")
        self.line(f"for {self.name(index)} in range({self.text(count)}):")
        self.depth += 1
        self.line("pass")
        self._continue([(body, 0, lambda way: self._assign(carried, body.outputs, way))], way)
        self.depth -= 1
        held = [value for value in carried if self.slices.kinds[value] is not Kind.TENSOR]
        results = [r for r, value in zip(node.results, carried, strict=True) if value in held]
        return self._assign(results, held, way)

    def _while(self, node: Node, way: _Way) -> _Way:
        condition, body = node.subgraphs
        way = self._assign(condition.inputs, node.arguments, way)
        self.line("while True:")
        self.depth += 1

        def ask(way: _Way) -> _Way:
            self._fetch(node)
            test = self.text(condition.outputs[0])
            self.handed.clear()
            decides_here = decides(node, self.slices)
            self.line(f"if not {test}: {'decisions.append(0); ' if decides_here else ''}break")
            if decides_here:
                self.line("decisions.append(1)")
            return self._assign(body.inputs, condition.inputs, way)

        again = (body, 0, lambda way: self._assign(condition.inputs, body.outputs, way))
        self._continue([again, (condition, 0, ask)], way)
        self.depth -= 1
        held = [value for value in condition.inputs if self.slices.kinds[value] is not Kind.TENSOR]
        results = [r for r, value in zip(node.results, condition.inputs, strict=True) if value in held]
        return self._assign(results, held, way)

    def _assign(self, values: Any, arguments: Any, way: _Way) -> _Way:
        """Give values what an inner body or a loop hands out; those of the host all at once."""
        targets: list[str] = []
        sources: list[str] = []
        for value, argument in zip(values, arguments, strict=True):
            if self.slices.kinds[value] is Kind.TENSOR:
                way = self._hosts(argument, way)
            else:
                targets.append(self.name(value))
                sources.append(self.text(argument))
        if targets:
            self.line(f"{', '.join(targets)} = {', '.join(sources)}")
        return way

    def _host(self, value: Value, way: _Way) -> _Way:
        """Note a host value that tensors are computed from."""
        if value in self.late:
            frame, index = self.late[value]
            self.line(f"hosts.append(Late({frame}, {index}))")
            return way
        if self.looked_up:
            self.line(f"hosts.append({self.text(value)})")
            return way
        return replace(way, hosts=(*way.hosts, self.text(value)))

    def _hosts(self, argument: Argument, way: _Way) -> _Way:
        """Note the host values in an argument that becomes a tensor."""
        for value in values_in(argument):
            if self.slices.kinds[value] is Kind.HOST:
                way = self._host(value, way)
        return way

    def _invoke(self, node: Node, way: _Way) -> _Way:
        callee = self.converted.graph.subgraphs[str(node.target)]
        arguments = [
            self.text(argument)
            for argument, value in zip(node.arguments, callee.inputs, strict=True)
            if self.slices.kinds[value] is not Kind.TENSOR
        ]
        if given := tensor_parameters(callee, self.slices):
            for index in given:
                way = self._hosts(node.arguments[index], way)
            arguments.append(f"{self.new('a')}")
            self.line(f"{arguments[-1]} = {self._wait}cut(decisions, invocations, hosts)")
        number = self.new("i")
        tensors = set(tensor_results(callee, self.slices))
        others = [result for index, result in enumerate(node.results) if index not in tensors]
        if self.form == "wave":
            self.line(f"{number} = yield wave_{node.target}({', '.join(arguments)})")
            self.line(f"invocations.append({number})")
            self.late.update((result, (number, index)) for index, result in enumerate(others))
            return way
        hosts = [self.name(result) for result in others]
        targets = ", ".join([number, *hosts])
        if self.form == "walk":
            self.line(f"{targets} = walk_{node.target}({', '.join([*arguments, 'levels - 1'])})")
        else:
            self.line(f"{targets} = yield plan_{node.target}({', '.join(arguments)})")
        if self.looked_up:
            self.line(f"invocations.append({number})")
            return way
        return replace(way, invocations=(*way.invocations, number))

    @property
    def _wait(self) -> str:
        return "yield from " if self.form == "wave" else ""

    def _fetch(self, node: Node) -> None:
        """Generate the wait for tensors whose values the host reads."""
        values = read_by_host(node, self.slices)
        if values:
            self.handed.update((value, self.new("f")) for value in values)
            names = "".join(f"{self.handed[value]}, " for value in values)
            self.line(f"{names}= yield from fetch(decisions, invocations, hosts)")

    def _plain(self, node: Node, way: _Way) -> _Way:
        self._fetch(node)
        if in_tensor_slice(node, self.slices):
            for value in dict.fromkeys(host_values(node, self.slices)):
                way = self._host(value, way)
        if id(node) in self.slices.exports:
            way = self._keep(node, way)
        elif in_host_slice(node, self.slices):
            text = self.operation(node)
            result = f"{self.name(node.results[0])} = " if node.results else ""
            self.line(result + text)
        self.handed.clear()
        return way

    def _keep(self, node: Node, way: _Way) -> _Way:
        """Generate a node at which the host is handed tensors that it keeps."""
        for value in handed_over(node, self.slices):
            name = self.handed[value] = self.new("k")
            self.line(f"{name} = keep()")
            if self.looked_up:
                self.line(f"kept.append({name})")
            else:
                way = replace(way, kept=(*way.kept, name))
        self.line(self.operation(node))
        self.handed.clear()
        return way

    def _finish(self, way: _Way) -> _Way:
        body = self.converted.graph.subgraphs[self.function]
        tensors = set(tensor_results(body, self.slices))
        hosts = [self.text(output) for index, output in enumerate(body.outputs) if index not in tensors]
        for index, output in enumerate(body.outputs):
            if index in tensors:
                way = self._hosts(output, way)
        if self.cut:
            told = f"*({self._wait}finish(decisions, invocations, hosts)), kept"
        elif self.looked_up:
            told = "find(tuple(decisions)), invocations, hosts, kept"
            self.objects["find"] = self.block_of
        else:
            pile = self.block_of(way.decisions)
            if not way.kept and not pile.steering:
                way = replace(way, hosts=tuple(map(self.named, way.hosts)))
                self._append(way, pile, hosts)
                if not way.hosts:
                    return way
            told = ", ".join([self.object(pile), *map(_display, (way.invocations, way.hosts, way.kept))])
        self._hand(f"emit({told})", hosts)
        return way

    def _hand(self, number: str, hosts: list[str]) -> None:
        """Generate the end of a planner: the invocation's number, and the results that are no tensors."""
        handed = f"({', '.join([number, *hosts])})" if hosts else number
        if self.form == "wave":
            handed = f"{number}, ({''.join(host + ', ' for host in hosts)})"
        self.line(f"{'yield' if self.form == 'plan' else 'return'} {handed}")

    def _append(self, way: _Way, pile: Waiting, hosts: list[str]) -> None:
        """Generate what `emit` does where host values are plain numbers, in a third of the time; the call follows."""
        if way.hosts:
            self.line(f"if {' and '.join(f'type({host}) in plain' for host in way.hosts)}:")
            self.depth += 1
        number = self.add(pile, way.invocations, way.hosts)
        self._hand(number, hosts)
        self.depth -= bool(way.hosts)


def _display(names: tuple[str, ...]) -> str:
    return f"({''.join(name + ', ' for name in names)})"


def _has_loop(body: SubGraph, slices: Slices) -> bool:
    return any(
        (node.op in ("loop", "while") and decides(node, slices))
        or any(_has_loop(nested, slices) for nested in node.subgraphs)
        for node in body.nodes
    )


def _ways(body: SubGraph, slices: Slices) -> int:
    """Return how many ways there are through a body without loops."""
    ways = 1
    for node in body.nodes:
        if node.op == "if" and decides(node, slices):
            ways *= sum(_ways(side, slices) for side in node.subgraphs)
    return ways

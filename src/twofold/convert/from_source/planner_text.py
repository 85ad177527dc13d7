"""The lines of a planner: names, and the expressions of what the host computes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from twofold.convert.python_text import operation
from twofold.graph import Argument, Constant, Node, Value

from .convert import Converted
from .slices import Kind, Slices

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.iand, operator.ior, operator.ixor)


def repeatable(held: Any) -> Any:
    """Return what is iterated over. Raises TypeError for an iterator, which calls at the same time would share."""
    if isinstance(held, Iterator):
        raise TypeError("an iterator is shared between calls that run at the same time")
    return held


def unshared(held: Any) -> Any:
    """Return the left side of `+=`. Raises TypeError for a container that calls at the same time may share."""
    if isinstance(held, list | dict | set):
        raise TypeError("a container is changed by calls that run at the same time")
    return held


class Waiting(Protocol):
    """The invocations of a block that wait, as columns that stay the same objects."""

    @property
    def steering(self) -> tuple[int, ...]:
        """Which host values `emit` has to see."""
        ...

    @property
    def tasks(self) -> list[int]:
        """Their numbers."""
        ...

    @property
    def invocations(self) -> Sequence[list[int]]:
        """The invocations that each made."""
        ...

    @property
    def hosts(self) -> Sequence[list[Any]]:
        """Their host values."""
        ...


PLAIN = frozenset({int, float, bool})
"""Types of host values that need no look: no tensors, and not to be changed later."""


@dataclass
class PlannerText:
    """A planner of one function in one form, `walk`, `plan` or `wave`, while it is written.

    `objects` are what names in it stand for.
    """

    converted: Converted
    slices: Slices
    function: str
    objects: dict[str, Any]
    form: str
    lines: list[str] = field(default_factory=list[str])
    positions: list[int] = field(default_factory=list[int])
    """For each line, the one of the function's file that it comes from."""
    position: int = 1
    depth: int = 1
    names: dict[Value, str] = field(default_factory=dict[Value, str])
    handed: dict[Value, str] = field(default_factory=dict[Value, str])
    """Names of tensors that the host is handed at the node being written: objects that it keeps, or values it reads."""
    late: dict[Value, tuple[str, int]] = field(default_factory=dict[Value, tuple[str, int]])
    """Host results of calls that may not have returned: the frame, and which result."""
    count: int = 0

    def line(self, text: str) -> None:
        """Add a line."""
        self.lines.append("    " * self.depth + text)
        self.positions.append(self.position)

    def come_to(self, node: Node) -> None:
        """Have the lines that follow come from where a node does."""
        source = self.converted.functions[self.function].source
        if node.origin is not None and node.origin.file == source.file:
            self.position = node.origin.line

    def name(self, value: Value) -> str:
        """Return the name of a value."""
        if value not in self.names:
            self.names[value] = self.new("v")
        return self.names[value]

    def new(self, letter: str) -> str:
        """Return a name that is not taken."""
        self.count += 1
        return f"{letter}{self.count}"

    def object(self, held: Any) -> str:
        """Return the name of an object."""
        for name, known in self.objects.items():
            if known is held:
                return name
        name = f"c{len(self.objects)}"
        self.objects[name] = held
        return name

    def named(self, expression: str) -> str:
        """Return a name for what an expression is."""
        if expression.isidentifier():
            return expression
        name = self.new("h")
        self.line(f"{name} = {expression}")
        return name

    def add(self, pile: Waiting, invocations: Sequence[str], hosts: Sequence[str]) -> str:
        """Add an invocation to those that wait; return the name of its number."""
        number, level = self.new("n"), "0"
        self.line(f"{number} = len(heights)")
        if invocations:
            level = self.new("m")
            self.line(f"{level} = heights[{invocations[0]}]")
            for made in invocations[1:]:
                self.line(f"if heights[{made}] > {level}: {level} = heights[{made}]")
            level += " + 1"
        self.line(f"heights.append({level})")
        columns = zip((pile.tasks, *pile.invocations, *pile.hosts), (number, *invocations, *hosts), strict=True)
        for column, value in columns:
            self.line(f"{self.object(column)}.append({value})")
        return number

    def text(self, argument: Argument) -> str:
        """Return the expression of an argument; tensors are None."""
        if isinstance(argument, Value):
            return self.value(argument)
        if isinstance(argument, tuple):
            return f"({''.join(self.text(item) + ', ' for item in argument)})"
        if isinstance(argument, list):
            return f"[{', '.join(self.text(item) for item in argument)}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{self.text(k)}: {self.text(v)}' for k, v in argument.items())}}}"
        if isinstance(argument, slice):
            return f"slice({self.text(argument.start)}, {self.text(argument.stop)}, {self.text(argument.step)})"
        if isinstance(argument, Constant):
            return self.object(argument.object)
        return repr(argument) if type(argument) in (int, str, bool, type(None)) else self.object(argument)

    def value(self, value: Value) -> str:
        """Return the expression of a value."""
        if self.slices.kinds[value] is Kind.TENSOR:
            return self.handed.get(value, "None")
        if value in self.late:
            frame, index = self.late[value]
            self.line(f"if not {frame}.done: yield {frame}")
            return f"{frame}.hosts[{index}]"
        if value in self.slices.fixed:
            held = self.slices.fixed[value]
            return repr(held) if type(held) in (int, str, bool, type(None)) else self.object(held)
        if value in self.converted.outer:
            return f"{self.object(self.converted.outer[value].read)}()"
        return self.name(value)

    def operation(self, node: Node) -> str:
        """Return the expression, or statement, of a node."""
        arguments = [self.text(argument) for argument in node.arguments]
        if self.form == "wave" and (node.target is tuple or node.target in _IN_PLACE):
            check = self.object(repeatable if node.target is tuple else unshared)
            arguments[0] = f"{check}({arguments[0]})"
        keywords = [f"{name}={self.text(argument)}" for name, argument in node.keywords]
        return operation(node, arguments, keywords, self.object)

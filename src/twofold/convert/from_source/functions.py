"""Python functions as the converter sees them: syntax tree, source positions, and what free names refer to."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch

from twofold.convert.refusals import Refusal, Refused
from twofold.convert.speculation.source import Code
from twofold.graph import Origin


class Recursive:
    """A function that is to become a SubGraph: what conversion needs to know of it, wherever it meets one."""

    def __init__(self, function: Callable[..., Any], receiver: object = None) -> None:
        self.function = function
        self.receiver = receiver

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for two objects that stand for the same function bound to the same receiver."""
        return id(self.function), id(self.receiver)

    def known(self, target: Any) -> Recursive | None:
        """Return what a body that belongs to it calls as a recursive function, if it is one."""
        return target if isinstance(target, Recursive) else None


@dataclass(frozen=True)
class Outer:
    """Something from outside the function: its name, how to read it anew, and what was read at conversion.

    `key` is equal for two that are read from the same place.
    """

    name: str
    key: tuple[Any, ...]
    read: Callable[[], Any]
    object: Any

    @classmethod
    def fixed(cls, name: str, held: Any) -> Outer:
        """Return an object that is always the same, such as a receiver or a default value."""
        return cls(name, (name, id(held)), lambda: held, held)

    def attribute(self, name: str) -> Outer:
        """Return what an attribute of it is. Raises AttributeError."""
        held = getattr(self.object, name)
        if isinstance(self.object, torch.nn.Module) and self.object._parameters.get(name) is held is not None:
            # At each call: the way through a module's `__getattr__` takes 2 µs.
            return Outer(f"{self.name}.{name}", (*self.key, name), lambda: self.read()._parameters[name], held)
        return Outer(f"{self.name}.{name}", (*self.key, name), lambda: getattr(self.read(), name), held)


@dataclass
class Source:
    """One function's source: its definition, and how lines of the definition map to lines of the file."""

    function: FunctionType
    definition: ast.FunctionDef
    file: str
    first_line: int
    lines: list[str] = field(repr=False)

    @classmethod
    def of(cls, function: Any) -> Source:
        """Read a function's source. Raises `Refused` where there is none."""
        name = getattr(function, "__qualname__", type(function).__qualname__)
        if not isinstance(function, FunctionType):
            raise Refused(Refusal("no_source", f"{name} is not a Python function"))
        Code.of(function)  # the file says what runs
        try:
            lines, first = inspect.getsourcelines(function.__code__)  # not of what it wraps
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError) as error:
            raise Refused(Refusal("no_source", f"the source of {name} cannot be read: {error}")) from None
        definition = tree.body[0] if tree.body else None
        if not isinstance(definition, ast.FunctionDef):
            raise Refused(Refusal("no_source", f"{name} is not defined by def"))
        return cls(function, definition, inspect.getsourcefile(function.__code__) or "?", first, lines)

    def origin(self, node: ast.AST) -> Origin:
        """Return the place in the file that a piece of syntax comes from."""
        line = getattr(node, "lineno", 1) + self.first_line - 1
        return Origin(self.file, line, self.function.__qualname__)

    def refuse(self, code: str, construct: str, node: ast.AST) -> Refused:
        """Return the exception that refuses a piece of syntax."""
        line = self.lines[getattr(node, "lineno", 1) - 1]
        return Refused(Refusal(code, construct, self.origin(node), line))

    @cached_property
    def signature(self) -> inspect.Signature:
        """The function's parameters."""
        return inspect.signature(self.function, follow_wrapped=False)

    def assignments(self, name: str) -> int:
        """Return in how many places a variable is given a value, parameters counted."""
        nodes = list(ast.walk(self.definition))
        stores = sum(isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id == name for n in nodes)
        return stores + sum(isinstance(n, ast.arg) and n.arg == name for n in nodes)

    def outer(self, name: str) -> Outer | None:
        """Return what a free name refers to: a variable of an enclosing function, a global or a builtin."""
        code, closure = self.function.__code__, self.function.__closure__ or ()
        if name in code.co_freevars:
            cell = closure[code.co_freevars.index(name)]
            try:
                return Outer(name, (id(cell),), lambda: cell.cell_contents, cell.cell_contents)
            except ValueError:
                return None
        namespaces: tuple[Mapping[str, Any], ...] = (self.function.__globals__, vars(builtins))  # pyright: ignore[reportAttributeAccessIssue]
        for namespace in namespaces:
            if name in namespace:
                return Outer(name, (id(namespace), name), lambda n=namespace: n[name], namespace[name])
        return None


@dataclass(frozen=True)
class Function:
    """A function that became a SubGraph: its name, its parameters' names and the form of what it returns.

    `form` has None for each result of the SubGraph.
    """

    name: str
    source: Source
    parameters: tuple[str, ...]
    form: Any
    recursive: Recursive

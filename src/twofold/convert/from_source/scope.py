"""Names and the structures behind them while a function is converted.

What a variable holds is an `Argument` of the graph, or `Outer` for something read from outside. Tuples stay tuples of
these, and objects of dataclasses `Record`s, so that packing, unpacking and several results cost nothing; `flatten` and
`rebuild` take them apart where the graph carries single values.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from twofold.graph import Value

from .functions import Outer


class Undefined:
    """What a variable holds that was not assigned on every way to here."""


UNDEFINED = Undefined()


@dataclass(frozen=True, eq=False)
class Record:
    """An object with named parts that is made inside: of a dataclass, a named tuple, or a dict that is returned."""

    kind: type
    keys: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def is_tuple(self) -> bool:
        """Whether its parts have positions, too."""
        return issubclass(self.kind, tuple)

    def like(self, values: Sequence[Any]) -> Record:
        """Return one with other values."""
        return Record(self.kind, self.keys, tuple(values))

    def construct(self) -> Any:
        """Return the object, where the values are those of Python."""
        named = dict(zip(self.keys, self.values, strict=True))
        return named if self.kind is dict else self.kind(**named)


def record_keys(kind: Any) -> tuple[str, ...] | None:
    """Return the names of the parts of a class that does nothing but hold them; None for other objects."""
    if not isinstance(kind, type):
        return None
    if issubclass(kind, tuple) and hasattr(kind, "_fields") and "__new__" in vars(kind):
        return tuple(kind._fields)  # type: ignore[attr-defined]
    if not dataclasses.is_dataclass(kind) or hasattr(kind, "__post_init__") or "__slots__" in vars(kind):
        return None
    fields = dataclasses.fields(kind)
    made = "__dataclass_params__" in vars(kind) and kind.__dataclass_params__.init  # type: ignore[attr-defined]
    return tuple(field.name for field in fields) if made and all(field.init for field in fields) else None


def flatten(held: Any) -> list[Any]:
    """Return what is in nested tuples and records, from left to right."""
    if isinstance(held, Record):
        return flatten(held.values)
    if type(held) is tuple:
        return [leaf for item in held for leaf in flatten(item)]
    return [held]


def rebuild(held: Any, leaves: Iterator[Any]) -> Any:
    """Return nested tuples and records of the same form with the leaves replaced."""
    if isinstance(held, Record):
        return held.like(rebuild(held.values, leaves))
    if type(held) is tuple:
        return tuple([rebuild(item, leaves) for item in held])
    return next(leaves)


def same_form(left: Any, right: Any) -> bool:
    """Say whether two structures have the same nesting."""
    if isinstance(left, Record) or isinstance(right, Record):
        alike = isinstance(left, Record) and isinstance(right, Record) and left.kind is right.kind
        return alike and left.keys == right.keys and same_form(left.values, right.values)
    if type(left) is tuple or type(right) is tuple:
        return (
            type(left) is tuple
            and type(right) is tuple
            and len(left) == len(right)
            and all(same_form(a, b) for a, b in zip(left, right, strict=True))
        )
    return True


def same(left: Any, right: Any) -> bool:
    """Say whether two leaves are certainly the same: one value, or equal constants of one type."""
    if isinstance(left, Outer) and isinstance(right, Outer):
        return left.object is right.object
    if isinstance(left, Value | Undefined) or isinstance(right, Value | Undefined):
        return left is right
    return type(left) is type(right) and left == right


class _Assigned(ast.NodeVisitor):
    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.returns = False
        self.leaves_loop = False

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.names[node.id] = None

    def visit_Return(self, node: ast.Return) -> None:
        self.returns = True
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.leaves_loop = True

    def visit_Continue(self, node: ast.Continue) -> None:
        self.leaves_loop = True

    def visit_ListComp(self, node: ast.ListComp) -> None:
        """Names of a comprehension are its own."""

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        """Names of a comprehension are its own."""

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """A function of its own."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names[node.name] = None


def assigned(statements: Sequence[ast.stmt]) -> list[str]:
    """Return the names that statements assign to, in order."""
    visitor = _Assigned()
    for statement in statements:
        visitor.visit(statement)
    return list(visitor.names)


def returns(statements: Sequence[ast.stmt]) -> bool:
    """Say whether there is a return among the statements."""
    visitor = _Assigned()
    for statement in statements:
        visitor.visit(statement)
    return visitor.returns


def constructed(form: Any, values: Iterator[Any]) -> Any:
    """Return Python objects of a form, with its leaves replaced."""
    if isinstance(form, Record):
        return form.like([constructed(part, values) for part in form.values]).construct()
    if type(form) is tuple:
        return tuple([constructed(part, values) for part in form])
    return next(values)


def result_form(definition: ast.FunctionDef, resolve: Callable[[ast.expr], Any]) -> Any:
    """Return what the return statements list: nested tuples and records with None for single values.

    `resolve` returns the object that an expression names, or None. Raises ValueError if they differ.
    """
    form: Any = None
    for value in _returned(definition.body):
        other = _form_of(value, resolve)
        if isinstance(value, ast.Name):
            other = _form_of_variable(value.id, definition, resolve)
        if form is not None and other is not None and not same_form(form, other):
            raise ValueError("return statements list results of several forms")
        form = other if form is None else form
    return form


def _returned(statements: Sequence[ast.AST]) -> Iterator[ast.expr]:
    for statement in statements:
        if isinstance(statement, ast.Return) and statement.value is not None:
            yield statement.value
        elif not isinstance(statement, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returned(list(ast.iter_child_nodes(statement)))


def _form_of(node: ast.expr, resolve: Callable[[ast.expr], Any]) -> Any:
    match node:
        case ast.Tuple():
            return tuple(_form_of(item, resolve) for item in node.elts)
        case ast.Dict() if record_dict(node):
            keys = tuple(key.value for key in node.keys)  # type: ignore[union-attr]
            return Record(dict, keys, tuple(_form_of(value, resolve) for value in node.values))
        case ast.Call(func=ast.Name() | ast.Attribute()):
            kind = resolve(node.func)
            keys = record_keys(kind)
            return None if keys is None else Record(kind, keys, (None,) * len(keys))
        case _:
            return None


def _form_of_variable(name: str, definition: ast.FunctionDef, resolve: Callable[[ast.expr], Any]) -> Any:
    """Return the form of a variable that only ever is an object of one dataclass, or named tuple."""
    forms: list[Any] = []
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            forms.append(None)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            forms.append(_form_of(node.value, resolve))
    records = [form for form in forms if isinstance(form, Record) and form.kind is not dict]
    one = len(records) * 2 == len(forms) and all(same_form(records[0], other) for other in records)
    return records[0] if records and one else None


def record_dict(node: ast.Dict) -> bool:
    """Say whether all keys of a dict display are different strings."""
    keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return len(set(keys)) == len(node.keys)

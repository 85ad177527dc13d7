"""Names and the structures behind them while a function is converted.

What a variable holds is an `Argument` of the graph, or `Outer` for something read from outside. Tuples stay tuples of
these, so that packing, unpacking and several results cost nothing; `flatten` and `rebuild` take them apart where the
graph carries single values.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from twofold.graph import Value

from .functions import Outer


class Undefined:
    """What a variable holds that was not assigned on every way to here."""


UNDEFINED = Undefined()


def flatten(held: Any) -> list[Any]:
    """Return what is in nested tuples, from left to right."""
    if type(held) is tuple:
        return [leaf for item in held for leaf in flatten(item)]
    return [held]


def rebuild(held: Any, leaves: Iterator[Any]) -> Any:
    """Return nested tuples of the same form with the leaves replaced."""
    if type(held) is tuple:
        return tuple([rebuild(item, leaves) for item in held])
    return next(leaves)


def same_form(left: Any, right: Any) -> bool:
    """Say whether two structures have the same nesting."""
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


def count_results(definition: ast.FunctionDef) -> int | None:
    """Return how many results the return statements list: None for one value. Raises ValueError if they differ."""
    counts: set[int | None] = set()

    def collect(statements: Sequence[ast.AST]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Return):
                counts.add(len(statement.value.elts) if isinstance(statement.value, ast.Tuple) else None)
            elif not isinstance(statement, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                collect(list(ast.iter_child_nodes(statement)))

    collect(definition.body)
    tuples = counts - {None}
    if len(tuples) > 1:
        raise ValueError(f"return statements list {' and '.join(map(str, sorted(filter(None, tuples))))} results")
    return next(iter(tuples), None)

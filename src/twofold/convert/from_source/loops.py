"""Loops without jumps: `break`, `continue` and `return` in a loop as variables that the rest of it asks for.

    while test:                          go = True; returned = False; result = None
        if done: break                   while go and test:
        if found: return h, c                jumped = False
        body                                 if done: jumped = True; go = False
                                             if not jumped:
                                                 if found: ...; returned = True; result = h, c
                                                 if not jumped: body
                                         if returned: return result

Names of the new variables contain a space, so that they are nobody's.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence

_numbers = itertools.count()


def jumps(statements: Sequence[ast.stmt]) -> bool:
    """Say whether statements leave, or go on with, the loop that they are the body of."""
    return any(_jumps(statement, ast.Return | ast.Break | ast.Continue) for statement in statements)


def _jumps(node: ast.AST, kinds: type | object) -> bool:
    if isinstance(node, kinds):  # type: ignore[arg-type]
        return True
    if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
        return False
    if isinstance(node, ast.For | ast.While):
        kinds = ast.Return
    return any(_jumps(child, kinds) for child in ast.iter_child_nodes(node))


def without_jumps(loop: ast.For | ast.While) -> list[ast.stmt]:
    """Return statements that do what a loop does and have no jumps in loops."""
    names = _Names(loop, next(_numbers))
    body = names.guarded(loop.body)
    start = [names.set("go", True)]
    end: list[ast.stmt] = []
    returned = next((node for node in ast.walk(loop) if isinstance(node, ast.Return)), None)
    if returned is not None:
        start += [names.set("returned", False), names.assign("result", _empty(returned.value))]
        end = [ast.If(names.load("returned"), [ast.Return(names.load("result"))], [])]
    new: ast.stmt
    if isinstance(loop, ast.For):
        guard = ast.If(names.load("go"), [names.set("jumped", False), *body], [])
        new = ast.For(loop.target, loop.iter, [guard], [])
    else:
        test = ast.BoolOp(ast.And(), [names.load("go"), loop.test])
        new = ast.While(test, [names.set("jumped", False), *body], [])
    return [names.placed(statement) for statement in (*start, new, *end)]


def _empty(value: ast.expr | None) -> ast.expr:
    """Return an expression of the form of a returned value without anything in it."""
    if isinstance(value, ast.Tuple):
        return ast.Tuple([_empty(item) for item in value.elts], ast.Load())
    return ast.Constant(None)


class _Names:
    """The variables of one loop."""

    def __init__(self, loop: ast.stmt, number: int) -> None:
        self._loop = loop
        self._number = number

    def load(self, name: str) -> ast.Name:
        return ast.Name(f"{name} {self._number}", ast.Load())

    def assign(self, name: str, value: ast.expr) -> ast.stmt:
        return ast.Assign([ast.Name(f"{name} {self._number}", ast.Store())], value)

    def set(self, name: str, value: bool) -> ast.stmt:
        return self.assign(name, ast.Constant(value))

    def placed(self, made: ast.stmt) -> ast.stmt:
        """Give what has no line that of the loop."""
        for node in ast.walk(made):
            if isinstance(node, ast.stmt | ast.expr) and not hasattr(node, "lineno"):
                ast.copy_location(node, self._loop)
        return made

    def guarded(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Return statements whose rest asks whether one before it has jumped."""
        made: list[ast.stmt] = []
        for index, statement in enumerate(statements):
            made += self._without(statement)
            if jumps([statement]):
                rest = self.guarded(statements[index + 1 :])
                if rest:
                    made.append(ast.If(ast.UnaryOp(ast.Not(), self.load("jumped")), rest, []))
                break
        return made

    def _without(self, statement: ast.stmt) -> list[ast.stmt]:
        match statement:
            case ast.Break():
                return [self.set("jumped", True), self.set("go", False)]
            case ast.Continue():
                return [self.set("jumped", True)]
            case ast.Return():
                value = ast.Constant(None) if statement.value is None else statement.value
                flags = [self.set(name, name != "go") for name in ("jumped", "go", "returned")]
                return [self.assign("result", value), *flags]
            case ast.If() if jumps([statement]):
                sides = self.guarded(statement.body), self.guarded(statement.orelse)
                return [ast.copy_location(ast.If(statement.test, *sides), statement)]
            case ast.For() | ast.While() if _jumps(statement, ast.Return):
                return self.guarded(without_jumps(statement))
            case _:
                return [statement]

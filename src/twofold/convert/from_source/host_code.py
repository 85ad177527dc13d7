"""Pieces of a function that the host runs as they are: compiled from their syntax, with what they read as arguments."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from typing import Any

from .functions import Source


def names_read(node: ast.AST) -> list[str]:
    """Return the names that a piece of syntax reads, in order; those that it defines for itself included."""
    return list(dict.fromkeys(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)))


def always_assigned(statement: ast.Try) -> list[str]:
    """Return the names that a `try` has assigned wherever it is left by its end."""

    def stored(statements: Sequence[ast.stmt]) -> set[str]:
        simple = (s for s in statements if isinstance(s, ast.Assign | ast.AugAssign | ast.AnnAssign))
        targets = [t for s in simple for t in (s.targets if isinstance(s, ast.Assign) else [s.target])]
        nodes = (node for target in targets for node in ast.walk(target))
        return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}

    sides = [stored([*statement.body, *statement.orelse])]
    for handler in statement.handlers:
        if not (handler.body and isinstance(handler.body[-1], ast.Raise)):
            sides.append(stored(handler.body))
    return sorted(set.intersection(*sides) | stored(statement.finalbody))


def compiled(source: Source, parameters: Sequence[str], body: Sequence[ast.stmt]) -> Callable[..., Any]:
    """Return a function with the given parameters and body, whose lines are those of the file."""
    arguments = ast.arguments([], [ast.arg(name) for name in parameters], None, [], [], None, [])
    definition = ast.FunctionDef(source.function.__name__, arguments, copy.deepcopy(list(body)), [], None)
    module = ast.fix_missing_locations(ast.Module([ast.copy_location(definition, body[0])], []))
    ast.increment_lineno(module, source.first_line - 1)
    namespace: dict[str, Any] = {}
    exec(compile(module, source.file, "exec"), source.function.__globals__, namespace)  # pyright: ignore[reportAttributeAccessIssue]
    function: Callable[..., Any] = namespace[source.function.__name__]
    return function

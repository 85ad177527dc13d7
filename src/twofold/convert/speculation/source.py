"""Functions as syntax: definitions found by the code objects of functions, lambdas included."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from twofold.convert.refusals import Refusal, Refused
from twofold.graph import Origin

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, eq=False)
class Code:
    """One function's syntax and what its free names refer to."""

    name: str
    file: str
    definition: Definition
    globals: dict[str, Any] = field(repr=False)
    cells: dict[str, CellType] = field(repr=False)

    @classmethod
    def of(cls, function: FunctionType) -> Code:
        """Read a function's source. Raises `Refused` where there is none."""
        code = _originals.get(function.__code__, function.__code__)
        definition = _definition(code)
        if definition is None:
            raise Refused(Refusal("no_source", f"the source of {function.__qualname__} cannot be read"))
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        return cls(function.__qualname__, code.co_filename, definition, function.__globals__, cells)

    def nested(self, definition: Definition) -> Code:
        """Return a function defined within this one."""
        name = "<lambda>" if isinstance(definition, ast.Lambda) else definition.name
        return Code(f"{self.name}.{name}", self.file, definition, self.globals, self.cells)

    def origin(self, node: ast.AST) -> Origin:
        """Return the place that a piece of syntax comes from."""
        return Origin(self.file, getattr(node, "lineno", self.definition.lineno), self.name)

    def refuse(self, code: str, construct: str, node: ast.AST) -> Refused:
        """Return the exception that refuses a piece of syntax."""
        origin = self.origin(node)
        return Refused(Refusal(code, construct, origin, linecache.getline(origin.file, origin.line)))

    @cached_property
    def body(self) -> list[ast.stmt]:
        """The statements."""
        definition = self.definition
        if isinstance(definition, ast.Lambda):
            return [ast.copy_location(ast.Return(definition.body), definition.body)]
        return definition.body

    @property
    def is_library(self) -> bool:
        """Whether it is PyTorch's own."""
        return str(self.globals.get("__name__", "")).partition(".")[0] == "torch"

    @cached_property
    def is_generator(self) -> bool:
        """Whether calling it runs nothing."""
        if isinstance(self.definition, ast.AsyncFunctionDef):
            return True
        return any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Await) for node in _own_nodes(self.body))

    @cached_property
    def declared(self) -> dict[str, str]:
        """The names declared `global` or `nonlocal`, with which of the two."""
        found: dict[str, str] = {}
        for node in _own_nodes(self.body):
            if isinstance(node, ast.Global | ast.Nonlocal):
                found.update(dict.fromkeys(node.names, type(node).__name__.lower()))
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """Its local variables."""
        arguments = self.definition.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        listed += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
        bound = {argument.arg for argument in listed} | set(_bound(self.body))
        return frozenset(bound - self.declared.keys())


_originals: WeakKeyDictionary[CodeType, CodeType] = WeakKeyDictionary()


def stands_for(code: CodeType, original: CodeType) -> None:
    """Have a function that was given other code be read as what it was."""
    _originals[code] = original


def _own_nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the syntax of a body without that of the functions and classes defined in it."""
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, _SCOPES):
            pending.extend(ast.iter_child_nodes(node))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.Lambda):
            continue
        elif isinstance(node, _COMPREHENSIONS):  # binds nothing here but by :=
            yield from (n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            continue
        pending.extend(ast.iter_child_nodes(node))


@lru_cache(maxsize=256)
def _definitions(file: str, text: str) -> dict[int, list[Definition]]:
    """Return the functions of a file by the line on which their code objects begin."""
    found: dict[int, list[Definition]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            found.setdefault(first, []).append(node)
    return found


@lru_cache(maxsize=256)
def _code_objects(file: str, text: str) -> frozenset[CodeType]:
    """Return the code objects that a file compiles to."""
    pending = [compile(text, file, "exec", dont_inherit=True)]
    found: set[CodeType] = set()
    while pending:
        code = pending.pop()
        found.add(code)
        pending.extend(held for held in code.co_consts if isinstance(held, CodeType))
    return frozenset(found)


def _definition(code: CodeType) -> Definition | None:
    """Return the syntax that a code object was compiled from; None if the file does not say that any more."""
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    try:
        # Code objects are equal if their instructions, constants, names and positions are.
        if not text or code not in _code_objects(code.co_filename, text):
            return None
        listed = _definitions(code.co_filename, text).get(code.co_firstlineno, [])
    except SyntaxError:
        return None
    fitting = [definition for definition in listed if _is_definition_of(definition, code)]
    return fitting[0] if len(fitting) == 1 else None


def _is_definition_of(definition: Definition, code: CodeType) -> bool:
    if not isinstance(definition, ast.Lambda):
        return definition.name == code.co_name
    if code.co_name != "<lambda>":
        return False
    body = definition.body
    begin, end = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    positions = [p for p in code.co_positions() if None not in p and p[2:] != (0, 0)]
    return any((p[0], p[2]) == begin and (p[1], p[3]) == end for p in positions)

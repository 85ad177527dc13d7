"""Detours: calls of a function that go another way while a unit of this thread runs, and in no other thread.

Nothing that the program holds is exchanged: not the function, nor the name, class or container in which it is found.
The function is given other code for as long as a detour is open anywhere: its own, compiled anew from its own file,
with one question before the first line. Where the answer is no, in other threads above all, what runs is the
function's own code, at its own lines, with its own frame.
"""

from __future__ import annotations

import ast
import linecache
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from twofold.convert.refusals import Refusal, Refused
from twofold.convert.speculation.source import Code, stands_for

_PLACEHOLDER = "twofold: where calls go in this thread"


class _Here(threading.local):
    go: Callable[..., Any] | None = None
    """What is called instead, in this thread."""


class Detour:
    """The other code of one function. Entered any number of times, by any thread."""

    def __init__(self, function: FunctionType) -> None:
        """Compile it. Raises `Refused` where the function's file does not say what runs."""
        self._function = function
        self._here = _Here()
        self._own = function.__code__
        self._other = _with_question(function, self._here)
        stands_for(self._other, self._own)
        self._entered = 0
        self._lock = threading.Lock()

    def open(self, go: Callable[..., Any]) -> None:
        """Have calls in this thread go to `go`, which is given their arguments."""
        with self._lock:
            if self._entered == 0 and self._function.__code__ is self._own:
                self._function.__code__ = self._other
            self._entered += 1
        self._here.go = go

    def turn(self, go: Callable[..., Any] | None) -> None:
        """Have calls in this thread, which has opened the detour, go to `go`; or for a while nowhere but on."""
        self._here.go = go

    def close(self) -> None:
        """End what `open` began. Code that the program has set since stays."""
        self._here.go = None
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._function.__code__ is self._other:
                self._function.__code__ = self._own

    @property
    def is_open(self) -> bool:
        """Whether calls in this thread take the other way."""
        return self._here.go is not None

    @property
    def is_current(self) -> bool:
        """Whether the function's code is still what this was made for."""
        return self._function.__code__ is self._own or self._function.__code__ is self._other


_detours: WeakKeyDictionary[FunctionType, Detour] = WeakKeyDictionary()
_lock = threading.Lock()


def detour_of(function: FunctionType) -> Detour:
    """Return the one detour of a function. Raises `Refused`."""
    with _lock:
        known = _detours.get(function)
        if known is None or not known.is_current:
            known = _detours[function] = Detour(function)
        return known


def _with_question(function: FunctionType, here: _Here) -> CodeType:
    """Return the function's code with a question before its first line."""
    code = function.__code__
    original = Code.of(function).definition  # the file says what runs
    if not isinstance(original, ast.FunctionDef) or original.args.vararg or original.args.kwarg:
        name = function.__qualname__
        raise Refused(Refusal("unsupported_syntax", f"{name} is no def with a fixed number of parameters"))
    tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    place = (original.lineno, original.col_offset, original.name)
    definition = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.lineno, node.col_offset, node.name) == place
    )
    documented = isinstance(definition.body[0], ast.Expr) and isinstance(definition.body[0].value, ast.Constant)
    definition.body.insert(int(documented), _question(definition))
    compiled = compile(tree, code.co_filename, "exec", dont_inherit=True)
    made = next(c for c in _nested(compiled) if _PLACEHOLDER in c.co_consts and c.co_name == code.co_name)
    return made.replace(co_consts=tuple(here if held == _PLACEHOLDER else held for held in made.co_consts))


def _question(definition: ast.FunctionDef) -> ast.stmt:
    """Return `if here.go is not None: return here.go(all parameters)`."""
    arguments = definition.args
    go = ast.Attribute(ast.Constant(_PLACEHOLDER), "go", ast.Load())
    given: list[ast.expr] = [ast.Name(a.arg, ast.Load()) for a in (*arguments.posonlyargs, *arguments.args)]
    named = [ast.keyword(a.arg, ast.Name(a.arg, ast.Load())) for a in arguments.kwonlyargs]
    statement = ast.If(
        ast.Compare(go, [ast.IsNot()], [ast.Constant(None)]), [ast.Return(ast.Call(go, given, named))], []
    )
    for node in ast.walk(statement):
        ast.copy_location(node, definition)
    return statement


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for held in code.co_consts:
        if isinstance(held, CodeType):
            yield from _nested(held)

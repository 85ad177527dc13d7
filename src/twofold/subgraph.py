"""`twofold.subgraph`: plain recursive functions as graphs that are batched over all invocations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from twofold.convert.from_source import Recursive, Refusal, Refused, convert, slice_graph
from twofold.errors import NotConvertibleError
from twofold.run.recursion.program import Program


class SubGraphFunction(Recursive):
    """A recursive function whose tensors are computed for all invocations together."""

    def __init__(self, function: Callable[..., Any], receiver: object = None, strict: bool = False) -> None:
        super().__init__(function, receiver)
        functools.update_wrapper(self, function)
        self._strict = strict
        self._signature = inspect.signature(function)
        self._program: Program | None = None
        self.refusal: Refusal | None = None
        """Why calls run as plain Python; None if they do not."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function: its tensors are computed when a value is needed, those of several calls together."""
        program = self._ready()
        if program is None:
            return self.function(*arguments, **keywords)
        bound = self._signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        return program.call(tuple(bound.arguments.values()))

    def _ready(self) -> Program | None:
        if self._program is None and self.refusal is None:
            try:
                converted = convert(self)
                self._program = Program(converted, slice_graph(converted, {}, frozenset()))
            except Refused as refused:
                self.refusal = refused.refusal
                if self._strict:
                    raise NotConvertibleError(str(refused.refusal)) from None
        return self._program

    def map(self, structures: Iterable[Any]) -> list[Any]:
        """Return the results for each structure; their tensors are computed together."""
        return [self(structure) for structure in structures]


def subgraph(function: Callable[..., Any] | None = None, *, strict: bool = False) -> Any:
    """Run a plain recursive function as a recursive SubGraph, batched over all its invocations.

    With `strict=True` a function that cannot be converted raises `NotConvertibleError` at its first call; otherwise it
    runs as plain Python, and `refusal` says why.
    """
    if function is None:
        return functools.partial(subgraph, strict=strict)
    return SubGraphFunction(function, strict=strict)

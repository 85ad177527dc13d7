"""From a function and the arguments of a call to its host graph (Janus, section 4, over Terra's skeleton)."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch

from twofold.capture.trace_graph import Path, PathNode, Signature, TraceGraph
from twofold.convert.refusals import Refusal, Refused, line_of
from twofold.graph import current_ambient

from .heap import Heap, Relax
from .host import Host
from .items import Item, Known, Method, Place, Scope
from .objects import Raised
from .source import Code
from .speculation import Speculation, tensor
from .statements import Interpreter
from .walk import Walk

_NOTHING = ast.Lambda(ast.arguments([], [], None, [], [], None, []), ast.Constant(None), lineno=0)

MAX_WALKS = 12
"""Walks in which places turn out to change before the function is given up."""


def speculate(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    graph: TraceGraph,
    signature: Signature,
    relaxed: frozenset[Hashable] = frozenset(),
    fetched: Mapping[PathNode, Any] | None = None,
) -> Speculation:
    """Convert a function on the way that a call with these arguments takes.

    Nothing is computed and nothing changes: not the arguments, the heap, the random streams, nor what `graph` counts.
    `relaxed`: places that are read anew in each call. `fetched`: what this call is known to fetch; elsewhere it is
    taken to fetch what was fetched last. Raises `Refused`.
    """
    refusal: Refusal | None = None
    for _ in range(MAX_WALKS):
        try:
            return _Conversion(Walk(graph, signature, fetched or {}), relaxed).convert(function, arguments, keywords)
        except Relax as found:
            relaxed |= frozenset(found.locations)
        except Refused as refused:
            refusal = with_line(refused.refusal)
            break
    # Raised anew, because the traceback of the first holds placeholders, whose references the skeleton counts.
    raise Refused(refusal or Refusal("unsupported_object", "what the call reads changes each time it is looked at"))


def with_line(refusal: Refusal) -> Refusal:
    """Return a refusal with the text of its source line."""
    return refusal if refusal.line or refusal.origin is None else replace(refusal, line=line_of(refusal.origin))


class _Conversion:
    """One walk."""

    def __init__(self, walk: Walk, relaxed: frozenset[Hashable]) -> None:
        self._walk = walk
        self._relaxed = relaxed
        self._interpreter: Interpreter | None = None

    def convert(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Speculation:
        ambient = current_ambient()
        try:
            result = self._convert(function, arguments, keywords)
            if current_ambient() != ambient:
                raise Refused(Refusal("unsupported_call", "the call leaves PyTorch's modes other than they were"))
            return result
        except RecursionError:
            raise Refused(Refusal("too_deep", "calls nested too deep for Python's stack")) from None
        except (Relax, Refused):
            raise
        except Exception as error:
            raise Refused(Refusal("converter_failed", f"{type(error).__name__}: {error}")) from error
        finally:
            self._walk.forget()
            if self._interpreter is not None:
                self._interpreter.forget()
            _restore(ambient)

    def _convert(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Speculation:
        name = getattr(function, "__name__", type(function).__name__)
        host = Host("".join(c if c.isalnum() or c == "_" else "_" for c in name), self._relaxed)
        heap = Heap(host)
        code = Code("", "", _NOTHING, {}, {})
        interpreter = self._interpreter = Interpreter(host, heap, Scope(code, frozenset(), None), self._walk)
        given = self._given(host, heap, arguments, keywords, function)
        callee = _callee(host, heap, function)
        try:
            result = interpreter.call(callee, *given)
        except Raised as raised:
            text = f"{type(raised.error).__name__}: {raised.error}"
            raise Refused(Refusal("raises", text[:160], host.origin)) from None
        path = self._walk.finish()
        self._assume_apart(host, heap, path)
        interpreter.assume_measured()
        heap.close()
        speculation = host.finish(result, path)
        kept = [node.arguments[1] for node in speculation.host.nodes if node.target is tensor]
        if any(slot not in path.program.escapes for slot in kept):
            raise Refused(Refusal("no_graph", "a tensor of the unit is kept that was not kept before", host.origin))
        return speculation

    def _assume_apart(self, host: Host, heap: Heap, path: Path) -> None:
        """Assume that arrays which the call changes show nothing of tensors: those are read when they are launched."""
        feeds = [feed for feed in self._walk.feeds.values() if isinstance(feed, torch.Tensor)]
        apart = all(heap.assume_apart(feed) for feed in feeds if not _is_of_torch(feed))
        if heap.arrays_changed and (_shows_memory(path) or not apart):
            text = "an array that may share memory with a tensor changes"
            raise Refused(Refusal("late_decision", text, host.origin))

    def _given(
        self, host: Host, heap: Heap, arguments: tuple[Any, ...], keywords: dict[str, Any], function: Any
    ) -> tuple[list[Item], dict[str, Item]]:
        names = _parameter_names(function)
        host.assume_length(host.arguments, len(arguments), Place("the number of arguments", "arguments", True))
        positional: list[Item] = []
        for index, held in enumerate(arguments):
            place = Place(names[index] if index < len(names) else f"argument {index}", ("argument", index), True)
            positional.append(heap.item(held, host.fetch("get_item", host.arguments, index), place))
        if keywords:
            host.assume_value(host.call(tuple, host.keywords), tuple(keywords), Place("the keywords", "keywords", True))
        else:
            host.assume_length(host.keywords, 0, Place("the number of keywords", "keywords", True))
        named = {
            name: heap.item(held, host.fetch("get_item", host.keywords, name), Place(name, ("keyword", name), True))
            for name, held in keywords.items()
        }
        return positional, named


def _shows_memory(path: Path) -> bool:
    """Whether arrays of NumPy may show memory of tensors that the unit reads or makes, but for what it is fed."""
    shown = any(node.event is not None and node.event.function in _SHOWS_MEMORY for node in path.nodes)
    return shown or not all(map(_is_of_torch, path.program.statics.values()))


def _is_of_torch(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().resizable()


_SHOWS_MEMORY = (torch.Tensor.numpy, torch.Tensor.__array__)


def _callee(host: Host, heap: Heap, function: Any) -> Item:
    if isinstance(function, types.MethodType):
        receiver = function.__self__
        root = host.root("self", receiver)
        place = Place("self", id(receiver), False)
        item = Known(receiver) if isinstance(receiver, type) else heap.fixed(receiver, root, place)
        return Method(Known(function.__func__), item)
    if isinstance(function, types.FunctionType):
        return Known(function)
    return heap.fixed(function, host.root("function", function), Place(type(function).__name__, id(function), False))


def _parameter_names(function: Any) -> tuple[str, ...]:
    called = function if isinstance(function, types.FunctionType | types.MethodType) else type(function).__call__
    code = getattr(called, "__code__", None)
    if code is None:
        return ()
    names = code.co_varnames[: code.co_argcount]
    return names if isinstance(function, types.FunctionType) else names[1:]


def _restore(ambient: Any) -> None:
    if torch.is_grad_enabled() != ambient.grad:
        torch._C._set_grad_enabled(ambient.grad)

"""Tensors whose values are not there yet, and what waits for them.

A call of a recursive function returns `Deferred` tensors. So do cheap operations on them: each is noted, and done when
the values are there, in the same order. Everything else that is done with one needs its value: the batch is flushed,
each deferred object becomes the ordinary tensor that it stood for, and the operation goes on with that.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from twofold.capture.intercept import call_before_unheard_code
from twofold.errors import FailedError
from twofold.graph import Ambient, ambient_context

SMALL = 1024
"""Elements up to which another tensor in a noted operation is copied, in case it is written to before the flush."""

_NOTED: frozenset[Any] = frozenset( { getattr(holder, name) for holder in (torch, Tensor) for name in ( "add", "sub",
"mul", "div", "neg", "sum", "mean", "stack", "cat", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
"__rmul__", "__truediv__", "__rtruediv__", "__neg__", "__iadd__", "add_", ) if hasattr(holder, name) } )  # fmt: skip


class Source(Protocol):
    """What computes deferred results: the invocations of one function."""

    def flush(self, sums: Sequence[Sum]) -> None:
        """Compute them, and fill in those still in use. It may give the terms of sums of its own results instead."""


@dataclass(eq=False)
class Sum:
    """Terms that are added up, which nobody else holds; and, where one source computes them all, all in one tensor."""

    terms: Sequence[Any]
    together: Tensor | None = None

    def value(self) -> Any:
        """Return the sum. The terms are there."""
        return _add_up(self.terms) if self.together is None else self.together.sum(0)


class Noted(NamedTuple):
    """An operation on deferred tensors, to be done at the flush."""

    function: Callable[..., Any]
    arguments: Any
    keywords: Any
    result: weakref.ref[Deferred]
    grad: bool


class Deferred(torch.Tensor):
    """A tensor whose value is not there yet. `place` says which output of which waiting invocation it is, if one."""

    place: tuple[Any, int, str, int]

    def __add__(self, other: Any) -> Any:
        """Note a sum without a way through PyTorch's dispatch, which takes as long as the rest: `sum` has many."""
        if type(other) in _PLAIN and not torch._C._len_torch_function_stack():
            noted = PENDING.note_plain(_ADD, self, other)
            if noted is not None:
                return noted
        return super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        # Python asks the subclass first where a tensor comes before: the order is in messages.
        return Tensor.__add__(other, self) if isinstance(other, Tensor) else self + other

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NOTED:
            noted = PENDING.note(func, args, kwargs or {})
            if noted is not None:
                return noted
        PENDING.flush()
        if any(type(leaf) is Deferred for leaf in pytree.tree_leaves((args, kwargs))):
            raise FailedError("the recursive calls that this tensor comes from raised an exception; call them again")
        return func(*args, **(kwargs or {}))


def defer() -> Deferred:
    """Make a deferred tensor."""
    return torch.Tensor._make_subclass(Deferred, _EMPTY)


_EMPTY = torch.empty(0)
"""What all deferred tensors hold until they are filled in; none shows it."""


def fill(deferred: Deferred, value: Tensor) -> None:
    """Turn a deferred object into the tensor it stands for, whose own object is used up."""
    torch._C._swap_tensor_impl(deferred, value)  # type: ignore[attr-defined]
    vars(deferred).pop("place", None)
    deferred.__class__ = torch.Tensor  # type: ignore[assignment]


class Pending(threading.local):
    """What waits to be computed in this thread: sources in the order of their first call, then noted operations."""

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._noted: list[Noted] = []
        self._flushing = False
        self.planning = 0
        """How many calls are being planned: their own Python's operations on deferred tensors do not wait."""

    @property
    def waits(self) -> bool:
        """Whether anything waits."""
        return bool(self._sources or self._noted)

    def add(self, source: Source) -> None:
        """Have a source flushed with the others."""
        if source not in self._sources:
            self._sources.append(source)

    def note(self, function: Any, args: Any, kwargs: Any) -> Deferred | None:
        """Note an operation and return its result to be; None if it must not wait."""
        if not kwargs and len(args) == 2 and type(args[0]) in _PLAIN and type(args[1]) in _PLAIN:
            return self.note_plain(function, *args)
        if kwargs.get("out") is not None or not self._may_note():
            return None
        taken: list[Any] = []
        for leaf in (leaves := pytree.tree_flatten((args, kwargs)))[0]:
            if isinstance(leaf, Tensor) and type(leaf) is not Deferred:
                if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.numel() > SMALL:
                    return None
                leaf = leaf.clone()
            taken.append(leaf)
        return self._noted_result(function, *pytree.tree_unflatten(taken, leaves[1]))

    def note_plain(self, function: Any, first: Any, second: Any) -> Deferred | None:
        """Do the same for two arguments, deferred tensors or Python's numbers."""
        return self._noted_result(function, (first, second), {}) if self._may_note() else None

    def _may_note(self) -> bool:
        return not (self._flushing or self.planning or not self.waits or changed())

    def _noted_result(self, function: Any, arguments: Any, keywords: Any) -> Deferred | None:
        in_place = function in _IN_PLACE
        if in_place and type(arguments[0]) is not Deferred:
            return None
        result = arguments[0] if in_place else defer()
        self._noted.append(Noted(function, arguments, keywords, weakref.ref(result), torch.is_grad_enabled()))
        return result

    def flush(self) -> None:
        """Compute everything that waits. Raises what its operations raise."""
        if self._flushing or not (self._sources or self._noted):
            return
        sources, self._sources = self._sources, []
        noted, self._noted = self._noted, []
        self._flushing = True
        try:
            with ambient_context(_at_the_call()), torch.set_grad_enabled(torch.is_grad_enabled()):
                operations = list(_sums_at_once(noted))
                for source in sources:
                    source.flush([op.arguments[0] for op in operations if op.function is Sum.value])
                self._carry_out(operations)
        finally:
            self._flushing = False

    def _carry_out(self, noted: list[Noted]) -> None:
        """Do what was noted, in order. What nobody holds any more, and no later operation takes, is left out.

        The caller restores the grad mode.
        """
        for operation in noted:
            result = operation.result()
            if result is None:
                continue
            if torch.is_grad_enabled() is not operation.grad:
                torch.set_grad_enabled(operation.grad)
            value = operation.function(*operation.arguments, **operation.keywords)
            if type(result) is Deferred:
                fill(result, value)


def _sums_at_once(noted: list[Noted]) -> Iterator[Noted]:
    """Make one operation of additions each of which takes the result before, which nobody else holds.

    `noted` is used up, so that what it alone holds is seen to be.
    """
    noted.reverse()
    while noted:
        operation = noted.pop()
        terms = [*operation.arguments] if _adds(operation) else []
        while terms and noted and _adds(noted[-1]) and _alone_takes(noted[-1], operation):
            operation = noted.pop()
            terms.append(operation.arguments[1])
        yield operation._replace(function=Sum.value, arguments=(Sum(terms),)) if len(terms) > 2 else operation


def _adds(operation: Noted) -> bool:
    if operation.function not in (Tensor.add, torch.add) or operation.keywords or len(operation.arguments) != 2:
        return False
    first, second = operation.arguments
    return isinstance(first, Tensor) and (isinstance(second, Tensor) or (type(second) is int and second == 0))


def _alone_takes(later: Noted, operation: Noted) -> bool:
    """Say whether an addition takes the result of another as its first argument, and nothing else holds it."""
    result = operation.result()
    held_by = 3  # the later one's arguments, `result`, and the question itself
    return result is later.arguments[0] and sys.getrefcount(result) == held_by and later.grad is operation.grad


def _add_up(terms: Sequence[Any]) -> Any:
    tensors = [term for term in terms if isinstance(term, Tensor)]
    first = tensors[0]
    if first.is_floating_point() and all(t.shape == first.shape and t.dtype is first.dtype for t in tensors):
        return torch.stack(tensors).sum(0)
    return functools.reduce(operator.add, terms)


def held_once(tensors: Sequence[Deferred]) -> bool:
    """Say whether nothing but a `Sum`, and this sequence of its terms, holds any of these tensors."""
    held_by = 4  # both of them, the name here, and the question itself
    return all(sys.getrefcount(tensor) == held_by for tensor in tensors)


def changed() -> bool:
    """Say whether operations do something else than usual in this thread: then nothing may wait."""
    return bool(
        torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling()
    )


def _at_the_call() -> Ambient:
    """Return the modes of what waits: none but the grad mode, which is set for each."""
    return Ambient(torch.is_grad_enabled(), False, (), torch.is_autocast_cache_enabled())


_PLAIN = (Deferred, int, float)
_ADD: Any = Tensor.add
_IN_PLACE = frozenset({Tensor.__iadd__, Tensor.add_})
PENDING = Pending()


@functools.cache
def flush_before_unheard_code() -> None:
    """Have everything that waits computed before an optimizer changes parameters, or code takes tensors unheard."""
    call_before_unheard_code(_flush_unless_planning)


def _flush_unless_planning() -> None:
    """Flush; not while calls are planned, when the batch itself computes what planners read."""
    if not PENDING.planning:
        PENDING.flush()

"""`twofold.subgraph`: plain recursive functions as graphs that are batched over all invocations."""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch

from twofold.capture.intercept import heard_by_listener_alone, modes_taken_off, unwatch, unwatched
from twofold.convert.from_source import Converted, Outer, Recursive, Refusal, Refused, Slices, convert, slice_graph
from twofold.errors import NotConvertibleError
from twofold.graph import show
from twofold.options import Options
from twofold.run.recursion import AbandonedError, Program, changed, flush_before_unheard_code

MOST_PROGRAMS = 8
"""States of the outside world (modules in training or evaluation, callees) that programs are kept for."""


class SubGraphFunction(Recursive):
    """A recursive function whose tensors are computed for all invocations together. Made by `subgraph`."""

    def __init__(self, function: Callable[..., Any], receiver: object = None, strict: bool = False) -> None:
        super().__init__(function, receiver)
        functools.update_wrapper(self, function)
        self._strict = strict
        signature = inspect.signature(function, follow_wrapped=False)
        parameters = list(signature.parameters.values())
        self._signature = signature if receiver is None else signature.replace(parameters=parameters[1:])
        self._bound: WeakKeyDictionary[Any, SubGraphFunction] = WeakKeyDictionary()
        self._programs: list[tuple[_World, Program]] = []
        self._eager = Options.make().engine == "eager"
        self._thread = threading.get_ident()
        self._varying: frozenset[tuple[Any, ...]] = frozenset()
        flush_before_unheard_code()
        self.refusal: Refusal | None = None
        """Why calls run as plain Python; None if they do not."""

    def __get__(self, receiver: Any, owner: type | None = None) -> SubGraphFunction:
        """Return the function as a method of an object."""
        if receiver is None:
            return self
        known = self._bound.get(receiver)
        if known is None:
            known = self._bound[receiver] = SubGraphFunction(self.function, receiver, self._strict)
        return known

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function: its tensors are computed when a value is needed, those of several calls together."""
        program = self._usable()
        if program is None or program.slices.fetches:
            return self._answered(program, [(arguments, keywords)])[0]
        with unwatched():
            return program.call([self._positional(arguments, keywords)])[0]

    def map(self, *structures: Iterable[Any]) -> list[Any]:
        """Return the results for each structure, or each row of several iterables; their tensors are computed together.

        Where the way through the function depends on values of tensors, so are those of several calls here alone.
        """
        calls: list[Any] = [(arguments, {}) for arguments in zip(*structures, strict=False)]
        return self._answered(self._usable(), calls)

    def _answered(self, program: Program | None, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        if program is not None:
            try:
                with unwatched():
                    return program.call([self._positional(*call) for call in calls])
            except AbandonedError:
                with _plainly():
                    return self._call_plainly(calls)
        return self._call_plainly(calls)

    def _call_plainly(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        first = [] if self.receiver is None else [self.receiver]
        return [self.function(*first, *arguments, **keywords) for arguments, keywords in calls]

    def _positional(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Sequence[Any]:
        if not keywords and len(arguments) == len(self._signature.parameters):
            return arguments
        bound = self._signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    @property
    def unbatched(self) -> dict[str, int]:
        """Why invocations ran one at a time, beside the first ones of each kind, and in how many batches."""
        counts: Counter[str] = Counter()
        for program in self.programs:
            counts.update(program.refusals)
        return dict(counts)

    @property
    def captured(self) -> dict[str, int]:
        """How many batches replayed CUDA graphs and how many rooms were captured; why others were launched, how often.

        Empty where there is no CUDA device.
        """
        counts: Counter[str] = Counter()
        for _, program in self._programs:
            counts.update(program.captures.counts)
        return dict(counts)

    def described(self) -> dict[str, Any]:
        """Return what ran of it, and how: the entry of a report."""
        computed: Counter[str] = Counter()
        for program in self.programs:
            computed.update(program.computed)
        code = self.function.__code__
        return {
            "function": self.function.__qualname__,
            "origin": f"{code.co_filename}:{code.co_firstlineno}",
            "refusal": None if self.refusal is None else str(self.refusal),
            "together": computed["together"],
            "singly": computed["singly"],
            "blocks": [entry for program in self.programs for entry in program.described()],
            "unbatched": self.unbatched,
        }

    def show(self) -> str:
        """Return the function's SubGraph, and those it invokes, as text. Raises `NotConvertibleError`."""
        try:
            return show(convert(self).graph)
        except Refused as refused:
            raise NotConvertibleError(str(refused.refusal)) from None

    def check(self, converted: Converted, slices: Slices) -> None:
        """Raise `Refused` for what converts and shall run as plain Python nevertheless."""

    @property
    def programs(self) -> list[Program]:
        """The programs in use, one for each state of the outside world."""
        return [program for _, program in self._programs]

    def _usable(self) -> Program | None:
        """Return the program that the call may run by; None if it has to be plain Python."""
        if self.refusal is not None or self._eager or _plain.calls or self._thread != threading.get_ident():
            return None
        if not _watched():
            return self.ready()
        if not heard_by_listener_alone() or changed():
            return None
        with modes_taken_off():
            program = self.ready()
        reason = f"{self.function.__name__} is recursive, and runs batched"
        return program if program is not None and unwatch("recursion", reason) else None

    def ready(self) -> Program | None:
        """Return the program for the outside world as it is; None if the function is refused."""
        for world, program in self._programs:
            if world.holds():
                return program
        if self._programs:
            self._varying |= self._programs[-1][0].changed_numbers()
        try:
            converted = convert(self)
            slices = slice_graph(converted, self._varying)
            self.check(converted, slices)
        except Refused as refused:
            self.refusal = refused.refusal
            if self._strict:
                raise NotConvertibleError(str(refused.refusal)) from None
            return None
        program = Program(converted, slices)
        self._programs = [*self._programs[1 - MOST_PROGRAMS :], (_World(converted, slices), program)]
        return program


class _World:
    """What a program relies on outside its function: callees, modules and numbers."""

    def __init__(self, converted: Converted, slices: Slices) -> None:
        self._outer = list({outer.key: outer for outer in (*converted.assumed, *slices.assumed)}.values())
        modules = [o.object for o in self._outer if isinstance(o.object, torch.nn.Module)]
        self._reads = [outer.read for outer in self._outer]
        self._objects = [outer.object for outer in self._outer]
        parts = list({id(part): part for module in modules for part in module.modules()}.values())
        library = [part for part in parts if _is_torchs(part)]
        self._modules = [part for part in parts if part not in library]
        self._contents = [held.values() for part in parts for held in _CONTENTS(part)]
        self._contents += [held.values() for part in library for held in (vars(part), part._buffers)]
        held = [*chain(*self._contents), *self._objects]
        self._tensors = [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
        self._state = self._read_state()

    def holds(self) -> bool:
        """Say whether all of it is as it was."""
        state = self._read_state()
        if len(state) != len(self._state) or not all(map(operator.is_, state, self._state)):
            return False
        try:
            now = [read() for read in self._reads]
        except _GONE:
            return False
        return all(map(operator.is_, now, self._objects)) or all(map(_unchanged, self._outer))

    def changed_numbers(self) -> frozenset[tuple[Any, ...]]:
        """Return the keys of numbers that are no longer what they were."""
        return frozenset(
            outer.key
            for outer in self._outer
            if isinstance(outer.object, bool | int | float | str | None) and not _unchanged(outer)
        )

    def _read_state(self) -> list[Any]:
        """Read what all modules are like: objects that are the same while nothing has changed.

        It is read at each call, so it is done without a line of Python for each module.
        """
        modules, tensors = self._modules, self._tensors
        own = [torch.get_default_dtype(), *map(_DTYPE, tensors), *map(_ON_CPU, tensors), *map(_TRAINING, modules)]
        return [*own, *chain(*map(_CONTENTS, modules)), *chain(*self._contents)]


def _is_torchs(module: torch.nn.Module) -> bool:
    """Say whether all that a module holds (a slope, an epsilon) may be in what was traced of it.

    Of a user's own module only what its source reads is, and the rest may change from batch to batch.
    """
    return type(module).__module__.startswith("torch.")


_DTYPE = operator.attrgetter("dtype")
_ON_CPU = operator.attrgetter("is_cpu")
_TRAINING = operator.attrgetter("training")
_CONTENTS = operator.attrgetter(
    "_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
"""Of a module: its parameters, its own modules, and what is called beside its forward and backward."""

_GONE = (AttributeError, KeyError, ValueError)
"""What reading an object raises that is no longer there."""
_COMPARED = (int, float, str, MethodType)


def _unchanged(outer: Outer) -> bool:
    try:
        now = outer.read()
    except _GONE:
        return False
    return now is outer.object or (type(now) is type(outer.object) in _COMPARED and now == outer.object)


class _Plain(threading.local):
    calls = 0
    """Calls in progress that run as plain Python, with all that they call."""


_plain = _Plain()


def runs_plainly() -> bool:
    """Whether a call in progress in this thread is to run as plain Python, with all that it calls."""
    return bool(_plain.calls)


@contextmanager
def _plainly() -> Generator[None]:
    _plain.calls += 1
    try:
        yield
    finally:
        _plain.calls -= 1


def _watched() -> bool:
    """Say whether something wants to see each operation, or changes what it does: then calls run as plain Python."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or changed())


@overload
def subgraph(function: Callable[..., Any], *, strict: bool = ...) -> SubGraphFunction: ...
@overload
def subgraph(function: None = ..., *, strict: bool = ...) -> Callable[[Callable[..., Any]], SubGraphFunction]: ...
def subgraph(function: Callable[..., Any] | None = None, *, strict: bool = False) -> Any:
    """Run a plain recursive function as a recursive SubGraph, batched over all its invocations.

    A function that cannot be converted runs as plain Python, and `refusal` of the result says why; with `strict=True`
    its first call raises `NotConvertibleError` instead.
    """
    if function is None:
        return functools.partial(SubGraphFunction, strict=strict)
    return SubGraphFunction(function, strict=strict)

"""Recursion that nobody decorated: found while a unit is recorded, and then run as `subgraph` runs it, if that pays.

The unit runs eagerly, with its recursive functions on detours: a call from the unit's own thread is answered by the
batched program, and what it returns waits until it is used. A watch hears the unit's other tensor calls, so that what
waits is computed before anything could be changed that it reads.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from twofold.capture.functions import HOOKS, METADATA
from twofold.capture.intercept import Watch, saved_tensor_hooks_in_force
from twofold.capture.recursive_calls import recursive_functions
from twofold.convert.from_source import Converted, Recursive, Refusal, Refused, Slices
from twofold.convert.from_source.exposure import check_exposure
from twofold.errors import TwofoldError
from twofold.graph import call_has_effect
from twofold.options import Options
from twofold.run.account import Account
from twofold.run.detours import Detour, detour_of
from twofold.run.recursion import PENDING, Deferred, Program, changed
from twofold.subgraph import SubGraphFunction, runs_plainly

WARM_UP_UNITS = 3
"""Batched units before any is timed: the first runs one by one, the next ones make the blocks run together."""
MOST_WARM_UP_UNITS = 24
"""Units in which blocks were made whose times do not count; if there are more, they do."""
MOST_GROWTH = 32
"""If blocks are made in so many more units than are not, batching is judged anew."""
SAMPLES = 4
"""Units timed of each side before batching is judged, if the difference is plain."""
MOST_SAMPLES = 16
"""Units after which it is judged in any case."""
PLAIN_DIFFERENCE = 0.6
MARGIN = 0.97
"""Batched units have to take less than this share of eager time, by their means."""
MOST_RECEIVERS = 16
"""Objects whose methods have programs of their own."""


class Phase(Enum):
    """What is known of the recursion of a function."""

    SEEKING = "seeking"
    JUDGING = "judging"
    ON = "on"
    OFF = "off"


class Kind(Enum):
    """How a unit with recursion in it runs. `LISTENED`: eagerly, to learn what the program does with results."""

    LISTENED = "listened"
    BATCHED = "batched"
    EAGER = "eager"


class Undecorated(SubGraphFunction):
    """A recursive function as it is found in the program, and the others that were found with it."""

    def __init__(self, function: FunctionType, receiver: object, family: Iterable[FunctionType]) -> None:
        super().__init__(function, receiver)
        self._family = frozenset(family)

    def known(self, target: Any) -> Recursive | None:
        """Return a function of the family, or a method, as a recursive function; one that is decorated, too."""
        receiver = target.__self__ if isinstance(target, MethodType) else None
        function = target.__func__ if isinstance(target, MethodType) else target
        if isinstance(function, FunctionType) and function in self._family:
            return Recursive(function, receiver)
        return super().known(target)

    def check(self, converted: Converted, slices: Slices) -> None:
        """Refuse what would make tensors share no memory that share it in plain Python."""
        check_exposure(converted, slices)

    def _usable(self) -> Program | None:
        if self.refusal is not None or runs_plainly() or changed():
            return None
        if saved_tensor_hooks_in_force() or torch.is_anomaly_enabled() or _has_global_module_hooks():
            return None
        return self.ready()


_has_global_module_hooks: Callable[[], Any] = torch.nn.modules.module._has_any_global_hook


class PlainRecursion:
    """The recursion of one decorated function: what was found, and whether it pays. Used by one thread at a time."""

    def __init__(self, account: Account, options: Options, outermost: CodeType) -> None:
        """`outermost` is the code whose call begins a unit."""
        self._account = account
        self._outermost = outermost
        named = options.engine not in ("auto", "speculation") or options.backend != "auto"
        self._phase = Phase.OFF if named or options.numerics == "exact" else Phase.SEEKING
        self._found: dict[FunctionType, object] = {}
        self._looked_at: set[CodeType] = set()
        self._callees: dict[tuple[FunctionType, int], Undecorated] = {}
        self._detours: list[tuple[Detour, Callable[..., Any]]] = []
        self._watch = Watch(self._before)
        self._kind = Kind.EAGER
        self._calls = 0
        self._made = 0
        self._warm_up = 0
        self._growth = 0
        self._seconds: dict[Kind, list[float]] = {Kind.BATCHED: [], Kind.EAGER: []}
        self._hazard: tuple[str, str] | None = None

    # ---- finding -----------------------------------------------------------------------------------------

    @property
    def takes_units(self) -> bool:
        """Whether units run by this."""
        return self._phase in (Phase.JUDGING, Phase.ON)

    def meets(self) -> str | None:
        """Look for functions that call themselves, in a tensor call of a unit; return the name of one, if any is."""
        if self._phase is Phase.OFF:
            return None
        found = recursive_functions(self._outermost, self._looked_at)
        self._looked_at.update(function.__code__ for function in found)
        self._found.update(found)
        return next((function.__qualname__ for function in found), None)

    def begin(self) -> bool:
        """Convert what was found in the unit that has ended; False if nothing was."""
        if self._phase is not Phase.SEEKING or not self._found:
            return False
        self._kind = Kind.LISTENED
        self._convert()
        return True

    def _convert(self) -> None:
        began = time.perf_counter()
        self._callees.clear()
        self._detours.clear()
        for function, receiver in self._found.items():
            self._open_road(function, receiver)
        self._account.stall_seconds += time.perf_counter() - began
        self._phase = Phase.JUDGING if self._detours else Phase.OFF

    def _open_road(self, function: FunctionType, receiver: object) -> None:
        try:
            detour = detour_of(function)
        except Refused as refused:
            self._refuse(function, refused.refusal)
            return
        callee = self._callee(function, receiver)
        if callee is None or callee.ready() is None:
            self._refuse(function, callee.refusal if callee is not None else None)
        else:
            self._detours.append((detour, functools.partial(self._go, function)))
            self._account.decision(f"{function.__qualname__} is recursive: its invocations can run batched")

    def _refuse(self, function: FunctionType, refusal: Refusal | None) -> None:
        if refusal is not None:
            name = f"{function.__qualname__}: {refusal.construct}"
            self._account.refusal(refusal.code, name, refusal.origin, refusal.line.strip(), refusal.hint)

    def _callee(self, function: FunctionType, receiver: object) -> Undecorated | None:
        known = self._callees.get((function, id(receiver)))
        if known is None and len(self._callees) < MOST_RECEIVERS:
            known = self._callees[function, id(receiver)] = Undecorated(function, receiver, self._found)
        return known

    # ---- a unit ------------------------------------------------------------------------------------------

    @contextmanager
    def unit(self) -> Generator[None]:
        """Run a unit that was taken; nothing waits any more when it is left."""
        if not self.takes_units or self._kind is Kind.EAGER or _others_watch():
            self._kind = Kind.EAGER
            yield
            return
        with ExitStack() as stack:
            if self._kind is Kind.BATCHED:
                for detour, go in self._detours:
                    detour.open(go)
                    stack.callback(detour.close)
            stack.enter_context(self._watch)
            try:
                yield
            except BaseException:
                with suppress(Exception):  # what the program still holds becomes tensors, where it can
                    PENDING.flush()
                raise
            PENDING.flush()

    def _go(self, function: FunctionType, *arguments: Any, **keywords: Any) -> Any:
        """Answer an outermost call of a recursive function."""
        with ExitStack() as stack:
            for detour, go in self._detours:
                detour.turn(None)
                stack.callback(detour.turn, go)
            is_method = self._found[function] is not None
            receiver, rest = (arguments[0], arguments[1:]) if is_method else (None, arguments)
            callee = self._callee(function, receiver) if self._watch.is_alone else None
            if callee is None:
                return function(*arguments, **keywords)
            self._calls += 1
            return callee(*rest, **keywords)

    def _before(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Hear of a tensor call of the unit before it is made."""
        if self._kind is Kind.LISTENED:
            self.meets()
        if function in _OF_HISTORY:
            self._note_history(function, arguments, keywords)
        on_result = bool(arguments) and type(arguments[0]) is Deferred  # which sees to it itself
        is_harmless = on_result or function in METADATA or not PENDING.waits
        if not is_harmless and call_has_effect(function, arguments, keywords):
            PENDING.flush()

    def _note_history(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Take note of what asks for gradients within the history that a batch is one node of."""
        if keywords.get("create_graph"):
            self._hazard = "double_backward", "gradients of gradients are taken"
        if function in HOOKS:
            asked = [arguments[0]]
        else:
            given = keywords.get("inputs") or (arguments[1:2] if function is torch.autograd.grad else arguments[4:5])
            asked = pytree.tree_leaves(given)
        inner = [tensor for tensor in asked if type(tensor) is Deferred or not tensor.is_leaf]
        if inner:
            self._hazard = "tensor_hook", "gradients of intermediate results are asked for"
        if self._kind is Kind.BATCHED and any(map(_is_of_batch, inner)):
            raise TwofoldError(
                "the gradient of a result within a batched recursion is asked for, which a batch does not have;"
                f" {self._account.name} runs eagerly with twofold.function(..., engine='coexecution')"
            )

    # ---- judging -----------------------------------------------------------------------------------------

    def end_unit(self, seconds: float) -> None:
        """Take the time of a unit; choose how the next one runs."""
        kind = self._kind
        if kind is Kind.BATCHED and self._calls:
            self._account.batched_iterations += 1
        if self._hazard is not None:
            self._stop(*self._hazard)
        elif any(callee.refusal is not None for callee in self._callees.values()):
            for callee in self._callees.values():
                self._refuse(callee.function, callee.refusal)
            self._stop(None, "the recursive function is not converted any more")
        elif self._phase is Phase.JUDGING:
            self._judge(kind, seconds)
        else:
            self._keep_watch()

    def _judge(self, kind: Kind, seconds: float) -> None:
        grew = self._grew()
        self._kind = Kind.BATCHED
        if kind is Kind.LISTENED:
            if len(self._found) > len(self._detours):
                self._convert()
            return
        is_new = self._warm_up < WARM_UP_UNITS or (grew and self._warm_up < MOST_WARM_UP_UNITS)
        if kind is Kind.BATCHED and is_new:
            self._warm_up += 1
            return
        batched, eager = self._seconds[Kind.BATCHED], self._seconds[Kind.EAGER]
        self._seconds[kind].append(seconds)
        self._kind = Kind.EAGER if len(eager) <= len(batched) else Kind.BATCHED
        if min(len(batched), len(eager)) < SAMPLES:
            return
        ratio = statistics.mean(batched) / statistics.mean(eager)
        if PLAIN_DIFFERENCE < ratio < 1 / PLAIN_DIFFERENCE and len(batched) < MOST_SAMPLES:
            return
        times = f"{statistics.mean(batched) * 1e3:.3f} ms a unit, eager {statistics.mean(eager) * 1e3:.3f} ms"
        if ratio < MARGIN:
            self._phase, self._kind = Phase.ON, Kind.BATCHED
            self._account.engine, self._account.backend = "recursion", "batched"
            self._account.decision(f"kept batched recursion: {times}")
        else:
            self._stop("not_faster", f"batched recursion is not faster than eager execution: {times}")

    def _grew(self) -> bool:
        """Say whether blocks were made to run together since the last time."""
        programs = [program for callee in self._callees.values() for program in callee.programs]
        made = sum(len(block.joints) + len(block.staged) for program in programs for block in program.all_blocks())
        grew, self._made = made > self._made, made
        return grew

    def _keep_watch(self) -> None:
        """Judge anew where each unit has blocks of its own, which take longer to make than a unit to run."""
        self._growth = self._growth + 1 if self._grew() else max(0, self._growth - 1)
        if self._growth == MOST_GROWTH:
            self._phase, self._growth = Phase.JUDGING, 0
            self._warm_up = MOST_WARM_UP_UNITS
            for seconds in self._seconds.values():
                seconds.clear()

    def _stop(self, code: str | None, reason: str) -> None:
        self._phase = Phase.OFF
        if self._account.engine == "recursion":
            self._account.engine, self._account.backend = "coexecution", "eager"
        if code is not None:
            self._account.fallback(code, reason)
        self._account.decision(f"recursion runs as plain Python: {reason}")

    # ---- the report --------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Write to the account what ran of each function."""
        self._account.recursions = [callee.described() for callee in self._callees.values() if callee.programs]


_OF_HISTORY = HOOKS | {torch.autograd.grad, torch.Tensor.backward, torch.autograd.backward}


def _others_watch() -> bool:
    """Say whether modes of the program's own are on, which want to hear each operation or change what it does."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or changed())


def _is_of_batch(tensor: torch.Tensor) -> bool:
    return type(tensor) is Deferred or type(tensor.grad_fn).__name__ == "RecursionBackward"

"""The public entry points.

A unit is a call of a decorated function or an iteration of a program's loop; either way it also ends where an
optimizer has stepped and no live autograd history crosses that line. How each one runs is decided in `driver.py`.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from twofold.capture.intercept import is_within_unit, observe_steps
from twofold.capture.landmarks import observe_loop
from twofold.driver import GRAPH_MEMORY, OTHER_THREAD, Driver, Mode
from twofold.errors import OptionError
from twofold.options import Options
from twofold.plain_recursion import PlainRecursion
from twofold.report import Report
from twofold.run.account import Account
from twofold.run.rounds import LoopUnits
from twofold.run.speculation.cache import MISSED
from twofold.subgraph import SubGraphFunction

P = ParamSpec("P")
R = TypeVar("R")


class Function(Generic[P, R]):
    """A function, method or module whose calls run as graphs where they can. Made by `twofold.function`."""

    def __init__(self, wrapped: Callable[P, R], options: Options) -> None:
        self._wrapped = wrapped
        self._options = options
        name = getattr(wrapped, "__qualname__", type(wrapped).__name__)
        self._driver = Driver(name, options)
        self._driver.recursion = PlainRecursion(self._driver.account, options, Function._run.__code__)
        self._driver.runner.meets_recursion = self._meets_recursion
        self._lock = threading.Lock()
        self._steps_in_call = 0
        self._steps_per_call: int | None = None
        self._receiver: weakref.ref[Any] | None = None
        """Of a method: its instance. What is wrapped then is a function of `_unbound` and the instance."""
        self._unbound: Callable[..., R] = wrapped
        self._bound: dict[int, tuple[weakref.ref[Any], Function[..., Any]]] = {}
        if not isinstance(wrapped, torch.nn.Module):
            functools.update_wrapper(self, wrapped)

    def _meets_recursion(self) -> str | None:
        """Say whether the code of the unit calls itself now; then nothing more of it is recorded."""
        assert self._driver.recursion is not None
        name = self._driver.recursion.meets()
        if name is not None:
            self._driver.interception.miss_operations()
        return name

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> R:
        """Call the wrapped function; results, effects and exceptions are those of eager execution."""
        if is_within_unit():
            return self._wrapped(*arguments, **keywords)
        if not self._lock.acquire(blocking=False):
            self._driver.account.fallback("thread", "called while another thread was inside")
            return self._wrapped(*arguments, **keywords)
        shares = torch.cuda.is_initialized()
        try:
            if shares and not GRAPH_MEMORY.acquire(blocking=False):
                self._driver.note_empty("thread", OTHER_THREAD)
                return self._wrapped(*arguments, **keywords)
            try:
                return self._run(*arguments, **keywords)
            finally:
                if shares:
                    GRAPH_MEMORY.release()
        finally:
            self._lock.release()

    def _run(self, *arguments: P.args, **keywords: P.kwargs) -> R:
        driver = self._driver
        if driver.rests():
            began = time.perf_counter()
            result = self._wrapped(*arguments, **keywords)
            driver.end_rested(began)
            return result
        self._steps_in_call = 0
        driver.choose()
        given = arguments if self._receiver is None else (self._receiver(), *arguments)
        result = driver.speculate(self._unbound, given, keywords)
        if result is not MISSED:
            return result
        mode = driver.start()
        if mode is Mode.IDLE:
            return self._run_idle(*arguments, **keywords)
        driver.between_units = self._after_step
        driver.runner.is_given((arguments, keywords))
        driver.interception.start()
        try:
            result = self._wrapped(*arguments, **keywords)
            driver.between_units = None
            if driver.interception.active:
                self._end_call()
            elif driver.runner.in_unit:  # nothing more was heard of it
                driver.end()
            return result
        except BaseException:
            driver.between_units = None
            if driver.runner.in_unit or self._steps_in_call:
                driver.runner.abandon()
            else:
                driver.runner.drop()
                driver.note_empty("unit_raised", "the program raised an exception before any tensor call")
            raise
        finally:
            driver.interception.stop()
            driver.runner.is_given(())
            self._steps_per_call = max(self._steps_per_call or 0, self._steps_in_call)

    def _run_idle(self, *arguments: P.args, **keywords: P.kwargs) -> R:
        """Run a call eagerly and unwatched; steps are counted where there are several, as the call is so many units."""
        driver = self._driver
        assert driver.recursion is not None
        stop_counting = observe_steps(self._count_step) if (self._steps_per_call or 0) > 1 else None
        try:
            with driver.recursion.unit():
                result = self._wrapped(*arguments, **keywords)
        finally:
            if stop_counting is not None:
                stop_counting()
        driver.end(max(1, self._steps_in_call))
        return result

    def _count_step(self, _optimizer: Any) -> None:
        self._steps_in_call += 1

    def _after_step(self) -> None:
        """Go on with the next unit, or let the rest of the call, in which no step was ever seen, run unwatched."""
        self._steps_in_call += 1
        if self._steps_per_call is not None and self._steps_in_call >= self._steps_per_call:
            self._driver.interception.stop()
        else:
            self._driver.begin_listening(goes_on=True)

    def _end_call(self) -> None:
        driver = self._driver
        if self._steps_in_call:  # what follows the last step: a return value, a log line
            driver.runner.drop()
        elif driver.runner.in_unit:
            driver.end()
        else:
            driver.runner.drop()
            driver.note_empty("no_tensor_calls", "the unit made no tensor calls")

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an instance, as a plain function in a class does; each instance has its own graphs."""
        if instance is None:
            return self
        identity = id(instance)
        known = self._bound.get(identity)
        if known is not None and known[0]() is instance:
            return known[1]
        function: Any = self._wrapped
        try:
            reference = weakref.ref(instance, lambda _: self._bound.pop(identity, None))
        except TypeError:  # an instance that cannot be remembered has nowhere to keep its graphs
            return function.__get__(instance, owner)

        @functools.wraps(function)
        def method(*arguments: Any, **keywords: Any) -> Any:
            return function(reference(), *arguments, **keywords)

        bound = Function(method, self._options)
        bound._receiver, bound._unbound = reference, function
        self._bound[identity] = reference, bound
        return bound

    def __getitem__(self, key: Any) -> Any:
        """Index what is wrapped, for modules that are containers."""
        wrapped: Any = self._wrapped
        return wrapped[key]

    def __len__(self) -> int:
        wrapped: Any = self._wrapped
        return len(wrapped)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Function[P, R]:
        return Function(copy.deepcopy(self._wrapped, memo), self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Function, (self._wrapped, self._options)


class Program:
    """A whole loop that runs as graphs where it can. Made by `twofold.program`; enter it once."""

    def __init__(self, options: Options) -> None:
        self._driver = Driver("program", options)
        self._stop_observing: list[Callable[[], None]] = []
        self._thread = 0
        self._shares = False

    def __enter__(self) -> Program:
        if is_within_unit():
            raise OptionError("twofold.program cannot be entered inside another unit: enter it outside")
        driver = self._driver
        self._shares = torch.cuda.is_available()
        if self._shares and not GRAPH_MEMORY.acquire(blocking=False):
            self._shares = False
            driver.note_empty("thread", OTHER_THREAD)
            return self
        self._thread = threading.get_ident()
        loop = LoopUnits(driver.runner, driver.interception, driver.end)
        self._stop_observing = [observe_steps(self._on_step), observe_loop(loop)]
        driver.between_units = driver.begin_listening
        driver.begin_listening()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        driver = self._driver
        driver.between_units = None
        if not self._stop_observing:  # all ran eagerly
            return
        for stop in self._stop_observing:
            stop()
        try:
            if error is not None:
                driver.runner.abandon()
            elif driver.interception.active and driver.runner.in_unit:
                driver.runner.end()
        finally:
            driver.interception.stop()
            if self._shares:
                GRAPH_MEMORY.release()

    def _on_step(self, _optimizer: Any) -> None:
        if not self._driver.interception.active and threading.get_ident() == self._thread:
            self._driver.end()


def function(wrapped: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Make a function, method or `nn.Module` run as graphs; use it as a call or as a decorator.

    Options: engine, backend, numerics, warm_up, background, strict; see `twofold.options.Options`. Raises
    `OptionError` for a bad option or something that cannot be called, and `BackendUnavailableError`.
    """
    checked = Options.make(**options)
    if wrapped is None:
        return lambda given: function(given, **options)
    if not callable(wrapped):
        raise OptionError(f"twofold.function needs something to call, got {type(wrapped).__name__}: {wrapped!r:.60}")
    made: Function[P, R] = Function(wrapped, checked)
    return made


def program(**options: Any) -> Program:
    """Run a whole loop, unchanged, as graphs: `with twofold.program(): ...`. Options as for `function`."""
    return Program(Options.make(**options))


def report(of: Any) -> Report:
    """Return the account of a function or program, or of a recursive function: what ran where and why."""
    if isinstance(of, SubGraphFunction):
        account = Account(of.function.__qualname__, "recursion")
        account.recursions = [of.described()]
        return Report(account)
    driver = getattr(of, "_driver", None)
    if not isinstance(driver, Driver):
        raise OptionError(
            f"twofold.report needs what twofold.function, twofold.program or twofold.subgraph returned, got {of!r:.60}"
        )
    driver.account.compile_seconds = driver.builder.compile_seconds()
    driver.speculator.cache.describe()
    if driver.recursion is not None:
        driver.recursion.describe()
    _count_operations(driver)
    return Report(driver.account)


def _count_operations(driver: Driver) -> None:
    driver.account.operations.clear()
    for path in driver.graph.paths:
        for node in path.nodes:
            event = node.event
            if event is not None and path.units:
                driver.account.operation(event.name, event.origin, "graph", path.units)
            if event is not None and path.seen:
                driver.account.operation(event.name, event.origin, "eager", path.seen)


def wait_for_compilation(of: Any, timeout: float | None = None) -> bool:
    """Wait until all kernels ordered for a function or program are compiled; False if `timeout` seconds passed.

    They are swapped in by the next calls.
    """
    driver: Driver = of._driver
    deadline = None if timeout is None else time.monotonic() + timeout
    for order in driver.builder.orders():
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            order.exception(left)
        except TimeoutError:
            return False
    return True

"""Planners that wait for values of tensors, run together in waves.

All planners that can go on are run as far as they get. Those that then wait for tensors are answered at once: what they
ask for is computed for all of them together, and read in one copy. A call that a planner makes is a frame of its own,
which the planner waits for where it uses a result, so that the branches of a structure get on side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from .factors import Table


class Want(NamedTuple):
    """A tensor that a planner waits for: a result of an invocation."""

    number: int
    table: Table


class Frame:
    """One call: its planner, and, when that is done, the invocation's number and the results that are no tensors."""

    __slots__ = ("caller", "depth", "done", "hosts", "number", "planner", "waiting")

    def __init__(self, planner: Generator[Any, Any, Any], caller: Frame | None) -> None:
        self.planner = planner
        self.caller = caller
        self.depth = 0 if caller is None else caller.depth + 1
        self.done = False
        self.number = -1
        self.hosts: tuple[Any, ...] = ()
        self.waiting: list[Frame] = []


class Late(NamedTuple):
    """A result, no tensor, of a call that may not have returned."""

    frame: Frame
    result: int


def run_waves(
    planners: Sequence[Generator[Any, Any, Any]],
    fetch: Callable[[Sequence[Want]], Sequence[Any]],
    side_by_side: bool,
    check_depth: Callable[[Frame], None],
) -> list[Frame]:
    """Run planners to their ends. `fetch` gives values. Calls are made one after the other unless `side_by_side`."""
    roots = [Frame(planner, None) for planner in planners]
    ready: deque[tuple[Frame, Any]] = deque((root, None) for root in roots)
    held_back = [] if side_by_side else [ready.pop() for _ in roots[1:]]
    asking: list[tuple[Frame, list[Want]]] = []
    while ready or asking or held_back:
        while ready:
            _advance(*ready.popleft(), ready, asking, side_by_side, check_depth)
        if asking:
            answers = iter(fetch([want for _, wants in asking for want in wants]))
            ready.extend((frame, [next(answers) for _ in wants]) for frame, wants in asking)
            asking.clear()
        elif held_back:
            ready.append(held_back.pop())
    return roots


def _advance(
    frame: Frame,
    value: Any,
    ready: deque[tuple[Frame, Any]],
    asking: list[tuple[Frame, list[Want]]],
    side_by_side: bool,
    check_depth: Callable[[Frame], None],
) -> None:
    """Run a planner until it waits or is done."""
    while True:
        try:
            asked = frame.planner.send(value)
        except StopIteration as stop:
            frame.number, frame.hosts = stop.value
            frame.done = True
            ready.extend((waiting, frame) for waiting in frame.waiting)
            return
        if type(asked) is list:
            asking.append((frame, asked))
            return
        if type(asked) is Frame:
            if not asked.done:
                asked.waiting.append(frame)
                return
            value = None
            continue
        called = Frame(asked, frame)
        check_depth(called)
        value = called
        if side_by_side:
            ready.append((called, None))
        else:
            called.waiting.append(frame)
            ready.append((called, None))
            return

"""Landmarks: points that a loop passes each time it comes round, whichever way it is written.

A loop in which no optimizer steps shows no other line between one iteration and the next. Landmarks are heard whether
anybody listens or not, since eager units have to end where others do: a data loader hands out a batch, a module is
called from outside any other, a `backward()` returns. What happens within one of these is no landmark.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import dataloader


class Landmark(NamedTuple):
    """A point that a loop may pass again."""

    what: Hashable
    is_free: bool
    """Whether a program seldom has autograd history there that a backward is still to go through."""


BACKWARD = Landmark("backward", True)


class Loop(Protocol):
    """Who is told, in its own thread, of the landmarks that the program passes."""

    def passes(self, landmark: Landmark) -> None:
        """Take note of a landmark. Called before what it stands for begins; after, for `BACKWARD`."""

    def leaves(self, landmark: Landmark) -> None:
        """Take note that the loop which passed a landmark is over: it was passed, and nothing has followed."""

    def steps(self) -> None:
        """Take note that an optimizer has stepped, before anything else does."""


class _Current(threading.local):
    loop: Loop | None = None
    """Who is told; nobody within a landmark."""
    around_step: Loop | None = None
    """Who is told again when the step is over: a closure calls the model as often as it likes."""


current = _Current()


def observe_loop(loop: Loop) -> Callable[[], None]:
    """Tell `loop` of the landmarks that this thread passes; return how to end that."""
    before = current.loop
    current.loop = loop

    def stop() -> None:
        current.loop, current.around_step = before, None

    return stop


class within:
    """Run what a landmark stands for."""

    __slots__ = ("_loop",)

    def __enter__(self) -> None:
        self._loop = current.loop
        current.loop = None

    def __exit__(self, *_error: object) -> None:
        current.loop = self._loop


def before_step() -> None:
    """Hear no landmarks until `after_step`."""
    if current.loop is not None:
        current.around_step, current.loop = current.loop, None


def after_step() -> None:
    """Hear landmarks again, and tell of the step."""
    if current.around_step is not None:
        current.loop, current.around_step = current.around_step, None
    if current.loop is not None:
        current.loop.steps()


def module_landmark(module: torch.nn.Module) -> Landmark:
    """Name the calls of a module. Those with history and those without are told apart: loops train, and evaluate."""
    return Landmark(id(module), not torch.is_grad_enabled())


def with_backward(run: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run a backward, and tell that it is over."""
    loop = current.loop
    if loop is None:
        return run(*arguments, **keywords)
    with within():
        result = run(*arguments, **keywords)
    loop.passes(BACKWARD)
    return result


def announce_landmarks() -> None:
    """Patch the places where PyTorch passes a landmark; that of modules is with their other patch. Called once."""
    run_engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    @functools.wraps(run_engine)
    def _engine_run_backward(*arguments: Any, **keywords: Any) -> Any:
        if current.loop is None or not keywords.get("accumulate_grad"):
            return run_engine(*arguments, **keywords)
        return with_backward(run_engine, arguments, keywords)

    torch.autograd._engine_run_backward = _engine_run_backward  # type: ignore[attr-defined]
    next_batch = dataloader._BaseDataLoaderIter.__next__

    @functools.wraps(next_batch)
    def __next__(self: Any) -> Any:
        if (loop := current.loop) is None:
            return next_batch(self)
        landmark = Landmark(id(self._dataset), True)
        with within():
            loop.passes(landmark)
            try:
                return next_batch(self)
            except StopIteration:
                loop.leaves(landmark)
                raise

    dataloader._BaseDataLoaderIter.__next__ = __next__

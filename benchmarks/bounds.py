"""Bounds on the seconds that parts of a benchmark may take, so that a run of many programs ends in a known time."""

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

REMINDER_SECONDS = 1.0
"""A cut that Python swallowed, as it does within a destructor, comes again after this."""


class OutOfTime(BaseException):
    """The bound is over. No `Exception`, so that no library takes it for an error that it can deal with."""


@contextmanager
def cut_after(seconds: float | None) -> Generator[None]:
    """Raise `OutOfTime` in the block once so many seconds have passed; None lets it take all it needs.

    Only in the main thread. A call into native code is cut when it returns.
    """
    if seconds is None:
        yield
        return

    def cut(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), REMINDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """The seconds that one program may take, from now on; `seconds` may be None, which is no bound."""

    FOR_ROUNDS = 0.4
    """What setting up leaves for the rounds that count, at least."""
    FOR_SETTLING = 0.75
    """What of its share a contender may take before it is measured as it is; at the end of it, it is cut."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()

    def left(self) -> float | None:
        """Return the seconds that are left, below zero if the bound is passed."""
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self._began)

    def share(self, contenders: int) -> float | None:
        """Return the seconds that one of so many contenders that are still to come may take to be set up."""
        left = self.left()
        if left is None or self.seconds is None:
            return None
        return max(1.0, (left - self.FOR_ROUNDS * self.seconds) / contenders)

    def is_over(self) -> bool:
        """Whether nothing is left."""
        left = self.left()
        return left is not None and left <= 0

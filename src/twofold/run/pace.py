"""`Pace`: when Twofold may take the program's time, so that no program waits for graphs that it may never use.

To record a unit takes several times as long as to run it eagerly, and to build its graph as long again: a program of
ten steps would never get that time back. So what keeps the program waiting is postponed until all that was taken, it
included, is at most a share of the eager time so far, and what graphs have saved since. Until then units run eagerly
and unwatched, at no cost. Time passes while they do, so it always comes; a longer step brings it in fewer iterations.
So the program is never behind eager execution by more than that share, and the graphs of a program of many paths pay
for one another.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import Enum
from typing import Final

import torch

from .account import Account

SHARE: float = 1 / 3
"""What may be taken of the eager time so far. The tenth step may come 1.5 times as late as eager's; the rest is for
what a first recording takes beyond its estimate."""
RECORDED_IN_EAGER_UNITS: Final = 10
"""A recording over an eager unit until one was measured: 8 for a perceptron of 29 calls, whose kernels take no time,
and below 1 where kernels take 10 ms."""
RECORDED_AT_MOST: Final = 0.25
"""Seconds that a first recording is taken to need at most, however long units are: 5,000 operations."""
TIMED: Final = 9
"""The latest eager units, whose median is what a unit takes."""
MEASURED: Final = 3
"""The latest times of each work, whose median is what it is taken to need: the first loads what is loaded once."""
LONG: Final = 3
"""A unit counts as at most so many of these: one in which the machine did something else is no time for graphs."""


HEAD_START: Final = 0.5
"""Seconds that may be taken at once in a program of an accelerator, which takes as long to start: a loop of 26 lengths
had 3 of its units recorded in its first 5 s without, and 26 graphs would have come after half a minute, by estimate."""


class Work(Enum):
    """What is done while the program waits. The value: recordings that it takes as long as, until it was measured."""

    RECORD = 1.0
    BUILD = 3.0
    CONVERT = 5.0


class Pace:
    """The time that one program was kept waiting, and whether more may be taken. Used by one thread at a time."""

    def __init__(
        self,
        account: Account,
        is_kept: bool,
        clock: Callable[[], float] = time.perf_counter,
        uses_accelerator: Callable[[], bool] = torch.cuda.is_initialized,
    ) -> None:
        """`is_kept`: whether anything is postponed at all."""
        self._account = account
        self._is_kept = is_kept
        self._clock = clock
        self._uses_accelerator = uses_accelerator
        self._has_begun = False
        self._eager: deque[float] = deque(maxlen=TIMED)
        self._unit = 0.0
        """What a unit takes eagerly, once some were timed."""
        self._eager_seconds = 0.0
        """What all units so far would have taken eagerly, the first left out."""
        self._saved_seconds = 0.0
        """What units that ran as graphs took less."""
        self._measured: dict[Work, deque[float]] = {}
        self._has_said = False

    def fits(self, *works: Work) -> bool:
        """Whether the program may be kept waiting now, for all of these."""
        if not self._is_kept:
            return True
        taken = self._account.stall_seconds
        cost = sum(map(self._estimate, works))
        head_start = HEAD_START if self._uses_accelerator() else 0.0
        fits = taken + cost <= SHARE * self._eager_seconds + self._saved_seconds + head_start
        if not fits and self._eager and not self._has_said:
            self._has_said = True
            self._account.decision(
                f"eager until graphs take at most {SHARE:.0%} more time: the next needs about {cost * 1e3:.1f} ms"
            )
        return fits

    def _estimate(self, work: Work) -> float:
        known = self._measured.get(work)
        if known:
            return statistics.median_low(known)
        if work is not Work.RECORD:
            return work.value * self._estimate(Work.RECORD)
        if not self._eager:
            return RECORDED_AT_MOST
        return min(RECORDED_IN_EAGER_UNITS * self._unit, RECORDED_AT_MOST)

    # ---- what was taken ----------------------------------------------------------------------------------

    @contextmanager
    def taking(self, work: Work | None = None) -> Generator[None]:
        """Measure work that is done while the program waits. None: work that is never postponed."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if work is not None:
                self._note(work).append(seconds)
            self._account.stall_seconds += seconds

    def _note(self, work: Work) -> deque[float]:
        return self._measured.setdefault(work, deque(maxlen=MEASURED))

    def ran_eagerly(self, seconds: float) -> None:
        """Take the time of a unit that ran eagerly and unwatched.

        Not of the first, in which PyTorch makes what it makes once, and a whole program all that comes before its loop.
        """
        if not self._has_begun:
            self._has_begun = True
            return
        self._eager.append(seconds)
        self._unit = statistics.median_low(self._eager)
        self.passed(seconds)

    def passed(self, seconds: float) -> None:
        """Take the time of a unit that ran eagerly where nothing is to be learned of it."""
        self._eager_seconds += min(seconds, LONG * self._unit)

    def recorded(self, seconds: float, is_whole: bool, goes_on: bool) -> None:
        """Take the time of a unit that was recorded.

        `is_whole`: to its end. `goes_on`: as the unit before it in the same call, for both of which there is one
        eager time.
        """
        if not self._eager:
            return
        taken = seconds if goes_on else max(0.0, seconds - self._unit)
        self._eager_seconds += 0.0 if goes_on else self._unit
        self._account.stall_seconds += taken
        if is_whole:
            measured = self._note(Work.RECORD)
            measured.append(taken + (measured.pop() if goes_on and measured else 0.0))

    def ran_otherwise(self, seconds: float) -> None:
        """Take the time of a unit that ran as a graph, or batched.

        What it took longer than an eager one is not counted: on few cores most of that is the compiler's. Counted, it
        came to 26 s in a run of the demo's script, whose kernels were then ordered 40 s late.
        """
        if self._eager:
            self.passed(max(seconds, self._unit))
            self._saved_seconds += max(0.0, self._unit - seconds)

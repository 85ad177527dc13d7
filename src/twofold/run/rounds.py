"""Where the units of a loop end in which no optimizer steps: `Rounds` counts, `LoopUnits` ends them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from twofold.capture.intercept import Interception, current_listener, hears, unwatch
from twofold.capture.landmarks import Landmark

from .python_runner import PythonRunner

PATIENCE = 8
"""Rounds in which a step is awaited where none was ever seen. Gradients are seldom accumulated over more."""


class Rounds:
    """Counts how often a loop has come round since an optimizer stepped last.

    It comes round where a landmark is passed again. As long as a step may still come, the unit goes on: one that
    accumulates gradients over several batches ends with its step.
    """

    def __init__(self) -> None:
        self._passed: set[Landmark] = set()
        self._fits: dict[Landmark, bool] = {}
        self._rounds = 0
        self._awaited: int | None = None
        """Rounds before a step, at most, where none was cut short."""

    def ends_unit(self, landmark: Landmark) -> bool:
        """Take note of a landmark; return whether the unit should end here."""
        if landmark not in self._passed:
            self._passed.add(landmark)
            return False
        self._passed = {landmark}
        self._rounds += 1
        return self._rounds > self._limit()

    def leave(self, landmark: Landmark) -> None:
        """Take note that a loop is over where it would have passed a landmark: what follows is no round of it.

        Else the first batch of each epoch came round, and ended a unit that had hardly begun.
        """
        self._passed.discard(landmark)

    def fits(self, landmark: Landmark) -> bool | None:
        """Whether units can end at a landmark; None if that has to be seen first."""
        return self._fits.get(landmark, landmark.is_free or None)

    def learn(self, landmark: Landmark, fits: bool) -> None:
        """Take note whether autograd history crossed the line. Where it ever did, no unit ends."""
        self._fits[landmark] = fits and self._fits.get(landmark, True)

    def _limit(self) -> int:
        return PATIENCE if self._awaited is None else self._awaited

    def step(self) -> None:
        """Take note that an optimizer has stepped."""
        if self._rounds <= self._limit():
            self._awaited = max(self._awaited or 0, self._rounds)
        self._rounds = 0
        self._passed.clear()


class LoopUnits:
    """Hears the landmarks of one program in its thread, and ends its units there; a `Loop`."""

    def __init__(self, runner: PythonRunner, interception: Interception, end_unheard: Callable[[], None]) -> None:
        self._runner = runner
        self._interception = interception
        self._end_unheard = end_unheard
        """Ends a unit of which nothing is heard: an idle one, or the rest of one."""
        self._rounds = Rounds()
        self._has_ends = False
        """Whether units were seen to have an end: a step, or a landmark that fits."""

    def steps(self) -> None:
        """Take note that an optimizer has stepped."""
        self._has_ends = True
        self._rounds.step()

    def leaves(self, landmark: Landmark) -> None:
        """Take note that a loop is over."""
        self._rounds.leave(landmark)

    def _may_end_unheard(self, fits: bool | None) -> bool:
        """Whether an unheard unit may end at a landmark.

        Units of which none was heard yet may have no other ends than landmarks that nothing is known of.
        """
        self._has_ends = self._has_ends or bool(fits)
        return bool(fits) or (fits is None and not self._has_ends)

    def passes(self, landmark: Landmark) -> None:
        """End the unit, eager or not, where its loop has come round and no step is awaited."""
        runner, rounds = self._runner, self._rounds
        fits = rounds.fits(landmark)
        with torch._C.DisableTorchFunction():
            if not self._interception.active:
                if self._may_end_unheard(fits) and current_listener() is None and rounds.ends_unit(landmark):
                    self._end_unheard()
            elif not hears(runner):
                return
            elif fits is False:
                if runner.is_refused:
                    unwatch("history_escapes", "a unit that runs eagerly anyway, and whose end is not in sight")
            elif rounds.ends_unit(landmark):
                if runner.is_refused:
                    runner.end()
                else:
                    rounds.learn(landmark, runner.end_round())

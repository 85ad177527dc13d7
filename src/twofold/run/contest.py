"""`Contest`: which tiers pay for the units that begin in one state, by the times that they took.

Units on a tier take turns with units on what it is to replace, so that whatever else the machine does slows both
alike. Where units take several paths, only what is known of the same path is compared; an eager unit does not show its
path, so a tier is compared with eager execution by the means of many units.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from twofold.capture.trace_graph import Path

SAMPLES = 5
"""Units timed of each side before a tier is judged, by their medians, where units take one path."""
MIXED_SAMPLES = 20
"""The same where they take several. Of the demo's script one unit in 45 evaluates the network first and takes 10 times
as long: among 20 units of one side it made the compiled tier, at 0.8 of the time, the slower one."""
MOST_SAMPLES = 100
"""As many are timed of each side against eager execution, if what is seen of the difference may still be chance."""
TRIMMED = 0.1
"""Of these the shortest and longest tenths do not count: one collection of all of Python's garbage, 130 ms, among 20
units of 1 ms would make them slower than eager ones of 7 ms."""
MARGIN = 0.97
"""A tier has to take less than this share of the time of what it replaces: beyond noise."""
LAST_TRIAL_AFTER = 200
"""Units after the verdict on the compiled tier until it is tried once more, for good."""
MAX_MISSED = 20
"""Units that took a path without the tier on trial, and the trial is put off until other paths may have it: it would
take the time of all units and come to no end. `a3c` was at 0.86 of eager's speed for 13,000 calls."""
EAGER = "eager"


@dataclass(eq=False)
class Trial:
    """One tier against another, or against eager execution. Mutable: units add their seconds."""

    tier: str
    against: str
    samples: defaultdict[Path | None, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of units on `tier`, by path; by None where they are compared with eager ones."""
    references: defaultdict[Path | None, list[float]] = field(default_factory=lambda: defaultdict(list))
    missed: int = 0
    """Units that should have run on `tier`, but took a path that does not have it."""

    def _key(self, path: Path) -> Path | None:
        return None if self.against == EAGER else path

    def is_turn_of_tier(self, path: Path) -> bool:
        """Whether the next unit of a path should run on the tier on trial: seldom where many were for nothing."""
        key = self._key(path)
        return len(self.samples[key]) + self.missed**2 // 4 <= len(self.references[key])

    def note(self, path: Path, tier: str, seconds: float) -> None:
        """Take the time of a unit, which ran on `tier` or eagerly."""
        (self.samples if tier == self.tier else self.references)[self._key(path)].append(seconds)

    def verdict(self, is_mixed: bool) -> tuple[float, float] | None:
        """Return the typical times of both sides, once enough are known. `is_mixed`: units take several paths."""
        pairs = {key: min(len(times), len(self.references[key])) for key, times in list(self.samples.items())}
        count = sum(pairs.values())
        if count < (MIXED_SAMPLES if is_mixed else SAMPLES):
            return None
        if is_mixed and self.against == EAGER:
            return _compare_mixtures(self.samples[None], self.references[None])
        tier, other = (
            sum(weight * statistics.median(side[key]) for key, weight in pairs.items() if weight) / count
            for side in (self.samples, self.references)
        )
        return tier, other


def _compare_mixtures(samples: list[float], references: list[float]) -> tuple[float, float] | None:
    """Return the trimmed means of units of several lengths; None if two standard errors may turn the verdict."""
    ours, theirs = map(_trimmed, (samples, references))
    means = statistics.mean(ours), statistics.mean(theirs)
    error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    is_clear = abs(means[0] - MARGIN * means[1]) > 2 * error
    return means if is_clear or min(len(samples), len(references)) >= MOST_SAMPLES else None


def _trimmed(seconds: list[float]) -> list[float]:
    left_out = int(TRIMMED * len(seconds))
    return sorted(seconds)[left_out : len(seconds) - left_out]


@dataclass(eq=False)
class Contest:
    """The tiers of the units that begin in one state, whichever path they take then."""

    paths: list[Path] = field(default_factory=list[Path])
    accepted: list[str] = field(default_factory=list[str])
    """The last is the best."""
    rejected: set[str] = field(default_factory=set[str])
    polled: int = 0
    """The path last looked at for kernels, besides the likely one."""
    trial: Trial | None = None
    beside: Trial | None = None
    """The first tier against eager execution while a compiler works on a core that both would use."""
    pays_beside: bool | None = None
    """The verdict of that."""
    last_trial: str | None = None
    """The compiled tier, while it is still to be tried once more."""
    rest: int = 0
    """Units until then."""
    put_off: int = 0
    """How often a trial was put off."""

    @property
    def best(self) -> str:
        return self.accepted[-1] if self.accepted else EAGER

    @property
    def is_mixed(self) -> bool:
        return len(self.paths) > 1

    def begin_trial(self, tier: str) -> None:
        """Try a tier against the best so far, or the best itself against eager execution."""
        self.trial = Trial(tier, EAGER if tier == self.best else self.best)

    def settle(self, is_accepted: bool) -> None:
        """End the trial with its verdict."""
        assert self.trial is not None
        tier, self.trial = self.trial.tier, None
        if tier in self.accepted and not is_accepted:
            self.accepted.remove(tier)
        elif is_accepted and tier not in self.accepted:
            self.accepted.append(tier)
        if is_accepted:
            self.rejected.discard(tier)
        else:
            self.rejected.add(tier)

    def begin_rest(self, tier: str) -> None:
        """Have a tier tried once more, some units from now."""
        self.last_trial, self.rest = tier, LAST_TRIAL_AFTER

    def put_trial_off(self) -> None:
        """Have the tier on trial tried later, when other paths may have it; later each time."""
        assert self.trial is not None
        self.last_trial, self.rest = self.trial.tier, LAST_TRIAL_AFTER << self.put_off
        self.trial = None
        self.put_off += 1

    def take_rest(self, units: int) -> None:
        """Count units; begin the last trial when it is due."""
        if self.last_trial is None or self.trial is not None:
            return
        self.rest -= units
        if self.rest <= 0:
            tier, self.last_trial = self.last_trial, None
            self.begin_trial(tier)

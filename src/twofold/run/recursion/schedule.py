"""Who runs when: invocations numbered so that each level's are neighbours, and the indices that join them.

Levels count from the leaves: an invocation is one above the highest that it takes a tensor from. A function's
invocations are numbered by level and, within a level, by block, so that what one block computes at one level are
neighbouring rows of a table of the function's results.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import RunnableBlock

Index = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Pile:
    """The invocations of one block that wait: their numbers, the invocations they made, their host values.

    `steering` are the block's `constant_hosts`.
    """

    block: RunnableBlock
    steering: tuple[int, ...]
    tasks: list[int] = field(default_factory=list[int])
    invocations: list[Sequence[int]] = field(default_factory=list[Sequence[int]])
    hosts: list[Sequence[Any]] = field(default_factory=list[Sequence[Any]])


class Segment(NamedTuple):
    """The invocations of one block at one level: its rows `start` to `stop`, from row `table` of the tables."""

    group: int
    number: int
    start: int
    stop: int
    table: int
    rows: int


@dataclass
class Group:
    """All invocations of one block: their numbers, by level, and their rows in the tables of their function."""

    pile: Pile
    tasks: Index
    rows: Index
    order: Index
    """The invocations as they are in the pile, by level."""
    segments: list[Segment] = field(default_factory=list[Segment])
    child_rows: Index = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    """i64[invocations made, invocations]: the rows of the invocations that each one made."""
    children: dict[tuple[int, ...], Any] = field(default_factory=dict[tuple[int, ...], Any])

    @property
    def block(self) -> RunnableBlock:
        """The block that they run."""
        return self.pile.block

    @property
    def bounds(self) -> tuple[int, int]:
        """The rows from the first to behind the last; others may lie between."""
        return int(self.rows[0]), int(self.rows[-1]) + 1


@dataclass
class Schedule:
    """The order in which invocations run. Of each: `row` in its function's tables, group, and `place` in its group."""

    device: torch.device
    groups: list[Group]
    levels: list[list[Segment]]
    row: Index
    group_of: Index
    place: Index
    sizes: dict[str, int]
    """How many invocations each function has."""
    requested: list[int]
    """The invocations whose results leave the batch."""
    shared: bool
    """Whether results of one outermost call may be used by another."""
    _once: dict[str, bool] = field(default_factory=dict[str, bool])

    def index(self, numbers: Index) -> Tensor:
        """Return indices as a tensor on the device."""
        return upload(numbers, self.device)

    def children(self, group: Group, places: tuple[int, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the rows of some of the invocations that each of a block's made, in turn: of all, and by level."""
        known = group.children.get(places)
        if known is None:
            whole = self.index(np.ascontiguousarray(group.child_rows[list(places)].T).reshape(-1))
            sizes = [segment.rows * len(places) for segment in group.segments]
            known = group.children[places] = whole, whole.split_with_sizes(sizes)
        return known

    def taken_once(self, function: str) -> bool:
        """Say whether each result of a function goes to one place at most: an invocation, or out of the batch."""
        known = self._once.get(function)
        if known is None:
            parts = [
                rows
                for g in self.groups
                for rows, c in zip(g.child_rows, g.block.callees, strict=True)
                if c == function
            ]
            outside = [
                task for task in set(self.requested) if self.groups[self.group_of[task]].block.function == function
            ]
            uses = np.concatenate([*parts, self.row[integers(outside)]])
            known = self._once[function] = len(uses) == 0 or int(np.bincount(uses).max()) <= 1
        return known


def make_schedule(
    piles: Sequence[Pile], levels: Sequence[int], device: torch.device, requested: Sequence[int], shared: bool
) -> Schedule:
    """Put invocations in order. `levels` has the level of each, by its number."""
    level = integers(levels)
    functions = sorted({pile.block.function for pile in piles})
    group_of, function, position, place, row = (np.empty(len(level), dtype=np.int64) for _ in range(5))
    for index, pile in enumerate(piles):
        numbers = integers(pile.tasks)
        group_of[numbers] = index
        function[numbers] = functions.index(pile.block.function)
        position[numbers] = np.arange(len(numbers))
    key = (function * (int(level.max()) + 1) + level) * len(piles) + group_of
    # Small numbers are sorted by radix, in a tenth of the time.
    order = np.argsort(key.astype(np.min_scalar_type(int(key.max()))), kind="stable")
    counts = np.bincount(function, minlength=len(functions))
    row[order] = np.arange(len(level))
    row -= (np.cumsum(counts) - counts)[function]
    sizes = dict(zip(functions, counts.tolist(), strict=True))
    steps: list[list[Segment]] = [[] for _ in range(int(level.max()) + 1)]
    schedule = Schedule(device, [], steps, row, group_of, place, sizes, list(requested), shared)
    for index, pile in enumerate(piles):
        numbers = order[group_of[order] == index]
        place[numbers] = np.arange(len(numbers))
        group = Group(pile, numbers, row[numbers], position[numbers])
        schedule.groups.append(group)
        _cut(schedule, index, group, level)
    _children(schedule)
    return schedule


def _cut(schedule: Schedule, index: int, group: Group, level: Index) -> None:
    """Cut a block's invocations by level."""
    levels = level[group.tasks]
    bounds = [0, *(np.flatnonzero(levels[1:] != levels[:-1]) + 1).tolist(), len(levels)]
    held, rows = levels[bounds[:-1]].tolist(), group.rows[bounds[:-1]].tolist()
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        segment = Segment(index, number, start, stop, rows[number], stop - start)
        group.segments.append(segment)
        schedule.levels[held[number]].append(segment)


def _children(schedule: Schedule) -> None:
    """Look up the rows of the invocations that each one made."""
    for group in schedule.groups:
        if group.block.callees:
            made = integers(itertools.chain.from_iterable(group.pile.invocations))
            numbers = made.reshape(-1, len(group.block.callees))[group.order]
            group.child_rows = schedule.row[numbers].T


def integers(numbers: Iterable[int]) -> Index:
    """Make an array of Python integers, several times faster than NumPy does. Raises OverflowError."""
    return np.frombuffer(array("q", numbers), dtype=np.int64)


def upload(numbers: Index, device: torch.device) -> Tensor:
    """Bring an array to a device without waiting for it."""
    held = torch.from_numpy(numbers)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)

"""Who runs when: invocations numbered so that each level's are neighbours, and the indices that join them.

Levels count from the leaves: an invocation is one above the highest that it takes a tensor from. A function's
invocations are numbered by level and, within a level, by block, so that what one block computes at one level are
neighbouring rows of a table of the function's results.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import RunnableBlock
from .factors import Table
from .requests import Leaving, Request

Index = NDArray[np.int64]


class Use(Enum):
    """What an index is for. What it says of is in the second place of a `Named`, if anything is."""

    ROWS = "the rows of a block's invocations in the tables"
    CHILDREN = "the rows of the invocations that each of a block's made, in turn: which of them"
    OWED = "the same where gradients are added: which of them"
    ROOTS = "the number of the outermost call that each of a block's belongs to: Table"
    LEAVING = "the rows of results that leave: Leaving"


class Named(NamedTuple):
    """An index that running a batch takes, by what it is for, so that it can be made anew for another batch."""

    use: Use
    what: Any
    group: int = -1


@dataclass(slots=True, eq=False)
class Pile:
    """The invocations of one block that wait: their numbers, the invocations they made, their host values.

    The latter two are columns: a list for each invocation that one makes, and for each host value. Planners hold the
    lists and add to them, so they stay the same objects.
    """

    block: RunnableBlock
    tasks: list[int]
    invocations: Sequence[list[int]]
    hosts: Sequence[list[Any]]

    @classmethod
    def of(cls, block: RunnableBlock) -> Pile:
        """Make a pile of none."""
        return cls(block, [], [[] for _ in block.callees], [[] for _ in range(block.block.hosts)])

    @property
    def steering(self) -> tuple[int, ...]:
        """Which host values choose a variant of the block, for which invocations wait instead."""
        return self.block.constant_hosts

    @property
    def columns(self) -> tuple[list[Any], ...]:
        """All lists."""
        return self.tasks, *self.invocations, *self.hosts

    def rows(self) -> Iterator[tuple[int, Sequence[int], Sequence[Any]]]:
        """Yield the number of each, the invocations it made, and its host values."""
        nothing = itertools.repeat(())
        made = zip(*self.invocations, strict=True) if self.invocations else nothing
        return zip(self.tasks, made, zip(*self.hosts, strict=True) if self.hosts else nothing, strict=False)

    def add(self, number: int, invocations: Sequence[int], hosts: Sequence[Any]) -> None:
        """Add an invocation."""
        for column, value in zip(self.columns, (number, *invocations, *hosts), strict=True):
            column.append(value)

    def drop(self, first: int) -> None:
        """Drop the invocations from a number on, one of them perhaps added in part when an interrupt came."""
        kept = bisect.bisect_left(self.tasks, first)
        for column in self.columns:
            del column[kept:]

    def copy(self) -> Pile:
        """Return a pile of the same invocations."""
        return Pile(self.block, self.tasks[:], [c[:] for c in self.invocations], [c[:] for c in self.hosts])


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

    number: int
    pile: Pile
    tasks: Index
    rows: Index
    order: Index
    """The invocations as they are in the pile, by level."""
    segments: list[Segment] = field(default_factory=list[Segment])
    child_rows: Index = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    """i64[invocations made, invocations]: the rows of the invocations that each one made."""

    @property
    def block(self) -> RunnableBlock:
        """The block that they run."""
        return self.pile.block

    def places_of(self, table: Table) -> list[int]:
        """Return which of the invocations that each one made have a result that is added to its own of this table."""
        if self.block.function != table[0]:
            return []
        return [o.invocation for o in self.block.operands if (o.callee, o.result) == table]

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
    spare: int = 0
    """How many rows at the end of tables and of sums belong to no invocation; `sizes` counts them."""
    leaving: dict[Leaving, Index] = field(default_factory=dict[Leaving, Index])
    """The invocations whose results leave, in the order in which these do."""
    _uploaded: dict[Named, Tensor] = field(default_factory=dict[Named, Tensor])
    _by_level: dict[Named, Sequence[Tensor]] = field(default_factory=dict[Named, Sequence[Tensor]])
    _once: dict[str, bool] = field(default_factory=dict[str, bool])
    _roots: dict[Table, Index | None] = field(default_factory=dict[Table, Index | None])

    def leave(self, requests: Sequence[Request], tables: Iterable[Table]) -> list[list[int]]:
        """Take note of what leaves; return the numbers of the requests that each of `leaving` answers.

        Results of these tables leave as rows of them.
        """
        found: dict[Leaving, list[int]] = {}
        tabled = frozenset(tables)
        for number, group in enumerate(self.group_of[[request.task for request in requests]].tolist()):
            block, output = self.groups[group].block, requests[number].output
            table = block.function, block.block.results[output]
            found.setdefault(table if table in tabled else (group, output), []).append(number)
        self.leaving = {
            leaving: integers(requests[number].task for number in numbers) for leaving, numbers in found.items()
        }
        return list(found.values())

    def count(self, leaving: Leaving) -> int:
        """Return how many results leave there."""
        return len(self.leaving.get(leaving, ()))

    def index(self, named: Named) -> Tensor:
        """Return an index as a tensor on the device."""
        known = self._uploaded.get(named)
        if known is None:
            known = self._uploaded[named] = upload(self.numbers(named), self.device)
        return known

    def numbers(self, named: Named) -> Index:
        """Return an index."""
        use, what, number = named
        match use:
            case Use.ROWS:
                return self.groups[number].rows
            case Use.CHILDREN | Use.OWED:
                return np.ascontiguousarray(self.groups[number].child_rows[list(what)].T).reshape(-1)
            case Use.ROOTS:
                roots = self.roots(what)
                assert roots is not None
                return roots[self.groups[number].tasks]
            case Use.LEAVING:
                return (self.row if type(what[0]) is str else self.place)[self.leaving[what]]

    def children(self, group: int, places: tuple[int, ...]) -> Sequence[Tensor]:
        """Return, by level, the rows of some of the invocations that each of a block's made, in turn."""
        return self._split(Named(Use.CHILDREN, places, group))

    def owed(self, group: int, places: tuple[int, ...]) -> Sequence[Tensor]:
        """Return, by level, the rows that gradients of these invocations are added to."""
        return self.children(group, places)

    def _split(self, named: Named) -> Sequence[Tensor]:
        known = self._by_level.get(named)
        if known is None:
            sizes = [segment.rows * len(named.what) for segment in self.groups[named.group].segments]
            known = self._by_level[named] = self.index(named).split_with_sizes(sizes)
        return known

    def roots(self, table: Table) -> Index | None:
        """Return which of the results of a table that leave each invocation adds to, if it adds to that alone.

        None where that cannot be said: a result is used twice, or by another outermost call, or not at all.
        """
        if table not in self._roots:
            self._roots[table] = self._find_roots(table)
        return self._roots[table]

    def _find_roots(self, table: Table) -> Index | None:
        """Find the outermost call of each invocation by the order in which they were made."""
        function, tasks = table[0], self.leaving.get(table, _NONE)
        if self.shared or set(self.sizes) != {function} or not self.taken_once(function):
            return None
        edges = sum(len(group.tasks) * len(group.places_of(table)) for group in self.groups)
        if edges != len(self.row) - len(tasks):
            return None
        order = np.argsort(tasks)
        return order[np.searchsorted(tasks[order], np.arange(len(self.row)))]

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
        group = Group(index, pile, numbers, row[numbers], position[numbers])
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
            made = np.stack([integers(column) for column in group.pile.invocations])
            group.child_rows = schedule.row[made[:, group.order]]


_NONE: Index = np.empty(0, dtype=np.int64)


def integers(numbers: Iterable[int]) -> Index:
    """Make an array of Python integers, several times faster than NumPy does. Raises OverflowError."""
    return np.frombuffer(array("q", numbers), dtype=np.int64)


def upload(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """Bring an array to a device without waiting for it."""
    held = torch.from_numpy(numbers)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)

"""Room for many batches: a schedule with rows to spare, which another batch's invocations can be put into.

A batch that has at most as many invocations of each block at each level as a room, and as many results that leave,
runs by the room's schedule. Rows that are left over are *padding*: they compute over again what the first invocation
of their block does, so that no value comes up in them that the batch does not have. Nothing takes their results,
the gradients that come to them are zero, so that they add zero to those of parameters, and what they owe to children
goes to a spare row that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .factors import Table
from .requests import Leaving
from .schedule import Group, Index, Named, Pile, Schedule, Segment, Use

SPARE = 1
"""Rows at the end of tables of gradients, and of sums, that padding writes to."""
LEAST = 8
"""Rooms for the invocations of a block at a level are multiples of this: on a GPU so few rows cost what one does."""


@dataclass(frozen=True, eq=False)
class Room:
    """How many invocations of each block there may be at each level, i64[blocks, levels], and results that leave."""

    rows: Index
    leaving: Mapping[Leaving, int]

    @classmethod
    def of(cls, schedule: Schedule) -> Room:
        """Return what a batch takes up."""
        rows = np.zeros((len(schedule.groups), len(schedule.levels)), dtype=np.int64)
        for level, segments in enumerate(schedule.levels):
            for segment in segments:
                rows[segment.group, level] = segment.rows
        return cls(rows, {leaving: len(tasks) for leaving, tasks in schedule.leaving.items()})

    @property
    def size(self) -> int:
        """How many invocations there may be."""
        return int(self.rows.sum())

    def holds(self, batch: Room) -> bool:
        """Say whether a batch has place, and padding has an invocation below it to do over again."""
        levels = batch.rows.shape[1]
        if levels > self.rows.shape[1] or self.leaving.keys() != batch.leaving.keys():
            return False
        first = np.argmax(self.rows > 0, 1) == np.argmax(batch.rows > 0, 1)
        return bool(
            (batch.rows <= self.rows[:, :levels]).all()
            and first.all()
            and all(self.leaving[leaving] >= count for leaving, count in batch.leaving.items())
        )

    def fits(self, batch: Room) -> bool:
        """Say whether a batch has place and leaves few levels, which cost most if they are narrow, and rows empty."""
        levels = batch.rows.shape[1]
        return (
            self.rows.shape[1] <= levels + levels // 2 + 4 and self.size <= 2 * batch.size + 512 and self.holds(batch)
        )

    def joined(self, other: Room) -> Room:
        """Return the least that holds both."""
        levels = max(self.rows.shape[1], other.rows.shape[1])
        rows = np.zeros((2, len(self.rows), levels), dtype=np.int64)
        rows[0, :, : self.rows.shape[1]] = self.rows
        rows[1, :, : other.rows.shape[1]] = other.rows
        return Room(
            rows.max(0), {leaving: max(self.leaving[leaving], other.leaving[leaving]) for leaving in other.leaving}
        )

    def widened(self) -> Room:
        """Return one for other batches of such trees.

        Sizes of trees, and where in a tree its invocations are, vary from batch to batch: an eighth more, and twice the
        square root, which matters where there are few. Blocks that are at several levels get an eighth more levels.
        """
        wide = self.rows + self.rows // 8 + 2 * np.sqrt(self.rows).astype(np.int64)
        rows = np.where(self.rows > 0, -(-wide // LEAST) * LEAST, 0)
        more = rows.shape[1] // 8
        rows = np.concatenate([rows, np.zeros((len(rows), more), dtype=np.int64)], 1)
        for own in rows:
            held = np.flatnonzero(own)
            if len(held) > 1:
                own[held[-1] + 1 : held[-1] + 1 + more] = LEAST
        return Room(rows, self.leaving)

    def furnish(self, schedule: Schedule, source: Callable[[Named], Tensor]) -> Furnished:
        """Return the schedule of this room, with blocks and functions as in a batch; `source` has its indices."""
        starts = [0] * len(schedule.groups)
        sizes = dict.fromkeys(schedule.sizes, 0)
        levels: list[list[Segment]] = []
        segments: list[list[Segment]] = [[] for _ in schedule.groups]
        for column in self.rows.T.tolist():
            levels.append([])
            for number, rows in enumerate(column):
                if rows:
                    function, start = schedule.groups[number].block.function, starts[number]
                    segment = Segment(number, len(segments[number]), start, start + rows, sizes[function], rows)
                    segments[number].append(segment)
                    levels[-1].append(segment)
                    starts[number] += rows
                    sizes[function] += rows
        groups = [
            Group(group.number, Pile.of(group.block), np.arange(rows), _rows(own), _NONE, own)
            for group, rows, own in zip(schedule.groups, starts, segments, strict=True)
        ]
        leaving = {leaving: np.zeros(count, dtype=np.int64) for leaving, count in self.leaving.items()}
        sizes = {function: rows + SPARE for function, rows in sizes.items()}
        once = {function: schedule.taken_once(function) for function in sizes}
        return Furnished(
            schedule.device,
            groups,
            levels,
            _NONE,
            _NONE,
            _NONE,
            sizes,
            [],
            False,
            SPARE,
            leaving,
            source=source,
            once=once,
        )


@dataclass
class Furnished(Schedule):
    """The schedule of a room. It says how many rows there are of what, and `source` which they are."""

    source: Callable[[Named], Tensor] = field(kw_only=True)
    once: Mapping[str, bool] = field(kw_only=True)

    def index(self, named: Named) -> Tensor:
        """Return an index as a tensor on the device."""
        return self.source(named)

    def owed(self, group: int, places: tuple[int, ...]) -> Sequence[Tensor]:
        """Return, by level, the rows that gradients are added to: not those of what padding takes."""
        return self._split(Named(Use.OWED, places, group))

    def taken_once(self, function: str) -> bool:
        """Say whether each result of a function goes to one place at most in the batches that are put here."""
        return self.once[function]

    def roots(self, table: Table) -> Index | None:
        """Say that each invocation adds to one result that leaves; `source` has which."""
        return _NONE


def _rows(segments: list[Segment]) -> Index:
    return np.concatenate([np.arange(segment.table, segment.table + segment.rows) for segment in segments])


_NONE: Index = np.empty(0, dtype=np.int64)


class Padding:
    """Where the invocations of a batch are in a room that holds it, and what is done in the rows that are left over."""

    def __init__(self, batch: Schedule, taken: Room, room: Room, furnished: Furnished) -> None:
        self._batch = batch
        self._furnished = furnished
        self._places: list[Index] = []
        """For each block: where its invocations are among its rows in the room."""
        self.sources: list[Index] = []
        """For each block and each of its rows: which invocation it computes."""
        self._moved: dict[str, Index] = {f: np.empty(rows, dtype=np.int64) for f, rows in batch.sizes.items()}
        """For each function: where rows of the batch's tables are in the room's."""
        for group, own in zip(batch.groups, furnished.groups, strict=True):
            counts = taken.rows[group.number]
            behind = np.cumsum(room.rows[group.number])[: len(counts)]
            shift = behind - room.rows[group.number, : len(counts)] - (np.cumsum(counts) - counts)
            places = np.arange(len(group.tasks)) + np.repeat(shift, counts)
            source = np.zeros(len(own.tasks), dtype=np.int64)
            source[places] = np.arange(len(places))
            self._places.append(places)
            self.sources.append(source)
            self._moved[group.block.function][group.rows] = own.rows[places]

    def numbers(self, named: Named) -> Index:
        """Return an index of the furnished schedule for this batch."""
        use, what, number = named
        match use:
            case Use.ROWS:
                return self._furnished.groups[number].rows
            case Use.CHILDREN:
                return self._children(number, what)[self.sources[number]].reshape(-1)
            case Use.OWED:
                spare = self._furnished.sizes[self._callee(number, what)] - SPARE
                return self._spread(number, self._children(number, what), spare).reshape(-1)
            case Use.ROOTS:
                return self._spread(number, self._batch.numbers(named), self._furnished.count(what))
            case Use.LEAVING:
                return self._leaving(what)

    def _callee(self, number: int, places: tuple[int, ...]) -> str:
        return self._batch.groups[number].block.callees[places[0]]

    def _children(self, number: int, places: tuple[int, ...]) -> Index:
        """Return, for each invocation of a block, the rows in the room of some of those that it made."""
        return self._moved[self._callee(number, places)][self._batch.groups[number].child_rows[list(places)]].T

    def _spread(self, number: int, held: Index, spare: int) -> Index:
        """Return what is given for the invocations of a block for its rows in the room, and `spare` for padding."""
        spread = np.full((len(self.sources[number]), *held.shape[1:]), spare)
        spread[self._places[number]] = held
        return spread

    def _leaving(self, leaving: Leaving) -> Index:
        """Return where results are that leave; what is left over reads some row, and adds nothing to its gradient."""
        own = self._batch.numbers(Named(Use.LEAVING, leaving))
        moved = self._moved[leaving[0]] if type(leaving[0]) is str else self._places[leaving[0]]
        held = np.zeros(self._furnished.count(leaving), dtype=np.int64)
        held[: len(own)] = moved[own]
        return held

"""Who runs when: invocations numbered so that each level's are neighbours, and the indices that join them.

Levels count from the leaves: an invocation is one above the highest that it takes a tensor from. A function's
invocations are numbered by level and, within a level, by block, so that what one block computes at one level are
neighbouring rows of a table of the function's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import RunnableBlock

Index = NDArray[np.int64]


class Task(NamedTuple):
    """One invocation: its block, the invocations it made, the host values it has, the tensors that the host keeps."""

    block: RunnableBlock
    invocations: Sequence[int]
    hosts: Sequence[Any]
    kept: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """The invocations of one block at one level: its rows `start` to `stop`, from row `table` of its function's tables."""

    group: int
    number: int
    start: int
    stop: int
    table: int
    rows: int


@dataclass
class Group:
    """All invocations of one block: their numbers, by level, and their rows in the tables of their function."""

    block: RunnableBlock
    tasks: Index
    rows: Index
    segments: list[Segment] = field(default_factory=list[Segment])
    children: list[Tensor] = field(default_factory=list[Tensor])
    """For each invocation that the block makes: the row of it, for all invocations of the block."""
    child_rows: list[Index] = field(default_factory=list[Index])

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

    def taken_once(self, function: str) -> bool:
        """Say whether each result of a function goes to one place at most: an invocation, or out of the batch."""
        known = self._once.get(function)
        if known is None:
            parts = [rows for g in self.groups for rows, c in zip(g.child_rows, g.block.callees, strict=True) if c == function]
            outside = [task for task in set(self.requested) if self.groups[self.group_of[task]].block.function == function]
            uses = np.concatenate([*parts, self.row[np.array(outside, dtype=np.int64)]])
            known = self._once[function] = len(uses) == 0 or int(np.bincount(uses).max()) <= 1
        return known


def levels_of(tasks: Sequence[Task]) -> list[int]:
    """Return the level of each invocation."""
    levels: list[int] = []
    append = levels.append
    for task in tasks:
        top = -1
        for child in task[1]:
            level = levels[child]
            if level > top:
                top = level
        append(top + 1)
    return levels


def make_schedule(tasks: Sequence[Task], device: torch.device, requested: Sequence[int], shared: bool) -> Schedule:
    """Put invocations in order. `tasks` has each one after those it takes tensors from."""
    numbers: dict[RunnableBlock, int] = {}
    members: list[list[int]] = []
    block_of: list[int] = []
    for number, task in enumerate(tasks):
        block = task[0]
        key = numbers.get(block)
        if key is None:
            key = numbers[block] = len(members)
            members.append([])
        members[key].append(number)
        block_of.append(key)
    blocks = list(numbers)
    functions = sorted({block.function for block in blocks})
    level = np.array(levels_of(tasks), dtype=np.int64)
    which = np.array(block_of, dtype=np.int64)
    function = np.array([functions.index(block.function) for block in blocks], dtype=np.int64)[which]
    order = np.lexsort((which, level, function))
    counts = np.bincount(function, minlength=len(functions))
    row = np.empty(len(tasks), dtype=np.int64)
    row[order] = np.arange(len(tasks))
    row -= (np.cumsum(counts) - counts)[function]
    groups = [_group(block, np.array(m, dtype=np.int64), level, row) for block, m in zip(blocks, members, strict=True)]
    place = np.empty(len(tasks), dtype=np.int64)
    for group in groups:
        place[group.tasks] = np.arange(len(group.tasks))
    sizes = dict(zip(functions, counts.tolist(), strict=True))
    levels: list[list[Segment]] = [[] for _ in range(int(level.max()) + 1)]
    schedule = Schedule(device, groups, levels, row, which, place, sizes, list(requested), shared)
    for index, group in enumerate(groups):
        _cut(schedule, index, group, level)
    _children(schedule, tasks)
    return schedule


def _group(block: RunnableBlock, members: Index, level: Index, row: Index) -> Group:
    members = members[np.argsort(level[members], kind="stable")]
    return Group(block, members, row[members])


def _cut(schedule: Schedule, index: int, group: Group, level: Index) -> None:
    """Cut a block's invocations by level."""
    levels = level[group.tasks]
    bounds = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        segment = Segment(index, number, start, stop, int(group.rows[start]), stop - start)
        group.segments.append(segment)
        schedule.levels[int(levels[start])].append(segment)


def _children(schedule: Schedule, tasks: Sequence[Task]) -> None:
    """Look up the rows of children, in one upload."""
    parts: list[Index] = []
    for group in schedule.groups:
        if group.block.callees:
            numbers = np.array([tasks[number][1] for number in group.tasks.tolist()], dtype=np.int64)
            group.child_rows = list(schedule.row[numbers].T.copy())
            parts += group.child_rows
    if not parts:
        return
    uploaded = iter(schedule.index(np.concatenate(parts)).split([len(part) for part in parts]))
    for group in schedule.groups:
        group.children = [next(uploaded) for _ in group.child_rows]


def upload(numbers: Index, device: torch.device) -> Tensor:
    """Bring an array to a device without waiting for it."""
    held = torch.from_numpy(numbers)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)

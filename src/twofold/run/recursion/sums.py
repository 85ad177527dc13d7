"""Results that are sums: each invocation's own term and the sums of the invocations it made.

Where every invocation is made by one other, an invocation belongs to one outermost call, and the terms are added up
by that alone. Where a result is used twice, or not at all, the sums go up level by level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .schedule import Group, Index, Schedule, Segment


class Sums:
    """Adds up one result of one function."""

    def __init__(self, schedule: Schedule, table: tuple[str, int]) -> None:
        self._schedule = schedule
        self._table = table
        self._root: Index | None = None
        self._count = 0

    def forward(self, terms: Sequence[tuple[Group, Tensor]], tasks: list[int]) -> Tensor:
        """Return the sums of the given invocations, from the terms of all."""
        self._find_roots(tasks)
        if self._root is not None:
            first = terms[0][1]
            total = first.new_zeros((len(tasks), *first.shape[1:]))
            for group, term in terms:
                total.index_add_(0, self._schedule.index(self._root[group.tasks]), term)
            return total
        sums = self._scatter(terms)
        for level in self._schedule.levels:
            for segment in level:
                for children in self._children(segment):
                    sums[segment.table : segment.table + segment.rows] += sums.index_select(0, children)
        return sums.index_select(0, self._schedule.index(self._schedule.row[tasks]))

    def backward(self, outside: Sequence[tuple[list[int], Tensor]], group: Group) -> Tensor:
        """Return the gradients of the terms of one block's invocations from those of requested sums."""
        rows = outside[0][1]
        if self._root is not None:
            gradient = rows.new_zeros((self._count, *rows.shape[1:]))
            for tasks, held in outside:
                gradient.index_add_(0, self._schedule.index(self._root[np.array(tasks)]), held)
            return gradient.index_select(0, self._schedule.index(self._root[group.tasks]))
        gradient = rows.new_zeros((self._schedule.sizes[self._table[0]], *rows.shape[1:]))
        for tasks, held in outside:
            gradient.index_add_(0, self._schedule.index(self._schedule.row[tasks]), held)
        for level in reversed(self._schedule.levels):
            for segment in level:
                own = gradient[segment.table : segment.table + segment.rows]
                for children in self._children(segment):
                    gradient.index_add_(0, children, own.clone())
        return gradient.index_select(0, self._schedule.index(group.rows))

    def _scatter(self, terms: Sequence[tuple[Group, Tensor]]) -> Tensor:
        first = terms[0][1]
        sums = first.new_zeros((self._schedule.sizes[self._table[0]], *first.shape[1:]))
        for group, term in terms:
            sums.index_copy_(0, self._schedule.index(group.rows), term)
        return sums

    def _children(self, segment: Segment) -> list[Tensor]:
        """Return the rows of those children whose sums are part of an invocation's, one tensor an operand."""
        group = self._schedule.groups[segment.group]
        return [self._schedule.children(group, (place,))[1][segment.number] for place in self._places(group)]

    def _places(self, group: Group) -> list[int]:
        if group.block.function != self._table[0]:
            return []
        return [o.invocation for o in group.block.operands if (o.callee, o.result) == self._table]

    def _find_roots(self, tasks: list[int]) -> None:
        """Find the outermost call of each invocation by the order in which they were made; None if that does not do."""
        schedule, (function, _) = self._schedule, self._table
        self._root, self._count = None, len(tasks)
        if schedule.shared or set(schedule.sizes) != {function} or not schedule.taken_once(function):
            return
        invocations = len(schedule.row)
        places = [self._places(group) for group in schedule.groups]
        edges = sum(len(g.tasks) * len(p) for g, p in zip(schedule.groups, places, strict=True))
        if edges == invocations - len(tasks):
            order = np.argsort(tasks)
            self._root = order[np.searchsorted(np.array(tasks)[order], np.arange(invocations))]

"""Results that are sums: each invocation's own term and the sums of the invocations it made.

Where every invocation is made by one other, an invocation belongs to one outermost call, and the terms are added up
by that alone. Where a result is used twice, or not at all, the sums go up level by level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .factors import Table
from .schedule import Group, Named, Schedule, Segment, Use


class Sums:
    """Adds up one result of one function."""

    def __init__(self, schedule: Schedule, table: Table) -> None:
        self._schedule = schedule
        self._table = table

    def forward(self, terms: Sequence[tuple[Group, Tensor]]) -> Tensor:
        """Return the sums that leave, from the terms of all invocations."""
        schedule, first = self._schedule, terms[0][1]
        if schedule.roots(self._table) is not None:
            total = first.new_zeros((schedule.count(self._table) + schedule.spare, *first.shape[1:]))
            for group, term in terms:
                total.index_add_(0, self._roots(group), term)
            return total[: schedule.count(self._table)]
        sums = first.new_zeros((schedule.sizes[self._table[0]], *first.shape[1:]))
        for group, term in terms:
            sums.index_copy_(0, schedule.index(Named(Use.ROWS, None, group.number)), term)
        for level in schedule.levels:
            for segment in level:
                for children in self._children(segment):
                    sums[segment.table : segment.table + segment.rows] += sums.index_select(0, children)
        return sums.index_select(0, schedule.index(Named(Use.LEAVING, self._table)))

    def backward(self, rows: Tensor, group: Group) -> Tensor:
        """Return the gradients of the terms of one block's invocations from those of the sums that left."""
        schedule = self._schedule
        if schedule.roots(self._table) is not None:
            if schedule.spare:
                rows = torch.cat([rows, rows.new_zeros((schedule.spare, *rows.shape[1:]))])
            return rows.index_select(0, self._roots(group))
        gradient = rows.new_zeros((schedule.sizes[self._table[0]], *rows.shape[1:]))
        gradient.index_add_(0, schedule.index(Named(Use.LEAVING, self._table)), rows)
        for level in reversed(schedule.levels):
            for segment in level:
                own = gradient[segment.table : segment.table + segment.rows]
                for children in self._children(segment):
                    gradient.index_add_(0, children, own.clone())
        return gradient.index_select(0, schedule.index(Named(Use.ROWS, None, group.number)))

    def _roots(self, group: Group) -> Tensor:
        return self._schedule.index(Named(Use.ROOTS, self._table, group.number))

    def _children(self, segment: Segment) -> list[Tensor]:
        """Return the rows of those children whose sums are part of an invocation's, one tensor an operand."""
        places = self._schedule.groups[segment.group].places_of(self._table)
        return [self._schedule.children(segment.group, (place,))[segment.number] for place in places]

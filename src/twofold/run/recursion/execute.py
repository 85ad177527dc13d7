"""Running all invocations of a batch: level by level what depends on children, once what does not.

Results of a function are rows of tables, one for each result that its callers wait for. A level gathers the rows of
its children and writes its own. Backward goes the same way in reverse: an invocation's gradient is complete when the
levels above have run, because each of them adds what it owes its children. A result that only sums up children's
results and a term of its own (a loss) has no table; the terms are added up at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import Group, Schedule, Segment
from .stages import Crossing, Stage, Staged
from .sums import Sums

Table = tuple[str, int]
"""A function and the number of one of its results."""


class Request(NamedTuple):
    """A tensor that leaves the batch: an output of the block of one invocation, by its position."""

    task: int
    output: int


@dataclass
class GroupRun:
    """What is known of one block's invocations while they run: values for all rows, and values level by level."""

    group: Group
    staged: Staged
    parameters: list[Tensor]
    whole: dict[str, Any]
    operands: dict[str, tuple[int, Table]]
    """For each name of an operand: which invocation it comes from, and the table."""
    tangents: dict[str, Table] = field(default_factory=dict[str, Table])
    """For each name of a tangent that comes from a table of gradients: which."""
    by_level: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    rows_of: dict[Table, tuple[Tensor, list[Tensor]]] = field(default_factory=dict[Table, tuple[Tensor, list[Tensor]]])

    @cached_property
    def owed(self) -> list[tuple[Crossing, int, Table]]:
        """The gradients that each invocation owes others: the value, which invocation it is, and the table."""
        return [
            (self.staged.crossings[gradient], *self.operands[name])
            for name, gradient in zip(self.staged.inputs, self.staged.input_gradients, strict=True)
            if gradient is not None and name in self.operands and self.operands[name][1] in self.staged.chained
        ]

    @classmethod
    def of(cls, group: Group, staged: Staged, columns: Sequence[Tensor]) -> GroupRun:
        """Begin with the host values of all invocations."""
        operands = group.block.operands
        tables = [(operand.invocation, (operand.callee, operand.result)) for operand in operands]
        named = dict(zip(staged.inputs, tables, strict=False))
        hosts = dict(zip(staged.inputs[len(operands) :], columns, strict=True))
        return cls(group, staged, group.block.parameters, hosts, named)

    @property
    def rows(self) -> int:
        """How many invocations there are."""
        return len(self.group.tasks)

    @property
    def function(self) -> str:
        """The function that they are calls of."""
        return self.group.block.function


class Run:
    """One batch: `forward`, then `backward` as often as what it needs is kept."""

    def __init__(self, schedule: Schedule, groups: list[GroupRun], summed: frozenset[Table]) -> None:
        self._schedule = schedule
        self._groups = groups
        self._summed = {table: Sums(schedule, table) for table in summed if table[0] in schedule.sizes}
        self._tables: dict[Table, Tensor] = {}
        self._gradients: dict[Table, Tensor] = {}
        self._requests: Sequence[Request] = ()
        for run in groups:
            for index, name in enumerate(run.staged.tangents):
                table = self._table(run, index)
                if name is not None and table in run.staged.chained:
                    run.tangents[name] = table

    def _table(self, run: GroupRun, output: int) -> Table:
        """Return the table of a block's output."""
        return run.function, run.group.block.block.results[output]

    # Forward.

    def forward(self, requests: Sequence[Request]) -> list[Tensor]:
        """Compute all invocations and return the requested tensors."""
        for run in self._groups:
            self._once(run, Stage.BEFORE)
        for level in self._schedule.levels:
            for segment in level:
                self._forward_level(self._groups[segment.group], segment)
        for run in self._groups:
            self._once(run, Stage.AFTER)
        self._requests = requests
        return self._requested(requests)

    def _once(self, run: GroupRun, stage: Stage) -> None:
        """Run a stage for all invocations of a block."""
        code = run.staged.stages[stage]
        if code.given:
            taken = [self._whole(run, crossing) for crossing in code.taken]
            run.whole.update(zip(code.given, code.run(run.rows, *taken), strict=True))

    def _level(self, run: GroupRun, segment: Segment, stage: Stage) -> None:
        """Run a stage for the invocations of one level."""
        code = run.staged.stages[stage]
        if code.given:
            taken = [self._part(run, crossing, segment) for crossing in code.taken]
            for name, held in zip(code.given, code.run(segment.rows, *taken), strict=True):
                self._keep(run, name, segment, held)

    def _forward_level(self, run: GroupRun, segment: Segment) -> None:
        self._level(run, segment, Stage.LEVEL)
        for output, table in run.staged.written:
            held = self._part(run, run.staged.crossings[run.staged.outputs[output]], segment)
            self._rows(run, table, self._tables, held)[segment.number].copy_(held)

    def _rows(self, run: GroupRun, table: Table, tables: dict[Table, Tensor], like: Tensor) -> Sequence[Tensor]:
        """Return the rows of a table that belong to a block, level by level; make the table if there is none yet."""
        rows = run.rows_of.get(table)
        if rows is None or rows[0] is not tables.get(table):
            whole = tables.get(table)
            if whole is None:
                whole = tables[table] = like.new_empty((self._schedule.sizes[table[0]], *like.shape[1:]))
            views = [whole[segment.table : segment.table + segment.rows] for segment in run.group.segments]
            rows = run.rows_of[table] = whole, views
        return rows[1]

    # Values, for all rows of a block or for those of one level.

    def _keep(self, run: GroupRun, name: str, segment: Segment, held: Any) -> None:
        parts = run.by_level.get(name)
        if parts is None:
            parts = run.by_level[name] = [None] * len(run.group.segments)
        parts[segment.number] = held

    def _whole(self, run: GroupRun, crossing: Crossing) -> Any:
        held = run.whole.get(crossing.name)
        if held is None:
            held = run.whole[crossing.name] = self._joined(run, crossing)
        return held

    def _joined(self, run: GroupRun, crossing: Crossing) -> Any:
        parts = run.by_level.get(crossing.name)
        if parts is not None and parts[0] is not None:
            if len(parts) == 1:
                return parts[0]
            if crossing.dimension is not None:
                return torch.cat(parts, crossing.dimension)
            return sum(parts) if crossing.source is Stage.BACK else parts[0]
        if crossing.name in run.tangents:
            return self._of_rows(self._gradients[run.tangents[crossing.name]], run.group)
        place, table = run.operands[crossing.name]
        return self._tables[table].index_select(0, self._schedule.children_of_all(run.group, place))

    def _of_rows(self, table: Tensor, group: Group) -> Tensor:
        first, last = group.bounds
        if last - first == len(group.tasks):
            return table[first:last]
        return table.index_select(0, self._schedule.index(group.rows))

    def _part(self, run: GroupRun, crossing: Crossing, segment: Segment) -> Any:
        name = crossing.name
        parts = run.by_level.get(name)
        if parts is not None and parts[segment.number] is not None:
            return parts[segment.number]
        if name in run.tangents:
            gradients = self._gradients[run.tangents[name]]
            return self._rows(run, run.tangents[name], self._gradients, gradients)[segment.number]
        if name in run.operands:
            self._gather(run, run.operands[name][1], segment)
            return run.by_level[name][segment.number]
        held = self._whole(run, crossing)
        if crossing.dimension is None:
            return held
        sizes = [part.rows * crossing.each for part in run.group.segments]
        run.by_level[name] = list(torch.split_with_sizes(held, sizes, crossing.dimension))
        return run.by_level[name][segment.number]

    def _gather(self, run: GroupRun, table: Table, segment: Segment) -> None:
        """Take the rows of all children of one level that come from a table, at once."""
        named = [(name, place) for name, (place, other) in run.operands.items() if other == table]
        index = self._schedule.children(run.group, tuple(place for _, place in named))[segment.number]
        held = self._tables[table].index_select(0, index)
        for (name, _), part in zip(named, torch.split_with_sizes(held, [segment.rows] * len(named)), strict=True):
            self._keep(run, name, segment, part)

    # What leaves the batch.

    def _places(self, requests: Sequence[Request]) -> dict[tuple[int, int], list[int]]:
        """Return which requests ask for which output of which group."""
        places: dict[tuple[int, int], list[int]] = {}
        for number, request in enumerate(requests):
            places.setdefault((int(self._schedule.group_of[request.task]), request.output), []).append(number)
        return places

    def _requested(self, requests: Sequence[Request]) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(requests)
        for (group, output), numbers in self._places(requests).items():
            run = self._groups[group]
            table = self._table(run, output)
            tasks = [requests[number].task for number in numbers]
            if table in self._summed:
                held = self._sums(table, tasks)
            elif table in self._tables:
                held = self._tables[table].index_select(0, self._schedule.index(self._schedule.row[tasks]))
            else:
                whole = self._whole(run, run.staged.crossings[run.staged.outputs[output]])
                held = whole.index_select(0, self._schedule.index(self._schedule.place[tasks]))
            for number, row in zip(numbers, held.unbind(), strict=True):
                found[number] = row.clone()
        return found

    def _terms(self, table: Table) -> list[tuple[Group, Tensor]]:
        terms: list[tuple[Group, Tensor]] = []
        for run in self._groups:
            if run.function == table[0] and table[1] in run.group.block.block.results:
                name = run.staged.outputs[run.group.block.block.results.index(table[1])]
                terms.append((run.group, self._whole(run, run.staged.crossings[name])))
        return terms

    def _sums(self, table: Table, tasks: list[int]) -> Tensor:
        return self._summed[table].forward(self._terms(table), tasks)

    # Backward.

    def backward(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradient of each parameter, by id, from those of the requested tensors.."""
        self._take_tangents(gradients)
        for run in self._groups:
            self._once(run, Stage.TURN)
        for level in reversed(self._schedule.levels):
            for segment in level:
                self._backward_level(self._groups[segment.group], segment)
        found: dict[int, Tensor] = {}
        for run in self._groups:
            self._once(run, Stage.FINISH)
            for parameter, name in zip(run.parameters, run.staged.parameter_gradients, strict=True):
                if name is not None:
                    own = self._whole(run, run.staged.crossings[name])
                    before = found.get(id(parameter))
                    found[id(parameter)] = own if before is None else before + own
        return found

    def host_gradient(self, group: int, host: int) -> Tensor | None:
        """Return the gradient of a column of host tensors."""
        run = self._groups[group]
        name = run.staged.input_gradients[len(run.group.block.operands) + host]
        return None if name is None else self._whole(run, run.staged.crossings[name])

    def _take_tangents(self, gradients: Sequence[Tensor | None]) -> None:
        """Put the gradients of what left the batch where the stages take them from."""
        for run in self._groups:
            for name in _backward_names(run.staged):
                run.whole.pop(name, None)
                run.by_level.pop(name, None)
            run.rows_of.clear()
        self._gradients = {table: torch.zeros_like(held) for table, held in self._tables.items()}
        outside: dict[Table, Any] = {}
        for (group, output), numbers in self._places(self._requests).items():
            given = [number for number in numbers if gradients[number] is not None]
            if not given:
                continue
            run, tasks = self._groups[group], [self._requests[number].task for number in given]
            rows = torch.stack([gradients[number] for number in given])  # type: ignore[misc]
            table = self._table(run, output)
            if table in self._summed:
                outside.setdefault(table, []).append((tasks, rows))
            elif table in self._gradients:
                self._gradients[table].index_add_(0, self._schedule.index(self._schedule.row[tasks]), rows)
            else:
                name = run.staged.tangents[output]
                if name is not None:
                    tangent = run.whole.setdefault(name, self._no_gradient(run, output))
                    tangent.index_add_(0, self._schedule.index(self._schedule.place[tasks]), rows)
        self._complete_tangents(outside)

    def _complete_tangents(self, outside: dict[Table, Any]) -> None:
        for run in self._groups:
            for output, name in enumerate(run.staged.tangents):
                if name is None or name in run.whole or name in run.tangents:
                    continue
                table = self._table(run, output)
                if table in self._summed and table in outside:
                    run.whole[name] = self._summed[table].backward(outside[table], run.group)
                else:
                    run.whole[name] = self._no_gradient(run, output)

    def _no_gradient(self, run: GroupRun, output: int) -> Tensor:
        return torch.zeros_like(self._whole(run, run.staged.crossings[run.staged.outputs[output]]))

    def _backward_level(self, run: GroupRun, segment: Segment) -> None:
        self._level(run, segment, Stage.BACK)
        for crossing, place, table in run.owed:
            owed = self._part(run, crossing, segment)
            children = self._schedule.children(run.group, (place,))[segment.number]
            if owed.untyped_storage().data_ptr() == self._gradients[table].untyped_storage().data_ptr():
                owed = owed.clone()  # a gradient handed on as it is: rows of the table that is written to
            if self._schedule.taken_once(table[0]):
                self._gradients[table].index_copy_(0, children, owed)
            else:
                self._gradients[table].index_add_(0, children, owed)


def _backward_names(staged: Staged) -> set[str]:
    """Return the names of values that only backward makes."""
    names = {name for name in staged.tangents if name is not None}
    for stage in (Stage.TURN, Stage.BACK, Stage.FINISH):
        names.update(staged.stages[stage].given)
    return names

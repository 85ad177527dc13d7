"""Running all invocations of a batch: level by level what depends on children, once what does not.

Results of a function are rows of tables, one for each result that its callers wait for. A level gathers the rows of
its children and writes its own. Backward goes the same way in reverse: an invocation's gradient is complete when the
levels above have run, because each of them adds what it owes its children. A result that only sums up children's
results and a term of its own (a loss) has no table; the terms are added up at the end.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .factors import Link, Table
from .native_run import Native, may_run, native_function, part, turned
from .parts import NATIVE, Crossing, Role, Stage, StageCode, Staged, View
from .requests import Leaving
from .schedule import Group, Named, Schedule, Segment, Use
from .sums import Sums


@dataclass
class GroupRun:
    """What is known of one block's invocations while they run.

    Values by name: `whole` for all rows, `parts` level by level.
    """

    group: Group
    staged: Staged
    parameters: list[Tensor]
    whole: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict[str, Table])
    """Where outputs are written to that callers wait for."""
    tangents: dict[str, Table] = field(default_factory=dict[str, Table])
    """For each name of a tangent that comes from a table of gradients: which."""
    parts: dict[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    relieving: Callable[..., None] | None = None
    """The native code of its levels backward that does what is then left out before them."""
    sizes: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """How many rows there are at each level, by how many belong to an invocation."""

    @classmethod
    def of(cls, group: Group, staged: Staged, columns: Sequence[Tensor]) -> GroupRun:
        """Begin with the host values of all invocations."""
        run = cls(group, staged, group.block.parameters, dict(zip(staged.hosts, columns, strict=True)))
        run.tables = {staged.outputs[output]: table for output, table in staged.written.items()}
        names = {staged.tangents[output]: table for output, table in staged.written.items()}
        run.tangents = {name: table for name, table in names.items() if name is not None}
        return run

    @property
    def rows(self) -> int:
        """How many invocations there are."""
        return len(self.group.tasks)

    @property
    def most(self) -> int:
        """How many there are at most at one level."""
        return max(segment.rows for segment in self.group.segments)

    @property
    def function(self) -> str:
        """The function that they are calls of."""
        return self.group.block.function

    def places(self, link: Link) -> tuple[int, ...]:
        """Return which of the invocations that each made a link leads to."""
        return tuple(self.group.block.operands[index].invocation for index in link.operands)

    def split(self, whole: Tensor, dimension: int = 0, each: int = 1) -> Sequence[Tensor]:
        """Return the rows of each level, `each` of an invocation."""
        if each not in self.sizes:
            self.sizes[each] = [segment.rows * each for segment in self.group.segments]
        return torch.split_with_sizes(whole, self.sizes[each], dimension)

    def views(self, table: Tensor) -> Sequence[Tensor]:
        """Return the rows of each level in a table."""
        first, last = self.group.bounds
        if last - first == self.rows:
            return self.split(table[first:last])
        return [table[segment.table : segment.table + segment.rows] for segment in self.group.segments]


class Run:
    """One batch: `forward`, then `backward` as often as what it needs is kept."""

    def __init__(self, schedule: Schedule, groups: list[GroupRun], summed: frozenset[Table]) -> None:
        self._schedule = schedule
        self._groups = groups
        self._summed = {table: Sums(schedule, table) for table in summed if table[0] in schedule.sizes}
        self._tables: dict[Table, Tensor] = {}
        self._gradients: dict[Table, Tensor] = {}

    # Forward.

    def forward(self) -> list[Tensor]:
        """Compute all invocations; return the results that leave, rows for each `Leaving` of the schedule."""
        for run in self._groups:
            self._once(run, Stage.BEFORE)
            self._fill_tables(run)
        self._levels(Stage.LEVEL, self._schedule.levels)
        for run in self._groups:
            self._once(run, Stage.AFTER)
        return [self._result(leaving) for leaving in self._schedule.leaving]

    def _once(self, run: GroupRun, stage: Stage) -> None:
        """Run a stage for all invocations of a block."""
        code = run.staged.stages[stage]
        if stage is Stage.TURN:
            run.relieving = self._relieving(run)
        if code.relieved is not None and run.relieving is not None:
            code = code.relieved
        elif code.in_passes is not None and may_run(code, run.rows, self._schedule.device):
            code = code.in_passes
        for crossing in code.kept:
            run.whole[crossing.name] = self._room_for_all(run, crossing)
        if code.given or code.kept:
            taken = [self._whole(run, crossing) for _, crossing in code.arguments]
            run.whole.update(zip(code.given, code.run(run.rows, *taken), strict=True))

    def _relieving(self, run: GroupRun) -> Callable[..., None] | None:
        """Return native code of the levels backward that relieves the stage before; None if it does not run."""
        code = run.staged.stages[Stage.BACK].relieving
        function = "" if code is None else native_function(code, run.most, self._schedule.device)
        return None if isinstance(function, str) else function

    def _levels(self, stage: Stage, levels: Iterable[list[Segment]]) -> None:
        """Run a stage level by level."""
        bound = [self._bound(run, run.staged.stages[stage]) for run in self._groups]
        segments = itertools.chain.from_iterable(levels)
        for group, together in itertools.groupby(segments, operator.attrgetter("group")):
            code, arguments = bound[group]
            if isinstance(code, Native):
                code.run(list(together))
            elif code is not None:
                for segment in together:
                    returned = code.run(segment.rows, *arguments[segment.number])
                    for name, held in zip(code.given, returned, strict=True):
                        self._groups[group].parts[name][segment.number] = held  # type: ignore[index]

    def _bound(self, run: GroupRun, code: StageCode) -> tuple[StageCode | Native | None, Sequence[Any]]:
        """Return a stage with what it takes and writes at each level; None if it has nothing to do."""
        if not (code.kept or code.given or any(role is Role.GIVE for role, _ in code.arguments)):
            return None, ()
        for crossing in code.kept:
            self._make_room(run, crossing)
        native, function = code.native, run.relieving
        if function is not None and code.relieving is not None:
            native = code.relieving
        else:
            function = native_function(native, run.most, self._schedule.device)
        code.ran[function if isinstance(function, str) else NATIVE] += 1
        if not isinstance(function, str) and not isinstance(native, str):
            for name, view in code.inside.items():
                run.whole[name] = view.make(run.rows, run.whole[view.crossing.name])
            given = [self._memory(run, role, what) for role, what in native.arguments]
            return Native(function, given, run.group.segments), ()
        for crossing in code.kept:
            run.parts[crossing.name] = self._room_by_level(run, crossing)
        for name, view in code.inside.items():
            run.whole[name] = view.make(run.rows, run.whole[view.crossing.name])
        for name in code.given:
            run.parts[name] = [None] * len(run.group.segments)
        columns = [self._column(run, role, what) for role, what in code.arguments]
        return code, list(zip(*columns, strict=True)) or [()] * len(run.group.segments)

    def _column(self, run: GroupRun, role: Role, what: Any) -> Sequence[Any]:
        """Return what a parameter of a stage is at each level."""
        match role:
            case Role.PART:
                return self._parts(run, what)
            case Role.VIEW:
                return self._views(run, what)
            case Role.CONSTANT:
                same: Any = turned(what.make(0, what.tensor), run.group.segments)
            case Role.CHILDREN:
                return self._schedule.children(run.group.number, run.places(what))
            case Role.OWED:
                return self._schedule.owed(run.group.number, run.places(what))
            case Role.TABLE:
                same = self._tables[what.table]
            case Role.GRADIENTS:
                same = self._gradients[what.table]
            case Role.GIVE:
                once = self._schedule.taken_once(what.table[0])
                same = Tensor.index_copy_ if once else Tensor.index_add_
            case Role.SAME | Role.SCRATCH:
                raise AssertionError(f"{role} is for native code")
        return [same] * len(run.group.segments)

    def _views(self, run: GroupRun, view: View) -> Sequence[Tensor]:
        """Return a view of a value at each level: of all rows, then cut, if they are neighbours."""
        name = view.crossing.name
        first, last = run.group.bounds
        table = self._tables.get(run.tables[name]) if name in run.tables else None
        if name in run.tangents:
            table = self._gradients[run.tangents[name]]
        if table is not None and last - first != run.rows:
            parts = self._parts(run, view.crossing)
            return [view.make(s.rows, part) for s, part in zip(run.group.segments, parts, strict=True)]
        whole = self._whole(run, view.crossing) if table is None else table[first:last]
        return run.split(view.make(run.rows, whole), 0, view.each)

    def _make_room(self, run: GroupRun, crossing: Crossing) -> None:
        """Make the rows that a value is written to level by level."""
        if crossing.name in run.tables:
            self._room_in_table(run, crossing)
            return
        shape = run.rows * crossing.each, *crossing.shape
        run.whole[crossing.name] = torch.empty(shape, dtype=crossing.dtype, device=crossing.device)

    def _room_by_level(self, run: GroupRun, crossing: Crossing) -> Sequence[Tensor]:
        if crossing.name in run.tables:
            return run.views(self._room_in_table(run, crossing))
        return run.split(run.whole[crossing.name], 0, crossing.each)

    def _memory(self, run: GroupRun, role: Role, what: Any) -> tuple[Tensor, int]:
        """Return a tensor that native code is given, all rows of it, and what it is told of that."""
        match role:
            case Role.PART:
                name = what.name
                held = self._tables[run.tables[name]] if name in run.tables else None
                held = self._gradients[run.tangents[name]] if name in run.tangents else held
                return part(self._whole(run, what) if held is None else held, what.each, held is not None)
            case Role.CONSTANT:
                held = what.make(what.tensor.detach())
                held = turned(held, run.group.segments)
                if held.dim() == 2 and held.t().is_contiguous():
                    return held, int(not held.is_contiguous())
                return held.contiguous(), 0
            case Role.TABLE:
                return self._tables[what.table], 0
            case Role.GRADIENTS:
                return self._gradients[what.table], int(self._schedule.taken_once(what.table[0]))
            case Role.CHILDREN | Role.OWED:
                return self._schedule.index(Named(Use.CHILDREN, run.places(what), run.group.number)), 0
            case Role.SCRATCH:
                rows = max(segment.rows for segment in run.group.segments)
                return torch.empty(what[1] * rows, dtype=torch.float32, device="cpu"), 0
            case _:
                return self._whole(run, what).contiguous(), 0

    def _room_in_table(self, run: GroupRun, crossing: Crossing) -> Tensor:
        table = run.tables[crossing.name]
        if table not in self._tables:
            shape = self._schedule.sizes[table[0]], *crossing.shape
            self._tables[table] = torch.empty(shape, dtype=crossing.dtype, device=crossing.device)
        return self._tables[table]

    def _room_for_all(self, run: GroupRun, crossing: Crossing) -> Tensor:
        """Return where a stage that runs once writes a result: rows of its table, if they are neighbours."""
        table = self._room_in_table(run, crossing)
        first, last = run.group.bounds
        return table[first:last] if last - first == run.rows else torch.empty_like(table[: run.rows])

    def _fill_tables(self, run: GroupRun) -> None:
        """Write those results to tables that do not depend on children, and are not there yet."""
        for name in run.tables:
            crossing = run.staged.crossings[name]
            table = self._room_in_table(run, crossing)
            first, last = run.group.bounds
            apart = last - first != run.rows
            if crossing.source is not Stage.LEVEL and (apart or crossing not in run.staged.stages[Stage.BEFORE].kept):
                table.index_copy_(0, self._rows(run.group), self._whole(run, crossing))

    # Values, for all rows of a block or level by level.

    def _whole(self, run: GroupRun, crossing: Crossing) -> Any:
        held = run.whole.get(crossing.name)
        if held is None:
            held = run.whole[crossing.name] = self._joined(run, crossing)
        return held

    def _joined(self, run: GroupRun, crossing: Crossing) -> Any:
        name = crossing.name
        if name in run.tables:
            return self._of_rows(self._tables[run.tables[name]], run.group)
        if name in run.tangents:
            return self._of_rows(self._gradients[run.tangents[name]], run.group)
        if name in run.staged.children:
            link = run.staged.children[name]
            children = Named(Use.CHILDREN, run.places(link), run.group.number)
            return self._tables[link.table].index_select(0, self._schedule.index(children))
        parts = run.parts[name]
        if crossing.dimension is not None:
            return torch.cat(list(parts), crossing.dimension)
        return sum(parts) if crossing.source is Stage.BACK else parts[0]

    def _of_rows(self, table: Tensor, group: Group) -> Tensor:
        first, last = group.bounds
        if last - first == len(group.tasks):
            return table[first:last]
        return table.index_select(0, self._rows(group))

    def _rows(self, group: Group) -> Tensor:
        return self._schedule.index(Named(Use.ROWS, None, group.number))

    def _parts(self, run: GroupRun, crossing: Crossing) -> Sequence[Any]:
        parts = run.parts.get(crossing.name)
        if parts is None:
            if crossing.name in run.tangents:
                parts = run.views(self._gradients[run.tangents[crossing.name]])
            elif crossing.dimension is None:
                parts = [self._whole(run, crossing)] * len(run.group.segments)
            else:
                parts = run.split(self._whole(run, crossing), crossing.dimension, crossing.each)
            run.parts[crossing.name] = parts
        return parts

    # What leaves the batch.

    def _result(self, leaving: Leaving) -> Tensor:
        if leaving in self._summed:
            return self._summed[leaving].forward(self._terms(leaving))
        index = self._schedule.index(Named(Use.LEAVING, leaving))
        if leaving in self._tables:
            return self._tables[leaving].index_select(0, index)
        run, name = self._output(leaving)
        return self._whole(run, run.staged.crossings[name]).index_select(0, index)

    def _output(self, leaving: Leaving) -> tuple[GroupRun, str]:
        run = self._groups[leaving[0]]
        return run, run.staged.outputs[leaving[1]]

    def _terms(self, table: Table) -> list[tuple[Group, Tensor]]:
        terms: list[tuple[Group, Tensor]] = []
        for run in self._groups:
            if run.function == table[0] and table[1] in run.group.block.block.results:
                name = run.staged.outputs[run.group.block.block.results.index(table[1])]
                terms.append((run.group, self._whole(run, run.staged.crossings[name])))
        return terms

    # Backward.

    def backward(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradient of each parameter, by id, from those of the results that left."""
        self._take_tangents(gradients)
        for run in self._groups:
            self._once(run, Stage.TURN)
        self._levels(Stage.BACK, reversed(self._schedule.levels))
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
        name = run.staged.host_gradients[host]
        return None if name is None else self._whole(run, run.staged.crossings[name])

    def _take_tangents(self, gradients: Sequence[Tensor | None]) -> None:
        """Put the gradients of what left the batch where the stages take them from."""
        for run in self._groups:
            for name in run.staged.backward:
                run.whole.pop(name, None)
                run.parts.pop(name, None)
        self._gradients = {table: torch.zeros_like(held) for table, held in self._tables.items()}
        outside: dict[Table, Tensor] = {}
        for leaving, rows in zip(self._schedule.leaving, gradients, strict=True):
            if rows is None:
                continue
            if leaving in self._summed:
                outside[leaving] = rows
                continue
            index = self._schedule.index(Named(Use.LEAVING, leaving))
            if leaving in self._gradients:
                self._gradients[leaving].index_add_(0, index, rows)
            else:
                run, output = self._output(leaving)
                name = run.staged.tangents[leaving[1]]
                if name is not None:
                    tangent = run.whole.setdefault(name, self._no_gradient(run, output))
                    tangent.index_add_(0, index, rows)
        self._complete_tangents(outside)

    def _complete_tangents(self, outside: dict[Table, Tensor]) -> None:
        for run in self._groups:
            for result, output, name in zip(
                run.group.block.block.results, run.staged.outputs, run.staged.tangents, strict=True
            ):
                if name is None or name in run.whole or name in run.tangents:
                    continue
                table = run.function, result
                if table in self._summed and table in outside:
                    run.whole[name] = self._summed[table].backward(outside[table], run.group)
                else:
                    run.whole[name] = self._no_gradient(run, output)

    def _no_gradient(self, run: GroupRun, output: str) -> Tensor:
        return torch.zeros_like(self._whole(run, run.staged.crossings[output]))

"""The invocations that wait to be computed, and how they are: all at once, or one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from twofold.errors import StaleError

from .autograd import differentiable_run
from .blocks import RunnableBlock
from .deferred import PENDING, Deferred, fill
from .execute import GroupRun, Request, Run
from .factors import Table
from .prepare import SumBroken, Tables, column, stage_group
from .schedule import Group, Pile, make_schedule
from .vectorize import Sample


class Owner(Protocol):
    """What a batch needs of the program whose invocations it holds."""

    name: str
    tables: Tables
    results: tuple[int, ...]
    refusals: dict[str, int]

    def all_blocks(self) -> list[RunnableBlock]:
        """Return all blocks met so far, variants included."""
        ...

    def versions(self) -> list[int]:
        """Return the version counters of the tensors from outside."""
        ...


class Batch:
    """Invocations in the order in which Python finished them, each after those it took results from."""

    def __init__(self, program: Owner) -> None:
        self._program = program
        self._grad = True
        self._levels: list[int] = []
        self._piles: dict[RunnableBlock, Pile] = {}
        self._wanted: list[tuple[Request, weakref.ref[Deferred]]] = []
        self._versions: Sequence[int] = ()
        self._shared = False
        self._planning = 0

    # While planners run.

    def begin(self) -> None:
        """Take up a call made from ordinary Python."""
        if not self._planning and self._levels and self._grad != torch.is_grad_enabled():
            PENDING.flush()
        if not self._levels:
            self._grad, self._versions = torch.is_grad_enabled(), self._program.versions()
        self._planning += 1
        PENDING.planning += 1

    def end(self) -> None:
        """Take note that a call has been planned."""
        self._planning -= 1
        PENDING.planning -= 1

    def pile(self, block: RunnableBlock) -> Pile:
        """Return where the invocations of a block wait."""
        known = self._piles.get(block)
        if known is None:
            known = self._piles[block] = Pile(block, block.constant_hosts)
        return known

    def emit(self, pile: Pile, invocations: Sequence[int], hosts: Sequence[Any], kept: Sequence[Deferred]) -> int:
        """Add an invocation; return its number. Levels count from the leaves."""
        for host in hosts:
            if type(host) is Deferred:
                pile, invocations, hosts = self._link(pile, invocations, hosts)
                break
        if steering := pile.steering:
            pile = self.pile(pile.block.variant(hosts))
            hosts = [host for index, host in enumerate(hosts) if index not in steering]
        levels = self._levels
        number = len(levels)
        top = -1
        for child in invocations:
            if levels[child] > top:
                top = levels[child]
        levels.append(top + 1)
        pile.tasks.append(number)
        pile.invocations.append(invocations)
        pile.hosts.append(hosts)
        if kept:
            first = len(pile.block.block.results) - len(kept)
            for index, deferred in enumerate(kept):
                self.want(pile.block, number, first + index, deferred)
        return number

    def _link(self, pile: Pile, invocations: Sequence[int], hosts: Sequence[Any]) -> Any:
        """Make host values that wait in this batch results of invocations; others are computed now."""
        places: list[tuple[int, str, int]] = []
        others: list[Any] = []
        numbers = list(invocations)
        for index, host in enumerate(hosts):
            if type(host) is not Deferred:
                others.append(host)
                continue
            place = host.__dict__.get("place")
            if place is None or place[0] is not self:
                PENDING.flush()
                return pile, invocations, hosts
            places.append((index, *place[2:]))
            numbers.append(place[1])
        self._shared = True
        return self.pile(pile.block.linked(places)), numbers, others

    def want(self, block: RunnableBlock, number: int, output: int, deferred: Deferred) -> None:
        """Have a deferred tensor filled in with an output of an invocation."""
        deferred.place = self, number, block.function, block.block.results[output]
        self._wanted.append((Request(number, output), weakref.ref(deferred)))

    def want_result(self, number: int, output: int, deferred: Deferred) -> None:
        """Have a deferred tensor filled in with a result of an invocation of the program's function."""
        deferred.place = self, number, self._program.name, self._program.results[output]
        self._wanted.append((Request(number, output), weakref.ref(deferred)))

    # At the flush.

    def flush(self) -> None:
        """Compute all invocations and fill in the tensors that are still held.

        While a call is being planned (its own Python asks for a value) the invocations stay, since others will take
        results from them, and are computed again with those.
        """
        levels, wanted, shared = self._levels[:], self._wanted, self._shared
        piles = [
            Pile(pile.block, pile.steering, pile.tasks, pile.invocations, pile.hosts)
            for pile in self._piles.values()
            if pile.tasks
        ]
        self._wanted = []
        if not self._planning:
            self._clear()
        held = [(request, deferred) for request, ref in wanted if (deferred := ref()) is not None]
        requests = list(dict.fromkeys(request for request, _ in held))
        if not piles:
            return
        if list(self._versions) != self._program.versions():
            raise StaleError(
                "a parameter or another tensor from outside was written to between a call of"
                f" {self._program.name} and the use of its result; use the result first"
            )
        with torch.set_grad_enabled(self._grad):
            found = dict(zip(requests, self._compute(piles, levels, requests, shared), strict=True))
        for request, deferred in held:
            fill(deferred, found[request])

    def _clear(self) -> None:
        self._levels.clear()
        self._shared = False
        for pile in self._piles.values():
            pile.tasks, pile.invocations, pile.hosts = [], [], []

    def _compute(self, piles: list[Pile], levels: list[int], requests: list[Request], shared: bool) -> Sequence[Tensor]:
        samples = self._program.tables.samples
        if all((pile.block.function, result) in samples for pile in piles for result in pile.block.block.results):
            try:
                return self._together(piles, levels, requests, shared)
            except Exception as error:  # noqa: BLE001 - one by one, an operation that fails is found with its line
                reason = str(error) or type(error).__name__
        else:
            reason = None
        results = one_by_one(piles, len(levels), requests, samples)
        if reason is not None:
            self._program.refusals[reason] = self._program.refusals.get(reason, 0) + 1
        return results

    def _together(
        self, piles: list[Pile], levels: list[int], requests: list[Request], shared: bool
    ) -> Sequence[Tensor]:
        """Run all invocations level by level. Raises `NotBatchableError`."""
        tables = self._program.tables
        device = next(iter(tables.samples.values())).device
        schedule = make_schedule(piles, levels, device, [request.task for request in requests], shared)
        columns = [_columns(group, device) for group in schedule.groups]
        parameters = list({id(p): p for pile in piles for p in pile.block.parameters}.values())
        differentiate = self._grad and (bool(parameters) or any(c.requires_grad for held in columns for c in held))
        while True:
            tables.update(self._program.all_blocks())
            try:
                staged = [
                    stage_group(group.block, held, tables, differentiate)
                    for group, held in zip(schedule.groups, columns, strict=True)
                ]
                break
            except SumBroken as broken:
                tables.not_summed.add(broken.table)
        runs = [GroupRun.of(*parts) for parts in zip(schedule.groups, staged, columns, strict=True)]
        run = Run(schedule, runs, tables.summed)
        return differentiable_run(run, requests, parameters, columns, differentiate)


def _columns(group: Group, device: torch.device) -> list[Tensor]:
    if not group.block.block.hosts:
        return []
    rows = [group.pile.hosts[position] for position in group.order.tolist()]
    return [column(values, device) for values in zip(*rows, strict=True)]


def one_by_one(piles: list[Pile], count: int, requests: list[Request], samples: dict[Table, Sample]) -> list[Tensor]:
    """Run each invocation by itself, with eager's own operations and history; note what results are like."""
    work: list[Any] = [None] * count
    for pile in piles:
        for number, invocations, hosts in zip(pile.tasks, pile.invocations, pile.hosts, strict=True):
            work[number] = pile.block, invocations, hosts
    outputs: list[list[Any]] = []
    for block, invocations, hosts in work:
        operands = [
            outputs[child := invocations[operand.invocation]][work[child][0].block.results.index(operand.result)]
            for operand in block.operands
        ]
        outputs.append(block.run(operands, hosts))
        for result, output in zip(block.block.results, outputs[-1], strict=False):
            if isinstance(output, Tensor):
                samples.setdefault((block.function, result), Sample.of(output))
    return [_own(outputs[request.task][request.output]) for request in requests]


def _own(value: Any) -> Tensor:
    """Return a value as a tensor object that nobody else holds."""
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return value.view_as(value)

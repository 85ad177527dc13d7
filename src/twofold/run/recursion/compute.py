"""Computing invocations: all of them at once, or, where that cannot be, one after the other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .autograd import differentiable_run
from .blocks import RunnableBlock
from .captured import Work, place
from .captures import Captures
from .factors import Table
from .known import GivenPile, Known, own
from .prepare import Column, SumBroken, Tables, column, sample, stage_group
from .requests import Bundles, Exits, Request
from .schedule import Group, Pile, Schedule, make_schedule
from .vectorize import Sample

_T = TypeVar("_T")


class Owner(Protocol):
    """What a batch needs of the program whose invocations it holds."""

    name: str
    tables: Tables
    results: tuple[int, ...]
    refusals: dict[str, int]
    computed: Counter[str]
    given: dict[Any, RunnableBlock]
    captures: Captures

    def all_blocks(self) -> list[RunnableBlock]:
        """Return all blocks met so far, variants included."""
        ...

    def versions(self) -> list[int]:
        """Return the version counters of the tensors from outside."""
        ...


def compute(program: Owner, piles: list[Pile], levels: list[int], leaving: Bundles, shared: bool) -> Sequence[Tensor]:
    """Compute invocations; return the requested tensors."""
    tasks = [request.task for request in leaving.requests]

    def together() -> Sequence[Tensor]:
        return _together(program, piles, levels, tasks, shared, lambda _: leaving)[0]

    def singly() -> Sequence[Tensor]:
        outputs = one_by_one(piles, len(levels), program.tables.samples)
        return leaving.tied([own(outputs[request.task][request.output]) for request in leaving.requests])

    return _batched(program, piles, together, singly)


def compute_all(program: Owner, piles: list[Pile], levels: list[int]) -> dict[int, Known]:
    """Compute invocations; return all their results, those of one block as rows of the same tensors."""

    def together() -> dict[int, Known]:
        tensors, schedule = _together(program, piles, levels, [], True, _all_outputs)
        rest, known = iter(tensors), dict[int, Known]()
        for group in schedule.groups:
            if not isinstance(group.pile, GivenPile):
                results = group.block.block.results
                values = [next(rest) for _ in results]
                known.update((int(task), Known(results, values, row)) for row, task in enumerate(group.tasks))
        return known

    def singly() -> dict[int, Known]:
        outputs = one_by_one(piles, len(levels), program.tables.samples)
        return {t: Known(pile.block.block.results, outputs[t], None) for pile in piles for t in pile.tasks}

    return _batched(program, piles, together, singly)


def _batched(program: Owner, piles: list[Pile], together: Callable[[], _T], singly: Callable[[], _T]) -> _T:
    """Compute all at once if results are known well enough and it can be done; else one by one."""
    samples = program.tables.samples
    count = sum(len(pile.tasks) for pile in piles)
    reason = None
    if all((pile.block.function, result) in samples for pile in piles for result in pile.block.block.results):
        try:
            found = together()
            program.computed["together"] += count
            return found
        except Exception as error:  # noqa: BLE001 - one by one, an operation that fails is found with its line
            reason = str(error) or type(error).__name__
    computed = singly()
    program.computed["singly"] += count
    if reason is not None:
        program.refusals[reason] = program.refusals.get(reason, 0) + 1
    return computed


def _together(
    program: Owner,
    piles: list[Pile],
    levels: list[int],
    requested: list[int],
    shared: bool,
    leaving: Callable[[Schedule], Bundles],
) -> tuple[Sequence[Tensor], Schedule]:
    """Run all invocations level by level. Raises `NotBatchableError`."""
    tables = program.tables
    device = next(iter(tables.samples.values())).device
    schedule = make_schedule(piles, levels, device, requested, shared)
    bundles = leaving(schedule)
    schedule.requested = [request.task for request in bundles.requests]
    columns = [_columns(group, device) for group in schedule.groups]
    parameters = list({id(p): p for pile in piles for p in pile.block.parameters}.values())
    tensors = [column for held in columns for column in held if isinstance(column, Tensor)]
    differentiate = torch.is_grad_enabled() and (bool(parameters) or any(tensor.requires_grad for tensor in tensors))
    while True:
        tables.update(program.all_blocks())
        try:
            staged = [
                stage_group(group.block, [sample(c, device, differentiate) for c in held], tables, differentiate)
                for group, held in zip(schedule.groups, columns, strict=True)
            ]
            break
        except SumBroken as broken:
            tables.not_summed.add(broken.table)
    groups = schedule.group_of[schedule.requested].tolist()
    flows = [staged[group].tangents[r.output] is not None for group, r in zip(groups, bundles.requests, strict=True)]
    numbers = schedule.leave(bundles.requests, tables.summed | tables.chained)
    exits = Exits(bundles, numbers, bundles.tied_flags(flows))
    work = Work(schedule, staged, columns, tables.summed, differentiate)
    lease = program.captures.lease(work)
    if lease is not None:
        return differentiable_run(lease, exits, parameters, [], differentiate), schedule
    placed = [place(held, device) for held in columns]
    return differentiable_run(replace(work, columns=placed).run(), exits, parameters, placed, differentiate), schedule


def _all_outputs(schedule: Schedule) -> Bundles:
    requests: list[Request] = []
    sizes: list[int | None] = []
    for group in schedule.groups:
        if not isinstance(group.pile, GivenPile):
            for output in range(len(group.block.block.results)):
                requests += [Request(int(task), output) for task in group.tasks]
                sizes.append(len(group.tasks))
    return Bundles(requests, sizes)


def _columns(group: Group, device: torch.device) -> list[Column]:
    if not group.block.block.hosts:
        return []
    if isinstance(group.pile, GivenPile):
        return [group.pile.column(index, group.order, device) for index in range(group.block.block.hosts)]
    return [column(values, group.order) for values in group.pile.hosts]


def one_by_one(piles: list[Pile], count: int, samples: dict[Table, Sample]) -> list[list[Any]]:
    """Run each invocation by itself, with eager's own operations and history; note what results are like."""
    work: list[Any] = [None] * count
    for pile in piles:
        known = pile.known if isinstance(pile, GivenPile) else itertools.repeat(None)
        for (number, *rest), held in zip(pile.rows(), known, strict=False):
            work[number] = pile.block, held, *rest
    outputs: list[list[Any]] = []
    for block, known, invocations, hosts in work:
        if known is not None:
            outputs.append([known.value(result) for result in block.block.results])
            continue
        operands = [
            outputs[child := invocations[operand.invocation]][work[child][0].block.results.index(operand.result)]
            for operand in block.operands
        ]
        outputs.append(block.run(operands, hosts))
        for result, output in zip(block.block.results, outputs[-1], strict=False):
            if (block.function, result) not in samples and isinstance(output, Tensor):
                samples[block.function, result] = Sample.of(output)
    return outputs

"""The invocations that wait to be computed, and how they are: all at once, or one after the other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError

from .autograd import differentiable_run
from .blocks import RunnableBlock
from .deferred import PENDING, Deferred, fill
from .execute import GroupRun, Request, Run
from .prepare import SumBroken, column, stage_group
from .schedule import Task, make_schedule
from .vectorize import NotBatchableError, Sample

if TYPE_CHECKING:
    from .program import Program

WORTH_TRACING = 0.5
"""Seconds that a first batch must take one by one for tracing its blocks first to be worth the wait."""


class Batch:
    """Invocations in the order in which Python finished them, each after those it took results from."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.tasks: list[Task] = []
        self.wanted: list[tuple[int, int, weakref.ref[Deferred]]] = []
        self._seconds = 0.0
        self._grad = True
        self._versions: dict[int, tuple[Tensor, int]] = {}

    # While planners run.

    def begin(self) -> None:
        """Take up a call made from ordinary Python."""
        if self.tasks and self._grad != torch.is_grad_enabled():
            PENDING.flush()
        self._grad = torch.is_grad_enabled()

    def emit(self, block: RunnableBlock, invocations: Sequence[int], hosts: Sequence[Any], kept: Sequence[Any]) -> int:
        """Add an invocation; return its number."""
        number = len(self.tasks)
        if block.constant_hosts:
            steering = block.constant_hosts
            block, hosts = block.variant(hosts), [h for i, h in enumerate(hosts) if i not in steering]
        self.tasks.append(Task(block, invocations, hosts, kept))
        return number

    # At the flush.

    def flush(self) -> None:
        """Compute all invocations and fill in the tensors that are still held."""
        tasks, self.tasks = self.tasks, []
        wanted, self.wanted = self.wanted, []
        if not tasks:
            return
        for number, task in enumerate(tasks):
            first = len(task.block.block.results)
            wanted += [(number, first + index, weakref.ref(kept)) for index, kept in enumerate(task.kept)]
        held = [(Request(task, output), deferred) for task, output, ref in wanted if (deferred := ref()) is not None]
        requests = list(dict.fromkeys(request for request, _ in held))
        with torch.set_grad_enabled(self._grad):
            found = dict(zip(requests, self._compute(tasks, requests), strict=True))
        for request, deferred in held:
            value = found[request]
            fill(deferred, value if type(value) is Tensor and not isinstance(value, torch.nn.Parameter) else value.view_as(value))

    def _compute(self, tasks: list[Task], requests: list[Request]) -> Sequence[Tensor]:
        tables = self._program.tables
        known = all((t.block.function, r) in tables.samples for t in tasks for r in t.block.block.results)
        if not known:
            return self._one_by_one(tasks, requests)
        try:
            return self._together(tasks, requests)
        except NotBatchableError:
            return self._one_by_one(tasks, requests)

    def _one_by_one(self, tasks: list[Task], requests: list[Request]) -> list[Tensor]:
        """Run each invocation by itself, with eager's own operations and history."""
        begun = time.perf_counter()
        results: list[list[Any]] = []
        samples = self._program.tables.samples
        for task in tasks:
            block = task.block
            operands = []
            for operand in block.operands:
                child = task.invocations[operand.invocation]
                operands.append(results[child][tasks[child].block.block.results.index(operand.result)])
            outputs = block.run(operands, task.hosts)
            results.append(outputs)
            for result, output in zip(block.block.results, outputs, strict=False):
                if isinstance(output, Tensor):
                    table = block.function, result
                    before = samples.get(table)
                    if before is None or (output.requires_grad and not before.differentiable):
                        samples[table] = Sample.of(output)
        self._seconds += time.perf_counter() - begun
        return [results[request.task][request.output] for request in requests]

    def _together(self, tasks: list[Task], requests: list[Request]) -> Sequence[Tensor]:
        """Run all invocations level by level."""
        tables = self._program.tables
        blocks = list(dict.fromkeys(task.block for task in tasks))
        device = next(iter(tables.samples.values())).device
        schedule = make_schedule(tasks, device, [request.task for request in requests], False)
        columns = [
            [column([tasks[number].hosts[index] for number in group.tasks.tolist()], device) for index in range(group.block.block.hosts)]
            for group in schedule.groups
        ]
        parameters = list({id(p): p for block in blocks for p in block.parameters}.values())
        differentiate = self._grad and (bool(parameters) or any(c.requires_grad for held in columns for c in held))
        while True:
            tables.update([*self._program.all_blocks(), *blocks])
            try:
                staged = [stage_group(g.block, c, tables, differentiate) for g, c in zip(schedule.groups, columns, strict=True)]
                break
            except SumBroken as broken:
                tables.not_summed.add(broken.table)
        runs: list[GroupRun] = []
        for group, code, held in zip(schedule.groups, staged, columns, strict=True):
            first = len(group.block.operands)
            whole = dict(zip(code.inputs[first:], held, strict=True))
            operands = {
                name: (operand.invocation, (operand.callee, operand.result))
                for name, operand in zip(code.inputs, group.block.operands, strict=False)
            }
            runs.append(GroupRun(group, code, whole, operands))
        run = Run(schedule, runs, tables.summed)
        return differentiable_run(run, requests, parameters, columns, differentiate)


class StaleError(TwofoldError):
    """A tensor was written to between a call of a recursive function and the use of its result."""

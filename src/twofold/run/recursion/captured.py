"""A batch as captured CUDA graphs: one launch forward and one backward, whatever the structure, if a room holds it.

Captured work owns the memory that it reads and writes. What forward keeps for backward stays there, so that the memory
belongs to one batch from its forward until its backward cannot come any more: that is a `Lease`. What leaves is copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twofold.backends.cuda_graph import Record

from .execute import GroupRun, Run
from .factors import Table
from .parts import Staged
from .prepare import Column
from .rooms import Padding, Room
from .schedule import Index, Named, Schedule, upload

Recording = Callable[[Callable[[], object]], AbstractContextManager[Record]]
"""Runs what it is given once, then captures; `twofold.backends.cuda_graph.recording` is one."""

ALIGNMENT = 64
"""Bytes: what an input begins at a multiple of."""


@dataclass(frozen=True)
class Work:
    """A batch that is to be computed: for each block, its stages and the columns of its host values."""

    schedule: Schedule
    staged: Sequence[Staged]
    columns: Sequence[Sequence[Column]]
    summed: frozenset[Table]
    differentiate: bool

    def run(self) -> Run:
        """Return it to be run operation by operation."""
        placed = [place(columns, self.schedule.device) for columns in self.columns]
        if self.schedule.device.type == "cpu":
            for staged in self.staged:
                staged.note_batch()
        runs = [GroupRun.of(*parts) for parts in zip(self.schedule.groups, self.staged, placed, strict=True)]
        return Run(self.schedule, runs, self.summed)


def place(columns: Sequence[Column], device: torch.device) -> list[Tensor]:
    """Bring columns to the device."""
    return [column if isinstance(column, Tensor) else upload(column, device) for column in columns]


class Inputs:
    """Memory on the device with the arrays that captured work reads; they come from the host in one copy."""

    def __init__(self, arrays: Mapping[Any, NDArray[Any]], device: torch.device) -> None:
        self._starts: dict[Any, int] = {}
        size = 0
        for key, array in arrays.items():
            self._starts[key] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors: dict[Any, Tensor] = {}
        for key, array in arrays.items():
            part = self._memory[self._starts[key] : self._starts[key] + array.nbytes]
            self.tensors[key] = part.view(torch.from_numpy(array).dtype).view(array.shape)
        self.fill(arrays)

    def fill(self, arrays: Mapping[Any, NDArray[Any]]) -> None:
        """Write arrays of the same shapes. Work that was launched before still reads the last ones."""
        pinned = self._memory.device.type == "cuda"
        # New each time: the allocator of pinned memory waits for the copy before it gives the same again.
        staged = torch.empty(len(self._memory), dtype=torch.uint8, device="cpu", pin_memory=pinned)
        whole = staged.numpy()
        for key, array in arrays.items():
            start = self._starts[key]
            whole[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._memory.copy_(staged, non_blocking=True)


class Captured:
    """Graphs for all batches that a room holds, of the same blocks and with results that leave in the same places."""

    def __init__(self, room: Room, taken: Room, work: Work, recording: Recording) -> None:
        """Capture, with a batch that takes up `taken` of the room as an example. To be called without autograd.

        Raises `twofold.backends.cuda_graph.CaptureFailed`, or `torch.OutOfMemoryError`.
        """
        self.room = room
        self._holder: Callable[[], Lease | None] = _nobody
        self._named: dict[Named, None] = {}
        device = work.schedule.device

        def note(named: Named) -> Tensor:
            self._named[named] = None
            return upload(padding.numbers(named), device)

        noted = room.furnish(work.schedule, note)
        padding = Padding(work.schedule, taken, room, noted)
        columns = [_padded(held, source) for held, source in zip(work.columns, padding.sources, strict=True)]

        def warm_up() -> None:
            run = replace(work, schedule=noted, columns=columns).run()
            results = run.forward()
            if work.differentiate:
                run.backward([_no_gradient(result) for result in results])

        with recording(warm_up) as record:
            self._inputs = Inputs(self._arrays(work, padding), device)
            self._columns = [
                [c if isinstance(c, Tensor) else self._inputs.tensors[number, index] for index, c in enumerate(held)]
                for number, held in enumerate(columns)
            ]
            self._furnished = room.furnish(work.schedule, self._inputs.tensors.__getitem__)
            self._work = replace(work, schedule=self._furnished, columns=self._columns)
            self._forward, self._results = record(self._compute)
            self._tangents: list[Tensor | None] = []
            if work.differentiate:
                self._tangents = [_no_gradient(result) for result in self._results]
                self._backward, self._gradients = record(self._differentiate)

    def _compute(self) -> list[Tensor]:
        self._run = self._work.run()
        return self._run.forward()

    def _differentiate(self) -> dict[int, Tensor]:
        return self._run.backward(self._tangents)

    def _arrays(self, work: Work, padding: Padding) -> dict[Any, NDArray[Any]]:
        """Return indices by name, and for each block its columns; or for those that are tensors, what rows to take."""
        arrays: dict[Any, NDArray[Any]] = {named: padding.numbers(named) for named in self._named}
        for number, columns in enumerate(work.columns):
            for index, column in enumerate(columns):
                if isinstance(column, Tensor):
                    arrays[number] = padding.sources[number]
                else:
                    arrays[number, index] = column[padding.sources[number]]
        return arrays

    @property
    def free(self) -> bool:
        """Whether no batch needs what is in the memory."""
        return self._holder() is None

    def take(self, work: Work, taken: Room) -> Lease:
        """Give the memory to a batch that the room holds. It has to be free."""
        self._inputs.fill(self._arrays(work, Padding(work.schedule, taken, self.room, self._furnished)))
        for number, columns in enumerate(work.columns):
            for index, column in enumerate(columns):
                if isinstance(column, Tensor):
                    rows = self._inputs.tensors[number]
                    torch.index_select(column, 0, rows, out=self._columns[number][index])
        lease = Lease(self, list(taken.leaving.values()))
        self._holder = weakref.ref(lease)
        return lease

    def compute(self, counts: Sequence[int]) -> list[Tensor]:
        """Compute the batch that was taken; return its results that leave, so many for each `Leaving`."""
        self._forward()
        return [result[:count].clone() for count, result in zip(counts, self._results, strict=True)]

    def differentiate(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradients of parameters, by id, from those of results."""
        for tangent, gradient in zip(self._tangents, gradients, strict=True):
            if tangent is not None:
                _overwrite(tangent, gradient)
        self._backward()
        copies = [torch.empty_like(gradient) for gradient in self._gradients.values()]
        if copies:
            torch._foreach_copy_(copies, list(self._gradients.values()))
        return dict(zip(self._gradients, copies, strict=True))


class Lease:
    """A batch in captured memory, which is its own as long as this object is held; see `Computation`."""

    def __init__(self, captured: Captured, counts: Sequence[int]) -> None:
        self._captured = captured
        self._counts = counts

    def forward(self) -> list[Tensor]:
        """Compute all invocations."""
        return self._captured.compute(self._counts)

    def backward(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradient of each parameter, by id."""
        return self._captured.differentiate(gradients)

    def host_gradient(self, group: int, host: int) -> Tensor | None:
        """Return None: no column of a captured batch requires a gradient."""
        return None


def _overwrite(whole: Tensor, rows: Tensor | None) -> None:
    """Write the first rows of a tensor, and zero to the others."""
    count = 0 if rows is None else len(rows)
    whole[count:].zero_()
    if rows is not None:
        whole[:count].copy_(rows)


def _nobody() -> None:
    return None


def _no_gradient(result: Tensor) -> Tensor | None:
    return torch.zeros_like(result) if result.is_floating_point() else None


def _padded(columns: Sequence[Column], source: Index) -> list[Column]:
    """Return columns with a row for each of a block's in the room."""
    return [
        column.index_select(0, upload(source, column.device)) if isinstance(column, Tensor) else column[source]
        for column in columns
    ]

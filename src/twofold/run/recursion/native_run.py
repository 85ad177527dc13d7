"""Native code of a stage with the memory of a batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.backends import cpu_code
from twofold.backends.host import GRAIN

from .parts import NativeCode, Role, StageCode
from .schedule import Segment
from .vectorize import SIZES


def part(rows: Tensor, each: int, of_table: bool) -> tuple[Tensor, int]:
    """Return rows for native code to read or write, and what it is told of them.

    That is twice the number of elements from one invocation, which has `each` rows, to the next; and one more where
    the rows are those of a table, and not those of a block.
    """
    rows = rows if rows[:each].is_contiguous() else rows.contiguous()
    return rows, 2 * each * rows.stride(0) + of_table


def native_function(code: NativeCode | str, rows: int, device: torch.device) -> Callable[..., None] | str:
    """Return a compiled function, if it is there and to be used for so many rows at once; else why not.

    It runs on one thread. Where there are more, many rows are left to PyTorch's kernels, which share them out. Where
    products may be rounded to fewer bits, they are PyTorch's too.
    """
    if device.type != "cpu":
        return f"the values are on {device.type}"
    if isinstance(code, str):
        return code
    if torch.get_float32_matmul_precision() != "highest":
        return "products may be rounded to fewer bits"
    if torch.get_num_threads() > 1 and code.widest * rows > GRAIN:
        return "a level has many elements, and there are several threads"
    return code.ready()


def may_run(code: StageCode, rows: int, device: torch.device) -> bool:
    """Say whether the passes of a stage are compiled and to be used for a batch."""
    found = [native_function(each, rows, device) for each in code.passes]  # all of them, so that all are ordered
    return not any(isinstance(function, str) for function in found)


FEW_ROWS = 16
"""Rows of a product from which on it takes MKL no more and no less time if the matrix is transposed; fewer, less."""
TURNED_FOR = {"AVX512": 9}
"""For how many products of `FEW_ROWS` a transposed matrix is turned, by instruction set, else `TURNED_FOR_OTHERS`.

Of a matrix of 336 by 840 a product takes 30 µs more, and turning it 270, with AVX-512; 12 of 180 and 370 with AVX2.
"""
TURNED_FOR_OTHERS = 30


def turned(matrix: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Return a matrix that all levels multiply with as it lies in memory best for that, if it pays."""
    lies_well = matrix.dim() != 2 or matrix.is_contiguous() or matrix.device.type != "cpu"
    products = sum(min(segment.rows, FEW_ROWS) for segment in segments) / FEW_ROWS
    pays = not lies_well and products > TURNED_FOR.get(torch.backends.cpu.get_cpu_capability(), TURNED_FOR_OTHERS)
    return matrix.contiguous() if pays else matrix


class OnePass:
    """Elementwise operations in one pass over all rows. To be called when their code is there."""

    def __init__(self, code: NativeCode, names: Sequence[str], made: Sequence[tuple[str, Sequence[int]]]) -> None:
        """`names`: of what is taken, then of what is made; `made`: what has no place yet, and its shape as traced."""
        self._code = code
        self.made = made
        self._shapes = [(shape[0] // SIZES[0], *shape[1:]) for _, shape in made]
        fresh = [name for name, _ in made]
        order = [*(name for name in names if name not in fresh), *fresh]
        self._places = [order.index(what) if role is Role.PART else (role, what) for role, what in code.arguments]

    def __call__(self, n: int, *taken: Tensor) -> list[Tensor]:
        """Return what is made, for `n` invocations."""
        made = [torch.empty((n * each, *rest), dtype=torch.float32, device="cpu") for each, *rest in self._shapes]
        tensors = [*(t if t[:1].is_contiguous() else t.contiguous() for t in taken), *made]
        held = [tensors[place] if type(place) is int else self._other(*place) for place in self._places]  # type: ignore[misc]
        given = (ctypes.c_void_p * len(held))(*(tensor.data_ptr() for tensor in held))
        apart = (ctypes.c_int64 * len(held))(*(t.stride(0) * (len(t) // n) if t.dim() else 0 for t in held))
        rows = (ctypes.c_int64 * 3)(0, 0, n)
        function = self._code.ready()
        assert not isinstance(function, str)
        function(rows, 0, 1, 1, given, apart, None)
        return made

    def _other(self, role: Role, what: Any) -> Tensor:
        if role is Role.SCRATCH:
            return torch.empty(what[1], dtype=torch.float32, device="cpu")
        return what.make(what.tensor.detach()).contiguous()


class Native:
    """A stage that is run for several levels at once."""

    def __init__(
        self, function: Callable[..., None], given: Sequence[tuple[Tensor, int]], segments: Sequence[Segment]
    ) -> None:
        """`given`: for each argument, the memory and what the code is told of it."""
        self._function = function
        self._held = [tensor for tensor, _ in given]
        self._given = (ctypes.c_void_p * len(given))(*(tensor.data_ptr() for tensor in self._held))
        self._flags = (ctypes.c_int64 * len(given))(*(flag for _, flag in given))
        rows = [number for s in segments for number in (s.start, s.table, s.rows)]
        self._segments = (ctypes.c_int64 * len(rows))(*rows)

    def run(self, segments: Sequence[Segment]) -> None:
        """Run levels that follow one another, up or down."""
        first, last = segments[0].number, segments[-1].number
        step = 1 if last >= first else -1
        self._function(self._segments, first, last + step, step, self._given, self._flags, cpu_code.gemm())

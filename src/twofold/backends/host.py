"""The host's own means: how many threads a compiled piece is worth on a CPU, and what becomes of memory that is freed.

Both are a matter of the size of tensors. Small ones are computed before a second thread has been woken; large ones
are cleared by the system, page by page, each time they are taken anew.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from twofold.graph import Graph, Node, Value, values_in
from twofold.options import has_allocator_settings

aten: Any = torch.ops.aten

GRAIN = 32_768
"""Elements below which ATen's own kernels use one thread (`at::internal::GRAIN_SIZE`)."""
SMALL_PRODUCT = 2**20
"""Multiplications and additions of a matrix product that one core does in about 10 µs; to wake and await a second
thread takes 2 to 10. The MLP of the benchmarks, whose 26 products have 2**18 each, took 175 µs a launch on one thread
and 210 to 450 on two, depending on where the second core was."""
_PRODUCTS: dict[Any, int] = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""Products and the positions of their first factors, whose last dimension is summed over."""
_MUCH_FOR_EACH_ELEMENT = ("conv", "attention", "linalg", "fft", "cdist", "rnn", "lstm", "gru", "solve", "cholesky")


def threads_for(graph: Graph) -> int:
    """Return the number of threads that a piece should be compiled for and run on: one, or as many as PyTorch has."""
    threads = torch.get_num_threads()
    return 1 if all(map(_is_small, graph.nodes)) else threads


def _is_small(node: Node) -> bool:
    if any(word in str(node.target) for word in _MUCH_FOR_EACH_ELEMENT):
        return False
    factor = _PRODUCTS.get(node.target)
    if factor is not None:
        length = _shape(node.arguments[factor])[-1]
        return 2 * length * sum(map(_elements, node.results)) <= SMALL_PRODUCT
    return all(_elements(value) <= GRAIN for value in _values(node))


def _values(node: Node) -> Iterator[Value]:
    yield from node.results
    yield from values_in((node.arguments, [argument for _, argument in node.keywords]))


def _shape(value: Any) -> list[int]:
    return [] if value.spec is None else [GRAIN + 1 if size is None else size for size in value.spec.shape]


def _elements(value: Value) -> int:
    count = 1
    for size in _shape(value):
        count *= size
    return count


def on_one_thread(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with all of its work on the calling thread; as it is where OpenMP and MKL are not there to be asked.

    Only the calling thread's own counts change. `torch.set_num_threads` would change the program's too, which other
    threads read when they begin.
    """
    counts = _thread_counts()
    if counts is None:
        return run
    openmp_threads, set_openmp_threads, set_mkl_threads = counts

    def run_on_one_thread(*inputs: Any) -> Any:
        of_openmp = openmp_threads()
        set_openmp_threads(1)
        of_mkl = set_mkl_threads(1)
        try:
            return run(*inputs)
        finally:
            set_mkl_threads(of_mkl)
            set_openmp_threads(of_openmp)

    return run_on_one_thread


@functools.cache
def _thread_counts() -> tuple[Callable[[], int], Callable[[int], None], Callable[[int], int]] | None:
    """Return OpenMP's functions that return and set the calling thread's count, and MKL's, which does both."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_get_max_threads, library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # another name, or a build with other libraries
        return None


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 2**30
LARGEST_KEPT_BLOCK = 2**25  # the most that glibc takes


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep up to 1 GiB that was freed, unless the user has set up its allocator.

    By default it gives back what is free at the end of its heap beyond a few MiB. A step that is replayed frees all
    that it made, and the next one has it cleared anew: LeNet at batch 128 took 3,300 page faults a step, and 8 to 10 ms
    instead of 5. PyTorch's allocator for accelerators keeps what is freed for the same reason.
    """
    if has_allocator_settings():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)

"""The host's own means: how many threads a compiled piece is worth on a CPU, and what becomes of memory that is freed.

Both are a matter of the size of tensors. Small ones are computed before a second thread has been woken; large ones
are cleared by the system, page by page, each time they are taken anew.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from twofold.convert.segments import is_view
from twofold.graph import Graph, Node, Value, values_in
from twofold.options import has_allocator_settings

from .executable import Environment, Executable

aten: Any = torch.ops.aten

GRAIN = 32_768
"""Elements below which ATen's own kernels use one thread (`at::internal::GRAIN_SIZE`)."""
SMALL_PRODUCT = 2**20
"""Multiplications and additions of a matrix product that one core does in about 10 µs; to wake and await a second
thread takes 2 to 10. The MLP of the benchmarks, whose 26 products have 2**18 each, took 175 µs a launch on one thread
and 210 to 450 on two, depending on where the second core was."""
_PRODUCTS: dict[Any, int] = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""Products and the positions of their first factors, whose last dimension is summed over."""
_CONVOLUTIONS: dict[Any, tuple[int, int]] = {
    aten.convolution.default: (1, 6),
    aten.convolution_backward.default: (2, 7),
}
"""Convolutions, with the positions of their weight and of whether they are transposed."""
MUCH_WORK = 1000.0
"""Grains of work of a node that nothing is known of."""
WORTH_SHARING = 0.1
SHARED_FROM = 0.5
"""Grains from which Inductor shares out a node: two of its `SMALLEST_CHUNK`."""
_MUCH_FOR_EACH_ELEMENT = ("conv", "attention", "linalg", "fft", "cdist", "rnn", "lstm", "gru", "solve", "cholesky")


def threads_for(graph: Graph) -> int:
    """Return the number of threads that a piece should be compiled for and run on: one, or as many as PyTorch has.

    One, unless the large nodes gain more by sharing their work than it takes to wake the others for each, by a tenth of
    all work at least. The training step of `examples/digits.py` gains a hundredth by this count; it took 2.26 ms on two
    threads and 2.00 on one.
    """
    threads = torch.get_num_threads()
    works = list(map(_work, graph.nodes))
    gain = sum(work * (1 - 1 / threads) - 1 for work in works if work > SHARED_FROM)
    return threads if gain > WORTH_SHARING * sum(works) else 1


def _work(node: Node) -> float:
    """Return the work of a node in grains, each as long as it takes to wake and await another thread."""
    if is_view(node):
        return 0.0
    if node.target in _CONVOLUTIONS:
        return _convolution_work(node)
    if any(word in str(node.target) for word in _MUCH_FOR_EACH_ELEMENT):
        return MUCH_WORK
    factor = _PRODUCTS.get(node.target)
    if factor is not None:
        length = _shape(node.arguments[factor])[-1]
        return 2 * length * sum(map(_elements, node.results)) / SMALL_PRODUCT
    return max(map(_elements, _values(node)), default=0) / GRAIN


def _convolution_work(node: Node) -> float:
    """Return the work of a convolution or of its gradients: a product for each output and each weight that it sees."""
    weight, is_transposed = (node.arguments[i] for i in _CONVOLUTIONS[node.target])
    if is_transposed is not False:
        return MUCH_WORK
    is_backward = node.target is aten.convolution_backward.default
    outputs: Any = node.arguments[0] if is_backward else node.results[0]
    mask: Any = node.arguments[10] if is_backward else (True,)
    count: int = sum(mask[:2])
    return count * 2 * _elements(outputs) * math.prod(_shape(weight)[1:]) / SMALL_PRODUCT


def _values(node: Node) -> Iterator[Value]:
    yield from node.results
    yield from values_in((node.arguments, [argument for _, argument in node.keywords]))


def _shape(value: Any) -> list[int]:
    return [] if value.spec is None else [int(MUCH_WORK) * GRAIN if size is None else size for size in value.spec.shape]


def _elements(value: Value) -> int:
    count = 1
    for size in _shape(value):
        count *= size
    return count


def cores() -> int:
    """Return how many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_core_to_spare() -> bool:
    """Whether a compiler beside the program takes no core from its threads."""
    return torch.get_num_threads() < cores()


class LeavesCore:
    """An executable on a CPU that leaves a core to a compiler beside it, as long as that works.

    On two cores, two threads that wait for one another at each kernel gain nothing while a compiler has one of the
    cores half of the time: a replayed step of `examples/digits.py` took 4.6 ms on average on two threads, and the
    compiler got 0.38 of a core; on one thread 3.3 ms, and it got a whole one.
    """

    reuses_outputs = False
    lends_outputs = False

    def __init__(self, inner: Executable, is_compiling: Callable[[], bool]) -> None:
        self.backend = inner.backend
        self._launch = inner.launch
        self._launch_aside = on_threads(max(1, cores() - 1), inner.launch)
        self._is_compiling = is_compiling

    def launch(self, index: int, environment: Environment) -> None:
        """Run segment `index`; see `Executable`."""
        is_aside = self._is_compiling() and not has_core_to_spare()
        (self._launch_aside if is_aside else self._launch)(index, environment)


def on_one_thread(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with all of its work on the calling thread; see `on_threads`."""
    return on_threads(1, run)


def on_threads(count: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` on so many threads, the calling one included; as it is without OpenMP and MKL to be asked.

    Only the calling thread's own counts change. `torch.set_num_threads` would change the program's too, which other
    threads read when they begin.
    """
    counts = _thread_counts()
    if counts is None:
        return run
    openmp_threads, set_openmp_threads, set_mkl_threads = counts

    def run_on_threads(*inputs: Any) -> Any:
        of_openmp = openmp_threads()
        set_openmp_threads(count)
        of_mkl = set_mkl_threads(count)
        try:
            return run(*inputs)
        finally:
            set_mkl_threads(of_mkl)
            set_openmp_threads(of_openmp)

    return run_on_threads


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

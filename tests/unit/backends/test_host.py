"""Threads and memory of the host."""

import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch

from twofold.backends import host
from twofold.backends.host import GRAIN, LeavesCore, on_one_thread, threads_for
from twofold.graph import parse

pytestmark = pytest.mark.usefixtures("two_threads")

SMALL = {
    "elementwise": "%0: f32[32,64] = call aten.relu.default(%x)",
    "product": "%0: f32[32,64] = call aten.mm.default(%x, %w)",
    "product with a bias": "%0: f32[32,64] = call aten.addmm.default(%b, %x, %w)",
    "convolution": "%0: f32[1,1,8,8] = \
call aten.convolution.default(%i, %k, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)",
    "view of much": "%0: f32[64,4096] = call aten.t.default(%long)",
    "work that is done before another thread has woken": "%0: f32[1024,64] = call aten.relu.default(%part)",
}
LARGE = {
    "elementwise": "%0: f32[4096,64] = call aten.relu.default(%long)",
    "product": "%0: f32[32,2048] = call aten.mm.default(%x, %wide)",
    "product that sums over much": "%0: f32[64,64] = call aten.mm.default(%t, %long)",
    "convolution": "%0: f32[32,32,8,8] = \
call aten.convolution.default(%images, %kernels, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)",
    "gradients of a convolution": "%0: f32[32,16,8,8], %1: f32[32,16,3,3], %2: f32[32] = \
call aten.convolution_backward.default(%out, %images, %kernels, [32], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, \
[True, True, True])",
    "transposed convolution": "%0: f32[1,1,8,8] = \
call aten.convolution.default(%i, %k, None, [1, 1], [1, 1], [1, 1], True, [0, 0], 1)",
    "unknown size": "%0: f32[?] = call aten.relu.default(%u)",
}
GRAPH = """
    graph g(%x: f32[32,64], %w: f32[64,64], %b: f32[64], %long: f32[4096,64], %wide: f32[64,2048], %t: f32[64,4096],
            %i: f32[1,1,8,8], %k: f32[1,1,3,3], %u: f32[?], %part: f32[1024,64], %images: f32[32,16,8,8],
            %kernels: f32[32,16,3,3], %out: f32[32,32,8,8]):
      NODE
      return %0
    """


def _threads_for(node: str) -> int:
    return threads_for(parse(GRAPH.replace("NODE", node).replace(",\n            ", ", ")))


@pytest.mark.parametrize("name", SMALL)
def test_small_work_gets_one_thread(name: str):
    assert _threads_for(SMALL[name]) == 1


@pytest.mark.parametrize("name", LARGE)
def test_one_large_call_gets_all_threads(name: str):
    assert torch.get_num_threads() == 2
    assert _threads_for(LARGE[name]) == 2


def test_counts_of_threads_come_back():
    assert torch.get_num_threads() == 2
    assert on_one_thread(torch.get_num_threads)() == 1
    assert torch.get_num_threads() == 2


class Counting:
    """An executable that notes how many threads it is launched on."""

    backend = "replay"
    reuses_outputs = False
    lends_outputs = False

    def __init__(self) -> None:
        self.counts: list[int] = []

    def launch(self, index: int, environment: Any) -> None:
        self.counts.append(torch.get_num_threads())


@pytest.mark.parametrize(("cores", "expected"), [(2, [2, 1, 2]), (3, [2, 2, 2])])
def test_launches_leave_a_core_to_a_compiler_at_work(monkeypatch: pytest.MonkeyPatch, cores: int, expected: list[int]):
    monkeypatch.setattr(host, "cores", lambda: cores)
    is_compiling = [False]
    inner = Counting()
    executable = LeavesCore(inner, lambda: is_compiling[0])
    for now in (False, True, False):
        is_compiling[0] = now
        executable.launch(0, {})
    assert executable.backend == inner.backend
    assert inner.counts == expected
    assert torch.get_num_threads() == 2


def test_counts_of_threads_come_back_behind_an_exception():
    def fail() -> None:
        raise KeyError("piece")

    with pytest.raises(KeyError, match="piece"):
        on_one_thread(fail)()
    assert torch.get_num_threads() == 2


def test_threads_that_start_meanwhile_have_their_own_count():
    seen: list[int] = []

    def start_a_thread() -> None:
        thread = threading.Thread(target=lambda: seen.append(_work_and_count()))
        thread.start()
        thread.join()

    on_one_thread(start_a_thread)()
    assert seen == [2]


def _work_and_count() -> int:
    torch.ones(4 * GRAIN).exp()
    return torch.get_num_threads()


FAULTS = textwrap.dedent("""
    import resource
    import torch
    from twofold.backends.host import keep_freed_memory
    keep_freed_memory()
    for step in range(14):
        if step == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(4 * 2**20) for _ in range(6)]
        del tensors
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
    """)


def _faults_a_step(environment: dict[str, str]) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_freed_memory_stays_with_the_process():
    pages = 6 * 16 * 2**20 // 4096
    assert _faults_a_step({}) < pages / 10


def test_settings_of_the_user_stay():
    pages = 6 * 16 * 2**20 // 4096
    assert _faults_a_step({"MALLOC_MMAP_THRESHOLD_": str(2**20)}) > pages / 10

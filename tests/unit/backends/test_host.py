"""Threads and memory of the host."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from twofold.backends.host import GRAIN, on_one_thread, threads_for
from twofold.graph import parse

pytestmark = pytest.mark.usefixtures("two_threads")

SMALL = {
    "elementwise": "%0: f32[32,64] = call aten.relu.default(%x)",
    "product": "%0: f32[32,64] = call aten.mm.default(%x, %w)",
    "product with a bias": "%0: f32[32,64] = call aten.addmm.default(%b, %x, %w)",
}
LARGE = {
    "elementwise": "%0: f32[1024,64] = call aten.relu.default(%long)",
    "product": "%0: f32[32,2048] = call aten.mm.default(%x, %wide)",
    "product that sums over much": "%0: f32[64,64] = call aten.mm.default(%t, %long)",
    "convolution": "%0: f32[1,1,8,8] = \
call aten.convolution.default(%i, %k, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)",
    "unknown size": "%0: f32[?] = call aten.relu.default(%u)",
}
GRAPH = """
    graph g(%x: f32[32,64], %w: f32[64,64], %b: f32[64], %long: f32[1024,64], %wide: f32[64,2048], %t: f32[64,1024],
            %i: f32[1,1,8,8], %k: f32[1,1,3,3], %u: f32[?]):
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

"""Microseconds of host work in a call: what a call costs when its kernels cost nothing."""

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.environment import synchronize

HOST_CALLS = 50


def host_microseconds(
    run: Callable[[int], Any], device: torch.device, is_twofold: bool, calls: int = HOST_CALLS
) -> float | None:
    """Return the median over calls.

    On CUDA: until the call returns, the device idle before it. On a CPU the kernels run within the call: there it is
    the processor time that the calling thread spends on it outside executables, which other work on the machine
    lengthens by a cold cache but not by waiting; None for contenders that have no executables. Kernels leave the
    caches cold too: the same call costs less the less its kernels touch.
    """
    if device.type == "cuda":
        return statistics.median(_until_return(run, index, time.perf_counter) for index in range(calls))
    if not is_twofold:
        return None
    with _time_of_launches() as launches:
        times: list[float] = []
        for index in range(calls):
            launches.clear()
            whole = _until_return(run, index, time.thread_time)
            times.append(whole - sum(launches))
    return statistics.median(times)


def _until_return(run: Callable[[int], Any], index: int, clock: Callable[[], float]) -> float:
    synchronize()
    begin = clock()
    run(index)
    return (clock() - begin) * 1e6


@contextmanager
def _time_of_launches() -> Generator[list[float], None, None]:
    """Add the microseconds of each launch of a CPU executable to a list."""
    from twofold.backends.inductor import InductorExecutable
    from twofold.backends.replay import ReplayExecutable

    times: list[float] = []

    def timed(launch: Callable[..., None]) -> Callable[..., None]:
        def timed_launch(*arguments: Any) -> None:
            begin = time.thread_time()
            launch(*arguments)
            times.append((time.thread_time() - begin) * 1e6)

        return timed_launch

    classes: tuple[Any, ...] = (InductorExecutable, ReplayExecutable)
    originals = [kind.launch for kind in classes]
    for kind in classes:
        kind.launch = timed(kind.launch)
    try:
        yield times
    finally:
        for kind, original in zip(classes, originals, strict=True):
            kind.launch = original

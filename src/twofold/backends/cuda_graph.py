"""CUDA graphs: capture what another executable launches, and replay it. The only file that captures.

The record is captured, never the user's Python: libraries ask whether a capture is going on and take another path.
Captures of units share one memory pool, but for those that lend their outputs. That is sound because a unit's segments
are always replayed in the order of their capture with no other unit between them, because whatever outlives a unit is
held here or copied out, and because a launch on another stream than the last one waits for that.
What `recording` captures has a pool of its own, because other graphs may be replayed between its parts.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

from twofold.convert.from_traces import Program
from twofold.convert.segments import written_roots
from twofold.graph import TensorSpec, Value

from .executable import Environment, Executable


class CaptureFailed(Exception):
    """A segment could not be captured; the cause is chained."""


@functools.cache
def _pool() -> tuple[Any, torch.cuda.CUDAGraph]:
    """Return the pool of all captures, with an empty graph that keeps it alive when no other does."""
    pool = torch.cuda.graph_pool_handle()
    keeper = torch.cuda.CUDAGraph()
    keeper.capture_begin(pool, "thread_local")
    torch.zeros(1, device="cuda")
    keeper.capture_end()
    return pool, keeper


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class _LastLaunch:
    """The stream of the last launch of any captured graph."""

    def __init__(self) -> None:
        self._raw = 0  # the default stream's handle
        self._stream: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Have the current stream wait for the last launch, if that was on another one."""
        raw = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())  # type: ignore[attr-defined]
        if raw == self._raw and self._stream is not None:
            return
        current = torch.cuda.current_stream()
        if self._stream is not None:
            current.wait_stream(self._stream)
        self._raw, self._stream = raw, current


_LAST_LAUNCH = _LastLaunch()


class CudaGraphExecutable:
    """One CUDA graph a segment, over static memory for feeds, settings and entry gradients."""

    reuses_outputs = True

    def __init__(
        self, program: Program, inner: Executable, given: Environment, warm_up: bool, lends_outputs: bool = False
    ) -> None:
        """Capture all segments of `inner` once, reading `given` for statics and examples of the rest.

        `warm_up`: run `inner` once before, for kernels that are loaded at their first launch; the caller restores
        what that run wrote. `lends_outputs`: take memory that no other capture uses. Raises `CaptureFailed`, or
        `torch.OutOfMemoryError`.
        """
        self.lends_outputs = lends_outputs
        self.backend = "cuda_graph" if inner.backend == "replay" else f"{inner.backend}+cuda_graph"
        self._program = program
        self._static: Environment = {value: given[value] for value in program.statics}
        self._buffers: dict[Value, torch.Tensor] = {}
        for value in given.keys() - program.statics.keys():
            self._buffers[value] = self._static[value] = _buffer_for(value.spec, given[value])
        self._last_settings: dict[Value, Any] = {value: given[value] for value in program.settings}
        self._graphs: list[tuple[torch.cuda.CUDAGraph, tuple[Value, ...]]] = []
        self._copies = self._plan_copies()
        self._written = [
            [
                value
                for value in written_roots(segment, program.views)
                if value in self._buffers and value not in program.settings
            ]
            for segment in program.segments
        ]
        with _on_side_stream():
            _pool()
            if warm_up:
                scratch = dict(self._static)
                for index in range(len(program.segments)):
                    inner.launch(index, scratch)
                torch.cuda.current_stream().synchronize()
            self._capture(inner)

    def _plan_copies(self) -> list[list[Value]]:
        copied: set[Value] = set()
        plan: list[list[Value]] = []
        for segment in self._program.segments:
            fresh = [v for v in segment.inputs if v in self._buffers and v not in copied]
            copied.update(fresh)
            plan.append(fresh)
        return plan

    def _capture(self, inner: Executable) -> None:
        environment = dict(self._static)
        pool = torch.cuda.graph_pool_handle() if self.lends_outputs else _pool()[0]
        for index, segment in enumerate(self._program.segments):
            try:
                graph, _ = _captured(pool, functools.partial(inner.launch, index, environment))
            except BaseException:
                _pool.cache_clear()  # PyTorch may take it for one that is still recorded to
                raise
            self._graphs.append((graph, segment.outputs))
        kept = {value for segment in self._program.segments for value in segment.outputs}
        self._static.update((value, environment[value]) for value in kept)

    def launch(self, index: int, environment: Environment) -> None:
        """Copy in what segment `index` is the first to read, and replay it; see `Executable`."""
        if index == 0:
            _LAST_LAUNCH.follow()
        for value in self._copies[index]:
            given = environment[value]
            buffer = self._buffers[value]
            if value in self._last_settings:
                if self._last_settings[value] != given:
                    buffer.fill_(given)
                    self._last_settings[value] = given
            elif given is not buffer:
                buffer.copy_(given)
        graph, outputs = self._graphs[index]
        graph.replay()
        for value in self._written[index]:  # a gradient that was accumulated into stays the user's own tensor
            environment[value].copy_(self._buffers[value])
        for value in outputs:
            environment[value] = self._static[value]


def _buffer_for(spec: TensorSpec | None, example: Any) -> torch.Tensor:
    if isinstance(example, torch.Tensor):
        return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device).copy_(
            example
        )
    return torch.full((), float(example), dtype=torch.float32, device="cuda")


@contextmanager
def _on_side_stream() -> Generator[None]:
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        yield
    torch.cuda.synchronize()


_T = TypeVar("_T")


class Record(Protocol):
    """Captures work: returns what repeats it in the same memory, and what it returned, which each repetition fills."""

    def __call__(self, work: Callable[[], _T], /) -> tuple[Callable[[], object], _T]:
        """Raise `CaptureFailed`, or `torch.OutOfMemoryError`."""
        ...


@contextmanager
def recording(warm_up: Callable[[], object]) -> Generator[Record]:
    """Give a `Record` for pieces of work that follow one another, all with one memory of their own.

    `warm_up` is run before, for kernels that are loaded at their first launch.
    """
    with _on_side_stream():
        warm_up()
        torch.cuda.current_stream().synchronize()
        pool = torch.cuda.graph_pool_handle()

        def record(work: Callable[[], _T], /) -> tuple[Callable[[], object], _T]:
            graph, made = _captured(pool, work)
            return graph.replay, made

        yield record


def _captured(pool: Any, work: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
    """Capture one piece of work. Raises `CaptureFailed`, or `torch.OutOfMemoryError`."""
    graph = torch.cuda.CUDAGraph()
    with _nothing_collected():
        try:
            graph.capture_begin(pool, "thread_local")
            made = work()
            graph.capture_end()
        except BaseException as error:
            _end_quietly(graph, pool)
            if isinstance(error, torch.OutOfMemoryError | KeyboardInterrupt):
                raise
            raise CaptureFailed(str(error)) from error
    return graph, made


@contextmanager
def _nothing_collected() -> Generator[None]:
    """Keep Python from collecting cycles: what holds memory or graphs of the device must not go during a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_quietly(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed, wherever it did, so that allocations and random draws are as before it."""
    with suppress(RuntimeError):  # the capture is invalid already; ending it is what resets the stream
        graph.capture_end()
    # Where that raised, PyTorch has neither ended the allocations nor told its generator; another capture does that.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    mender = torch.cuda.CUDAGraph()
    with suppress(RuntimeError):
        mender.capture_begin(torch.cuda.graph_pool_handle(), "thread_local")
        torch.zeros(1, device="cuda")
        mender.capture_end()

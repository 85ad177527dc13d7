"""Make paths runnable: build their program, choose among tiers by measurement, swap them between two units.

Tier 1 replays eager's kernels (captured in CUDA graphs on a GPU, called one by one on a CPU); tier 2 has fused kernels
and arrives when the compile process is done. With `backend="auto"` a tier stays only if it was measured faster
than the best so far, eager included; a named backend is obeyed.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from twofold.backends.compilation import compiler
from twofold.backends.cuda_graph import CaptureFailed, CudaGraphExecutable
from twofold.backends.executable import Executable
from twofold.backends.inductor import CompileFailed, InductorExecutable, piece_texts
from twofold.backends.replay import ReplayExecutable
from twofold.capture.intercept import modes_taken_off
from twofold.capture.trace_graph import Path
from twofold.convert.from_traces import Program, UnsupportedPath, build_program
from twofold.graph import MalformedGraphError
from twofold.options import Options, has_cpp_compiler

from .account import Account
from .graph_runner import Installed, RandomState, example_environment

SAMPLES = 7
"""Units timed before a tier is judged; the first two are warm-up."""
WARM_UP_SAMPLES = 2
MAX_REBUILDS = 8
"""A path whose graph had to be rebuilt so often depends on something that changes all the time."""
MAX_COMPILED_NODES = 6_000
"""On 2 cores Inductor takes about 0.1 s a node: beyond this the kernels would come after ten minutes."""


@dataclass(eq=False)
class PathState:
    """The tiers of one path. `Path.executable` is the one in use."""

    rebuilds: int = 0
    best: str = "eager"
    best_seconds: float | None = None
    best_executable: Any = None
    samples: list[float] = field(default_factory=list[float])
    on_trial: str | None = None
    has_ordered: bool = False
    orders: list[Future[Any]] = field(default_factory=list[Future[Any]])


class Builder:
    """Builds and judges the executables of one program's paths."""

    def __init__(self, options: Options, account: Account) -> None:
        self.options = options
        self.account = account
        self._states: dict[Path, PathState] = {}
        self._eager_rates: deque[float] = deque(maxlen=20)
        self._compiler_missing_said = False
        self._ordered: set[str] = set()

    # ---- what is asked of it -----------------------------------------------------------------------------

    def prepare(self, path: Path, accelerator: bool) -> None:
        """Build what is due for a path that was recorded: program, tier 1, an order for tier 2."""
        state = self._states.setdefault(path, PathState())
        if path.blocked or not path.stale:
            return
        began = time.perf_counter()
        state.rebuilds += 1
        path.executable = None
        state.orders.clear()
        state.on_trial = None
        state.has_ordered = False
        state.best, state.best_executable = "eager", None
        if state.rebuilds > MAX_REBUILDS:
            self._block(path, "argument_changes", "the graph of this path had to be built again and again")
            return
        try:
            with modes_taken_off(), torch.no_grad():
                path.program = build_program(path, self._is_exact(), path.volatile)
                self._install_first(path, state, accelerator)
        except UnsupportedPath as refusal:
            if refusal.code != "new_path":
                origin = None if refusal.origin is None else str(refusal.origin)
                self._block(path, refusal.code, refusal.reason, origin)
            return
        except MalformedGraphError as error:
            self._block(path, "unsupported_call", str(error).splitlines()[0][:300])
            return
        finally:
            self.account.stall_seconds += time.perf_counter() - began
        path.stale = False

    def poll(self, path: Path, accelerator: bool) -> None:
        """Swap in tier 2 if its kernels have arrived. Called between two units."""
        state = self._states.get(path)
        if state is None or state.on_trial is not None or path.blocked or path.stale:
            return
        if not state.has_ordered and self._wants_kernels():
            self._order(path, state, accelerator)
        if not state.orders or not all(order.done() for order in state.orders):
            return
        orders, state.orders = state.orders, []
        failure = next((order.exception() for order in orders if order.exception() is not None), None)
        if failure is not None:
            self._say_compile_failed(str(failure))
            return
        began = time.perf_counter()
        with modes_taken_off(), torch.no_grad():
            inner = InductorExecutable(path.program, compiler().artifact)
            self._install(path, state, inner, accelerator)
        self.account.stall_seconds += time.perf_counter() - began

    def compile_seconds(self) -> float:
        """Return the time spent compiling for this program."""
        return sum(compiler().seconds_of(key) for key in self._ordered)

    def orders(self) -> list[Future[Any]]:
        """Return what the compile process still owes."""
        return [order for state in self._states.values() for order in state.orders]

    # ---- measuring ---------------------------------------------------------------------------------------

    def wants_eager_samples(self) -> bool:
        """Whether eager execution must be timed before a graph can be judged."""
        return self.options.backend == "auto" and len(self._eager_rates) < SAMPLES - WARM_UP_SAMPLES

    def is_timing(self, path: Path | None) -> bool:
        """Whether the next unit's time counts, so that the device must be idle at both ends."""
        state = None if path is None else self._states.get(path)
        return self.wants_eager_samples() or (state is not None and state.on_trial is not None)

    def note_eager(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran eagerly and unseen, and probably took this path."""
        self._eager_rates.append(seconds / max(path.call_count, 1))

    def note_graph(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran as a graph, and judge the tier on trial when there are enough."""
        state = self._states[path]
        if state.on_trial is None:
            return
        state.samples.append(seconds)
        if len(state.samples) < SAMPLES:
            return
        measured = statistics.median(state.samples[WARM_UP_SAMPLES:])
        name, state.on_trial, state.samples = state.on_trial, None, []
        reference = state.best_seconds
        if state.best == "eager" and self._eager_rates:
            reference = statistics.median(self._eager_rates) * path.call_count
        if reference is None or measured < reference:
            state.best, state.best_seconds, state.best_executable = name, measured, path.executable
            self.account.backend = name
            against = "" if reference is None else f", {reference * 1e3:.3f} ms before"
            self.account.decision(f"kept {name}: {measured * 1e3:.3f} ms a unit{against}")
        else:
            self.account.decision(
                f"dropped {name}: {measured * 1e3:.3f} ms a unit, {state.best} takes {reference * 1e3:.3f} ms"
            )
            path.executable = state.best_executable
            if path.executable is None and not state.orders and (state.has_ordered or not self._wants_kernels()):
                self._block(path, "not_faster", f"{name} is not faster than eager execution")

    # ---- tiers -------------------------------------------------------------------------------------------

    def _is_exact(self) -> bool:
        return self.options.numerics == "exact"

    def _install_first(self, path: Path, state: PathState, accelerator: bool) -> None:
        backend = self.options.backend
        if backend != "inductor":
            self._install(path, state, ReplayExecutable(path.program), accelerator)
        if backend == "inductor" or (self._wants_kernels() and not self.options.background):
            self._order(path, state, accelerator)

    def _wants_kernels(self) -> bool:
        backend = self.options.backend
        return backend == "inductor" or (backend == "auto" and not self._is_exact())

    def _install(self, path: Path, state: PathState, inner: Executable, accelerator: bool) -> None:
        executable = inner
        if accelerator and path.program.history is not None:
            # What a later backward reads must outlive the next launch, and memory of a captured graph does not.
            self.account.decision("not captured: outputs of this path are differentiated outside the unit")
        elif accelerator and self.options.backend != "replay":
            captured = self._capture(path.program, inner)
            if captured is None:
                if state.best_executable is None and not state.orders:
                    self._block(path, "capture_failed", "no tier could run this path")
                return
            executable = captured
        path.executable = Installed(path.program, executable)
        self.account.segments = max(self.account.segments, len(path.program.segments))
        if self.options.backend == "auto":
            state.on_trial, state.samples = executable.backend, []
        else:
            state.best, state.best_executable = executable.backend, path.executable
            self.account.backend = executable.backend
        self.account.decision(f"a path of {path.call_count} calls runs as {executable.backend}")

    def _capture(self, program: Program, inner: Executable) -> Executable | None:
        given = example_environment(program)
        warm = inner.backend != "replay"
        saved = Installed(program, inner).save_written() if warm else None
        random = RandomState.take()
        try:
            executable = CudaGraphExecutable(program, inner, given, warm)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.account.fallback("out_of_memory", "memory ran out while capturing a CUDA graph")
            return None
        except CaptureFailed as failure:
            self.account.fallback("capture_failed", str(failure))
            return None
        finally:
            if saved is not None:
                saved()
            random.restore()
        self.account.captures += 1
        return executable

    def _order(self, path: Path, state: PathState, accelerator: bool) -> None:
        """Have the kernels of a path compiled. Not while a tier is on trial: compiling would be measured with it."""
        state.has_ordered = True
        if not accelerator and not has_cpp_compiler():
            if not self._compiler_missing_said:
                self._compiler_missing_said = True
                self.account.fallback("no_compiler", "no C++ compiler was found, so nothing can be compiled")
            return
        if sum(len(segment.graph.nodes) for segment in path.program.segments) > MAX_COMPILED_NODES:
            self.account.fallback("too_large", f"more than {MAX_COMPILED_NODES} operations in one unit")
            return
        try:
            texts = piece_texts(path.program)
        except CompileFailed as failure:
            self._say_compile_failed(str(failure))
            return
        background = self.options.background
        self._ordered |= texts.keys()
        state.orders = [compiler().order(key, text, background) for key, text in texts.items()]
        self.account.decision(f"compiling {len(texts)} pieces for a path of {path.call_count} calls")

    def _say_compile_failed(self, failure: str) -> None:
        self.account.fallback("compile_failed", failure)

    def _block(self, path: Path, code: str, reason: str, origin: str | None = None) -> None:
        path.blocked = code
        path.executable = None
        path.stale = False
        self.account.fallback(code, reason, origin)

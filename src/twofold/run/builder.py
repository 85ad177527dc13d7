"""Make paths runnable: build their program, choose among tiers by measurement, swap them between two units.

Tier 1 replays eager's kernels (captured in CUDA graphs on a GPU, called one by one on a CPU); tier 2 has fused kernels
and arrives when the compile process is done. With `backend="auto"` a tier stays only if it was measured faster
than the best so far, eager included; a named backend is obeyed.
"""

from __future__ import annotations

import statistics
from collections import Counter
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
from twofold.graph import MalformedGraphError, inference_mode
from twofold.options import Options, has_cpp_compiler

from .account import Account
from .graph_runner import RandomState
from .installed import Installed, example_environment
from .pace import Pace, Work
from .versions import keep_versions

WARM_UP_UNITS = 2
"""Units of a path on a tier whose times do not count."""
SAMPLES = 5
"""Units timed of each side before a tier is judged, by their medians, where units take one path."""
MIXED_SAMPLES = 20
"""The same where they take several, and it is not known which an eager unit took: judged by their means."""
LONG = 3
"""In these means no unit counts for more than so many times what one in ten exceeds: one collection of all of Python's
garbage, 130 ms, among 20 units of 1 ms would make them slower than eager ones of 7 ms."""
MARGIN = 0.97
"""A tier has to take less than this share of the time of what it replaces: beyond noise."""
INDUCTOR = frozenset({"inductor", "inductor+cuda_graph"})
MAX_REBUILDS = 8
"""A path whose graph had to be rebuilt so often depends on something that changes all the time."""
MAX_COMPILED_NODES = 6_000
"""On 2 cores Inductor takes about 0.1 s a node: beyond this the kernels would come after ten minutes."""


@dataclass(eq=False)
class PathState:
    """What was built for one path. `Path.executable` is the tier in use."""

    tiers: dict[str, Installed] = field(default_factory=dict[str, Installed])
    units: Counter[str] = field(default_factory=Counter[str])
    """How many units ran on each tier."""
    rebuilds: int = 0
    has_ordered: bool = False
    orders: list[Future[Any]] = field(default_factory=list[Future[Any]])


@dataclass(eq=False)
class Contest:
    """Which tiers pay for the units that begin in one state, whichever path they take then."""

    paths: list[Path] = field(default_factory=list[Path])
    accepted: list[str] = field(default_factory=list[str])
    """The last is the best."""
    rejected: set[str] = field(default_factory=set[str])
    polled: int = 0
    """The path last looked at for kernels, besides the likely one."""
    on_trial: str | None = None
    samples: list[float] = field(default_factory=list[float])
    """Seconds of the units that ran on the tier on trial."""
    references: list[float] = field(default_factory=list[float])
    """Seconds of those that ran on the best tier accepted, or eagerly. They take turns with the others, so that
    whatever else the machine does slows both alike."""

    def verdict(self) -> tuple[float, float] | None:
        """Return the typical times of both sides, once enough are known."""
        is_mixed = len(self.paths) > 1
        if min(len(self.samples), len(self.references)) < (MIXED_SAMPLES if is_mixed else SAMPLES):
            return None
        typical = _mean_of_mixture if is_mixed else statistics.median
        return typical(self.samples), typical(self.references)


def _mean_of_mixture(seconds: list[float]) -> float:
    """Return the mean of units of several lengths, none of which counts for more than `LONG` long ones."""
    bound = LONG * statistics.quantiles(seconds, n=10)[-1]
    return statistics.mean(min(bound, one) for one in seconds)


class Builder:
    """Builds and judges the executables of one program's paths."""

    def __init__(self, options: Options, account: Account, pace: Pace) -> None:
        self.options = options
        self.account = account
        self.pace = pace
        self.settled: set[Path] = set()
        """Paths to which nothing is due, whatever runs next: no kernels are awaited, and no tier is on trial."""
        self._states: dict[Path, PathState] = {}
        self._contests: dict[Any, Contest] = {}
        self._compiler_missing_said = False
        self._ordered: set[str] = set()

    # ---- what is asked of it -----------------------------------------------------------------------------

    def prepare(self, path: Path, accelerator: bool) -> None:
        """Build what is due for a path that was recorded: program, tier 1, an order for tier 2."""
        state = self._states.setdefault(path, PathState())
        if path.blocked or not path.stale:
            return
        self.settled.clear()
        state.rebuilds += 1
        path.executable = None
        state.orders.clear()
        state.tiers.clear()
        state.units.clear()
        state.has_ordered = False
        if state.rebuilds > MAX_REBUILDS:
            self._block(path, "argument_changes", "the graph of this path had to be built again and again")
            return
        try:
            with self.pace.taking(Work.BUILD), inference_mode(False), modes_taken_off(), torch.no_grad():
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
        path.stale = False

    def poll(self, path: Path, accelerator: bool) -> None:
        """Swap in tier 2 where its kernels have arrived. Called between two units, for the path that is likely next.

        Of the other paths that begin alike, one is looked at each time.
        """
        contest = self._contest(path)
        self._poll(path, contest, accelerator)
        if len(contest.paths) > 1:
            contest.polled = (contest.polled + 1) % len(contest.paths)
            self._poll(contest.paths[contest.polled], contest, accelerator)

    def _poll(self, path: Path, contest: Contest, accelerator: bool) -> None:
        state = self._states.get(path)
        if state is None or path.blocked or path.stale or contest.on_trial is not None:
            return
        if self._has_to_order(state, contest):
            with self.pace.taking(Work.ORDER):
                self._order(path, state, accelerator)
        if not state.orders or not all(order.done() for order in state.orders):
            return
        orders, state.orders = state.orders, []
        failure = next((order.exception() for order in orders if order.exception() is not None), None)
        if failure is not None:
            self._say_compile_failed(failure, state)
            return
        with self.pace.taking(Work.INSTALL), inference_mode(False), modes_taken_off(), torch.no_grad():
            inner = InductorExecutable(path.program, compiler().artifact)
            self._install(path, state, inner, accelerator)

    def _has_to_order(self, state: PathState, contest: Contest) -> bool:
        return not state.has_ordered and self._wants_kernels() and INDUCTOR.isdisjoint(contest.rejected)

    def _is_owed(self, state: PathState, contest: Contest) -> bool:
        return bool(state.orders) or self._has_to_order(state, contest)

    def compile_seconds(self) -> float:
        """Return the time spent compiling for this program."""
        return sum(compiler().seconds_of(key) for key in self._ordered)

    def orders(self) -> list[Future[Any]]:
        """Return what the compile process still owes."""
        return [order for state in self._states.values() for order in state.orders]

    def _is_compiling(self) -> bool:
        """Whether kernels of another path are made beside the program, which on few cores is measured with it."""
        return not all(order.done() for order in self.orders())

    # ---- measuring ---------------------------------------------------------------------------------------

    def is_timing(self, path: Path | None) -> bool:
        """Whether the next unit's time counts, so that the device must be idle at both ends."""
        return path is not None and path in self._states and self._contest(path).on_trial is not None

    def choose(self, path: Path) -> None:
        """Set what the next unit of a path runs on: the tier on trial or the best accepted, in turns; None: eagerly."""
        state, contest = self._states.get(path), self._contest(path)
        if state is None:
            return
        if contest.on_trial is None and len(contest.paths) <= 1 and not self._is_owed(state, contest):
            self.settled.add(path)
        if self.options.backend != "auto":
            return
        is_sample = len(contest.samples) <= len(contest.references)
        for other in contest.paths if contest.on_trial else (path,):
            tiers = self._states[other].tiers
            if contest.on_trial in tiers and is_sample:
                other.executable = tiers[contest.on_trial]
            else:
                other.executable = next((tiers[t] for t in reversed(contest.accepted) if t in tiers), None)

    def note_eager(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran eagerly and unseen, and began as units of this path do."""
        contest = self._contest(path)
        if contest.on_trial is not None and not contest.accepted and not self._is_compiling():
            contest.references.append(seconds)
            self._judge(contest)

    def note_graph(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran as a graph."""
        contest, state = self._contest(path), self._states[path]
        tier = path.executable.executable.backend
        state.units[tier] += 1
        is_judged = contest.on_trial in state.tiers and state.units[tier] > WARM_UP_UNITS
        if is_judged and not self._is_compiling():
            (contest.samples if tier == contest.on_trial else contest.references).append(seconds)
            self._judge(contest)

    def _contest(self, path: Path) -> Contest:
        root = path.nodes[0].parent
        contest = self._contests.get(root)
        if contest is None:
            contest = self._contests[root] = Contest()
        return contest

    def _judge(self, contest: Contest) -> None:
        """Accept or reject the tier on trial, once there are enough times of both sides."""
        verdict = contest.verdict()
        if verdict is None or contest.on_trial is None:
            return
        tier, contest.on_trial = contest.on_trial, None
        best = contest.accepted[-1] if contest.accepted else "eager"
        is_accepted = verdict[0] < MARGIN * verdict[1]
        times = f"{verdict[0] * 1e3:.3f} ms a unit, {best} {verdict[1] * 1e3:.3f} ms"
        self.account.decision(f"{'kept' if is_accepted else 'dropped'} {tier}: {times}")
        if is_accepted:
            contest.accepted.append(tier)
            self.account.backend = tier
        else:
            contest.rejected.add(tier)
        for path in contest.paths:
            self._settle(path, contest)

    def _settle(self, path: Path, contest: Contest) -> None:
        """Block a path on which no tier pays and no other will come."""
        self.choose(path)
        state = self._states[path]
        if path.executable is None and not state.orders and (state.has_ordered or not self._wants_kernels()):
            self._block(path, "not_faster", f"{' and '.join(contest.rejected)} is not faster than eager execution")

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
        self.settled.clear()
        executable = inner
        if accelerator and path.program.history is not None:
            # What a later backward reads must outlive the next launch, and memory of a captured graph does not.
            self.account.decision("not captured: outputs of this path are differentiated outside the unit")
        elif accelerator and self.options.backend != "replay":
            captured = self._capture(path.program, inner)
            if captured is None:
                if not state.tiers and not state.orders:
                    self._block(path, "capture_failed", "no tier could run this path")
                return
            executable = captured
        tier = executable.backend
        installed = state.tiers[tier] = Installed(path.program, executable)
        self.account.segments = max(self.account.segments, len(path.program.segments))
        self.account.decision(f"a path of {path.call_count} calls runs as {tier}")
        if self.options.backend != "auto":
            path.executable = installed
            self.account.backend = tier
            return
        contest = self._contest(path)
        if path not in contest.paths:
            contest.paths.append(path)
        if tier in contest.accepted or tier in contest.rejected:
            self._settle(path, contest)
        else:
            if contest.on_trial is None:
                contest.on_trial = tier
                contest.samples.clear()
                contest.references.clear()
            path.executable = installed

    def _capture(self, program: Program, inner: Executable) -> Executable | None:
        given = example_environment(program)
        warm = inner.backend != "replay"
        saved = Installed(program, inner).save_written() if warm else None
        random = RandomState.take(program.on_accelerator)
        restore_versions = keep_versions(program.statics.values())
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
            restore_versions()  # a capture computes nothing and the warm-up is undone, but both count as writes
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
            self._say_compile_failed(failure, state)
            return
        background = self.options.background
        self._ordered |= texts.keys()
        state.orders = [compiler().order(key, text, background) for key, text in texts.items()]
        self.account.decision(f"compiling {len(texts)} pieces for a path of {path.call_count} calls")

    def _say_compile_failed(self, failure: BaseException, state: PathState) -> None:
        code = failure.code if isinstance(failure, CompileFailed) else "compile_failed"
        self.account.fallback(code, str(failure), tier=next(iter(state.tiers), "eager"))

    def _block(self, path: Path, code: str, reason: str, origin: str | None = None) -> None:
        path.blocked = code
        path.executable = None
        path.stale = False
        self.account.fallback(code, reason, origin)

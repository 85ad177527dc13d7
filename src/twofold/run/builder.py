"""Make paths runnable: build their program, choose among tiers by measurement, swap them between two units.

Tier 1 replays eager's kernels (captured in CUDA graphs on a GPU, called one by one on a CPU); tier 2 has fused kernels
and arrives when the compile process is done. With `backend="auto"` a tier stays only if it was measured faster
than the best so far, eager included; a named backend is obeyed.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from twofold.backends.compilation import compiler, is_compiling
from twofold.backends.cuda_graph import CaptureFailed, CudaGraphExecutable
from twofold.backends.executable import Executable
from twofold.backends.host import LeavesCore, has_core_to_spare
from twofold.backends.inductor import CompileFailed, InductorExecutable, piece_texts
from twofold.backends.replay import ReplayExecutable
from twofold.capture.intercept import modes_taken_off
from twofold.capture.trace_graph import Path
from twofold.convert.from_traces import Program, UnsupportedPath, build_program
from twofold.convert.segments import bytes_of
from twofold.graph import MalformedGraphError, inference_mode
from twofold.options import Options, has_cpp_compiler

from .account import Account
from .contest import EAGER, MARGIN, MAX_MISSED, Contest, Trial
from .graph_runner import RandomState
from .installed import Installed, example_environment
from .pace import Pace, Work
from .versions import keep_versions

WARM_UP_UNITS = 2
"""Units of a path on a tier whose times do not count."""
INDUCTOR = frozenset({"inductor", "inductor+cuda_graph"})
MAX_REBUILDS = 8
"""A path whose graph had to be rebuilt so often depends on something that changes all the time."""
MAX_COMPILED_NODES = 6_000
"""On 2 cores Inductor takes about 0.1 s a node: beyond this the kernels would come after ten minutes."""
HOT = 1 / 3
"""Where compiling takes a core from the program, all paths but the first are compiled once their units have taken this
share of what it takes to compile one: the demo's script spends a tenth of its time in paths of one unit in 45, for
which it compiled as long as for all others."""
QUIET_SECONDS = 0.3
"""Seconds after a compiler was at work in which nothing is judged."""
LENT_BYTES = 32 << 20
"""Gradients that take as much are lent, not copied: below, a copy takes an H200 less than 20 µs, and asking who holds
them takes Python as long."""


@dataclass(eq=False)
class PathState:
    """What was built for one path. `Path.executable` is the tier in use."""

    tiers: dict[str, Installed] = field(default_factory=dict[str, Installed])
    units: Counter[str] = field(default_factory=Counter[str])
    """How many units ran on each tier."""
    rebuilds: int = 0
    has_ordered: bool = False
    keys: frozenset[str] | None = None
    """The pieces that it needs compiled, where that was asked before they were ordered."""
    orders: list[Future[Any]] = field(default_factory=list[Future[Any]])
    may_lend: bool = True
    """Whether the program has not been seen to keep the gradients of the path."""


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
        self._lender: Path | None = None
        self._busy_until = 0.0
        """When a compiler was last seen at work, by `time.perf_counter`, with the pause behind it."""

    # ---- what is asked of it -----------------------------------------------------------------------------

    def prepare(self, path: Path, accelerator: bool) -> None:
        """Build what is due for a path that was recorded: program, tier 1, an order for tier 2."""
        state = self._states.setdefault(path, PathState())
        if path.blocked or not path.stale:
            return
        self.settled.clear()
        state.rebuilds += 1
        path.executable = None
        lent = [installed.lent for installed in state.tiers.values() if installed.lent is not None]
        state.may_lend = state.may_lend and not any(gradients.is_held for gradients in lent)
        state.orders.clear()
        state.tiers.clear()
        state.units.clear()
        state.has_ordered = False
        state.keys = None
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

    def poll(self, path: Path, accelerator: bool, units: int = 1) -> None:
        """Swap in tier 2 where its kernels have arrived. Called between two units, for the path that is likely next.

        `units`: so many have run since it was called last. Of the other paths that begin alike, one is looked at.
        """
        contest = self._contest(path)
        contest.take_rest(units)
        self._poll(path, contest, accelerator)
        if contest.is_mixed:
            contest.polled = (contest.polled + 1) % len(contest.paths)
            self._poll(contest.paths[contest.polled], contest, accelerator)

    def _poll(self, path: Path, contest: Contest, accelerator: bool) -> None:
        state = self._states.get(path)
        if state is None or path.blocked or path.stale:
            return
        trial = contest.trial
        if trial is None and self._has_to_order(path, state, contest):
            with self.pace.taking():
                self._order(path, state, accelerator)
        if (trial is not None and trial.tier not in INDUCTOR) or not state.orders:
            return  # kernels join a trial of kernels: on few paths that seldom come it would not end
        if not all(order.done() for order in state.orders):
            return
        orders, state.orders = state.orders, []
        failure = next((order.exception() for order in orders if order.exception() is not None), None)
        if failure is not None:
            self._say_compile_failed(failure, state)
            return
        with self.pace.taking(), inference_mode(False), modes_taken_off(), torch.no_grad():
            inner = InductorExecutable(path.program, compiler().artifact)
            self._install(path, state, inner, accelerator)

    def _has_to_order(self, path: Path, state: PathState, contest: Contest) -> bool:
        is_wanted = not state.has_ordered and self._wants_kernels() and INDUCTOR.isdisjoint(contest.rejected)
        is_free = path.program.on_accelerator or has_core_to_spare()
        return is_wanted and (is_free or self._is_hot(path) or self._is_compiled_already(path, state))

    def _is_hot(self, path: Path) -> bool:
        """Whether the units of a path have taken long enough for its kernels to be worth the processor's time."""
        compiled = [seconds for key in self._ordered if (seconds := compiler().seconds_of(key))]
        if not compiled:
            return not self._ordered
        return path.seconds >= HOT * sum(compiled) / len(compiled)

    def _is_compiled_already(self, path: Path, state: PathState) -> bool:
        """Whether other paths have had all compiled that a path needs: the bodies of a loop that it takes as well."""
        if not self._ordered or self._is_too_large(path):
            return False
        if state.keys is None:
            with self.pace.taking():
                try:
                    state.keys = frozenset(piece_texts(path.program))
                except CompileFailed:
                    state.keys = frozenset()
        return bool(state.keys) and state.keys <= self._ordered

    def _is_owed(self, path: Path, state: PathState, contest: Contest) -> bool:
        can_order = not state.has_ordered and self._wants_kernels() and INDUCTOR.isdisjoint(contest.rejected)
        return bool(state.orders) or can_order or contest.last_trial is not None

    def compile_seconds(self) -> float:
        """Return the time spent compiling for this program."""
        return sum(compiler().seconds_of(key) for key in self._ordered)

    def orders(self) -> list[Future[Any]]:
        """Return what the compile process still owes."""
        return [order for state in self._states.values() for order in state.orders]

    def _is_compiling(self) -> bool:
        """Whether kernels are made beside the program, or were a moment ago. On few cores that is measured with it."""
        now = time.perf_counter()
        if is_compiling() or not all(order.done() for order in self.orders()):
            self._busy_until = now + QUIET_SECONDS
        return now < self._busy_until

    # ---- measuring ---------------------------------------------------------------------------------------

    def is_timing(self, path: Path | None) -> bool:
        """Whether the next unit's time counts, so that the device must be idle at both ends."""
        if path is None or path not in self._states:
            return False
        return self._trial_now(self._contest(path)) is not None

    def choose(self, path: Path) -> None:
        """Set what the next unit of a path runs on: the tier on trial or the best accepted, in turns; None: eagerly."""
        state, contest = self._states.get(path), self._contest(path)
        if state is None:
            return
        if contest.trial is None and not contest.is_mixed and not self._is_owed(path, state, contest):
            self.settled.add(path)
        if self.options.backend != "auto":
            return
        trial = self._trial_now(contest)
        for other in contest.paths if trial else (path,):
            other.executable = self._chosen(other, contest, trial)

    def _chosen(self, path: Path, contest: Contest, trial: Trial | None) -> Installed | None:
        tiers = self._states[path].tiers
        first = next(iter(tiers.values()), None)
        best = next((tiers[tier] for tier in reversed(contest.accepted) if tier in tiers), None)
        if trial is None:
            is_beside = contest.pays_beside and is_compiling()
            # Where other paths run as graphs: an eager unit does not show which path it takes, so all would be eager.
            return best or (first if contest.accepted or is_beside else None)
        if trial.is_turn_of_tier(path):
            return tiers.get(trial.tier) or best or first
        return None if trial.against == EAGER else best or first

    def _trial_now(self, contest: Contest) -> Trial | None:
        """Return what is measured now: the tier on trial, or while a compiler works at most a rejected first tier.

        A trial that has to wait leaves units on the best tier: what is not accepted may take twice as long.
        """
        if contest.trial is None:
            return contest.beside if is_compiling() else None
        return None if self._is_compiling() else contest.trial

    def note_eager(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran eagerly and unseen, and began as units of this path do."""
        self._note(path, EAGER, seconds)

    def note_graph(self, path: Path, seconds: float) -> None:
        """Take the time of a unit that ran as a graph."""
        state = self._states[path]
        tier = path.executable.executable.backend
        state.units[tier] += 1
        contest = self._contest(path)
        trial = self._trial_now(contest)
        if trial is not None and trial.tier not in state.tiers:
            trial.missed += 1
            if trial.missed == MAX_MISSED and trial is contest.trial:
                contest.put_trial_off()
        elif trial is not None and state.units[tier] > WARM_UP_UNITS:
            self._note(path, tier, seconds)

    def _note(self, path: Path, tier: str, seconds: float) -> None:
        contest = self._contest(path)
        trial = self._trial_now(contest)
        is_beside = trial is not None and trial is contest.beside
        if trial is None or tier not in (trial.tier, trial.against):
            return
        trial.note(path, tier, seconds)
        verdict = trial.verdict(contest.is_mixed)
        if verdict is not None and is_beside:
            contest.beside, contest.pays_beside = None, verdict[0] < MARGIN * verdict[1]
            self._say_verdict(trial, verdict, contest.pays_beside, " while kernels are compiled")
        elif verdict is not None:
            self._judge(contest, trial, verdict)

    def _contest(self, path: Path) -> Contest:
        root = path.nodes[0].parent
        contest = self._contests.get(root)
        if contest is None:
            contest = self._contests[root] = Contest()
        return contest

    def judge_again(self) -> None:
        """Compare what was kept with eager execution once more: units take longer than when it was judged."""
        self.settled.clear()
        for contest in self._contests.values():
            contest.accepted = contest.accepted[-1:]
            if contest.trial is not None or contest.accepted:
                contest.begin_trial(contest.best if contest.trial is None else contest.trial.tier)

    def _judge(self, contest: Contest, trial: Trial, verdict: tuple[float, float]) -> None:
        """Accept or reject the tier on trial. One that was compiled is tried once more later."""
        is_accepted = verdict[0] < MARGIN * verdict[1]
        if trial.tier in contest.accepted:
            is_accepted = verdict[0] < verdict[1]
        is_first = trial.tier not in contest.accepted and trial.tier not in contest.rejected
        contest.settle(is_accepted)
        self._say_verdict(trial, verdict, is_accepted)
        if is_accepted:
            self.account.backend = trial.tier
        if is_first and trial.tier in INDUCTOR:
            contest.begin_rest(trial.tier)
        for path in contest.paths:
            self._settle(path, contest)

    def _say_verdict(self, trial: Trial, verdict: tuple[float, float], is_accepted: bool, when: str = "") -> None:
        times = f"{verdict[0] * 1e3:.3f} ms a unit, {trial.against} {verdict[1] * 1e3:.3f} ms"
        self.account.decision(f"{'kept' if is_accepted else 'dropped'} {trial.tier}{when}: {times}")

    def _settle(self, path: Path, contest: Contest) -> None:
        """Block a path on which no tier pays and no other will come."""
        self.choose(path)
        state = self._states[path]
        is_over = not state.orders and contest.last_trial is None and contest.trial is None
        if path.executable is None and is_over and (state.has_ordered or not self._wants_kernels()):
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
            captured = self._capture(path, state, inner)
            if captured is None:
                if not state.tiers and not state.orders:
                    self._block(path, "capture_failed", "no tier could run this path")
                return
            executable = captured
        tier = executable.backend
        if not accelerator and self.options.is_paced and not self._is_exact():
            executable = LeavesCore(executable, is_compiling)
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
            if contest.trial is None:
                contest.begin_trial(tier)
            path.executable = installed

    def _lends(self, path: Path, state: PathState, inner: Executable) -> bool:
        """Whether a captured graph shall lend its gradients, for which it needs memory of its own.

        One path does, on its best tier: the memory that all others share is no smaller for that.
        """
        is_best = inner.backend != "replay" or not self._wants_kernels()
        is_only = self._lender is None or self._lender is path
        made = [plan.exit for plan in path.program.gradients if plan.exit is not None]
        return is_best and is_only and state.may_lend and sum(map(bytes_of, made)) >= LENT_BYTES

    def _capture(self, path: Path, state: PathState, inner: Executable) -> Executable | None:
        if self._lends(path, state, inner):
            executable = self._captured(path.program, inner, lends_outputs=True)
            if executable is not None:
                self._lender = path
                return executable
        return self._captured(path.program, inner, lends_outputs=False)

    def _captured(self, program: Program, inner: Executable, lends_outputs: bool) -> Executable | None:
        given = example_environment(program)
        warm = inner.backend != "replay"
        saved = Installed(program, inner).save_written() if warm else None
        random = RandomState.take(program.on_accelerator)
        restore_versions = keep_versions(program.statics.values())
        try:
            executable = CudaGraphExecutable(program, inner, given, warm, lends_outputs)
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
        if self._is_too_large(path):
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
        contest = self._contest(path)
        if background and contest.rejected and not contest.accepted and not has_core_to_spare() and state.tiers:
            contest.beside = Trial(next(iter(state.tiers)), EAGER)

    def _is_too_large(self, path: Path) -> bool:
        return sum(len(segment.graph.nodes) for segment in path.program.segments) > MAX_COMPILED_NODES

    def _say_compile_failed(self, failure: BaseException, state: PathState) -> None:
        code = failure.code if isinstance(failure, CompileFailed) else "compile_failed"
        self.account.fallback(code, str(failure), tier=next(iter(state.tiers), "eager"))

    def _block(self, path: Path, code: str, reason: str, origin: str | None = None) -> None:
        path.blocked = code
        path.executable = None
        path.stale = False
        self.account.fallback(code, reason, origin)

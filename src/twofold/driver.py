"""How the next unit of a function or program runs: the only place that decides it.

Before each unit, `Driver.next_mode` picks one of three ways:

- `record`: eagerly, watched, because the path is new or has changed;
- `follow`: the skeleton beside a graph;
- `idle`: eagerly and unwatched, at no cost: while kernels are being made, while eager execution is timed, or for
  good where a graph does not pay.

A call that would be followed may be answered without its Python at all: `Driver.speculate`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from twofold.backends.compilation import is_compiling
from twofold.capture.autocast import Region, begin_without_casts
from twofold.capture.intercept import Interception, saved_tensor_hooks_in_force
from twofold.capture.trace import Trace
from twofold.capture.trace_graph import Path, PathNode, Signature, TraceGraph
from twofold.errors import NotConvertibleError
from twofold.options import Options
from twofold.plain_recursion import PlainRecursion
from twofold.run.account import Account
from twofold.run.builder import Builder
from twofold.run.pace import Pace, Work
from twofold.run.python_runner import PythonRunner
from twofold.run.recursion import PENDING
from twofold.run.speculation.cache import MISSED
from twofold.run.speculation.speculator import Speculator

MAX_PATHS = 64
"""Paths kept for one program; each holds a graph and, on a GPU, its memory."""
MAX_NEW = 40
"""So many more units on new paths than on known ones, and recording, which takes some ten times as long as eager
execution, stops: the paths do not repeat. 64 paths that are equally likely stay below 20."""
MAX_NEW_AGAIN = 8
"""The same when it is tried once more."""
UNITS_UNTIL_TRIED_AGAIN = 400
"""Units until then; the distance doubles each time."""
MAX_REST = 32
"""Units in a row, at most, that run eagerly without a look at how they begin. To look takes 20 µs where caches are warm
and 100 where the unit has left them cold, 1.5% of a step of LeNet on two cores."""
RETRY_AFTER = 2
"""Units after which recording is tried again where it failed or did not pay; the distance doubles each time."""


GRAPH_MEMORY = threading.RLock()
"""Held while a unit of an accelerator program may run: all captured graphs share memory, so no two may interleave."""
OTHER_THREAD = "another thread is inside a unit, and captured graphs share their memory"


class Mode(Enum):
    """How the next unit runs."""

    RECORD = "record"
    FOLLOW = "follow"
    IDLE = "idle"


class Driver:
    """Runs the units of one function or program, in one thread at a time."""

    def __init__(self, name: str, options: Options) -> None:
        self.options = options
        self.account = Account(name, "eager" if options.engine == "eager" else "coexecution")
        self.graph = TraceGraph()
        self.pace = Pace(self.account, options.is_paced)
        self.builder = Builder(options, self.account, self.pace)
        self.runner = PythonRunner(self.graph, self.account, self._end_unit)
        self.interception = Interception(self.runner)
        self.speculator = Speculator(self.graph, self.account, options, self.pace)
        self.recursion: PlainRecursion | None = None
        self.between_units: Callable[[], None] | None = None
        """Called where a unit has ended and the program goes on."""
        self._mode = Mode.IDLE
        self._region = Region()
        self._signature: Signature = ()
        self._root = self.graph.root(self._signature)
        self._likely: Path | None = None
        self._laid_out: Path | None = None
        """A path whose parameters and buffers were found to be laid out as they were, when the mode was chosen."""
        self._began = 0.0
        self._taken = 0.0
        """Seconds for which the program had been kept waiting when the unit began."""
        self._rest = 0
        """Units until the next look."""
        self._next_rest = 1
        self._unseen = 0
        """Units since the last look."""
        self._rests_for_compiler = False
        """Whether a compiler was at work when the rest began."""
        self._timing = False
        self._awaits_conversion = False
        """Whether calls like this one will soon run without their Python, so that its time tells nothing."""
        self._goes_on = False
        """Whether the unit is recorded because the one before it in the same call was."""
        self._granted = 0
        """Units that may still be recorded, whatever the pace: the rest of a warm-up."""
        self._new = 0
        """How many more units took new paths than known ones."""
        self._gave_up_at: int | None = None
        self._patience = UNITS_UNTIL_TRIED_AGAIN

    # ---- one unit ----------------------------------------------------------------------------------------

    def begin(self, goes_on: bool = False) -> Mode:
        """Choose and start the next unit."""
        self.choose(goes_on)
        return self.start()

    def choose(self, goes_on: bool = False) -> None:
        """Choose how the next unit runs. `goes_on`: within the call in which the last one ran."""
        self._goes_on = goes_on and self._mode is Mode.RECORD
        self._signature = self.graph.signature()
        self._root = self.graph.root(self._signature)
        self._laid_out = None
        self._awaits_conversion = False
        self._rest = 0
        self._mode = self.next_mode(self._root)
        self._unseen = 0
        if self._rest == 0:
            self._next_rest = 1
        if self._mode is not Mode.IDLE:
            if self._region.is_around_unit:
                begin_without_casts()
            PENDING.flush()  # results of recursive calls that the unit is given shall be ordinary tensors
        self._timing = (
            self._mode is not Mode.RECORD
            and self._likely not in self.builder.settled
            and self.builder.is_timing(self._likely)
        )

    def rests(self) -> bool:
        """Whether the next unit runs eagerly without a look: the last found no graph that runs, and none has come."""
        if self._rest == 0 or (self._rests_for_compiler and not is_compiling()):
            return False
        self._rest -= 1
        self._unseen += 1
        return True

    def end_rested(self, began: float) -> None:
        """Count a unit that was run so, from `began` by `time.perf_counter`."""
        ended = time.perf_counter()
        account = self.account
        account.iterations += 1
        account.eager_iterations += 1
        if self._likely is not None:
            account.eager_calls += self._likely.call_count
        self.pace.passed(ended - began)
        account.span("python", "eager", int(began * 1e9), int(ended * 1e9))

    def _begin_rest(self, at_most: int = MAX_REST) -> Mode:
        """Have the next units run without a look, more of them each time, if no other path runs as a graph.

        Where a compiler is at work, they do until it is done.
        """
        if all(path.executable is None for path in self.graph.paths):
            self._rest = min(self._next_rest, at_most)
            self._next_rest = min(2 * self._next_rest, MAX_REST)
            self._rests_for_compiler = is_compiling()
        return Mode.IDLE

    def start(self) -> Mode:
        """Start the unit as chosen."""
        self._begin_unit()
        self.runner.begin(self._mode.value, self._signature)
        return self._mode

    def _begin_unit(self) -> None:
        if self._timing and self.graph.has_accelerator:
            torch.cuda.synchronize()
        self._taken = self.account.stall_seconds
        self._began = time.perf_counter()

    def speculate(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer the call that was just chosen for without running its Python; `MISSED` if that has to run."""
        if self._mode is not Mode.FOLLOW or not self.speculator.is_willing():
            return MISSED
        self._begin_unit()
        result, path = self.speculator.call(function, arguments, keywords, self._signature, self._root, self._laid_out)
        if self.speculator.cache.stopped and self.account.speculated_iterations:
            self.builder.judge_again()
        if path is not None:
            self.account.speculated_iterations += 1
            self._end_unit(path, None, self._signature)
        else:
            self._awaits_conversion = self._timing and self.speculator.awaits_conversion(self._root)
        return result

    def next_mode(self, root: PathNode) -> Mode:
        """Decide how the next unit runs, which begins at `root`."""
        if self.options.engine == "eager" or (self._gave_up_at is not None and self._has_given_up()):
            return self._begin_rest()
        if self.recursion is not None and self.recursion.takes_units:
            self._likely = None
            return Mode.IDLE
        if saved_tensor_hooks_in_force():  # checkpointing counts what is saved
            self.account.fallback("tensor_hook", "hooks on saved tensors, of checkpointing perhaps, are in force")
            return Mode.IDLE
        if not self._region.allows_unit(self.graph.leaves):
            self.account.fallback("unsupported_call", "a unit that trains began with autocast on: enter it within")
            return Mode.IDLE
        if self.account.iterations < root.idle_until:
            return self._begin_rest(root.idle_until - self.account.iterations - 1)
        path = self._likely = self.graph.likely(root)
        if path is None:
            return self._recording(root)
        if path.blocked:
            return Mode.FOLLOW if self._others_run(root, path) else self._begin_rest()
        is_settled = path in self.builder.settled
        if not is_settled:
            self.builder.poll(path, self.graph.has_accelerator, 1 + self._unseen)
        if path.stale or (path.seen < self.options.warm_up and path.executable is None):
            return self._recording(root)
        if not is_settled:
            self.builder.choose(path)
        if path.executable is None:
            return Mode.IDLE if self.builder.is_timing(path) else self._begin_rest()
        if path.executable.placement.has_kept_layouts():
            self._laid_out = path
            return Mode.FOLLOW
        # Where the program raises because of that, it shall do so at its own line.
        self.account.fallback("mutated_outside", "a parameter or buffer has another shape, layout, type or device")
        path.stale = True
        return Mode.RECORD

    def _recording(self, root: PathNode) -> Mode:
        """Record the next unit, unless that has to wait.

        There must be time for the warm-up as a whole, with what is built behind it: its units follow one another, as
        they do where nothing waits. Units far apart may have the same batch, which is then taken for a constant until
        another comes, and the graph is built and compiled again.
        """
        if self._goes_on:
            return Mode.RECORD
        if self._granted:
            self._granted -= 1
            return Mode.RECORD
        is_known = any(path.executable is not None for path in self.graph.paths)
        units = 1 if is_known else self.options.warm_up
        if not self.pace.fits(*(Work.RECORD,) * units, Work.BUILD):
            return Mode.IDLE
        self._granted = units - 1
        return Mode.RECORD

    def _others_run(self, root: PathNode, blocked: Path) -> bool:
        """Whether units that begin at `root` take a path that runs as a graph as often as a blocked one."""
        known = [path for path in self.graph.paths if path.passes(root) and path.executable is not None]
        return bool(known) and sum(path.units + path.seen for path in known) >= blocked.seen

    def end(self, units: int = 1) -> None:
        """Finish the unit, if it has seen anything. `units`: what ran eagerly and unwatched would be so many."""
        if self._mode is Mode.IDLE:
            self._end_unit(None, None, (), units)
        elif self.runner.in_unit:
            self.runner.end()

    def _end_unit(self, path: Path | None, trace: Trace | None, signature: Signature, units: int = 1) -> None:
        if self._timing and self.graph.has_accelerator:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        account = self.account
        account.iterations += 1
        account.compared_iterations += self._timing
        if path is not None:
            account.graph_iterations += 1
            account.graph_calls += len(path.nodes)
            if self._new:
                self._new -= 1
            root = path.nodes[0].parent
            assert root is not None
            root.refusals = 0
            root.units += 1
            path.units += 1
            path.seconds += seconds
            account.span("graph", account.backend, int(self._began * 1e9), int((self._began + seconds) * 1e9))
            run = seconds - (account.stall_seconds - self._taken)
            self.pace.ran_otherwise(run)
            if self._timing and not self._awaits_conversion:
                self.builder.note_graph(path, run)
        else:
            account.eager_iterations += 1
            self._pace_eager(trace, seconds)
            if trace is not None:
                account.traced_iterations += 1
                self._learn(trace, signature)
                self._region.end_unit(self.graph.leaves(), trace.written_storages())
            elif self._mode is Mode.IDLE and self._likely is not None:
                account.eager_calls += self._likely.call_count
                if self._timing or not self.graph.has_accelerator:  # else the device may still be at work
                    self.builder.note_eager(self._likely, seconds / units)
            elif self._mode is Mode.IDLE and self.recursion is not None and self.recursion.takes_units:
                self.recursion.end_unit(seconds)
            account.span("python", "eager", int(self._began * 1e9), int((self._began + seconds) * 1e9))
        if self.between_units is not None:
            self.between_units()

    def _pace_eager(self, trace: Trace | None, seconds: float) -> None:
        """Tell the pace of a unit that ran eagerly."""
        if trace is not None:
            self.pace.recorded(seconds, trace.refusal is None, self._goes_on)
        elif self._mode is Mode.IDLE:
            if self.recursion is not None and self.recursion.takes_units:
                self.pace.ran_otherwise(seconds)
            else:
                self.pace.ran_eagerly(seconds)

    def _learn_refusal(self, trace: Trace, root: PathNode) -> None:
        """Take a unit that cannot run as a graph. Two in a row, and its kind is left alone for a while."""
        refusal = trace.refusal
        assert refusal is not None
        origin = None if refusal.origin is None else str(refusal.origin)
        self.account.fallback(refusal.code, refusal.reason, origin)
        root.refusals += 1
        if root.refusals >= self.options.warm_up:
            pause = RETRY_AFTER * 2 ** (root.refusals - self.options.warm_up)
            root.idle_until = self.account.iterations + pause
            self.account.decision(f"eager for {pause} units: {refusal.code}")
        if self.options.strict:
            raise NotConvertibleError(f"{self.account.name} stays eager: {refusal.reason} ({origin})")

    def _learn(self, trace: Trace, signature: Signature) -> None:
        if self.recursion is not None and self.recursion.begin():
            return
        if trace.refusal is not None:
            self._learn_refusal(trace, self.graph.root(signature))
            return
        self.graph.root(signature).refusals = 0
        if not trace.events:  # a path of no calls would have no root
            self.account.fallback("no_tensor_calls", "the unit made no tensor calls")
            return
        if len(self.graph.paths) >= MAX_PATHS:
            self.account.fallback("too_many_paths", f"more than {MAX_PATHS} paths")
            self._note_new()
            return
        path = self.graph.merge(trace, signature)
        if path is None:
            self.account.fallback("argument_changes", self.graph.lesson)
            return
        if path.seen == 1 and len(self.graph.paths) > 1:
            self.account.fallback("new_path", "the unit took a path not seen before")
        if path.seen > 1:
            self._new = max(0, self._new - 1)
        elif self._note_new():
            return
        self.account.paths = len(self.graph.paths)
        others_run = any(other.executable is not None for other in self.graph.paths)
        if path.seen >= self.options.warm_up or others_run:
            self.builder.prepare(path, self.graph.has_accelerator)
        if path.blocked and self.options.strict:
            raise NotConvertibleError(f"{self.account.name} stays eager: {next(iter(self.account.fallbacks))}")

    def _note_new(self) -> bool:
        """Take note of a unit on a new path; give up, and say so, where there are too many."""
        self._new += 1
        has_tried = self._patience > UNITS_UNTIL_TRIED_AGAIN
        if self._new < (MAX_NEW_AGAIN if has_tried else MAX_NEW):
            return False
        self._gave_up_at = self.account.iterations
        self._new = 0
        self.account.fallback("too_many_paths", "most units take paths of their own")
        self.account.decision("recording stopped: the paths of this program do not repeat")
        self.graph.clear()
        return True

    def _has_given_up(self) -> bool:
        assert self._gave_up_at is not None
        if self.account.iterations - self._gave_up_at < self._patience:
            return True
        self._gave_up_at = None
        self._patience *= 2
        return False

    def note_empty(self, code: str, reason: str) -> None:
        """Count a call that made no tensor calls at all."""
        self.account.iterations += 1
        self.account.eager_iterations += 1
        self.account.fallback(code, reason)

    def begin_listening(self, goes_on: bool = False) -> None:
        """Begin a unit, and listen unless it is idle or a mode of the program's own has been entered since.

        `goes_on`: within the call in which the last one ran.
        """
        if self.begin(goes_on) is Mode.IDLE:
            self.interception.stop()
        elif self.interception.active:
            self.interception.hear_operations()
        elif not self.interception.resume():
            self.runner.drop()
            self._mode = Mode.IDLE

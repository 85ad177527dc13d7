"""The speculated graphs of one function: which to try, and what to learn where an assumption fails (Janus, section 3).

A graph belongs to the root at which its units begin. A location that was read as a value and has changed is relaxed:
the graphs that took it for a constant are dropped, and from then on it is read anew. Where a branch, a type or a shape
is another, the next conversion adds a graph beside the others.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from twofold.capture.trace_graph import Path, PathNode, TraceGraph
from twofold.convert.speculation.generate import HostFunction, generate
from twofold.convert.speculation.schedule import reads_in_place, schedule
from twofold.convert.speculation.speculation import Assumption, Speculation
from twofold.graph import current_ambient
from twofold.run.account import Account, AssumptionCount
from twofold.run.outputs import learn_layout

from .unit import FAILED, SpeculatedUnit, TensorWork

MISSED: Final = object()
"""What a call returns that has to run in the ordinary way."""
MAX_GRAPHS = 64
"""Graphs kept for units that begin alike: six coins make 64. Of those that foresee the same coin only one is tried."""
MAX_CONVERSIONS = 8
"""Conversions of a function, beside one for each path, until each further one must have been earned, by
`CALLS_A_CONVERSION` calls."""
CALLS_A_CONVERSION = 25
RECENT = 50
"""Calls over which failures are counted."""
MAX_FAILED = 5
"""So many of the recent calls failed, and the function is not speculated on any more."""
MAX_UNDONE = 3
"""So often launched work was undone and no other graph fitted, in more than a tenth of the calls since the last path
was added, and the function is not speculated on."""
MAX_RETRIED = 1 / 3
"""The same where another graph fitted, in more than this share of `RECENT` calls or more: each launched twice."""
RELAXED: Final = frozenset({"value", "identity"})
"""Kinds of assumptions about what lies at a place: where one fails, it is read anew from then on."""
MAX_ASSUMPTIONS = 2_000
"""Assumptions kept for the report."""

_LATE = "after tensor work had begun"

AssumptionCounts = dict[tuple[str, str, str, Any], AssumptionCount]


@dataclass(eq=False)
class SpeculatedGraph:
    """One graph with all that is needed to run calls by it."""

    speculation: Speculation
    function: HostFunction
    work: TensorWork
    names: tuple[int, ...]
    """The assumptions in their order, by the numbers that the cache knows them by."""
    runs: int = 0
    """Calls in which all assumptions held."""
    failures: Counter[int] = field(default_factory=Counter[int])
    """How often each assumption failed, by index."""
    rival: SpeculatedGraph | None = None
    """The graph that fitted instead when the work of this one was undone last, if this one has not fitted since."""
    comes_in_runs: bool = True
    """Whether calls that it fitted, where another was tried first, were followed by one that it fitted too."""
    leads: bool = False
    """Whether it is tried first since the last call."""

    def gives_way(self, to: SpeculatedGraph) -> bool:
        """Whether another graph, which fitted when the work of this one was undone, is to be tried before it.

        Most ways come in runs. One that is taken now and then would be tried in vain in the next call.
        """
        self.comes_in_runs = self.comes_in_runs and not self.leads
        to.comes_in_runs = to.comes_in_runs or self.rival is to
        self.rival, self.leads, to.leads = to, False, to.comes_in_runs
        return to.comes_in_runs

    def shares(self, way: tuple[int, ...]) -> bool:
        """Whether the assumptions up to one that has just failed are this graph's too, so that it fails as well."""
        return self.names[: len(way)] == way


class GraphCache:
    """The graphs of one function, most recently used first. Used by one thread at a time."""

    def __init__(self, graph: TraceGraph, account: Account) -> None:
        self.relaxed: set[Hashable] = set()
        """Locations that are read anew in each call."""
        self.stopped = ""
        """Why the function is not speculated on any more, if it is not."""
        self.undone: Assumption | None = None
        """What the last call was found to be otherwise in, the latest thing, after tensor work had begun."""
        self.has_raised = False
        """Whether the last call raised something after tensor work had begun: only Python may run it now."""
        self.had_graphs = False
        """Whether there was any graph to try the last call by."""
        self.fetched: dict[PathNode, Any] = {}
        """What the last call fetched before its work was undone: where it went another way, this is what decided."""
        self._graphs: dict[PathNode, list[SpeculatedGraph]] = {}
        self._trace_graph = graph
        self._account = account
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._calls = 0
        """Calls that were tried since failures were forgiven, and in how many of them launched work was undone."""
        self._retried = 0
        self._given_back = 0
        self._conversions = 0
        self._past: AssumptionCounts = {}
        self._names: dict[Assumption, int] = {}

    # ---- calls -------------------------------------------------------------------------------------------

    def call(
        self, root: PathNode, arguments: tuple[Any, ...], keywords: dict[str, Any], laid_out: Path | None = None
    ) -> tuple[Any, Path | None]:
        """Run a call by the first graph whose assumptions hold; return its result and path, or `MISSED`.

        `laid_out`: a path whose parameters and buffers are known to be laid out as they were.
        Raises what an effect raises, and lets KeyboardInterrupt and its like through, undone.
        """
        graphs = self._graphs.get(root)
        self.fetched, self.has_raised, self.undone = {}, False, None
        self.had_graphs = bool(graphs)
        if not graphs:
            return MISSED, None
        self._calls += 1
        failed: list[tuple[int, ...]] = []
        undone: SpeculatedGraph | None = None
        for place, graph in enumerate(tuple(graphs)):
            path = graph.work.path
            if (failed and any(map(graph.shares, failed))) or not path.can_begin():
                continue
            unit = SpeculatedUnit(graph.work, path is laid_out)
            result = _run(graph, unit, arguments, keywords)
            if result is not MISSED:
                graph.runs += 1
                graph.rival, graph.leads = None, False
                self._recent.append(False)
                if place and (undone is None or undone.gives_way(graph)):
                    graphs.remove(graph)
                    graphs.insert(0, graph)
                if self.undone is not None:
                    self._note_retried(self.undone)
                return result, path
            was_found_out_late = self._learn(graph, unit)
            if unit.failed_at is None:
                self.has_raised = was_found_out_late
                if self.has_raised:
                    return MISSED, None
                continue
            failed.append(graph.names[: unit.failed_at + 1])
            if was_found_out_late:
                undone = undone or graph
                self.undone = graph.speculation.assumptions[unit.failed_at]
                self.fetched |= unit.fetched()
        self._account.misses += 1
        return MISSED, None

    def _learn(self, graph: SpeculatedGraph, unit: SpeculatedUnit) -> bool:
        """Learn from a call that a graph did not fit. Whether it was found out after a launch."""
        if unit.failed_at is not None:
            graph.failures[unit.failed_at] += 1
            self._relax(graph.speculation.assumptions[unit.failed_at])
        if not graph.work.is_up_to_date():
            self._drop(lambda other: other is graph)
        if not unit.has_launched:
            return False
        self._account.discards += 1
        return True

    def _note_retried(self, undone: Assumption) -> None:
        self._retried += 1
        if self._calls >= RECENT and self._retried > MAX_RETRIED * self._calls:
            self.stop(f"{undone} and its like failed in {self._retried} of {self._calls} calls: {_LATE}")

    def _relax(self, failed: Assumption) -> None:
        if failed.kind in RELAXED and failed.location not in self.relaxed:
            self.relaxed.add(failed.location)
            self._account.decision(f"relaxed {failed.subject}: it was {failed.expected} and has changed")
            key = (failed.subject, failed.kind, failed.expected, failed.origin)
            self._past.setdefault(key, AssumptionCount()).relaxed = True
            self._drop(
                lambda graph: any(
                    one.kind == failed.kind and one.location == failed.location for one in graph.speculation.assumptions
                )
            )

    def note_failed(self) -> None:
        """Take note of a call that fitted no graph, and for which none could be made; give up if there are many."""
        self._recent.append(True)
        if len(self._recent) == RECENT and sum(self._recent) > MAX_FAILED:
            self.stop(f"{sum(self._recent)} of the last {RECENT} calls were other than any graph assumed")
        elif self.undone is not None:
            self._given_back += 1
            if self._given_back >= MAX_UNDONE and self._given_back * 10 > self._calls:
                self.stop(f"{self.undone} and its like failed in {self._given_back} of {self._calls} calls: {_LATE}")

    def forgive(self) -> None:
        """Forget the calls that failed."""
        self._recent.clear()
        self._calls = self._retried = self._given_back = 0

    def stop(self, reason: str) -> None:
        """Give up speculating on the function."""
        self.stopped = reason
        self._drop(lambda _: True)
        self._account.engine = "coexecution"
        self._account.fallback("assumption_failed", reason)
        self._account.decision(f"speculation stopped: {reason}")

    # ---- graphs ------------------------------------------------------------------------------------------

    @property
    def may_convert(self) -> bool:
        """Whether one more conversion is worth its time."""
        earned = sum(graph.runs for graphs in self._graphs.values() for graph in graphs) // CALLS_A_CONVERSION
        return not self.stopped and self._conversions < MAX_CONVERSIONS + len(self._trace_graph.paths) + earned

    def add(self, root: PathNode, speculation: Speculation) -> None:
        """Make a new speculation runnable. Raises `Unschedulable`."""
        self._conversions += 1
        path = speculation.path
        scheduled = schedule(speculation.host, reads_in_place(path.program), speculation.data)
        function = generate(scheduled, speculation.roots, current_ambient())  # that of all units of the root
        work = TensorWork(path, scheduled, functools.partial(learn_layout, self._trace_graph, self._account))
        known = set(self._trace_graph.roots.values())
        for forgotten in [root for root in self._graphs if root not in known]:
            self._drop(lambda _: True, forgotten)
        graphs = self._graphs.setdefault(root, [])
        names = tuple(self._names.setdefault(one, len(self._names)) for one in speculation.assumptions)
        graphs.insert(0, SpeculatedGraph(speculation, function, work, names))
        for old in graphs[MAX_GRAPHS:]:
            self._drop(lambda other, old=old: other is old, root)

    def has_graphs(self, root: PathNode) -> bool:
        """Whether a call was converted that began as those of a root do."""
        return bool(self._graphs.get(root))

    def graphs(self) -> list[SpeculatedGraph]:
        """Return all graphs that calls are tried by."""
        return [graph for graphs in self._graphs.values() for graph in graphs]

    def _drop(self, condition: Callable[[SpeculatedGraph], bool], root: PathNode | None = None) -> None:
        for one in list(self._graphs) if root is None else [root]:
            for graph in self._graphs[one]:
                if condition(graph):
                    _count(graph, self._past)
            self._graphs[one] = [graph for graph in self._graphs[one] if not condition(graph)]
            if not self._graphs[one]:
                del self._graphs[one]

    def describe(self) -> None:
        """Enter all assumptions, those of dropped graphs included, and the generated functions in the account."""
        counts = {key: replace(count) for key, count in self._past.items()}
        for graph in self.graphs():
            _count(graph, counts)
        self._account.assumptions = counts
        self._account.speculated = [graph.function.text for graph in self.graphs()]


def _run(graph: SpeculatedGraph, unit: SpeculatedUnit, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    try:
        result = graph.function.call(unit, arguments, keywords)
    except BaseException as error:
        if unit.is_committed:
            raise
        unit.discard()
        if not isinstance(error, Exception):
            raise
        # Whatever else it is, Python decides what the program sees.
        return MISSED
    if result is FAILED:
        unit.discard()
        return MISSED
    return result


def _count(graph: SpeculatedGraph, counts: AssumptionCounts) -> None:
    for index, assumption in enumerate(graph.speculation.assumptions):
        key = (assumption.subject, assumption.kind, assumption.expected, assumption.origin)
        if key not in counts and len(counts) >= MAX_ASSUMPTIONS:
            continue
        count = counts.setdefault(key, AssumptionCount())
        count.checked += graph.runs + graph.failures[index]
        count.failed += graph.failures[index]

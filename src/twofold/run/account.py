"""The account of one decorated function or program: what ran where, why, and for how long.

Mutable, and written to by whoever does the work; ``twofold.report`` reads it. Counters are plain attributes,
so that a writer pays one addition. Everything that could grow with the number of iterations is bounded: a
program may run for days. Writers may be on several threads: appends and dictionary stores are atomic under
the interpreter lock, and a counter that loses an addition to a race is off by one, never corrupt.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

Lane = Literal["python", "graph"]
Where = Literal["graph", "python", "eager"]
"""``graph``: a segment computed it. ``python``: Python answered (a property read). ``eager``: neither."""

Origin = Hashable | None
"""Anything hashable whose ``str`` reads ``file:line``; turned into text only when a report is made."""

MAX_DECISIONS: Final = 200
MAX_REASONS: Final = 200
MAX_SPANS: Final = 20_000
MAX_OPERATIONS: Final = 20_000

logger = logging.getLogger("twofold")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a converter would not turn a piece of source into a graph."""

    code: str
    construct: str
    origin: Origin
    reason: str
    hint: str


class Decision(NamedTuple):
    """A move between modes or tiers, with its reason; ``seconds`` since the account was opened."""

    seconds: float
    text: str


class Span(NamedTuple):
    """A stretch of time in one lane, in nanoseconds of ``time.perf_counter_ns``."""

    lane: Lane
    name: str
    start_ns: int
    end_ns: int


_make_span = functools.partial(tuple.__new__, Span)
"""A third of the time that Span itself takes, which goes through Python."""


@dataclass(slots=True)
class AssumptionCount:
    """How an assumption of speculated graphs fared, and whether what it was about is now read in each call."""

    checked: int = 0
    failed: int = 0
    relaxed: bool = False


class Account:
    """What happened to one function or program so far. All counters start at zero."""

    def __init__(self, name: str, engine: str) -> None:
        self.name = name
        self.engine = engine
        self.backend = "eager"
        """The backend of the last graph that ran; "eager" until one has."""

        self.iterations = 0
        """Invariant, between units: ``iterations == graph_iterations + eager_iterations``."""
        self.graph_iterations = 0
        self.eager_iterations = 0
        self.traced_iterations = 0
        """Those of ``eager_iterations`` that were recorded."""
        self.compared_iterations = 0
        """Those of all ``iterations`` whose time was taken to compare graphs with others, or with eager execution."""

        self.graph_calls = 0
        """Tensor calls executed in graphs."""
        self.eager_calls = 0
        """Tensor calls executed outside graphs, while Twofold was looking."""

        self.speculated_iterations = 0
        """Those of ``graph_iterations`` that ran without their Python."""
        self.misses = 0
        """Calls that no speculated graph fitted, found out before anything was launched."""
        self.assumptions: dict[tuple[str, str, str, Origin], AssumptionCount] = {}
        """By subject, kind and what was expected; set when a report is made."""
        self.speculated: list[str] = []
        """The Python that stands for the function, one text for each graph, likewise."""

        self.batched_iterations = 0
        """Those of ``eager_iterations`` in which invocations of recursive functions ran batched."""
        self.recursions: list[dict[str, Any]] = []
        """What ran of each recursive function, of a unit those that nobody decorated; set when a report is made."""

        self.segments = 0
        self.paths = 0
        self.captures = 0
        self.discards = 0
        self.compile_seconds = 0.0
        self.stall_seconds = 0.0
        """Time for which the program was kept waiting by Twofold; that of recording only where a pace is kept,
        since eager units were timed then."""

        self.started_ns: Final = time.perf_counter_ns()
        self.fallbacks: dict[tuple[str, str, Origin], int] = {}
        self.refusals: dict[Refusal, int] = {}
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self.spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self.operations: dict[tuple[Origin, str, Where], int] = {}

    def fallback(self, code: str, reason: str, origin: Origin = None, tier: str = "eager") -> None:
        """Count one fallback to eager, or to a tier, which is a decision; ``code`` is a key of ``errors.CODES``.

        Beyond ``MAX_REASONS`` different ones, only the code is kept.
        """
        key = (code, reason, origin)
        if key not in self.fallbacks and len(self.fallbacks) >= MAX_REASONS:
            key = (code, "other reasons of this kind", None)
        if key not in self.fallbacks:
            place = f" [{origin}]" if origin else ""
            logger.info("%s: fell back to %s (%s): %s%s", self.name, tier, code, reason, place)
            if tier != "eager":
                self.decisions.append(self._decided(f"fell back to {tier} ({code}): {reason}"))
        self.fallbacks[key] = self.fallbacks.get(key, 0) + 1

    def refusal(self, code: str, construct: str, origin: Origin, reason: str, hint: str) -> None:
        """Count one refusal to convert; equal ones are kept once, and no more than ``MAX_REASONS``."""
        refusal = Refusal(code, construct, origin, reason, hint)
        if refusal in self.refusals or len(self.refusals) < MAX_REASONS:
            self.refusals[refusal] = self.refusals.get(refusal, 0) + 1

    def decision(self, text: str) -> None:
        """Record, and log at INFO, a move between modes or tiers together with its reason."""
        self.decisions.append(self._decided(text))
        logger.info("%s: %s", self.name, text)

    def _decided(self, text: str) -> Decision:
        return Decision((time.perf_counter_ns() - self.started_ns) / 1e9, text)

    def span(self, lane: Lane, name: str, start_ns: int, end_ns: int) -> None:
        """Record that ``lane`` was busy with ``name``; the oldest of ``MAX_SPANS`` is forgotten."""
        self.spans.append(_make_span((lane, name, start_ns, end_ns)))

    def operation(self, name: str, origin: Origin, where: Where, count: int = 1) -> None:
        """Add ``count`` executions of ``name`` at ``origin``; past ``MAX_OPERATIONS`` keys, as "other"."""
        key = (origin, name, where)
        if key not in self.operations and len(self.operations) >= MAX_OPERATIONS:
            key = (None, "other", where)
        self.operations[key] = self.operations.get(key, 0) + count

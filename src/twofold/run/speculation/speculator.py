"""`Speculator`: when calls of one function are speculated on, and when its source is converted for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from twofold.capture.trace_graph import Path, PathNode, Signature, TraceGraph
from twofold.convert.refusals import Refusal, Refused
from twofold.convert.speculation.convert import speculate
from twofold.convert.speculation.schedule import Unschedulable
from twofold.convert.speculation.speculation import Assumption
from twofold.errors import NotConvertibleError
from twofold.options import Options
from twofold.run.account import Account
from twofold.run.pace import Pace, Work

from .cache import MISSED, GraphCache

UNITS_BEFORE = 2
"""Units that began alike and ran beside their Python before the source is converted."""
MAX_REFUSALS = 4
"""So many refusals in a row, and conversion is not tried again, unless all that was missing was a graph to go by."""
FIRST_RETRY: Final = 4
"""Calls until conversion is tried again; four times as many after each further refusal in a row."""
MOST_AWAITED: Final = 50
"""Calls that are not judged by their time until the source is converted, which may have to wait for the pace."""
MAX_PAUSE: Final = 16
"""Calls, at most, that run beside their Python after one went a way which has no graph yet."""


class Speculator:
    """Speculates on the calls of one function, in one thread at a time."""

    def __init__(self, graph: TraceGraph, account: Account, options: Options, pace: Pace) -> None:
        self.cache = GraphCache(graph, account)
        self._graph = graph
        self._account = account
        self._pace = pace
        self._is_demanded = options.engine == "speculation"
        self._is_strict = options.strict
        self._refusals = 0
        self._retry_at = 0
        self._pause_until = 0
        """The iteration from which calls are tried again."""
        self._refused_ways: set[Assumption | None] = set()
        """Assumptions whose failure, behind a launch, leads to what is not converted. Python runs these calls."""
        self._lacks_graph = False
        """Whether all that the last refusal missed was a graph to go by."""
        self._paths = 0
        self._awaited = 0
        """Calls that were not judged by their time, since calls like them were soon to be converted."""
        if options.engine not in ("auto", "speculation"):
            self.cache.stopped = f"engine={options.engine!r}"

    def is_willing(self) -> bool:
        """Whether calls may be speculated on now."""
        return (
            not self.cache.stopped
            # What the program has entered around the call is not among the assumptions.
            and not torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
            and torch._C._len_torch_function_stack() == 0
            and torch._C._len_torch_dispatch_stack() == 0
        )

    def call(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        signature: Signature,
        root: PathNode,
        laid_out: Path | None = None,
    ) -> tuple[Any, Path | None]:
        """Run a call without its Python; return its result and its path, or `MISSED` and None.

        `laid_out`: a path whose parameters and buffers are known to be laid out as they were.

        Raises `NotConvertibleError` where speculation is demanded, strictly, and refused; else what effects of the
        call raise.
        """
        if len(self._graph.paths) != self._paths:
            self._look_for_paths()
        if self._account.iterations < self._pause_until:
            return MISSED, None
        result, path = self.cache.call(root, arguments, keywords, laid_out)
        if result is not MISSED:
            return result, path
        is_postponed = False
        if self._may_convert(root):
            is_postponed = not self._pace.fits(Work.CONVERT)
            if not is_postponed and self._convert(function, arguments, keywords, signature, root):
                return self.cache.call(root, arguments, keywords, laid_out)
        if self.cache.had_graphs and not is_postponed:
            self.cache.note_failed()
        if self.cache.undone is not None and self.cache.undone not in self._refused_ways:
            # Ways come in runs, and this one has no graph yet.
            wait = min(max(FIRST_RETRY, self._retry_at - self._account.iterations), MAX_PAUSE)
            self._pause_until = self._account.iterations + wait
        return result, path

    def _look_for_paths(self) -> None:
        """Paths were added, or dropped: forgive what was refused or failed for want of them; coins take their time."""
        self._paths = len(self._graph.paths)
        self.cache.forgive()
        if self._lacks_graph:
            self._refusals = 0
            self._retry_at = min(self._retry_at, self._account.iterations + FIRST_RETRY)

    def awaits_conversion(self, root: PathNode) -> bool:
        """Whether calls like the last one, which began at `root`, are soon to be converted for the first time."""
        is_due = not self._refusals and self.cache.may_convert and not self.cache.has_graphs(root)
        if not is_due or self._awaited == MOST_AWAITED:
            return False
        self._awaited += 1
        return True

    def _may_convert(self, root: PathNode) -> bool:
        if self.cache.has_raised or self.cache.undone in self._refused_ways:
            return False
        has_settled = self.cache.has_graphs(root) or root.units >= UNITS_BEFORE
        return has_settled and self.cache.may_convert and self._account.iterations >= self._retry_at

    def _convert(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        signature: Signature,
        root: PathNode,
    ) -> bool:
        try:
            with self._pace.taking(Work.CONVERT):
                relaxed = frozenset(self.cache.relaxed)
                made = speculate(function, arguments, keywords, self._graph, signature, relaxed, self.cache.fetched)
                self.cache.add(root, made)
        except Refused as refused:
            self._refuse(refused.refusal)
            return False
        except Unschedulable as unschedulable:
            self._refuse(Refusal("late_decision", str(unschedulable), unschedulable.node.origin))
            return False
        self._refusals = 0
        self._account.engine = "speculation"
        self._account.decision(f"converted: {len(made.assumptions)} assumptions, {len(made.host.nodes)} nodes")
        return True

    def _refuse(self, refusal: Refusal) -> None:
        """Go on beside the function's Python, and try again a few times: paths may be added that were missing."""
        self._account.refusal(refusal.code, refusal.construct, refusal.origin, refusal.line.strip(), refusal.hint)
        if self.cache.undone is not None and refusal.code != "no_graph":
            self._refused_ways.add(self.cache.undone)
            return
        self._lacks_graph = refusal.code == "no_graph"
        self._refusals = min(self._refusals + 1, MAX_REFUSALS)
        self._retry_at = self._account.iterations + FIRST_RETRY**self._refusals
        if self._refusals == MAX_REFUSALS and not self._lacks_graph:
            self.cache.stopped = f"not converted: {refusal.code}"
        if self._is_demanded and self._is_strict and self.cache.undone is None:
            raise NotConvertibleError(f"{self._account.name} is not speculated on: {refusal}", refusal)

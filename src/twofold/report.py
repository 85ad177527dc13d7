"""What ran where and why: for people, as a dict, as an HTML page, as a timeline.

``Report`` is a snapshot: it does not change while the program goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from twofold.errors import CODES
from twofold.run.account import Account, Lane, Span
from twofold.run.recursion import NATIVE

LANES: Final[dict[Lane, int]] = {"python": 1, "graph": 2}
"""Thread number of each lane in a timeline; the order is that on the screen."""

SHOWN_LINES: Final = 12
"""Source lines in the text form."""
SHOWN_ROWS: Final = 2_000
"""Rows of a table in the HTML page."""
SHOWN_SPANS: Final = 240
"""Spans in the drawing of the HTML page: the last few units. ``Report.timeline`` has all that are kept."""


@dataclass(frozen=True)
class SourceLine:
    """How often the tensor calls of one line ran in graphs, were answered by Python, or ran eagerly."""

    origin: str
    names: tuple[str, ...]
    graph: int
    python: int
    eager: int


class Report:
    """A snapshot of an ``Account``."""

    def __init__(self, account: Account) -> None:
        self._numbers: dict[str, Any] = {
            "name": account.name,
            "engine": account.engine,
            "backend": account.backend,
            "iterations": account.iterations,
            "graph_iterations": account.graph_iterations,
            "eager_iterations": account.eager_iterations,
            "traced_iterations": account.traced_iterations,
            "compared_iterations": account.compared_iterations,
            "batched_iterations": account.batched_iterations,
            "speculated_iterations": account.speculated_iterations,
            "misses": account.misses,
            "graph_calls": account.graph_calls,
            "eager_calls": account.eager_calls,
            "graph_op_fraction": _fraction(account.graph_calls, account.eager_calls),
            "segments": account.segments,
            "paths": account.paths,
            "captures": account.captures,
            "discards": account.discards,
            "compile_seconds": account.compile_seconds,
            "stall_seconds": account.stall_seconds,
        }
        self._fallbacks = [
            {"code": code, "reason": reason, "origin": _text(origin), "count": count, "hint": _hint(code)}
            for (code, reason, origin), count in sorted(account.fallbacks.copy().items(), key=lambda entry: -entry[1])
        ]
        self._refusals = [
            {
                "code": refusal.code,
                "construct": refusal.construct,
                "origin": _text(refusal.origin),
                "reason": refusal.reason,
                "hint": refusal.hint or _hint(refusal.code),
                "count": count,
            }
            for refusal, count in account.refusals.copy().items()
        ]
        self._assumptions: list[dict[str, Any]] = [
            {
                "subject": subject,
                "kind": kind,
                "expected": expected,
                "origin": _text(origin),
                "checked": count.checked,
                "failed": count.failed,
                "relaxed": count.relaxed,
            }
            for (subject, kind, expected, origin), count in account.assumptions.items()
        ]
        self._recursions = [dict(entry) for entry in account.recursions]
        self.generated: tuple[str, ...] = tuple(account.speculated)
        """The Python that runs in place of the function: one text for each speculated graph."""
        self._decisions: list[dict[str, Any]] = [
            {"seconds": decision.seconds, "text": decision.text} for decision in account.decisions.copy()
        ]
        self._operations = _operations(account)
        self._spans = list(account.spans.copy())
        self._started_ns = account.started_ns

    def to_dict(self) -> dict[str, Any]:
        """Everything but the timeline, as values that JSON can hold. The lists are the caller's own."""
        return {
            **self._numbers,
            "fallbacks": [dict(entry) for entry in self._fallbacks],
            "refusals": [dict(entry) for entry in self._refusals],
            "assumptions": [dict(entry) for entry in self._assumptions],
            "recursions": [dict(entry) for entry in self._recursions],
            "decisions": [dict(entry) for entry in self._decisions],
            "operations": [dict(entry) for entry in self._operations],
        }

    def lines(self) -> list[SourceLine]:
        """The account by source line, those that ran eagerly most often first."""
        by_origin: dict[str, list[dict[str, Any]]] = {}
        for operation in self._operations:
            by_origin.setdefault(operation["origin"] or "", []).append(operation)
        lines = [
            SourceLine(
                origin,
                tuple(operation["name"] for operation in operations),
                *(sum(operation[where] for operation in operations) for where in ("graph", "python", "eager")),
            )
            for origin, operations in by_origin.items()
        ]
        return sorted(lines, key=lambda line: (-line.eager, -line.graph, _source_order(line.origin)))

    def __str__(self) -> str:
        return "\n".join(self._paragraphs())

    def _paragraphs(self) -> Iterator[str]:
        numbers = self._numbers
        yield f"Twofold report: {numbers['name']}"
        yield from (f"  {line}" for line in self.summary())
        if self._fallbacks:
            yield "\nRan eagerly instead"
        for entry in self._fallbacks:
            yield from _entry_lines(entry, f"{entry['code']}: {entry['reason']}")
        if self._refusals:
            yield "\nNot converted from source"
        for entry in self._refusals:
            yield from _entry_lines(entry, f"{entry['code']} ({entry['construct']}): {entry['reason']}")
        if self._assumptions:
            shown = sorted(self._assumptions, key=lambda entry: (-entry["failed"], not entry["relaxed"]))
            yield f"\nAssumed, and checked in each call, those that failed first{_of(SHOWN_LINES, len(shown))}"
            yield from map(_assumption_line, shown[:SHOWN_LINES])
        if self._recursions:
            yield "\nRecursive functions"
        for entry in self._recursions:
            yield from _recursion_lines(entry)
        if self._decisions:
            yield "\nDecisions"
        for decision in self._decisions:
            yield f"  {decision['seconds']:8.2f} s  {decision['text']}"
        lines = self.lines()
        if lines:
            yield f"\nTensor calls by source line, eager ones first{_of(SHOWN_LINES, len(lines))}"
            yield from _table(lines[:SHOWN_LINES])

    def summary(self) -> list[str]:
        """A few lines: mode, shares, sizes, times."""
        numbers = self._numbers
        if not numbers["iterations"]:
            ran = [entry["function"] for entry in self._recursions if entry["together"] or entry["singly"]]
            return [] if ran else ["nothing has run yet"]
        calls = numbers["graph_calls"] + numbers["eager_calls"]
        return [
            f"engine {numbers['engine']}, backend {numbers['backend']}",
            f"{numbers['iterations']:,} iterations: {numbers['graph_iterations']:,} as graphs,"
            f" {numbers['eager_iterations']:,} eager ({numbers['traced_iterations']:,} of these recorded);"
            f" {numbers['compared_iterations']:,} were timed to choose between them",
            *self._speculation(),
            *self._recursion(),
            f"{numbers['graph_op_fraction']:.1%} of tensor calls ran in graphs"
            f" ({numbers['graph_calls']:,} of {calls:,})",
            f"{_count(numbers['paths'], 'path')} in {_count(numbers['segments'], 'segment')},"
            f" {_count(numbers['captures'], 'capture')}, {_count(numbers['discards'], 'discard')}",
            f"{numbers['compile_seconds']:.2f} s of compiling; the program was kept waiting for"
            f" {numbers['stall_seconds']:.2f} s",
        ]

    def _speculation(self) -> list[str]:
        numbers = self._numbers
        if not numbers["speculated_iterations"]:
            return []
        return [
            f"{numbers['speculated_iterations']:,} iterations ran without their Python;"
            f" {_count(numbers['misses'], 'miss', 'es')}, {_count(len(self._assumptions), 'assumption')}"
        ]

    def _recursion(self) -> list[str]:
        numbers = self._numbers
        if not numbers["batched_iterations"]:
            return []
        together = sum(entry["together"] for entry in self._recursions)
        return [
            f"{numbers['batched_iterations']:,} of the eager iterations ran their recursion batched:"
            f" {_count(together, 'invocation')}"
        ]

    def to_html(self, path: str | Path) -> None:
        """Write a page that needs no network and no other file."""
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        rows = sorted(self._operations, key=lambda row: (*_source_order(row["origin"] or ""), row["name"]))
        page = template.from_string(files("twofold").joinpath("report.html").read_text("utf-8")).render(
            numbers=self._numbers,
            summary=self.summary(),
            fallbacks=self._fallbacks,
            refusals=self._refusals,
            assumptions=self._assumptions,
            generated=self.generated,
            decisions=self._decisions,
            operations=rows[:SHOWN_ROWS],
            operations_shown=_of(SHOWN_ROWS, len(rows)),
            drawing=_drawing(self._spans[-SHOWN_SPANS:]),
        )
        Path(path).write_text(page, "utf-8")

    def timeline(self, path: str | Path) -> None:
        """Write a trace for ui.perfetto.dev or chrome://tracing: one lane for Python, one for the graph."""
        events: list[dict[str, Any]] = [
            {
                "ph": "M",
                "pid": 1,
                "name": "process_name",
                "args": {"name": f"twofold: {self._numbers['name']}"},
            }
        ]
        for lane, thread in LANES.items():
            about = {"ph": "M", "pid": 1, "tid": thread}
            events.append({**about, "name": "thread_name", "args": {"name": lane.capitalize()}})
            events.append({**about, "name": "thread_sort_index", "args": {"sort_index": thread}})
        for span in self._spans:
            events.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": LANES[span.lane],
                    "name": span.name,
                    "ts": (span.start_ns - self._started_ns) / 1e3,
                    "dur": (span.end_ns - span.start_ns) / 1e3,
                }
            )
        for decision in self._decisions:
            at = {"ph": "i", "pid": 1, "tid": LANES["python"], "s": "p", "ts": decision["seconds"] * 1e6}
            events.append({**at, "name": decision["text"]})
        Path(path).write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}), "utf-8")


def _fraction(graph_calls: int, eager_calls: int) -> float:
    return graph_calls / (graph_calls + eager_calls) if graph_calls else 0.0


def _text(origin: object) -> str | None:
    return None if origin is None else str(origin)


def _hint(code: str) -> str:
    return CODES[code].hint if code in CODES else ""


def _operations(account: Account) -> list[dict[str, Any]]:
    rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    for (origin, name, where), count in account.operations.copy().items():
        row = rows.setdefault(
            (_text(origin), name),
            {"origin": _text(origin), "name": name, "graph": 0, "python": 0, "eager": 0},
        )
        row[where] += count
    return list(rows.values())


def _source_order(origin: str) -> tuple[str, int]:
    """``file:line`` in the order of the source: line 9 before line 10."""
    file, _, line = origin.rpartition(":")
    return (file, int(line)) if line.isdigit() else (origin, 0)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _of(shown: int, total: int) -> str:
    return f" ({shown:,} of {total:,})" if total > shown else ""


def _entry_lines(entry: dict[str, Any], what: str) -> Iterator[str]:
    yield f"  {entry['count']:>6,} x  {what}"
    if entry["origin"]:
        yield f"            at {entry['origin']}"
    if entry["hint"]:
        yield f"            -> {entry['hint']}"


def _assumption_line(entry: dict[str, Any]) -> str:
    fared = f"failed {entry['failed']:,} of {entry['checked']:,}{', read anew since' if entry['relaxed'] else ''}"
    return f"  {entry['subject']}: {entry['kind']} {entry['expected']} ({fared}; {entry['origin'] or 'no origin'})"


def _recursion_lines(entry: dict[str, Any]) -> Iterator[str]:
    yield f"  {entry['function']}: {entry['together']:,} invocations batched, {entry['singly']:,} singly"
    yield f"            at {entry['origin']}"
    if entry["refusal"]:
        yield f"            runs as plain Python: {entry['refusal']}"
    for block in entry["blocks"]:
        yield f"            {block['name']}: {'batched' if block['together'] else block['reason']}"
        for way in ("forward", "backward"):
            for how, count in block[f"levels_{way}"].items():
                ran = how if how == NATIVE else f"ATen calls, since {how}"
                yield f"              levels {way}, {_count(count, 'batch', 'es')}: {ran}"
    for reason, count in entry["unbatched"].items():
        yield f"  {count:>6,} x  one by one: {reason}"


def _table(lines: list[SourceLine]) -> Iterator[str]:
    yield f"  {'eager':>9} {'graph':>9} {'python':>9}  line"
    for line in lines:
        names = ", ".join(line.names[:4]) + (", ..." if len(line.names) > 4 else "")
        yield f"  {line.eager:>9,} {line.graph:>9,} {line.python:>9,}  {line.origin or '(unknown)'}  {names}"


@dataclass(frozen=True)
class Bar:
    """One span in the drawing; ``x`` and ``width`` in its user units."""

    lane: Lane
    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """The last units on a time axis ``WIDTH`` wide."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    width: int


def _drawing(spans: list[Span], width: int = 1000) -> Drawing | None:
    """Lay ``spans`` out on a time axis; ``None`` if there are none."""
    if not spans:
        return None
    start = min(span.start_ns for span in spans)
    total = max(max(span.end_ns for span in spans) - start, 1)
    scale = width / total
    bars = tuple(
        Bar(
            span.lane,
            (span.start_ns - start) * scale,
            # Narrower bars would vanish on the screen.
            max((span.end_ns - span.start_ns) * scale, 0.6),
            f"{span.name}: {(span.end_ns - span.start_ns) / 1e6:.3f} ms",
        )
        for span in spans
    )
    ticks = tuple((width * part / 10, f"{total * part / 10 / 1e6:.2f}") for part in range(11))
    return Drawing(bars, ticks, width)

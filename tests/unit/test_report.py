import json
import logging
from html.parser import HTMLParser
from pathlib import Path

import pytest

from twofold.report import Report
from twofold.run.account import MAX_DECISIONS, MAX_OPERATIONS, MAX_REASONS, MAX_SPANS, Account

PROMISED = {
    "engine",
    "backend",
    "iterations",
    "graph_iterations",
    "eager_iterations",
    "graph_op_fraction",
    "segments",
    "paths",
    "fallbacks",
    "refusals",
    "compile_seconds",
    "stall_seconds",
}


@pytest.fixture
def account() -> Account:
    account = Account("train_step", "coexecution")
    account.backend = "inductor"
    account.iterations, account.graph_iterations, account.eager_iterations = 10, 7, 3
    account.traced_iterations = 2
    account.graph_calls, account.eager_calls = 75, 25
    account.segments, account.paths, account.captures = 2, 1, 1
    account.compile_seconds, account.stall_seconds = 12.5, 0.25
    account.fallback("new_path", "the else side of train.py:9", "train.py:9")
    account.fallback("new_path", "the else side of train.py:9", "train.py:9")
    account.fallback("tensor_hook", "a hook <script>alert(1)</script> & more", None)
    account.refusal("unsupported_call", "generator", "train.py:4", "a generator is no function", "")
    account.decision("co-execution begins: the path was seen twice")
    account.operation("conv2d", "train.py:10", "graph", 7)
    account.operation("conv2d", "train.py:10", "eager", 3)
    account.operation("shape", "train.py:9", "python", 7)
    start = account.started_ns
    account.span("python", "skeleton", start, start + 1_000_000)
    account.span("graph", "segment 0", start + 500_000, start + 2_000_000)
    return account


def test_dict_has_what_the_interface_promises(account: Account):
    report = Report(account).to_dict()
    assert report.keys() >= PROMISED
    assert report["graph_op_fraction"] == 0.75
    first = report["fallbacks"][0]
    assert {key: first[key] for key in ("code", "reason", "origin", "count")} == {
        "code": "new_path",
        "reason": "the else side of train.py:9",
        "origin": "train.py:9",
        "count": 2,
    }
    assert report["operations"][0] == {
        "origin": "train.py:10",
        "name": "conv2d",
        "graph": 7,
        "python": 0,
        "eager": 3,
    }
    json.dumps(report)


def test_report_is_a_snapshot(account: Account):
    report = Report(account)
    before = report.to_dict()
    account.iterations += 1
    account.fallback("thread", "two at once")
    account.operation("conv2d", "train.py:10", "graph")
    report.to_dict()["fallbacks"].clear()
    assert report.to_dict() == before


def test_text_says_what_ran_why_not_and_what_to_do(account: Account):
    text = str(Report(account))
    for part in (
        "7 as graphs, 3 eager",
        "75.0% of tensor calls",
        "2 x  new_path: the else side of train.py:9",
        "-> Remove the hook",
        "unsupported_call (generator)",
        "co-execution begins",
        "train.py:10",
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_report_of_nothing():
    report = Report(Account("step", "auto"))
    assert "nothing has run yet" in str(report)
    assert report.to_dict()["graph_op_fraction"] == 0.0


class _Page(HTMLParser):
    """Collects tags and attributes, and checks that tables and drawing are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag in ("table", "svg", "div"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "svg", "div"):
            assert self.open.pop() == tag


def test_html_is_self_contained_and_escaped(account: Account, tmp_path: Path):
    Report(account).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert not page.links
    assert "script" not in page.tags
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert page.tags.count("rect") == 2
    assert "Remove the hook" in text


def test_html_of_nothing(tmp_path: Path):
    Report(Account("step", "auto")).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "nothing has run yet" in text
    assert "<svg" not in text


def test_html_rows_follow_the_source(tmp_path: Path):
    account = Account("step", "auto")
    for line in (10, 9, 100):
        account.operation("relu", f"model.py:{line}", "graph")
    Report(account).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.index("model.py:9<") < text.index("model.py:10<") < text.index("model.py:100<")


def test_timeline_has_one_lane_for_python_and_one_for_the_graph(account: Account, tmp_path: Path):
    Report(account).timeline(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["Graph", "Python"]
    spans = {names[event["tid"]]: event for event in events if event["ph"] == "X"}
    assert (spans["Python"]["name"], spans["Python"]["ts"], spans["Python"]["dur"]) == (
        "skeleton",
        0.0,
        1000.0,
    )
    assert (spans["Graph"]["name"], spans["Graph"]["ts"], spans["Graph"]["dur"]) == (
        "segment 0",
        500.0,
        1500.0,
    )
    assert any(event["ph"] == "i" and "co-execution begins" in event["name"] for event in events)


def test_account_is_bounded():
    account = Account("step", "auto")
    for number in range(MAX_SPANS + 5):
        account.span("graph", "s", number, number + 1)
        account.operation("relu", f"model.py:{number}", "eager")
    for number in range(MAX_REASONS + 50):
        account.decision(str(number))
        account.fallback("argument_changes", f"value {number}")
        account.refusal("unsupported_call", "call", f"a.py:{number}", "no", "")
    assert len(account.spans) == MAX_SPANS
    assert len(account.decisions) == MAX_DECISIONS
    assert len(account.operations) <= MAX_OPERATIONS + 1
    assert len(account.refusals) == MAX_REASONS
    assert len(account.fallbacks) == MAX_REASONS + 1
    assert sum(account.fallbacks.values()) == MAX_REASONS + 50
    assert sum(account.operations.values()) == MAX_SPANS + 5


def test_decisions_and_first_fallbacks_are_logged(caplog: pytest.LogCaptureFixture):
    account = Account("step", "auto")
    with caplog.at_level(logging.INFO, "twofold"):
        account.decision("tier 1: replay")
        for _ in range(3):
            account.fallback("thread", "two at once", "a.py:3")
    assert [record.getMessage() for record in caplog.records] == [
        "step: tier 1: replay",
        "step: fell back to eager (thread): two at once [a.py:3]",
    ]

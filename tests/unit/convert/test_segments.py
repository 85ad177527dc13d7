"""Where a unit's graph is cut."""

from textwrap import dedent

import pytest

from twofold.convert.segments import MAX_UNDONE_BYTES, before_last_updates, cut, view_nodes
from twofold.graph import Graph, parse

UNIT = """
    graph unit(%small: f32[4], %large: f32[20000]):
      %early: f32[4] = feed(name="early")
      %late: f32[4] = feed(name="late")
      %0: f32[4] = call aten.mul.Tensor(%early, %small)
      %1: f32[] = call aten.sum.default(%0)
      fetch([%1])
      %2: f32[4] = call aten.exp.default(%0)
      %3: f32[4] = call aten.add_.Tensor(%small, %2)
      {waits}
      %9: f32[4] = call aten.exp.default(%2)
      return %9
    """


def targets(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


def segments(waits: str, late: bool = True) -> tuple[list[list[str]], tuple[int, ...]]:
    graph = parse(dedent(UNIT.format(waits=waits)))
    values = {node.results[0].name: node.results[0] for node in graph.nodes if node.op == "feed"}
    (final,) = graph.outputs
    cuts = cut(graph, view_nodes(graph.nodes), {final}, [{values["late"]}] if late else None)
    return [targets(segment.graph) for segment in cuts.segments], cuts.positions


FIRST = ["aten.mul.Tensor", "aten.sum.default"]
AHEAD = ["aten.exp.default", "aten.add_.Tensor"]


def test_without_late_feeds_a_unit_is_cut_at_fetches_alone():
    waits = "%4: f32[4] = call aten.sin.default(%late)"
    assert segments(waits, late=False) == ([FIRST, [*AHEAD, "aten.sin.default", "aten.exp.default"]], (1,))


def test_what_reads_a_late_feed_waits_for_python():
    waits = "%4: f32[4] = call aten.sin.default(%late)"
    assert segments(waits) == ([FIRST, AHEAD, ["aten.sin.default", "aten.exp.default"]], (1,))


def test_a_view_of_a_late_feed_is_one():
    waits = "%4: f32[2,2] = call aten.view.default(%late, [2, 2])\n      %5: f32[2,2] = call aten.sin.default(%4)"
    assert segments(waits)[0][2] == ["aten.view.default", "aten.sin.default", "aten.exp.default"]


def test_a_write_to_much_memory_waits_for_python():
    assert MAX_UNDONE_BYTES < 4 * 20000
    waits = "%4: f32[20000] = call aten.mul_.Tensor(%large, 2)"
    assert segments(waits) == ([FIRST, AHEAD, ["aten.mul_.Tensor", "aten.exp.default"]], (1,))


@pytest.mark.parametrize(("counters", "waits"), [(3, False), (4, True)])
def test_a_write_to_many_tensors_waits_for_python(counters: int, waits: bool):
    """As to the step counters of an optimizer: each is copied by itself where it may have to be put back."""
    names = ", ".join(f"%c{index}" for index in range(counters))
    inputs = ", ".join(f"%c{index}: f32[]" for index in range(counters))
    text = UNIT.format(waits=f"call aten._foreach_add_.Scalar([{names}], 1)")
    graph = parse(dedent(text.replace("%large: f32[20000]", inputs)))
    cuts = cut(graph, view_nodes(graph.nodes), set(graph.outputs), [()])
    found = [targets(segment.graph) for segment in cuts.segments]
    step = ["aten._foreach_add_.Scalar", "aten.exp.default"]
    assert found == ([FIRST, AHEAD, step] if waits else [FIRST, [*AHEAD, *step]])


def test_what_follows_a_fetch_is_one_segment_where_nothing_waits():
    waits = "%4: f32[4] = call aten.sin.default(%early)"
    assert segments(waits) == ([FIRST, [*AHEAD, "aten.sin.default", "aten.exp.default"]], (1,))


LAST = """
    graph unit(%p: f32[4], %b: f32[4], %g: f32[4], %rate: f32[]):
      %0: f32[4] = call aten.mul_.Tensor(%b, 0.9)
      %1: f32[4] = call aten.mul.Tensor(%g, 2)
      %2: f32[4] = call aten.add_.Tensor(%b, %g)
      %3: f32[4] = call aten.add_.Tensor(%p, %b, alpha=-0.1)
      {last}
      return %1
    """


@pytest.mark.parametrize(
    ("last", "before"),
    [
        ("%4: f32[4] = call aten.mul_.Scalar(%p, 2)", 2),
        ("%4: f32[4] = call aten.mul_.Tensor(%p, %rate)", 5),
        ("%4: f32[4] = call aten.mul.Tensor(%p, 2)", 5),
        ("%4: f32[4] = call aten.copy_.default(%p, %g)", 5),
    ],
    ids=["in place", "of another shape", "allocates", "a copy"],
)
def test_what_cannot_fail_at_the_end(last: str, before: int):
    """Elementwise, in place, of operands that are alike: once the first of these begins, there is nothing to undo."""
    nodes = parse(dedent(LAST.format(last=last))).nodes
    assert before_last_updates(nodes) == nodes[:before]

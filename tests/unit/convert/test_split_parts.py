"""In-place operations on parts of a split: the graphs, and that a compiler's view of them computes the same."""

import textwrap

import pytest

from tests.unit.convert.test_products import assert_same
from twofold.convert.split_parts import settle_split_parts
from twofold.graph import parse, show


def block(text: str) -> str:
    return textwrap.dedent(text).lstrip()


GATES = """
    graph g(%x: f32[2,8], %y: f32[2,8]):
      %s: f32[2,8] = call aten.add.Tensor(%x, %y)
      %a: f32[2,4]{8,1}, %b: f32[2,4]{8,1} = call aten.unsafe_split.Tensor(%s, 4, 1)
      %a2: f32[2,4]{8,1} = call aten.sigmoid_.default(%a)
      %b2: f32[2,4]{8,1} = call aten.tanh_.default(%b)
      %h: f32[2,4] = call aten.mul.Tensor(%a, %b)
      return %h
    """


def test_what_is_written_to_a_part_becomes_a_tensor_of_its_own():
    graph = parse(block(GATES))
    settled = settle_split_parts(graph)
    assert show(settled) == block("""
        graph g(%x: f32[2,8], %y: f32[2,8]):
          %s: f32[2,8] = call aten.add.Tensor(%x, %y)
          %a: f32[2,4]{8,1}, %b: f32[2,4]{8,1} = call aten.unsafe_split.Tensor(%s, 4, 1)
          %a2: f32[2,4] = call aten.sigmoid.default(%a)
          %b2: f32[2,4] = call aten.tanh.default(%b)
          %h: f32[2,4] = call aten.mul.Tensor(%a2, %b2)
          return %h
        """)
    assert_same(graph, settled, exact=True)


def test_a_part_that_is_written_twice():
    graph = parse(block(GATES).replace("  %b2:", "  %a3: f32[2,4]{8,1} = call aten.tanh_.default(%a)\n  %b2:"))
    settled = settle_split_parts(graph)
    assert "aten.tanh.default(%a2)" in show(settled)
    assert "aten.mul.Tensor(%a3, %b2)" in show(settled)
    assert_same(graph, settled, exact=True)


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("what is split is read later", "return %h", "%t: f32[2,8] = call aten.exp.default(%s)\n  return %h, %t"),
        ("what is split is returned", "return %h", "return %h, %s"),
        ("a part is returned", "return %h", "return %h, %a"),
        ("a part is fetched", "  return", "  fetch(%a)\n  return"),
        ("a part is shown by a view", "%h: f32[2,4] = call aten.mul.Tensor(%a, %b)",
         "%v: f32[2]{8} = call aten.select.int(%a, 1, 0)\n  %h: f32[2,4] = call aten.mul.Tensor(%b, %b)"),
        ("what is split is split twice", "  %h:", "  %c: f32[2,4]{8,1}, %d: f32[2,4]{8,1} = "
         "call aten.unsafe_split.Tensor(%s, 4, 1)\n  %c2: f32[2,4]{8,1} = call aten.sigmoid_.default(%c)\n  %h:"),
        ("what is split was given", "(%s, 4, 1)", "(%x, 4, 1)"),
        ("what is written is not computed of the part alone", "%b2: f32[2,4]{8,1} = call aten.tanh_.default(%b)",
         "%b2: f32[2,4]{8,1} = call aten.mul_.Tensor(%b, %a)"),
    ],
)  # fmt: skip
def test_parts_whose_memory_shows_are_views(why: str, old: str, new: str):
    text = block(GATES)
    assert old in text
    graph = parse(text.replace(old, new, 1))
    settled = settle_split_parts(graph)
    assert "aten.split.Tensor" in show(settled)
    assert "aten.sigmoid_.default(%a)" in show(settled)
    assert_same(graph, settled, exact=True)


def test_a_split_that_nothing_writes_to_stays():
    text = block(GATES)
    for name in ("sigmoid", "tanh"):
        text = text.replace(f"{{8,1}} = call aten.{name}_", f" = call aten.{name}")
    graph = parse(text)
    assert settle_split_parts(graph) is graph

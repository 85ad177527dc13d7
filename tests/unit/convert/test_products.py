"""Products made at once and sums in place: the graphs, and that they compute the same."""

import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.convert.accumulation import accumulate_in_place
from twofold.convert.products import merge_products
from twofold.graph import Graph, Value, interpret, parse, show, verify


def block(text: str) -> str:
    return textwrap.dedent(text).lstrip()


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(v.spec.shape).to(v.spec.dtype) for v in graph.inputs if v.spec is not None]


def assert_same(before: Graph, after: Graph, exact: bool = False) -> None:
    verify(after)
    given = inputs_of(before)
    torch.manual_seed(1)
    expected = interpret(before, [t.clone() for t in given])
    torch.manual_seed(1)
    got = interpret(after, [t.clone() for t in given])
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(got.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.stride() == b.stride()
    for one, other in zip(got.effects, expected.effects, strict=True):
        assert one.kind == other.kind
        for a, b in zip(one.values, other.values, strict=True):
            assert type(a) is type(b)
            torch.testing.assert_close(a, b, **tolerance) if isinstance(a, torch.Tensor) else None


GRADIENTS = """
    graph g(%a: f32[2,16], %b: f32[2,16], %c: f32[2,16], %x: f32[2,8], %y: f32[2,8], %z: f32[2,8]):
      %at: f32[16,2]{1,16} = call aten.t.default(%a)
      %0: f32[16,8] = call aten.mm.default(%at, %x)
      %bt: f32[16,2]{1,16} = call aten.t.default(%b)
      %1: f32[16,8] = call aten.mm.default(%bt, %y)
      %2: f32[16,8] = call aten.add.Tensor(%0, %1)
      %ct: f32[16,2]{1,16} = call aten.t.default(%c)
      %3: f32[16,8] = call aten.mm.default(%ct, %z)
      %4: f32[16,8] = call aten.add.Tensor(%2, %3)
      return %4
    """


def test_a_sum_of_products_is_one_product():
    graph = parse(block(GRADIENTS))
    merged = merge_products(graph)
    assert show(merged) == block("""
        graph g(%a: f32[2,16], %b: f32[2,16], %c: f32[2,16], %x: f32[2,8], %y: f32[2,8], %z: f32[2,8]):
          %merged0: f32[6,16] = call aten.cat.default([%a, %b, %c])
          %merged1: f32[16,6]{1,16} = call aten.t.default(%merged0)
          %merged2: f32[6,8] = call aten.cat.default([%x, %y, %z])
          %4: f32[16,8] = call aten.mm.default(%merged1, %merged2)
          return %4
        """)
    assert_same(graph, merged)


def test_a_term_of_another_kind_is_added():
    text = block(GRADIENTS).replace("%z: f32[2,8])", "%z: f32[2,8], %w: f32[16,8])")
    text = text.replace("  return %4", "  %5: f32[16,8] = call aten.add.Tensor(%4, %w)\n  return %5")
    graph = parse(text)
    merged = merge_products(graph)
    assert "call aten.add.Tensor(%merged3, %w)" in show(merged)
    assert_same(graph, merged)


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("a factor is changed before the sum", "  %4:", "  %q: f32[2,16] = call aten.mul_.Tensor(%a, 2)\n  %4:"),
        ("a product is read elsewhere", "return %4", "return %4, %1"),
        ("a partial sum is read elsewhere", "return %4", "return %4, %2"),
        ("a sum is scaled", "(%0, %1)", "(%0, %1, alpha=2)"),
    ],
)
def test_what_cannot_be_merged_still_computes_the_same(why: str, old: str, new: str):
    text = block(GRADIENTS)
    assert old in text
    graph = parse(text.replace(old, new, 1))
    assert_same(graph, merge_products(graph))


def test_products_as_large_as_their_factors_stay():
    text = block(GRADIENTS).replace("[2,", "[64,").replace(",2]{", ",64]{")
    graph = parse(text)
    assert show(merge_products(graph)) == show(graph)


def test_sums_over_rows_follow_their_products():
    text = block(GRADIENTS)
    for name, at in zip("abc", ("%1:", "%3:", "%4:"), strict=True):
        text = text.replace(f"  {at}", f"  %s{name}: f32[1,16] = call aten.sum.dim_IntList(%{name}, [0], True)\n"
                            f"  %v{name}: f32[16] = call aten.view.default(%s{name}, [16])\n  {at}")  # fmt: skip
    text = text.replace(
        "return %4",
        "%u: f32[16] = call aten.add.Tensor(%va, %vb)\n  %w: f32[16] = call aten.add.Tensor(%u, %vc)\n  return %4, %w",
    )
    graph = parse(text)
    merged = merge_products(graph)
    assert show(merged).count("aten.sum.dim_IntList") == 1
    assert_same(graph, merged)


def test_gradients_of_all_slices_are_a_stack():
    graph = parse(
        block("""
        graph g(%a: f32[2,3], %b: f32[2,3], %c: f32[2,3]):
          %0: f32[2,3,3] = call aten.select_backward.default(%c, [2, 3, 3], 1, 2)
          %1: f32[2,3,3] = call aten.select_backward.default(%b, [2, 3, 3], 1, 1)
          %2: f32[2,3,3] = call aten.add.Tensor(%0, %1)
          %3: f32[2,3,3] = call aten.select_backward.default(%a, [2, 3, 3], 1, 0)
          %4: f32[2,3,3] = call aten.add.Tensor(%2, %3)
          return %4
        """)
    )
    merged = merge_products(graph)
    assert "call aten.stack.default([%a, %b, %c], 1)" in show(merged)
    assert_same(graph, merged)
    partial = parse(show(graph).replace("1, 0)", "1, 1)"))
    assert_same(partial, merge_products(partial))


SHARED = """
    graph g(%x: f32[2,2,8], %w: f32[8,16], %b: f32[16]):
      %0: f32[2,8]{16,1} = call aten.select.int(%x, 1, 0)
      %1: f32[2,16] = call aten.addmm.default(%b, %0, %w)
      %2: f32[2,16] = call aten.tanh.default(%1)
      %3: f32[2,8]{16,1} = call aten.select.int(%x, 1, 1)
      %4: f32[2,16] = call aten.addmm.default(%b, %3, %w)
      %5: f32[2,16] = call aten.mul.Tensor(%2, %4)
      return %5
    """


def test_products_with_one_factor_are_one_before_the_first_is_read():
    graph = parse(block(SHARED))
    merged = merge_products(graph)
    assert show(merged).count("aten.addmm.default") == 1
    assert_same(graph, merged)


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("a result is changed in place", "call aten.tanh.default(%1)", "call aten.tanh_.default(%1)"),
        ("the shared factor is changed between", "  %4:", "  %q: f32[8,16] = call aten.mul_.Tensor(%w, 2)\n  %4:"),
        ("what a factor shows is changed between", "  %4:", "  %q: f32[2,2,8] = call aten.mul_.Tensor(%x, 2)\n  %4:"),
        ("a result is returned", "return %5", "return %5, %1"),
    ],
)  # fmt: skip
def test_shared_factors_that_do_not_hold_are_left(why: str, old: str, new: str):
    graph = parse(block(SHARED).replace(old, new, 1))
    merged = merge_products(graph)
    assert show(merged).count("aten.addmm.default") == 2
    assert_same(graph, merged)


def test_a_recurrence_is_not_merged():
    text = block(SHARED).replace("%3: f32[2,8]{16,1} = call aten.select.int(%x, 1, 1)",
                                 "%3: f32[2,8]{16,1} = call aten.slice.Tensor(%2, 1, 0, 8)")  # fmt: skip
    graph = parse(text)
    assert show(merge_products(graph)) == show(graph)


TWO_LAYERS = """
    graph g(%x: f32[2,2,8], %w: f32[8,8], %u: f32[8,8], %v: f32[8,8]):
      %x0: f32[2,8]{16,1} = call aten.select.int(%x, 1, 0)
      %a0: f32[2,8] = call aten.mm.default(%x0, %w)
      %g0: f32[2,8] = call aten.tanh.default(%a0)
      %b0: f32[2,8] = call aten.mm.default(%g0, %u)
      %h0: f32[2,8] = call aten.tanh_.default(%b0)
      %x1: f32[2,8]{16,1} = call aten.select.int(%x, 1, 1)
      %a1: f32[2,8] = call aten.mm.default(%x1, %w)
      %r1: f32[2,8] = call aten.mm.default(%g0, %v)
      %s1: f32[2,8] = call aten.add.Tensor(%a1, %r1)
      %g1: f32[2,8] = call aten.tanh.default(%s1)
      %b1: f32[2,8] = call aten.mm.default(%g1, %u)
      %h1: f32[2,8] = call aten.mul.Tensor(%h0, %b1)
      return %h1
    """


def products(graph: Graph) -> int:
    return show(graph).count("aten.mm.default")


def test_the_products_of_a_second_layer_are_one_behind_the_first():
    graph = parse(block(TWO_LAYERS).replace("aten.tanh_.default", "aten.tanh.default"))
    merged = merge_products(graph)
    assert products(graph) == 5
    assert products(merged) == 3
    assert_same(graph, merged)
    names = [result.name for node in merged.nodes for result in node.results]
    assert names.index("g1") < names.index("b0") < names.index("h0")


@pytest.mark.parametrize(
    ("why", "old", "new", "count"),
    [
        ("a result is changed in place", "", "", 4),
        ("what a product reads is changed behind it", "tanh_.default(%b0)", "tanh.default(%b0)\n"
         "  %q: f32[2,8] = call aten.mul_.Tensor(%g0, 2)", 4),
        ("random numbers are drawn between", "tanh_.default(%b0)", "bernoulli.p(%b0, 0.5)", 3),
        ("random numbers are drawn twice", "tanh_.default(%b0)", "bernoulli.p(%b0, 0.5)\n"
         "  %q: f32[2,8] = call aten.rand_like.default(%x0)", 3),
        ("something given is changed between", "tanh_.default(%b0)", "tanh.default(%b0)\n"
         "  %q: f32[8,8] = call aten.mul_.Tensor(%v, 2)", 5),
        ("the factor is changed between", "tanh_.default(%b0)", "tanh.default(%b0)\n"
         "  %q: f32[8,8] = call aten.mul_.Tensor(%u, 2)", 5),
    ],
)  # fmt: skip
def test_what_moves_keeps_behind_what_it_needs(why: str, old: str, new: str, count: int):
    graph = parse(block(TWO_LAYERS).replace(old, new, 1))
    merged = merge_products(graph)
    assert products(merged) == count
    assert_same(graph, merged)


@pytest.mark.parametrize("is_changed", [False, True])
def test_rows_that_changed_since_are_joined_anew(is_changed: bool):
    lines = ["graph g(%x: f32[6,8], %y: f32[2,16], %w: f32[8,16]):"]
    for t in range(3):
        lines += [
            f"  %x{t}: f32[2,8] = call aten.slice.Tensor(%x, 0, {2 * t}, {2 * t + 2})",
            f"  %a{t}: f32[2,8] = call aten.sin.default(%x{t})",
            f"  %p{t}: f32[2,16] = call aten.mm.default(%a{t}, %w)",
            f"  %h{t}: f32[2,16] = call aten.tanh.default(%p{t})",
        ]
    lines += ["  %q: f32[2,8] = call aten.mul_.Tensor(%a1, 2)"] if is_changed else []
    for t in range(3):
        lines += [
            f"  %t{t}: f32[8,2]{{1,8}} = call aten.t.default(%a{t})",
            f"  %g{t}: f32[8,16] = call aten.mm.default(%t{t}, %h{t})",
        ]
    lines += ["  %s1: f32[8,16] = call aten.add.Tensor(%g0, %g1)", "  %s2: f32[8,16] = call aten.add.Tensor(%s1, %g2)"]
    graph = parse("\n".join([*lines, "  return %s2"]) + "\n")
    merged = merge_products(graph)
    assert products(merged) == 2
    assert show(merged).count("aten.cat.default") == 2 + is_changed
    assert_same(graph, merged)


def test_nothing_moves_past_a_fetch():
    text = block(TWO_LAYERS).replace("  %x1:", "  fetch(%h0)\n  %x1:", 1)
    graph = parse(text)
    merged = merge_products(graph)
    assert products(merged) == products(graph)
    assert_same(graph, merged)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_recurrences_compute_the_same(steps: int, batch: int, width: int, keeps: bool):
    lines = [f"graph g(%h0: f32[{batch},{width}], %w: f32[{width},{width}], %x: f32[{batch},{steps},{width}]):"]
    spec = f"f32[{batch},{width}]"
    stride = "" if steps == 1 or batch == 1 else f"{{{steps * width},1}}"
    for t in range(steps):
        lines.append(f"  %x{t}: {spec}{stride} = call aten.select.int(%x, 1, {t})")
        lines.append(f"  %p{t}: {spec} = call aten.mm.default(%x{t}, %w)")
        lines.append(f"  %r{t}: {spec} = call aten.mm.default(%h{t}, %w)")
        lines.append(f"  %h{t + 1}: {spec} = call aten.add.Tensor(%p{t}, %r{t})")
        lines.append(f"  %t{t}: f32[{width},{batch}]{{1,{width}}} = call aten.t.default(%h{t})")
        lines.append(f"  %g{t}: f32[{width},{width}] = call aten.mm.default(%t{t}, %h{t + 1})")
        total = f"%g{t}" if t == 0 else f"%s{t}"
        if t:
            lines.append(
                f"  %s{t}: f32[{width},{width}] = call aten.add.Tensor({'%g0' if t == 1 else f'%s{t - 1}'}, %g{t})"
            )
    lines.append(f"  return %h{steps}, {total}" + (", %h1" if keeps else ""))
    graph = parse("\n".join(lines) + "\n")
    assert_same(graph, merge_products(graph))
    assert_same(graph, accumulate_in_place(graph), exact=True)


def test_a_sum_takes_the_place_of_a_term_that_nothing_else_reads():
    graph = parse(
        block("""
        graph g(%a: f32[2], %b: f32[2]):
          %0: f32[2] = call aten.mul.Tensor(%a, 2)
          %1: f32[2] = call aten.add.Tensor(%0, %b)
          %2: f32[2] = call aten.add.Tensor(%a, %b)
          %3: f32[2] = call aten.add.Tensor(%1, %2)
          %4: f32[2] = call aten.add.Tensor(%3, %3)
          return %4, %2
        """)
    )
    changed = accumulate_in_place(graph)
    assert show(changed) == show(graph).replace("add.Tensor(%0, %b)", "add_.Tensor(%0, %b)").replace(
        "add.Tensor(%1, %2)", "add_.Tensor(%1, %2)"
    )
    assert_same(graph, changed, exact=True)


def test_a_view_is_never_summed_into():
    graph = parse(
        block("""
        graph g(%a: f32[2,2], %b: f32[2]):
          %0: f32[2] = call aten.select.int(%a, 0, 0)
          %1: f32[2] = call aten.add.Tensor(%0, %b)
          return %1
        """)
    )
    assert show(accumulate_in_place(graph)) == show(graph)
    assert all(isinstance(value, Value) for value in graph.inputs)

"""Passes, text in and text out."""

import textwrap

import pytest

from twofold.graph import (
    MalformedGraphError,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    equivalent,
    optimize,
    parse,
    passes,
    show,
)


def text(body: str) -> str:
    return textwrap.dedent(body).strip("\n") + "\n"


def assert_becomes(run_pass, before: str, after: str) -> None:
    result = run_pass(parse(before))
    assert show(result) == text(after)
    assert equivalent(run_pass(result), result)


def assert_unchanged(run_pass, before: str) -> None:
    assert_becomes(run_pass, before, before)


def test_dead_calls_go_and_unread_inputs_stay():
    assert_becomes(
        eliminate_dead_code,
        """
        graph g(%x: f32[2], %unread: f32[2], %o: object):
          %0: f32[2] = call torch.neg(%x)
          %1: f32[2] = call torch.exp(%0)
          %2: f32[2] = feed(name="unread")
          %3: object = get_attr(%o, "unread")
          %4: f32[2] = call torch.sin(%x)
          return %4
        """,
        """
        graph g(%x: f32[2], %unread: f32[2], %o: object):
          %4: f32[2] = call torch.sin(%x)
          return %4
        """,
    )


def test_nodes_with_effect_keep_what_they_read():
    assert_unchanged(
        eliminate_dead_code,
        """
        graph g(%x: f32[2], %o: object):
          %0: bool[] = call torch.any(%x)
          assert(%0)
          %1: f32[2] = call torch.neg(%x)
          fetch(%1)
          %2: f32[2] = call torch.exp(%x)
          %3: f32[2] = call torch.Tensor.add_(%2, 1)
          %4: f32[2] = call torch.sin(%x)
          set_attr(%o, "a", %4)
          %5: f32[2] = call torch.cos(%x)
          set_item(%o, 0, %5)
          %6: f32[2] = call torch.rand_like(%x)
          return
        """,
    )


def test_bodies_are_cleaned_and_keep_outer_references():
    assert_becomes(
        eliminate_dead_code,
        """
        graph g(%x: f32[2], %p: bool[]):
          %0: f32[2] = call torch.neg(%x)
          %1: f32[2] = call torch.exp(%x)
          %2: f32[2] = if(%p):
            then():
              %3: f32[2] = call torch.sin(%1)
              %4: f32[2] = call torch.cos(%0)
              return %4
            else():
              return %x
          %5: f32[2] = if(%p):
            then():
              return %1
            else():
              return %x
          return %2
        """,
        """
        graph g(%x: f32[2], %p: bool[]):
          %0: f32[2] = call torch.neg(%x)
          %2: f32[2] = if(%p):
            then():
              %4: f32[2] = call torch.cos(%0)
              return %4
            else():
              return %x
          return %2
        """,
    )


def test_invocations_without_effect_go_with_what_only_they_invoke():
    assert_becomes(
        eliminate_dead_code,
        """
        graph g(%x: f32[2]):
          %0: f32[2] = invoke pure(%x)
          invoke fetching(%x)
          return %x

        subgraph pure(%a: f32[2]):
          %1: f32[2] = invoke inner(%a)
          return %1

        subgraph inner(%b: f32[2]):
          %2: f32[2] = invoke pure(%b)
          return %2

        subgraph fetching(%c: f32[2]):
          fetch(%c)
          invoke fetching(%c)
          return
        """,
        """
        graph g(%x: f32[2]):
          invoke fetching(%x)
          return %x

        subgraph fetching(%c: f32[2]):
          fetch(%c)
          invoke fetching(%c)
          return
        """,
    )


def test_equal_calls_are_computed_once():
    assert_becomes(
        eliminate_common_subexpressions,
        """
        graph g(%x: f32[2], %p: bool[]):
          %0: f32[2] = call torch.exp(%x)
          %1: f32[2] = call torch.exp(%x)
          %2: f32[2] = call torch.add(%0, %1)
          %3: f32[2] = if(%p):
            then():
              %4: f32[2] = call torch.add(%0, %1, alpha=2)
              return %4
            else():
              return %x
          fetch(%2)
          return %3
        """,
        """
        graph g(%x: f32[2], %p: bool[]):
          %0: f32[2] = call torch.exp(%x)
          %2: f32[2] = call torch.add(%0, %0)
          %3: f32[2] = if(%p):
            then():
              %4: f32[2] = call torch.add(%0, %0, alpha=2)
              return %4
            else():
              return %x
          fetch(%2)
          return %3
        """,
    )


UNMERGED = {
    "another type of number": ("call torch.mul(%x, 1)", "call torch.mul(%x, 1.0)", "call torch.add(%0, %1)"),
    "other modes": ("call torch.exp(%x)", "call torch.exp(%x) {no_grad}", "call torch.add(%0, %1)"),
    "random": ("call torch.rand_like(%x)", "call torch.rand_like(%x)", "call torch.add(%0, %1)"),
    "uninitialised": ("call torch.empty_like(%x)", "call torch.empty_like(%x)", "call torch.add(%0, %1)"),
    "views": ("call torch.Tensor.view(%x, 2)", "call torch.Tensor.view(%x, 2)", "call torch.add(%0, %1)"),
    "read by a view": ("call torch.exp(%x)", "call torch.exp(%x)", "call torch.Tensor.view(%1, 2)"),
    "read by a composite": ("call torch.exp(%x)", "call torch.exp(%x)", "call torch.matmul(%1, %0)"),
    "written to": ("call torch.exp(%x)", "call torch.exp(%x)", "call torch.Tensor.add_(%1, %0)"),
}


@pytest.mark.parametrize("lines", UNMERGED.values(), ids=UNMERGED.keys())
def test_calls_that_somebody_could_tell_apart_stay(lines: tuple[str, str, str]):
    first, second, third = lines
    assert_unchanged(
        eliminate_common_subexpressions,
        f"""
        graph g(%x: f32[2]):
          %0: f32[2] = {first}
          %1: f32[2] = {second}
          %2: f32[2] = {third}
          return %2
        """,
    )


def test_results_that_leave_the_graph_or_have_history_stay_apart():
    assert_unchanged(
        eliminate_common_subexpressions,
        """
        graph g(%x: f32[2], %w: f32[2]!):
          %0: f32[2] = call torch.exp(%x)
          %1: f32[2] = call torch.exp(%x)
          %2: f32[2]! = call torch.exp(%w)
          %3: f32[2]! = call torch.exp(%w)
          %4: f32[2]! = call torch.add(%2, %3)
          fetch(%0)
          return %1, %4
        """,
    )


def test_calls_in_sibling_bodies_stay_apart():
    assert_unchanged(
        eliminate_common_subexpressions,
        """
        graph g(%x: f32[2], %p: bool[]):
          %0: f32[2] = if(%p):
            then():
              %1: f32[2] = call torch.exp(%x)
              %2: f32[2] = call torch.neg(%1)
              return %2
            else():
              %3: f32[2] = call torch.exp(%x)
              %4: f32[2] = call torch.sin(%3)
              return %4
          return %0
        """,
    )


def test_optimize_runs_the_passes_and_verifies_after_each(monkeypatch: pytest.MonkeyPatch):
    graph = parse("graph g(%x: f32[2]):\n  %0: f32[2] = call torch.exp(%x)\n  return %x\n")
    assert show(optimize(graph)) == "graph g(%x: f32[2]):\n  return %x\n"
    broken = (lambda graph: type(graph)(graph.name, (), graph.nodes, graph.outputs),)
    monkeypatch.setattr(passes, "PASSES", broken)
    with pytest.raises(MalformedGraphError, match="expected %x to be defined before its use"):
        optimize(graph)

"""Recursive functions, decorated, against the same functions undecorated: results, gradients, and what is kept."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twofold

from .recursive_programs import LABELS, PROGRAMS, WORDS, Recursion, Tree


def trees() -> st.SearchStrategy[Tree]:
    numbers = (st.integers(0, WORDS - 1), st.integers(0, LABELS - 1), st.floats(0.5, 1.5))
    return st.recursive(
        st.builds(Tree, *numbers, st.just([])),
        lambda inner: st.builds(Tree, *numbers, st.lists(inner, min_size=1, max_size=3)),
        max_leaves=12,
    )


def step(recursion: Recursion, batch: list[Tree]) -> tuple[Any, list[torch.Tensor]]:
    """Return the loss of a batch and the gradients of all parameters."""
    for parameter in recursion.parameters:
        parameter.grad = None
    loss = sum(recursion.call(tree) for tree in batch)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in recursion.parameters]
    return loss.detach(), gradients


def assert_equal(got: Any, expected: Any) -> None:
    for mine, eager in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-4, atol=2e-5)


@functools.cache
def built(name: str, decorated: bool) -> Recursion:
    decorate = functools.partial(twofold.subgraph, strict=True) if decorated else lambda function: function
    return PROGRAMS[name](decorate)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@given(batch=st.lists(trees(), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_equals_plain_python(name: str, batch: list[Tree]) -> None:
    assert_equal(step(built(name, True), batch), step(built(name, False), batch))

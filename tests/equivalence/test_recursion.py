"""Recursive functions, decorated, against the same functions undecorated: results, gradients, and what is kept."""

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twofold
from twofold.run.recursion import execute, parts, schedule

from .recursive_programs import LABELS, PROGRAMS, WORDS, Recursion, Tree


@pytest.fixture(scope="module", autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trees() -> st.SearchStrategy[Tree]:
    numbers = (st.integers(0, WORDS - 1), st.integers(0, LABELS - 1), st.floats(0.5, 1.5))
    return st.recursive(
        st.builds(Tree, *numbers, st.just([])),
        lambda inner: st.builds(Tree, *numbers, st.lists(inner, min_size=1, max_size=3)),
        max_leaves=12,
    )


def step(recursion: Recursion, batch: list[Tree]) -> tuple[Any, list[torch.Tensor]]:
    """Return the loss of a batch, in which each tree weighs differently, and the gradients of all parameters."""
    for parameter in recursion.parameters:
        parameter.grad = None
    loss = sum(weight * recursion.call(tree) for weight, tree in enumerate(batch, 1))
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in recursion.parameters]
    return loss.detach(), gradients


def assert_equal(got: Any, expected: Any) -> None:
    for mine, eager in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)


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


def random_tree(numbers: random.Random, depth: int = 3) -> Tree:
    children = [random_tree(numbers, depth - 1) for _ in range(numbers.randrange(4) if depth else 0)]
    return Tree(numbers.randrange(WORDS), numbers.randrange(LABELS), numbers.uniform(0.5, 1.5), children)


def differs(name: str, shared: bool = False) -> bool:
    """Say whether the oracle finds a decorated function, freshly made, to differ from the plain one."""
    plain = PROGRAMS[name](lambda function: function)
    decorated = PROGRAMS[name](functools.partial(twofold.subgraph, strict=True))
    numbers = random.Random(1)
    for _ in range(3):
        batch = [random_tree(numbers) for _ in range(3)]
        if shared:
            batch = [Tree(1, 1, 1.0, [batch[0], batch[0], batch[0], batch[1]])]
        try:
            assert_equal(step(decorated, batch), step(plain, batch))
        except AssertionError:
            return True
    return False


def test_the_oracle_is_content_without_a_fault() -> None:
    assert not differs("binary_tree_lstm")
    assert not differs("memoised", shared=True)


def children_exchanged(monkeypatch: pytest.MonkeyPatch) -> str:
    original = schedule._children

    def exchanged(made: schedule.Schedule) -> None:
        original(made)
        for group in made.groups:
            group.child_rows = group.child_rows[::-1]

    monkeypatch.setattr(schedule, "_children", exchanged)
    return "binary_tree_lstm"


def gradients_overwritten(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(schedule.Schedule, "taken_once", lambda self, function: True)
    return "memoised"


def terms_of_other_trees(monkeypatch: pytest.MonkeyPatch) -> str:
    def wrong(self: schedule.Schedule, table: Any) -> Any:
        return np.zeros(len(self.row), dtype=np.int64)

    monkeypatch.setattr(schedule.Schedule, "_find_roots", wrong)
    return "binary_tree_lstm"


def rows_of_the_wrong_children(monkeypatch: pytest.MonkeyPatch) -> str:
    original = execute.Run._column

    def column(self: execute.Run, run: Any, role: Any, what: Any) -> Any:
        held = original(self, run, role, what)
        return [part.flip(0) for part in held] if role in (parts.Role.CHILDREN, parts.Role.OWED) else held

    monkeypatch.setattr(execute.Run, "_column", column)
    return "binary_tree_lstm"


def rows_of_the_wrong_level(monkeypatch: pytest.MonkeyPatch) -> str:
    original = execute.Run._parts

    def wrong(self: execute.Run, run: Any, crossing: Any) -> Any:
        held = original(self, run, crossing)
        return (
            [part.flip(0) for part in held] if crossing.source is parts.Stage.TURN and crossing.dimension == 0 else held
        )

    monkeypatch.setattr(execute.Run, "_parts", wrong)
    return "binary_tree_lstm"


def a_level_left_out_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> str:
    original = execute.Run._joined

    def joined(self: execute.Run, run: Any, crossing: Any) -> Any:
        held = original(self, run, crossing)
        levels = run.parts.get(crossing.name)
        return levels[0] if levels and crossing.dimension is None else held

    monkeypatch.setattr(execute.Run, "_joined", joined)
    return "method"


FAULTS = [
    children_exchanged,
    gradients_overwritten,
    terms_of_other_trees,
    rows_of_the_wrong_children,
    rows_of_the_wrong_level,
    a_level_left_out_of_a_sum,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_the_oracle_catches_a_planted_fault(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = plant(monkeypatch)
    assert differs(name, shared=name == "memoised")


def after_no_grad(recursion: Recursion, batch: list[Tree]) -> None:
    with torch.no_grad():
        for tree in batch:
            float(recursion.call(tree))


def after_freezing(recursion: Recursion, batch: list[Tree]) -> None:
    for parameter in recursion.parameters:
        parameter.requires_grad_(False)
    for tree in batch:
        float(recursion.call(tree))
    for parameter in recursion.parameters:
        parameter.requires_grad_()


@pytest.mark.parametrize("name", ["binary_tree_lstm", "child_sum", "mutual"])
@pytest.mark.parametrize("before", [after_no_grad, after_freezing])
def test_what_ran_without_gradients_takes_none_from_later_calls(name: str, before: Any) -> None:
    plain = PROGRAMS[name](lambda function: function)
    decorated = PROGRAMS[name](functools.partial(twofold.subgraph, strict=True))
    numbers = random.Random(2)
    batch = [random_tree(numbers) for _ in range(3)]
    before(decorated, batch)
    for _ in range(2):
        assert_equal(step(decorated, batch), step(plain, batch))


def test_blocks_are_batched_and_not_run_one_by_one() -> None:
    for name in PROGRAMS:
        recursion = built(name, True)
        for seed in range(3):
            shared = random_tree(random.Random(seed))
            step(recursion, [Tree(1, 1, 1.0, [shared, shared])])
        assert recursion.encode.unbatched == {}

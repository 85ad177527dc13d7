"""Recursion that passes tensors down or decides by their values, decorated, against the same functions undecorated."""

import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twofold
from twofold.run.recursion import batch, execute, known, pieces, requests

from .recursive_programs import Tree
from .test_recursion import assert_equal, double_precision, random_tree, step, trees  # noqa: F401 - a fixture
from .top_down_programs import PROGRAMS

strict = functools.partial(twofold.subgraph, strict=True)


def plain(function: Any) -> Any:
    return function


@functools.cache
def built(name: str) -> Any:
    return PROGRAMS[name](strict), PROGRAMS[name](plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@given(batch=st.lists(trees(), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
def test_equals_plain_python(name: str, batch: list[Tree]) -> None:
    decorated, plainly = built(name)
    assert_equal(step(decorated, batch), step(plainly, batch))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "pairs_of_states"])
def test_blocks_are_batched_and_not_run_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decorated, plainly = PROGRAMS[name](strict), PROGRAMS[name](plain)
    rows: list[int] = []
    original = execute.Run.forward

    def forward(self: Any) -> Any:
        rows.append(sum(run.rows for run in self._groups))
        return original(self)

    monkeypatch.setattr(execute.Run, "forward", forward)
    numbers = random.Random(3)
    for _ in range(3):
        trees = [Tree(1, 1, 1.0, [random_tree(numbers), random_tree(numbers)])]
        assert_equal(step(decorated, trees), step(plainly, trees))
    assert decorated.encode.unbatched == {}
    assert max(rows) > 3


def test_one_wave_serves_all_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of reads grows with the depth of a tree, not with its nodes."""
    reads = 0
    original = batch.Batch.fetch

    def fetch(self: Any, wants: Any) -> Any:
        nonlocal reads
        reads += 1
        return original(self, wants)

    monkeypatch.setattr(batch.Batch, "fetch", fetch)
    decorated = PROGRAMS["a_forest"](strict)
    numbers = random.Random(3)
    for _ in range(2):
        reads = 0
        decorated.encode([random_tree(numbers) for _ in range(8)]).backward()
        assert 0 < reads <= 5


def differs(name: str) -> bool:
    decorated, plainly = PROGRAMS[name](strict), PROGRAMS[name](plain)
    numbers = random.Random(1)
    for _ in range(3):
        trees = [random_tree(numbers) for _ in range(3)]
        try:
            assert_equal(step(decorated, trees), step(plainly, trees))
        except AssertionError:
            return True
    return False


def test_the_oracle_is_content_without_a_fault() -> None:
    assert not differs("decided_by_the_parent")
    assert not differs("both_ways")


def arguments_of_another_call(monkeypatch: pytest.MonkeyPatch) -> str:
    original = pieces.Pieces._cut
    given: list[int] = []

    def cut(self: Any, decisions: Any, invocations: Any, hosts: Any) -> int:
        given.append(original(self, decisions, invocations, hosts))
        return given[-1] if len(given) % 5 else max(n for n in given if n <= given[-1] and n != given[-1])

    monkeypatch.setattr(pieces.Pieces, "_cut", cut)
    return "state_of_the_parent"


def a_value_of_another_invocation(monkeypatch: pytest.MonkeyPatch) -> str:
    original = batch.Batch.fetch
    monkeypatch.setattr(batch.Batch, "fetch", lambda self, wants: original(self, wants)[::-1])
    return "a_forest"


def rows_of_another_invocation(monkeypatch: pytest.MonkeyPatch) -> str:
    original = known.GivenPile.column

    def column(self: Any, index: int, order: Any, device: Any) -> Any:
        return original(self, index, order, device).flip(0)

    monkeypatch.setattr(known.GivenPile, "column", column)
    return "decided_by_the_parent"


def gradients_lost_between_waves(monkeypatch: pytest.MonkeyPatch) -> str:
    original = requests.Bundles.untied

    def untied(self: Any, gradients: Any) -> Any:
        return original(self, [None if size else g for size, g in zip(self.sizes, gradients, strict=True)])

    monkeypatch.setattr(requests.Bundles, "untied", untied)
    return "decided_by_the_parent"


FAULTS = [
    arguments_of_another_call,
    a_value_of_another_invocation,
    rows_of_another_invocation,
    gradients_lost_between_waves,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_the_oracle_catches_a_planted_fault(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differs(plant(monkeypatch))


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_gradients(name: str) -> None:
    decorated, plainly = built(name)
    tree = random_tree(random.Random(5))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(decorated.call(tree) + 0, plainly.call(tree))
    assert_equal(step(decorated, [tree]), step(plainly, [tree]))

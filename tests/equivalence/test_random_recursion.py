"""Random recursive programs over random trees and DAGs: decorated against plain, outputs and all gradients."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import twofold
from twofold.run.recursion import batch, execute

from .random_recursion import CHILDREN, DECISIONS, KEEPS, OWN, RETURNS, Text, dags, make, texts
from .recursive_programs import Tree
from .test_recursion import assert_equal, double_precision, step, trees  # noqa: F401 - a fixture

strict = functools.partial(twofold.subgraph, strict=True)


def compare(text: Text, structures: list[Tree], rounds: int = 2) -> dict[str, int]:
    """Check that a program does the same with and without; return why blocks were not batched."""
    decorated, plainly = make(text, strict), make(text, lambda function: function)
    for _ in range(rounds):
        assert_equal(step(decorated, structures), step(plainly, structures))
    return decorated.encode.unbatched


@pytest.mark.slow
@given(texts(), st.lists(st.one_of(trees(), dags()), min_size=1, max_size=3))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_plain_python(text: Text, structures: list[Tree]) -> None:
    compare(text, structures)


TREE = Tree(1, 1, 0.9, [Tree(4, 2, 1.1, [Tree(0), Tree(6, 3)]), Tree(5, 0, 0.7, [Tree(1, 1)]), Tree(3, 2)])
BY_VALUES = Text("state", (OWN[0], DECISIONS[2], RETURNS[0], CHILDREN[0], KEEPS[0], DECISIONS[4]))
LISTS = Text("node", (OWN[0], DECISIONS[2], RETURNS[0], CHILDREN[1], KEEPS[1], DECISIONS[2]))
BY_NODES = Text("node", (OWN[2], DECISIONS[1], RETURNS[1], CHILDREN[2], KEEPS[1], DECISIONS[6]))


@pytest.mark.parametrize("given_down", ["node", "state", "pass"])
@pytest.mark.parametrize("children", CHILDREN)
def test_each_way_to_the_children(children: str, given_down: str) -> None:
    text = Text(given_down, (OWN[1], DECISIONS[3], RETURNS[1], children, KEEPS[0], DECISIONS[0]))
    assert compare(text, [TREE, TREE]) == {}


def one_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> Text:
    original = execute.Run.backward

    def backward(self: Any, gradients: Any) -> Any:
        found = original(self, gradients)
        return dict(list(found.items())[1:])

    monkeypatch.setattr(execute.Run, "backward", backward)
    return BY_NODES


def values_of_the_other_sign(monkeypatch: pytest.MonkeyPatch) -> Text:
    original = batch.Batch.fetch

    def fetch(self: Any, wants: Any) -> Any:
        return [~value if value.dtype is torch.bool else value for value in original(self, wants)]

    monkeypatch.setattr(batch.Batch, "fetch", fetch)
    return Text("state", (OWN[0], DECISIONS[2], RETURNS[0], CHILDREN[0], KEEPS[0], DECISIONS[0]))


def results_kept_in_another_order(monkeypatch: pytest.MonkeyPatch) -> Text:
    original = batch.Batch.want

    def want(self: Any, block: Any, number: int, output: int, deferred: Any) -> None:
        original(self, block, max(number - 1, 0) if self.levels[number - 1] == 0 else number, output, deferred)

    monkeypatch.setattr(batch.Batch, "want", want)
    return BY_NODES


@pytest.mark.parametrize("plant", [one_gradient_lost, values_of_the_other_sign, results_kept_in_another_order])
def test_the_oracle_catches_a_planted_fault(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        compare(text, [TREE, TREE.children[0]], rounds=3)


def test_the_oracle_is_content_without_a_fault() -> None:
    compare(BY_VALUES, [TREE, TREE.children[0]], rounds=3)
    compare(BY_NODES, [TREE, TREE.children[0]], rounds=3)


def test_a_list_is_needed_before_and_after_a_value_is_read() -> None:
    compare(LISTS, [TREE, Tree(0, 0, 1.0, [Tree(0)])])

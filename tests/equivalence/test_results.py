"""Recursion whose results are dataclasses, dicts and nested tuples, decorated, against the undecorated functions."""

import random
from typing import Any

import pytest
import torch

import twofold
from twofold.convert.from_source import scope

from .recursive_programs import Tree
from .result_programs import PROGRAMS
from .test_recursion import assert_equal, double_precision, random_tree, step  # noqa: F401 - a fixture
from .test_top_down import plain, strict

rows = torch.linspace(-1.0, 1.0, 21).reshape(7, 3)


def differs(name: str) -> bool:
    decorated, plainly = PROGRAMS[name](strict), PROGRAMS[name](plain)
    numbers = random.Random(1)
    for _ in range(3):
        batch = [random_tree(numbers), Tree(1, 1, 1.5, [random_tree(numbers), random_tree(numbers)])]
        try:
            assert_equal(step(decorated, batch), step(plainly, batch))
        except (AssertionError, RuntimeError):
            return True
    assert decorated.encode.unbatched == {}
    return False


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_plain_python(name: str) -> None:
    assert not differs(name)


def test_the_oracle_catches_parts_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    original = scope.Record.like
    monkeypatch.setattr(scope.Record, "like", lambda self, values: original(self, list(values)[::-1]))
    assert differs("nested_results")


def a_list(node: Any) -> Any:
    states = [rows[node.word]]
    for child in node.children:
        states.append(a_list(child)[0])
    return states


def chunks(node: Any) -> Any:
    return rows[node.word].chunk(3)


def a_variable_that_is_a_dict(node: Any) -> Any:
    held = {"h": rows[node.word]}
    held["twice"] = held["h"] * 2.0
    return held


def without_history(node: Any) -> Any:
    with torch.no_grad():
        below = [without_history(child) for child in node.children]
    return sum(below, rows[node.word])


@pytest.mark.parametrize("function", [a_list, chunks, a_variable_that_is_a_dict, without_history])
def test_what_cannot_be_told_apart_runs_as_plain_python(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decorated = twofold.subgraph(function)
    tree = random_tree(random.Random(3))
    expected = function(tree)
    monkeypatch.setitem(function.__globals__, function.__name__, decorated)
    for _ in range(2):
        torch.testing.assert_close(decorated(tree), expected)
    assert decorated.refusal is not None
    assert decorated.refusal.code in ("result_structure", "unsupported_syntax")


def test_no_tensor_where_one_was_expected_is_an_error_and_no_wrong_result() -> None:
    @strict
    def sometimes(node: Any) -> Any:
        return None if node.word == 2 else rows[node.word] + 1.0

    with pytest.raises(twofold.TwofoldError, match="a NoneType where a tensor was expected"):
        sometimes(Tree(2)).sum().item()
    torch.testing.assert_close(sometimes(Tree(1)) + 0, rows[1] + 1.0)

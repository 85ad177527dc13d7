"""Sums of results that wait: added up at once where nobody can see the difference."""

import operator
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from torch import Tensor

import twofold
from twofold.run.recursion import deferred

Leaf = Callable[[float], Tensor]


@pytest.fixture
def leaf() -> Leaf:
    weight = torch.ones((), requires_grad=True)

    @twofold.subgraph(strict=True)
    def leaf(number: float) -> Tensor:
        return weight * number

    return leaf


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many terms were added up at once, sum by sum."""
    counts: list[int] = []
    original = deferred._add_up

    def counted(terms: list[object]) -> object:
        counts.append(len(terms))
        return original(terms)

    monkeypatch.setattr(deferred, "_add_up", counted)
    return counts


@pytest.mark.parametrize("count", [2, 3, 4, 20])
def test_a_sum_is_added_up_at_once(leaf: Leaf, sums: list[int], count: int) -> None:
    total = sum(leaf(float(number)) for number in range(count))
    assert float(total.detach()) == sum(range(count))
    assert sums == [count + 1]  # with the 0 that `sum` begins with


def test_a_subtotal_that_is_held_keeps_its_value(leaf: Leaf, sums: list[int]) -> None:
    terms = [leaf(float(number)) for number in range(10)]
    subtotal = reduce(operator.add, terms[:5])
    total = reduce(operator.add, terms[5:], subtotal)
    assert (float(subtotal.detach()), float(total.detach())) == (10.0, 45.0)
    assert sums == [5, 6]


def test_results_of_whole_numbers_keep_their_dtype(sums: list[int]) -> None:
    @twofold.subgraph(strict=True)
    def whole(number: int) -> Tensor:
        return torch.tensor(number, dtype=torch.int16)

    for _ in range(2):
        total = sum(whole(number) for number in range(6))
        assert total.dtype is torch.int16
        assert int(total) == 15
    assert sums == [7, 7]


def test_terms_of_several_shapes_are_broadcast(sums: list[int]) -> None:
    @twofold.subgraph(strict=True)
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    total = ones(1) + ones(3) + ones(1) + ones(3)
    torch.testing.assert_close(total + 0.0, torch.full((3,), 4.0))
    assert sums == [4]

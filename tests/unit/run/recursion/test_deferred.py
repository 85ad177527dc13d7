"""Sums of results that wait: added up at once where nobody can see the difference."""

import operator
import weakref
from collections.abc import Callable
from functools import reduce
from typing import Any

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


def test_results_that_are_dropped_are_given_out_again_and_others_are_not(leaf: Leaf) -> None:
    first = leaf(1.0)
    number = id(leaf(2.0))
    again = leaf(3.0)
    assert id(again) == number
    kept = [again, leaf(4.0)]
    assert (float(first.detach()), *(float(one.detach()) for one in kept)) == (1.0, 3.0, 4.0)


def test_a_result_that_somebody_can_see_again_is_not_given_out(leaf: Leaf) -> None:
    seen = weakref.ref(leaf(1.0))
    marked = leaf(2.0)
    marked.mark = "mine"  # type: ignore[attr-defined]
    del marked
    last = leaf(3.0)
    assert seen() is None or seen() is not last
    assert not hasattr(last, "mark")
    assert float(last.detach()) == 3.0


def test_what_is_noted_is_not_given_out(leaf: Leaf) -> None:
    total = leaf(1.0) + leaf(2.0)
    other = leaf(3.0)
    assert (float(total.detach()), float(other.detach())) == (3.0, 3.0)


def test_a_call_that_fails_leaves_earlier_results(leaf: Leaf) -> None:
    @twofold.subgraph(strict=True)
    def either(number: float) -> Tensor:
        return torch.ones(()) * (1.0 / number)

    either(1.0)
    with pytest.raises(ZeroDivisionError):
        either(0.0)
    assert (float(either(2.0)), float(either(4.0))) == (0.5, 0.25)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_tensor_before_a_result_is_the_first_argument(leaf: Leaf, shape: tuple[int, ...]) -> None:
    @twofold.subgraph(strict=True)
    def pair(number: float) -> Tensor:
        return torch.ones(2) * number

    with pytest.raises(RuntimeError) as expected:
        torch.ones(shape) + torch.ones(2)
    with pytest.raises(RuntimeError) as found:
        (torch.ones(shape) + pair(1.0)).tolist()
    assert str(found.value).splitlines()[0] == str(expected.value)
    assert torch.equal(torch.ones(3, 1) + pair(2.0), torch.full((3, 2), 3.0))


def test_a_mode_hears_sums(leaf: Leaf) -> None:
    heard: list[object] = []

    class Hears(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(func)
            return func(*args, **(kwargs or {}))

    one, two = leaf(1.0), leaf(2.0)
    with Hears():
        total = one + two
    assert Tensor.add in heard
    assert float(total.detach()) == 3.0

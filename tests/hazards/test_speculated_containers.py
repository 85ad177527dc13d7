"""Containers and exceptions of a speculated call: several names for one, views, orders and words are Python's own.

Each function was computed otherwise once, without its Python.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.hazards.programs import Parts, assertion_without_words, same, training

STEPS = 14


class Kept:
    """What outlives the calls."""

    def __init__(self) -> None:
        self.items = [1, 2, 3]
        self.table = {"a": 0.5}
        self.number = 0


kept = Kept()


def dictionary_of_two_names() -> Any:
    first = second = {"x": 1}
    first |= {"y": 2}
    return second


def set_of_two_names() -> Any:
    first = second = {1, 2}
    first |= {3}
    first -= {1}
    return sorted(second)


def list_of_two_names() -> Any:
    first = second = [1]
    first *= 3
    return second


def view_of_keys() -> Any:
    table = {"a": 1}
    keys = table.keys()
    table["b"] = 2
    return list(keys), len(keys), "b" in keys


def view_that_is_iterated() -> Any:
    table = {"a": 1, "b": 2}
    found = []
    for _, value in table.items():
        table["b"] = 5
        found.append(value)
    return found


def class_of_a_view() -> Any:
    return type({1: 2}.keys()).__name__, isinstance(kept.table.items(), list), isinstance({}.values(), tuple)


def class_of_an_iterator() -> Any:
    return type(zip([1], [2], strict=True)).__name__, type(map(str, [1])).__name__


def unpacking_of_too_few() -> Any:
    try:
        first, *_rest, last = kept.items[:1]
    except ValueError as error:
        return str(error)
    return first, last


def unpacking_of_too_many() -> Any:
    try:
        first, second = [1, 2, 3]
    except ValueError as error:
        return str(error)
    return first, second


def item_that_a_tuple_lacks() -> Any:
    try:
        return (1, 2)[kept.number + 5]
    except IndexError as error:
        return str(error)


def item_that_a_list_does_not_remove() -> Any:
    try:
        [1].remove(4)
    except ValueError as error:
        return str(error)


def generator_that_is_used_up(parts: Parts) -> Any:
    parameters = parts.model.parameters()
    return len(list(parameters)), len(list(parameters))


def items_that_are_deleted() -> Any:
    del kept.items[0]
    kept.items.append(4)
    del kept.items[3:]
    return len(kept.items)


def run(compute: Callable[..., Any]) -> dict[str, Any]:
    takes_parts = compute.__code__.co_argcount

    def make(parts: Parts) -> Any:
        kept.__dict__.update(Kept().__dict__)
        if takes_parts:
            return lambda number, x, y: (parts.train(x, y).detach(), compute(parts))
        return lambda number, x, y: (parts.train(x, y).detach(), compute())

    return same(training(make), STEPS, engine="speculation")


@pytest.mark.parametrize(
    "compute",
    [
        dictionary_of_two_names, set_of_two_names, list_of_two_names, view_of_keys, view_that_is_iterated,
        class_of_a_view, class_of_an_iterator, unpacking_of_too_few, unpacking_of_too_many,
        item_that_a_list_does_not_remove, item_that_a_tuple_lacks, assertion_without_words, generator_that_is_used_up,
        items_that_are_deleted,
    ],
)  # fmt: skip
def test_speculated_call_computes_what_python_does(compute: Callable[..., Any]) -> None:
    report = run(compute)
    assert report["speculated_iterations"] > 4, report["refusals"]


def order_of_a_set() -> Any:
    return list({3, 1, 2}), [letter for letter in {"b", "a", "c"}]  # noqa: C416


def text_of_a_view() -> Any:
    return f"{kept.table.keys()} {({1: 2}).items()}"


def item_of_a_tuple_that_is_deleted() -> Any:
    pair: Any = (1, 2)
    try:
        del pair[0]
    except TypeError:
        return "refused"
    return pair


def name_that_is_not_bound() -> Any:
    try:
        if kept.number == 0:
            del later  # noqa: F821
        later = 1
    except UnboundLocalError:
        return "unbound"
    return later


@pytest.mark.parametrize(
    "compute",
    [
        order_of_a_set, text_of_a_view, item_of_a_tuple_that_is_deleted,
        name_that_is_not_bound,
    ],
)  # fmt: skip
def test_what_the_converter_does_not_follow_is_refused(compute: Callable[..., Any]) -> None:
    report = run(compute)
    assert report["speculated_iterations"] == 0
    assert report["refusals"]

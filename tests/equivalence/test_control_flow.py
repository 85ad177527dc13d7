"""Recursion with loops that are left, `try`, lambdas and helpers, decorated, against the same functions undecorated."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.convert.from_source import loops

from .control_flow_programs import PROGRAMS
from .recursive_programs import Tree
from .test_recursion import assert_equal, double_precision, random_tree, step, trees  # noqa: F401 - a fixture
from .test_top_down import plain, strict


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@given(batch=st.lists(trees(), min_size=1, max_size=2))
@settings(max_examples=5, deadline=None)
def test_equals_plain_python(name: str, batch: list[Tree]) -> None:
    assert_equal(step(PROGRAMS[name](strict), batch), step(PROGRAMS[name](plain), batch))


def differs(name: str) -> bool:
    decorated, plainly = PROGRAMS[name](strict), PROGRAMS[name](plain)
    numbers = random.Random(1)
    for _ in range(3):
        batch = [random_tree(numbers), Tree(0, 0, 1.0, [Tree(5), Tree(6), Tree(1, 2)])]
        try:
            assert_equal(step(decorated, batch), step(plainly, batch))
        except AssertionError:
            return True
    assert decorated.encode.unbatched == {}
    return False


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_batched(name: str) -> None:
    assert not differs(name)


def test_the_oracle_catches_a_continue_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops._Names, "guarded", lambda self, statements: [
        made for statement in statements for made in self._without(statement)
    ])  # fmt: skip
    assert differs("loops_that_are_left")


def test_the_oracle_catches_a_loop_that_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loops._Names.set

    def kept(self: Any, name: str, value: bool) -> Any:
        return original(self, name, value or (name == "go" and isinstance(self._loop, loops.ast.For)))

    monkeypatch.setattr(loops._Names, "set", kept)
    assert differs("loops_that_are_left")


def test_a_name_that_may_be_unassigned_after_a_loop_is_refused() -> None:
    import twofold

    @twofold.subgraph
    def last(node: Any) -> Any:
        while node is not None:
            found = torch.ones(1) * node.word
            node = None
        return found if node is None else last(node)

    assert last(Tree(3)).item() == 3
    assert last.refusal is not None
    assert "found may be unassigned" in str(last.refusal)

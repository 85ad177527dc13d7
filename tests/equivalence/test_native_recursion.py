"""Native levels from the first batch on, in float32, against plain Python: results, gradients, what nodes keep."""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import twofold
from twofold.backends import cpu_code
from twofold.run.recursion import NATIVE, parts

from .random_recursion import Text, dags, make, texts
from .recursive_programs import HIDDEN, PROGRAMS, Recursion, Tree
from .test_recursion import random_tree, step, trees

pytestmark = pytest.mark.skipif(cpu_code.lacks() is not None, reason=str(cpu_code.lacks()))
strict = functools.partial(twofold.subgraph, strict=True)

LEFT_TO_ATEN = {"method": "native_layer_norm", "handed_on": ""}
"""Programs without a level that is native, and what their report says of that; nothing where there are no levels."""


@pytest.fixture(scope="module", autouse=True)
def at_once() -> Iterator[None]:
    """Have native code compiled when it is first wanted, and wanted from the first batch on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PATIENCE", 0)
        patch.setattr(cpu_code, "start", lambda order: order.compile())
        yield


def assert_close(got: Any, expected: Any) -> None:
    """Both are losses and gradients, in float32: sums of some 50 terms of up to 10."""
    for mine, eager in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=5e-5)


def levels(encode: Any) -> Counter[str]:
    """Return what the levels of a function ran as, and in how many batches."""
    found: Counter[str] = Counter()
    for block in twofold.report(encode).to_dict()["recursions"][0]["blocks"]:
        found.update(block["levels_forward"])
        found.update(block["levels_backward"])
    return found


def compare(build: Callable[[Any], Recursion], rounds: int = 3, structures: list[Tree] | None = None) -> Any:
    """Check that a program does the same with and without; return the decorated function."""
    decorated, plainly = build(strict), build(lambda function: function)
    numbers = random.Random(1)
    for _ in range(rounds):
        batch = structures or [random_tree(numbers) for _ in range(3)]
        assert_close(step(decorated, batch), step(plainly, batch))
    return decorated.encode


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_plain_python(name: str) -> None:
    ran = levels(compare(PROGRAMS[name]))
    if name in LEFT_TO_ATEN:
        assert NATIVE not in ran
        assert LEFT_TO_ATEN[name] in " ".join(ran)
    else:
        assert ran[NATIVE] >= 2


@pytest.mark.slow
@given(texts(), st.lists(st.one_of(trees(), dags()), min_size=1, max_size=3))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_programs_equal_plain_python(text: Text, structures: list[Tree]) -> None:
    compare(lambda decorate: make(text, decorate), rounds=2, structures=structures)


def test_what_is_kept_at_each_node_equals_plain_python() -> None:
    def run(decorate: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(HIDDEN, HIDDEN)
        kept: list[Tensor] = []

        @decorate
        def encode(node: Tree) -> Tensor:
            state = torch.full((1, HIDDEN), node.weight)
            for child in node.children:
                state = state + encode(child)
            state = layer(state).tanh()
            kept.append(state)
            return state

        numbers, found = random.Random(2), list[Tensor]()
        for _ in range(3):
            layer.zero_grad()
            kept.clear()
            states = [encode(random_tree(numbers)) for _ in range(3)]
            torch.cat([*states, *kept[::2]]).square().sum().backward()
            found += [*(state.detach().clone() for state in kept), layer.weight.grad.clone(), layer.bias.grad.clone()]
        if decorate is strict:
            assert levels(encode)[NATIVE] >= 2
        return found

    torch.testing.assert_close(run(strict), run(lambda function: function), rtol=1e-4, atol=5e-5)


SEEN = "binary_tree_lstm"
FAULTS = {
    "a child's row is another's": ("[r] *", "[0] *", SEEN),
    "a gradient is overwritten": ("to[i] += from[i]", "to[i] = from[i]", "memoised"),
    "a product keeps nothing of its bias": ("&kept,", "&none,", SEEN),
    "a gate is another function": ("sigmoid(p", "tangent(p", SEEN),
    "the last row is left out": ("r < n; r++", "r < n - 1; r++", SEEN),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches_a_fault_in_the_code(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, name = FAULTS[fault]
    original, planted = cpu_code.ordered, list[str]()

    def faulty(text: str) -> Any:
        if right in text:
            planted.append(text)
        return original(text.replace("float one = 1.0f;", "float one = 1.0f, none = 0.0f;").replace(right, wrong))

    monkeypatch.setattr(cpu_code, "ordered", faulty)
    shared = random_tree(random.Random(1))
    with pytest.raises(AssertionError):
        compare(PROGRAMS[name], structures=[Tree(1, 1, 1.0, [shared, shared, shared, Tree(2)])])
    assert planted

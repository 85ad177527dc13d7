"""Every contender of `benchmarks.trees` computes plain recursion's loss and gradients: else its speed means nothing.

DyNet is among them where its wheels can be installed, or where TWOFOLD_DYNET_PYTHON names an interpreter that has it.
"""

import copy
import os
import random
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.programs.tree_lstm import TreeLSTM, recursion
from benchmarks.trees import level_batched
from benchmarks.trees import measure as measure_module
from benchmarks.trees.contenders import NAMES, Contender, Skipped, open_contender
from benchmarks.trees.data import BinaryNode, shaped_tree
from benchmarks.trees.level_batched import Plan, loss_by_autograd, loss_by_hand, make_plan
from benchmarks.trees.measure import Measurement, format_table, measure

LossOf = Callable[[TreeLSTM, Plan], torch.Tensor]

WORDS, LABELS, WIDTH, HIDDEN = 12, 4, 6, 5
DYNET_PYTHON = os.environ.get("TWOFOLD_DYNET_PYTHON")
CPU = torch.device("cpu")


def make_model(dtype: torch.dtype = torch.float32) -> TreeLSTM:
    torch.manual_seed(0)
    return TreeLSTM(WORDS, LABELS, WIDTH, HIDDEN).to(dtype)


def make_trees(leaves: list[int], seed: int = 0) -> list[BinaryNode]:
    draw = random.Random(seed)
    return [shaped_tree("random", count, WORDS, LABELS, draw) for count in leaves]


def gradients(loss: torch.Tensor, model: TreeLSTM) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_equals_recursion(loss_of: LossOf, trees: list[BinaryNode], plan: Plan) -> None:
    """In float64, so that the tolerance leaves no room for a mistake."""
    model = make_model(torch.float64)
    expected = sum(recursion(model)(tree)[2] for tree in trees)
    loss = loss_of(model, plan)
    torch.testing.assert_close(loss, expected)
    # 2.5 times, in case the gradient that comes in is ignored.
    torch.testing.assert_close(gradients(2.5 * loss, model), gradients(2.5 * expected, model))


@pytest.mark.parametrize("loss_of", [loss_by_autograd, loss_by_hand])
@settings(max_examples=15, deadline=None)
@given(leaves=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_level_batching_equals_recursion(loss_of: LossOf, leaves: list[int], seed: int) -> None:
    leaves[0] += 1  # at least one inner node: else autograd leaves its parameters without a gradient
    trees = make_trees(leaves, seed)
    assert_equals_recursion(loss_of, trees, make_plan(trees, CPU))


@pytest.mark.parametrize("loss_of", [loss_by_autograd, loss_by_hand])
@pytest.mark.parametrize("part", ["labels", "words"])
def test_a_fault_in_the_plan_is_caught(loss_of: LossOf, part: str) -> None:
    trees = make_trees([7, 4])
    plan = make_plan(trees, CPU)
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_recursion(loss_of, trees, replace(plan, **{part: getattr(plan, part).roll(1)}))


def test_a_fault_in_the_backward_pass_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_batched, "sigmoid_backward", level_batched.tanh_backward)
    trees = make_trees([7, 4])
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_recursion(loss_by_hand, trees, make_plan(trees, CPU))


@contextmanager
def opened(name: str, model: TreeLSTM, trees: list[BinaryNode]) -> Generator[Contender, None, None]:
    with ExitStack() as stack:
        try:
            contender = stack.enter_context(open_contender(name, model, trees, DYNET_PYTHON))
        except Skipped as reason:
            pytest.skip(str(reason))
        yield contender


def assert_same_gradients(contender: Contender, model: TreeLSTM, trees: list[BinaryNode]) -> None:
    batch = range(1, len(trees))
    with open_contender("plain", model, trees) as plain:
        expected_loss, expected = plain.gradients(batch)
    loss, found = contender.gradients(batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_contender_equals_plain_recursion(name: str) -> None:
    model, trees = make_model(), make_trees([9, 3, 14, 1, 6])
    with opened(name, model, trees) as contender:
        assert_same_gradients(contender, model, trees)
        assert_same_gradients(contender, model, trees)  # nothing accumulates


@pytest.mark.parametrize("name", ["plain", "dynet", "level_by_hand"])
def test_a_contender_with_other_parameters_is_caught(name: str) -> None:
    model, trees = make_model(), make_trees([9, 3, 14])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.bias[0] += 0.01
    with opened(name, other, trees) as contender, pytest.raises(AssertionError, match=r"not close|approx"):
        assert_same_gradients(contender, model, trees)


@pytest.mark.parametrize("name", ["plain", "dynet", "level_autograd", "level_by_hand", "level_by_hand_cached"])
def test_contenders_train_alike_and_forward_changes_nothing(name: str) -> None:
    model, trees = make_model(), make_trees([9, 3, 14, 5])
    batches = [range(2), range(2, 4)]
    with opened("plain", model, trees) as plain, opened(name, model, trees) as contender:
        plain.seconds("train", batches, passes=3)
        assert contender.seconds("forward", batches) > 0.0
        contender.seconds("train", batches, passes=3)
        loss, expected = contender.gradients(range(4))[0], plain.gradients(range(4))[0]
        assert loss == pytest.approx(expected, rel=1e-5)


def test_measurement_has_a_row_for_all_contenders_that_run_and_a_reason_for_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure_module, "ROUND_SECONDS", 0.01)
    trees = make_trees([3, 4, 5])
    measurement = Measurement(["plain", "level_by_hand", "nobody"], make_model(), trees, [1, 2], rounds=2)
    document = measure(measurement)
    assert "unknown contender" in document["contenders"].pop("nobody")["error"]
    assert [(row["batch"], row["kind"]) for row in document["results"]] == [
        (1, "forward"), (1, "train"), (2, "forward"), (2, "train")
    ]  # fmt: skip
    for row in document["results"]:
        assert set(row["contenders"]) == {"plain", "level_by_hand"}
        assert all(len(result["rounds_ms"]) == 2 for result in row["contenders"].values())
    document["contenders"]["nobody"] = {"skipped": "it is not there"}
    assert "skipped: it is not there" in format_table("made up", document)

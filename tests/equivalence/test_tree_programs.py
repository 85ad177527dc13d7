"""The recursive programs learn in plain Python, and are the same under twofold as without it."""

from collections.abc import Iterable
from functools import partial

import pytest
import torch

import twofold
from benchmarks.programs import PROGRAMS, RECURSIVE_NAMES
from benchmarks.programs.tree_training import undecorated
from tests.differential import assert_same, function, seed_everything

CPU = torch.device("cpu")
STEPS = 80


def mean(losses: Iterable[float]) -> float:
    values = list(losses)
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURSIVE_NAMES)
def test_plain_recursion_learns(name: str) -> None:
    seed_everything(0)
    program = PROGRAMS[name]("small", CPU)
    losses = [program.step(*program.batches(0)).item() for _ in range(STEPS)]
    assert mean(losses[-10:]) < 0.8 * mean(losses[:10])


@pytest.mark.parametrize("name", RECURSIVE_NAMES)
def test_every_parameter_that_is_trained_has_a_gradient(name: str) -> None:
    seed_everything(0)
    program = PROGRAMS[name]("small", CPU)
    program.step(*program.batches(0))
    trained = {n: p for n, p in program.modules["model"].named_parameters() if p.requires_grad}
    assert trained
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", RECURSIVE_NAMES)
def test_recursion_inside_a_function_is_exact(name: str) -> None:
    configuration = function(numerics="exact", background=False)
    report = assert_same(partial(PROGRAMS[name], "small", CPU), 3, configuration)
    assert report["iterations"] == 3


@pytest.mark.parametrize("name", RECURSIVE_NAMES)
def test_the_decorator_stands_on_the_recursive_function(name: str) -> None:
    calls = 0

    def counting(recursive):
        def call(*arguments):
            nonlocal calls
            calls += 1
            return recursive(*arguments)

        return call

    seed_everything(0)
    plain = PROGRAMS[name]("small", CPU, decorate=undecorated)
    seed_everything(0)
    decorated = PROGRAMS[name]("small", CPU, decorate=counting)
    assert torch.equal(plain.step(*plain.batches(0)), decorated.step(*decorated.batches(0)))
    assert calls > len(plain.batches(0)[0])  # the function's calls of itself are seen too


@pytest.mark.skipif(not hasattr(twofold, "subgraph"), reason="this version of twofold has no subgraph")
@pytest.mark.parametrize("name", RECURSIVE_NAMES)
def test_recursion_under_subgraph_equals_plain_recursion(name: str) -> None:
    seed_everything(0)
    plain = PROGRAMS[name]("small", CPU)
    seed_everything(0)
    batched = PROGRAMS[name]("small", CPU, decorate=twofold.subgraph)
    for index in range(4):
        expected, found = plain.step(*plain.batches(index)), batched.step(*batched.batches(index))
        torch.testing.assert_close(found.detach() + 0, expected.detach())
    torch.testing.assert_close(batched.modules["model"].state_dict(), plain.modules["model"].state_dict())

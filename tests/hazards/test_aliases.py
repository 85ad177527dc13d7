"""Tensors that a unit is given which are apart in one unit, and show the same memory in another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import Parts, runs_as_graph, same, summary, training
from twofold.capture import match
from twofold.run.speculation import unit

STEPS = 18

Pair = Callable[[int, torch.Tensor, torch.Tensor], Any]


def always(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    return x, x.detach()


def at_first(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    return x, x.detach() if number < 6 else y


def now_and_then(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    return x, x.detach() if number % 3 == 1 else y


def one_object(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    return x, x if number % 3 == 1 else y


def in_another_form(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    """It is no view in the same form, so that each is a value of its own."""
    return x, x[:, [1, 0, 2, 3]] if number % 3 == 1 else x.t().contiguous().t()


def made(pair: Pair) -> Any:
    """An autoencoder, which often is its own target."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def make(parts: Parts) -> Callable[..., Any]:
        def step(x: torch.Tensor, target: torch.Tensor) -> Any:
            return parts.train(x, target).detach()

        return step

    def build() -> Any:
        program = training(make, model=model)()
        batches = program.batches
        pool = [torch.randn(6, 4) for _ in range(4)]

        def paired(number: int) -> Any:
            _, x, _ = batches(number)
            return pair(number, x, pool[number % 4])

        program.batches = paired
        return program

    return build


PAIRS = [always, at_first, now_and_then, one_object, in_another_form]


@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
@pytest.mark.parametrize("pair", PAIRS)
def test_batch_is_its_own_target(pair: Pair, engine: str) -> None:
    if engine == "program":
        runs_as_graph(made(pair), STEPS, "program", at_least=STEPS // 2)
        return
    report = runs_as_graph(made(pair), STEPS, engine=engine, at_least=STEPS // 2)
    assert report["paths"] <= 2, summary(report)
    if engine == "speculation":
        assert report["speculated_iterations"] >= STEPS // 3, summary(report)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_harness_catches_what_is_taken_for_one_tensor(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "_compile_match", match._compile_match.__wrapped__)  # those compiled before are kept
    monkeypatch.setattr(match, "memory_key", lambda _: 0)
    monkeypatch.setattr(unit, "memory_key", lambda _: 0)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(made(at_first), STEPS, engine=engine)


@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
def test_two_constants_of_one_memory_are_parted(engine: str) -> None:
    """The second is given memory of its own between two units."""

    def make(parts: Parts) -> Callable[..., Any]:
        first = torch.ones(4)
        second = parts.seen["second"] = first.detach()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x * first + second, y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 8:
            parts.seen["second"].data = torch.full((4,), 2.0)

    factory = training(make, between=between)
    if engine == "program":
        same(factory, STEPS, "program")
    else:
        runs_as_graph(factory, STEPS, engine=engine, at_least=STEPS // 2)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_constant_is_now_and_then_the_batch(engine: str) -> None:
    def build() -> Any:
        constant = torch.randn(6, 3)

        def make(parts: Parts) -> Callable[..., Any]:
            def step(x: torch.Tensor, y: torch.Tensor) -> Any:
                parts.optimizer.zero_grad()
                output = parts.model(x)
                loss = F.mse_loss(output, constant) + F.l1_loss(output, y)
                loss.backward()
                parts.optimizer.step()
                return loss.detach()

            return step

        program = training(make)()
        batches = program.batches

        def given(number: int) -> Any:
            _, x, y = batches(number)
            return x, constant.detach() if number in (1, 7, 8, 13) else y.clone()

        program.batches = given
        return program

    runs_as_graph(build, STEPS, engine=engine, at_least=STEPS // 2)

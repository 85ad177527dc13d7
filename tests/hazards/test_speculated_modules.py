"""Modules that a speculated call sets before it runs them: what they compute is what the call has set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.hazards.programs import Parts, same, summary, training

Step = Callable[..., Any]


def speculates(factory: Any, steps: int, at_least: int) -> dict[str, Any]:
    report = same(factory, steps, engine="speculation")
    assert report["speculated_iterations"] >= at_least, {**summary(report), "refusals": report["refusals"]}
    return report


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))


@pytest.mark.parametrize("period", [2, 3, 7])
def test_mode_is_set_within_the_call(period: int) -> None:
    """The mode that the last call left is the other one each time it changes."""

    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % period == period - 1:
                parts.model.eval()
                with torch.no_grad():
                    return parts.loss(x, y)
            parts.model.train()
            return parts.train(x, y).detach()

        return step

    report = speculates(training(make, model=network), 40, at_least=24)
    assert report["discards"] == 0


def test_attribute_of_a_leaf_is_set_within_the_call() -> None:
    def make(parts: Parts) -> Step:
        dropout: Any = parts.model[2]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            dropout.p = 0.5 if number % 2 else 0.1
            loss = parts.train(x, y).detach()
            dropout.p = 0.9
            return loss

        return step

    speculates(training(make, model=network), 30, at_least=16)


def test_hook_comes_between_two_calls_that_set_the_mode() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.model.train()
            return parts.train(x, y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 10:
            parts.seen["heard"] = 0

            def hear(*_: Any) -> None:
                parts.seen["heard"] += 1

            between.handle = parts.model[1].register_forward_hook(hear)  # type: ignore[attr-defined]
        if number == 13:
            between.handle.remove()  # type: ignore[attr-defined]

    speculates(training(make, model=network, between=between), 24, at_least=8)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["optimizer", "model"])
def test_gradients_are_cleared_after_the_step(of: str, set_to_none: bool) -> None:
    """And sometimes they are not, so that the next call adds to them."""

    def make(parts: Parts) -> Step:
        parts.seen["updates"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()
            parts.seen["updates"] += 1
            if number % 3:
                owner = parts.optimizer if of == "optimizer" else parts.model
                owner.zero_grad(set_to_none=set_to_none)
            return loss.detach()

        return step

    speculates(training(make), 40, at_least=20)

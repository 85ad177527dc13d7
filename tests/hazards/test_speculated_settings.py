"""Optimizers that a speculated call sets before they step: each step goes by what its call has set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from tests.hazards.programs import Parts, runs_as_graph, same, summary, training

Step = Callable[..., Any]


def adam(model: Any) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def speculates(factory: Any, steps: int = 40, at_least: int = 20) -> dict[str, Any]:
    report = same(factory, steps, engine="speculation")
    assert report["speculated_iterations"] >= at_least, {**summary(report), "refusals": report["refusals"]}
    return report


def test_rate_of_every_call() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["calls"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["calls"] += 1
            for group in parts.optimizer.param_groups:
                parts.seen["before"] = group["lr"]
                print("it was", group["lr"])
                group["lr"] = 0.01 / parts.seen["calls"]
                print("it is", group["lr"])
            return parts.train(x, y).detach()

        return step

    speculates(training(make, optimizer=adam))


def test_rate_that_is_set_again_after_the_step() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            group = parts.optimizer.param_groups[0]
            group["lr"] = 0.01 + 0.001 * number
            group["weight_decay"] = 0.1
            loss = parts.train(x, y).detach()
            group["lr"] = group["lr"] / 2
            group["weight_decay"] = 0.0
            return loss, group["lr"]

        return step

    speculates(training(make, optimizer=adam))


def test_scheduler_steps_first() -> None:
    def make(parts: Parts) -> Step:
        parts.optimizer.step()  # else the scheduler warns
        schedule = torch.optim.lr_scheduler.ExponentialLR(parts.optimizer, 0.9)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            schedule.step()
            return parts.train(x, y).detach(), schedule.get_last_lr()

        return step

    speculates(training(make, optimizer=adam))


@pytest.mark.parametrize("at", [20, 21, 30])
def test_setting_is_taken_back(at: int) -> None:
    """A decision on the loss goes the other way before the step: no rate of an undone call is left."""

    def make(parts: Parts) -> Step:
        parts.seen["high"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            group = parts.optimizer.param_groups[0]
            group["lr"] = group["lr"] * 0.9
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            if loss.item() > 50:
                parts.seen["high"] += 1
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number == at else 0.0)

    report = speculates(training(make, optimizer=adam, between=between))
    assert report["discards"] >= 1


def test_rate_by_what_the_unit_computes() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.param_groups[0]["lr"] = 0.01 / (1.0 + loss.item())
            parts.optimizer.step()
            return loss.detach()

        return step

    report = same(training(make, optimizer=adam), 20, engine="speculation")
    assert {entry["code"] for entry in report["refusals"]} == {"late_decision"}


def test_group_that_is_replaced_is_refused() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            group = parts.optimizer.param_groups[0]
            group.update(lr=0.01 + 0.001 * number)
            return parts.train(x, y).detach()

        return step

    report = same(training(make, optimizer=adam), 20, engine="speculation")
    assert {entry["code"] for entry in report["refusals"]} == {"unsupported_object"}


def test_layout_is_asked_after_the_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            turned = (x * 2).t()
            parts.optimizer.zero_grad()
            loss.backward()
            parts.optimizer.step()
            return turned.stride(), turned.is_contiguous(), turned.shape

        return step

    runs_as_graph(training(make), 10, engine="speculation")

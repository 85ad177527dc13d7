"""The known ways in which plain tracing goes wrong: a call is recorded once, and what it decided is decided for ever.

Each program here is the same under every engine as in eager execution, and each catches a recorder that takes one call
for all calls (`tests/plain_replay.py`), by the name of what it got wrong.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.differential import Factory, compare, eager, run
from tests.hazards.programs import Parts, runs_as_graph, sgd, training
from tests.plain_replay import plain_replay

ENGINES = ("auto", "coexecution", "speculation")
STEPS = 14
TOTAL = {"calls": 0}
calls_of_module = 0


def plain(parts: Parts) -> Callable[..., Any]:
    return lambda number, x, y: parts.train(x, y).detach()


class Branching(nn.Module):
    """Its own branch on the mode, as a normalisation has one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(x))
        if self.training:
            x = x + 0.1 * self.linear.weight.sum()
        return x


class Recurrent(nn.Module):
    """Goes on from the state in which the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.RNNCell(4, 5), nn.Linear(5, 3)
        self.state: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.cell(x, self.state)
        self.state = state.detach()
        return self.last(state)


def train_or_evaluate(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number % 4 == 3:
            parts.model.eval()
            with torch.no_grad():
                return parts.loss(x, y)
        parts.model.train()
        return parts.train(x, y).detach()

    return step


def append_to_a_list(parts: Parts) -> Callable[..., Any]:
    losses = parts.seen.setdefault("losses", [])

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.train(x, y).detach()
        losses.append(loss)
        return loss

    return step


def count_in_an_attribute(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.model.calls = getattr(parts.model, "calls", 0) + 1
        return parts.train(x, y).detach()

    return step


def write_to_an_object_of_the_module(parts: Parts) -> Callable[..., Any]:
    TOTAL["calls"] = 0
    parts.seen["total"] = TOTAL

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        TOTAL["calls"] += 1
        return parts.train(x, y).detach() * TOTAL["calls"]

    return step


def rebind_a_global(parts: Parts) -> Callable[..., Any]:
    global calls_of_module
    calls_of_module = 0

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        global calls_of_module
        calls_of_module += 1
        return parts.train(x, y).detach(), calls_of_module

    return step


def say_something(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.train(x, y).detach()
        print("batch", number, "of", len(x))
        return loss

    return step


def draw_a_coin(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if random.random() < 0.5:
            x = -x
        return parts.train(x, y).detach()

    return step


def draw_a_number(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        return parts.train(x * random.choice((0.5, 1.0, 2.0)), y).detach()

    return step


def change_a_closure(parts: Parts) -> Callable[..., Any]:
    scale = 1.0

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        nonlocal scale
        loss = parts.train(x * scale, y).detach()
        if number % 5 == 4:
            scale = 2.0 if scale == 1.0 else 1.0
        return loss

    return step


def change_a_default(parts: Parts) -> Callable[..., Any]:
    def scaled(x: torch.Tensor, by: list[float] = [1.0]) -> torch.Tensor:  # noqa: B006 - that it changes is the test
        return x * by[0]

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.train(scaled(x), y).detach()
        scaled.__defaults__[0][0] = 1.0 + number // 6  # type: ignore[index]
        return loss

    return step


def branch_on_a_tensor(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number >= 6:  # what the first calls saw does not last
            x = x + 5.0
        if x.mean() > 2.0:
            x = x / 5.0
        return parts.train(x, y).detach()

    return step


def divide_by_the_batch(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.zero_grad()
        loss = F.mse_loss(parts.model(x), y, reduction="sum") / len(x)
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def change_the_learning_rate(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.param_groups[0]["lr"] = 0.1 if number < 6 else 0.01
        return parts.train(x, y).detach()

    return step


def change_the_optimizer(parts: Parts) -> Callable[..., Any]:
    second = torch.optim.SGD(parts.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number == 6:
            parts.optimizer = second
        return parts.train(x, y).detach()

    return step


@dataclass(frozen=True)
class Hazard:
    """A program, and the name of a fact that plain tracing gets wrong."""

    factory: Factory
    wrong: str


HAZARDS = {
    "train or evaluate": Hazard(training(train_or_evaluate, model=Branching), "attributes net['training']"),
    "state carried across calls": Hazard(training(plain, model=Recurrent), "attributes net['state']"),
    "list": Hazard(training(append_to_a_list), "observed seen['losses']"),
    "attribute": Hazard(training(count_in_an_attribute), "attributes net['calls']"),
    "object of the module": Hazard(training(write_to_an_object_of_the_module), "observed seen['total']['calls']"),
    "global": Hazard(training(rebind_a_global), "result[1]"),
    "print": Hazard(training(say_something), "printed"),
    "coin": Hazard(training(draw_a_coin), "random of Python"),
    "random number": Hazard(training(draw_a_number), "random of Python"),
    "closure": Hazard(training(change_a_closure), "result"),
    "default": Hazard(training(change_a_default), "result"),
    "branch on a tensor": Hazard(training(branch_on_a_tensor), "parameter net.0.weight"),
    "shape": Hazard(training(divide_by_the_batch, sizes=lambda number: 3 if number % 5 == 4 else 6), "result"),
    "learning rate": Hazard(training(change_the_learning_rate), "parameter net.0.weight"),
    "optimizer": Hazard(training(change_the_optimizer), "parameter net.0.weight"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HAZARDS)
def test_what_changes_after_the_first_calls_is_seen(name: str, engine: str) -> None:
    runs_as_graph(HAZARDS[name].factory, STEPS, engine=engine)


@pytest.mark.parametrize("name", HAZARDS)
def test_plain_tracing_is_caught(name: str) -> None:
    factory = HAZARDS[name].factory
    differences = compare(run(factory, STEPS, eager), run(factory, STEPS, plain_replay))
    assert any(f": {HAZARDS[name].wrong}: " in difference for difference in differences), differences


@pytest.mark.parametrize("optimizer", [sgd, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)])
def test_plain_tracing_is_right_about_programs_that_never_change(optimizer: Callable[..., Any]) -> None:
    factory = training(plain, optimizer=optimizer)
    assert compare(run(factory, STEPS, eager), run(factory, STEPS, plain_replay)) == []

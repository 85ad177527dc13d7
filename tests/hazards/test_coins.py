"""Units whose branches are coins: what the coins of the unit before have left in `.grad` is nothing to most of them."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.hazards.programs import MODES, MakeStep, Mode, Parts, same, summary, training
from twofold.capture.gradients import EntryGradients
from twofold.run.installed import Installed
from twofold.run.speculation import cache
from twofold.run.speculation.cache import GraphCache

STEPS = 60
CALLS = 72
"""To see what one step leaves to the next. That nothing compares gradients with those that a path began with, or that
none are cleared, is seen in the 61st call at the latest; in 120, by no other steps of `FATES`."""
ENGINES = ["coexecution", "speculation"]


class Blocks(nn.Module):
    """Residual blocks of which the coins leave some out, and a parameter that nothing ever uses."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.last = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if random.random() < 0.5:
                x = x + torch.tanh(block(x))
        return self.last(x)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)


def coins(make: MakeStep, **options: Any) -> Any:
    return training(make, model=Blocks, optimizer=momentum, **options)


def by_hand(parts: Parts) -> None:
    for parameter in parts.model.parameters():
        parameter.grad = None


def by_deletion(parts: Parts) -> None:
    for parameter in parts.model.parameters():
        del parameter.grad


DROPS: dict[str, Callable[[Parts], None]] = {
    "optimizer": lambda parts: parts.optimizer.zero_grad(),
    "set_to_none": lambda parts: parts.optimizer.zero_grad(set_to_none=True),
    "positional": lambda parts: parts.optimizer.zero_grad(True),
    "model": lambda parts: parts.model.zero_grad(),
    "by hand": by_hand,
    "by deletion": by_deletion,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("drop", DROPS)
def test_coins_make_a_path_a_sequence_and_no_more(drop: str, is_last: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if not is_last:
                DROPS[drop](parts)
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()
            if is_last:
                DROPS[drop](parts)
            return loss.detach()

        return step

    report = same(coins(make), STEPS, mode, engine="coexecution")
    # In `program`, a unit begins behind a step, so that the first and the last are others.
    assert report["paths"] <= (4 if mode == "function" else 6), summary(report)
    assert report["graph_iterations"] > STEPS * 2 // 3, summary(report)


def test_coins_choose_among_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the graphs that foresee the same coin one is tried: with three coins, four of eight at most."""
    tries: list[int] = []
    call, run = GraphCache.call, cache._run

    def counting(self: GraphCache, *given: Any) -> Any:
        tries.append(0)
        return call(self, *given)

    def count(*given: Any) -> Any:
        tries[-1] += 1
        return run(*given)

    monkeypatch.setattr(GraphCache, "call", counting)
    monkeypatch.setattr(cache, "_run", count)
    build = training(dropped_by_model, model=lambda: Blocks(3), optimizer=momentum)
    report = same(build, STEPS * 3, engine="speculation")
    assert report["paths"] == 8, summary(report)
    assert report["speculated_iterations"] > STEPS * 2, summary(report)
    assert max(tries) == 4


def test_harness_catches_gradients_that_are_taken_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compares the gradients that are there with those that the path began with."""
    take = EntryGradients.take_first_looks
    monkeypatch.setattr(EntryGradients, "take_first_looks", lambda self: take(self)[:0])
    with pytest.raises(AssertionError, match="differences from eager"):
        same(coins(FATES["read first"]), STEPS, engine="coexecution")


def test_harness_catches_gradients_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is dropped and not made again stays."""
    prepare = Installed.__post_init__

    def clear_nothing(self: Installed) -> None:
        prepare(self)
        self.exits = replace(self.exits, cleared=())

    monkeypatch.setattr(Installed, "__post_init__", clear_nothing)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(coins(FATES["dropped by the model"]), STEPS, engine="coexecution")


# ---- where gradients matter after all ------------------------------------------------------------------------


def zeroed(parts: Parts) -> Callable[..., Any]:
    """A zeroed gradient stays a tensor and a missing one stays None, so which there are matters."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.zero_grad(set_to_none=number % 7 == 6)
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return loss.detach(), [p.grad is None for p in parts.model.parameters()]

    return step


def dropped_by_model(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.model.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def read_first(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        norms = [None if p.grad is None else p.grad.norm() for p in parts.model.blocks.parameters()]
        parts.optimizer.zero_grad()
        between = [p.grad for p in parts.model.parameters()]
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return norms, between, loss.detach()

    return step


def accumulated(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.loss(x, y) / 2
        loss.backward()
        if number % 2:
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        return loss.detach()

    return step


def accumulated_and_read(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.loss(x, y) / 2
        shown = loss.item()
        loss.backward()
        if number % 3 == 2:
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        return shown

    return step


def clipped(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parts.model.parameters(), 0.1)
        parts.optimizer.step()
        return norm, loss.detach()

    return step


def stepped_before(parts: Parts) -> Callable[..., Any]:
    """The optimizer takes the gradients that the unit before has left."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        return loss.detach()

    return step


def kept(parts: Parts) -> Callable[..., Any]:
    """The program holds gradients across `zero_grad`, and reads them; those that were zeroed in place go on."""
    parts.seen["held"] = []

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        held = parts.seen["held"]
        parts.optimizer.zero_grad(set_to_none=number % 5 != 4)
        loss = parts.loss(x, y)
        if held:
            loss = loss + held[-1].square().sum()
        loss.backward()
        parts.optimizer.step()
        held.append(parts.model.last.weight.grad)
        del held[:-3]
        return loss.detach()

    return step


def put_there(parts: Parts) -> Callable[..., Any]:
    """A gradient of the program's own, before and after the one of the unit."""
    mine = parts.seen["mine"] = torch.full((3,), 0.5)

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        bias = parts.model.last.bias
        parts.optimizer.zero_grad()
        bias.grad = mine if number % 3 else None
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        if number % 2:
            bias.grad = mine
        mine.mul_(0.9)
        return loss.detach(), bias.grad

    return step


def two_optimizers(parts: Parts) -> Callable[..., Any]:
    """Each drops its own gradients, and one of them only now and then, and steps outside of the graph."""
    other = torch.optim.RMSprop(parts.model.last.parameters(), lr=0.01)
    first = torch.optim.Adam(parts.model.blocks.parameters(), lr=0.01)

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        first.zero_grad()
        if number % 3:
            other.zero_grad()
        parts.loss(x, y).backward()
        first.step()
        loss = parts.loss(x, y)
        loss.backward()
        if number % 4:
            other.step()
        return loss.detach()

    return step


def stepped_outside(parts: Parts) -> Callable[..., Any]:
    """An optimizer steps outside of the graph, with gradients where there were none, before a value is read."""
    first = torch.optim.Adam(parts.model.blocks.parameters(), lr=0.01)
    other = torch.optim.Adam(parts.model.last.parameters(), lr=0.01)

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = parts.loss(x, y)
        loss.backward(retain_graph=True)
        first.step()
        shown = (loss * 2).item()
        other.step()
        parts.model.zero_grad()
        return shown, loss.detach()

    return step


def raising(parts: Parts) -> Callable[..., Any]:
    """Exceptions before and after the gradients are dropped, and before and after they are made again."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        before = [p.grad for p in parts.model.parameters()] if number % 8 == 7 else []
        if number % 12 == 11:
            raise ValueError("before")
        parts.optimizer.zero_grad()
        if number % 12 == 9:
            raise ValueError("dropped")
        loss = parts.loss(x, y)
        if number % 12 == 7:
            raise ValueError("forward")
        loss.backward()
        if number % 12 == 5:
            raise ValueError("backward")
        parts.optimizer.step()
        return loss.detach(), before

    return step


def surprised(parts: Parts) -> Callable[..., Any]:
    """What a fetch gives decides, after gradients were dropped or zeroed, and some units are undone."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parts.optimizer.zero_grad(set_to_none=number % 20 < 10)
        loss = parts.loss(x, y)
        loss.backward()
        if loss.item() > 1.0 and number % 2:
            parts.optimizer.zero_grad(set_to_none=False)
            loss = parts.loss(x * 0.5, y)
            loss.backward()
        parts.optimizer.step()
        return loss.detach(), [p.grad is None for p in parts.model.parameters()]

    return step


def frozen_now_and_then(parts: Parts) -> Callable[..., Any]:
    """What is frozen between units keeps its gradient, which an optimizer goes on to take, until it is dropped."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number % 6 != 3:
            parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def freeze(number: int, parts: Parts) -> None:
    parts.model.last.weight.requires_grad_(number % 6 < 3)


def looked_at_by_no_step(parts: Parts) -> Callable[..., Any]:
    """A forward alone, between units that train: it leaves gradients as they are."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number % 3 == 0:
            with torch.no_grad():
                return parts.loss(x, y)
        if number % 3 == 1:
            parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def differentiated_by_hand(parts: Parts) -> Callable[..., Any]:
    """`torch.autograd.grad` neither reads nor writes gradients of leaves."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        parameters = list(parts.model.last.parameters())
        found = torch.autograd.grad(parts.loss(x, y), parameters)
        if number % 4 == 0:
            parts.optimizer.zero_grad()
        for parameter, gradient in zip(parameters, found, strict=True):
            if number % 4 < 2:
                parameter.grad = gradient
        parts.optimizer.step()

    return step


FATES: dict[str, MakeStep] = {
    "zeroed": zeroed,
    "dropped by the model": dropped_by_model,
    "read first": read_first,
    "accumulated": accumulated,
    "accumulated and read": accumulated_and_read,
    "clipped": clipped,
    "stepped before": stepped_before,
    "kept": kept,
    "put there": put_there,
    "two optimizers": two_optimizers,
    "stepped outside": stepped_outside,
    "raising": raising,
    "surprised": surprised,
    "frozen now and then": frozen_now_and_then,
    "looked at by no step": looked_at_by_no_step,
    "differentiated by hand": differentiated_by_hand,
}


MANY_PATHS = {"accumulated and read", "stepped before", "stepped outside"}
"""In `program` three rounds are one unit of 64 paths, and history crosses steps; a call ends with its last step."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fate", FATES)
def test_gradients_are_eagers(fate: str, engine: str, mode: Mode) -> None:
    between = freeze if fate == "frozen now and then" else None
    report = same(coins(FATES[fate], between=between), CALLS, mode, engine=engine)
    if fate not in MANY_PATHS and not (between and mode == "program"):  # freezing is a part of the loop there
        assert report["graph_iterations"] > CALLS // 8, summary(report)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fate", FATES)
def test_gradients_are_changed_outside(fate: str, engine: str) -> None:
    """Between two units, gradients are put on some parameters, and taken off others."""

    def between(number: int, parts: Parts) -> None:
        if number % 5 == 4:
            for index, parameter in enumerate(parts.model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1) if (index + number) % 3 == 0 else None

    same(coins(FATES[fate], between=between), CALLS, engine=engine)

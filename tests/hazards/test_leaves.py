"""Leaves that a unit makes, their gradients, and tensors that take up autograd history after they were made."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import MODES, Mode, Parts, runs_as_graph, same, stays_eager, training

Compute = Callable[[Parts, torch.Tensor, torch.Tensor], Any]


def attack(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    given = x.clone().detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(parts.loss(given, y), given)
    return parts.train((given + 0.1 * gradient.sign()).detach(), y), given.requires_grad


def penalty(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The loss is differentiated twice, and its backward leaves a gradient in the leaf too."""
    between = (x * torch.rand(len(x), 1)).requires_grad_(True)
    made = parts.model(between)
    (gradient,) = torch.autograd.grad(made, between, torch.ones_like(made), create_graph=True, retain_graph=True)
    loss = F.mse_loss(made, y) + ((gradient.norm(dim=1) - 1) ** 2).mean()
    parts.optimizer.zero_grad()
    loss.backward()
    parts.optimizer.step()
    return loss


def leaf_with_gradient(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    shift = torch.zeros(4, requires_grad=True)
    loss = parts.loss(x + shift, y)
    parts.optimizer.zero_grad()
    loss.backward()
    parts.optimizer.step()
    parts.seen["shift"] = shift
    return loss, shift.is_leaf


def asks_for_gradient(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    shift = torch.zeros(4)
    shift.requires_grad = True
    parts.optimizer.zero_grad()
    for _ in range(2):
        parts.loss(x + shift, y).backward()
    assert shift.grad is not None
    moved = shift.detach() - shift.grad
    shift.grad = None
    has_none = shift.grad is None
    return parts.train(x + moved, y), moved, has_none


def no_leaf_any_more(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    fixed = torch.zeros(4, requires_grad=True)
    fixed.requires_grad_(False)
    return parts.train(x + fixed, y), fixed


def asks_whether(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    hidden = x * 2
    if not hidden.requires_grad:
        hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(parts.loss(hidden, y), hidden)
    return parts.train(x - gradient, y)


def filled_in_place(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    filled = torch.zeros(6, 3)
    seen = [filled.requires_grad, filled.is_leaf]
    for row in range(6):
        filled[row] = parts.model(x[row])
        if filled.requires_grad:
            filled = filled * 1.1
    parts.optimizer.zero_grad()
    F.mse_loss(filled, y).backward()
    parts.optimizer.step()
    return filled, seen, filled.requires_grad, filled.is_leaf


def filled_through_a_view(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    filled = torch.zeros(6, 3)
    part = filled[:4]
    before = part.requires_grad
    part.copy_(parts.model(x[:4]))
    parts.optimizer.zero_grad()
    F.mse_loss(filled, y).backward()
    parts.optimizer.step()
    return filled, before, filled.requires_grad, part.requires_grad


def printed(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    hidden = parts.model(x)
    print(hidden)
    hidden.mul_(2)
    print(hidden)
    parts.optimizer.zero_grad()
    F.mse_loss(hidden, y).backward()
    parts.optimizer.step()
    return hidden


@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
@pytest.mark.parametrize(
    "compute",
    [
        attack,
        penalty,
        leaf_with_gradient,
        asks_for_gradient,
        no_leaf_any_more,
        asks_whether,
        filled_in_place,
        filled_through_a_view,
        printed,
    ],
)
def test_unit_is_a_graph(compute: Compute, engine: str) -> None:
    factory = training(lambda parts: lambda number, x, y: compute(parts, x, y))
    if engine == "program":
        runs_as_graph(factory, 12, "program")
    else:
        runs_as_graph(factory, 12, engine=engine)


def copied(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    shift = torch.zeros(4, requires_grad=True)
    parts.loss(x + shift, y).backward()
    again = copy.deepcopy(shift)
    return parts.train(x, y), again, again.grad


@pytest.mark.parametrize("mode", MODES)
def test_leaf_is_copied_with_its_gradient(mode: Mode) -> None:
    stays_eager(training(lambda parts: lambda number, x, y: copied(parts, x, y)), "unsupported_call", 12, mode)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_gradient_of_a_leaf_is_one_object(engine: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            shift = torch.zeros(4, requires_grad=True)
            parts.loss(x + shift, y).backward()
            parts.seen["shift"], gradient = shift, shift.grad
            return parts.train(x, y), gradient, shift.grad is gradient

        return step

    runs_as_graph(training(make), 12, engine=engine)


@pytest.mark.parametrize("mode", MODES)
def test_leaf_is_kept_sometimes(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = leaf_with_gradient(parts, x, y)
            if number % 3:
                del parts.seen["shift"]
            return loss

        return step

    same(training(make), 14, mode)


@pytest.mark.parametrize("mode", MODES)
def test_tensor_from_outside_takes_up_history(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        memory = nn.Buffer(torch.zeros(6, 3))
        parts.seen["memory"] = memory

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            seen = memory.requires_grad
            memory[number % 6] = parts.model(x)[0]
            parts.optimizer.zero_grad()
            F.mse_loss(memory, y).backward()
            parts.optimizer.step()
            seen = seen, memory.requires_grad
            memory.detach_()
            return seen

        return step

    same(training(make), 14, mode)

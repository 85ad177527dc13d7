"""The very tensors in `.grad`: what a unit puts there and puts back, and scripts that deal with gradients at random."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.differential import Twofold, assert_same, exact_backend, function, program
from tests.hazards.programs import Parts, same, training
from tests.hazards.test_coins import ENGINES, STEPS, coins


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_unit_that_is_left_puts_the_very_gradients_back(engine: str, set_to_none: bool) -> None:
    """It ends at a line that it never ended at, before anything has looked at gradients, and after."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    fails = {"early": False, "late": False}

    @twofold.function(engine=engine, backend="replay", background=False)
    def step() -> float:
        loss = F.mse_loss(model(x), y)
        shown = loss.item()
        if fails["early"]:
            raise ValueError(shown)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        if fails["late"]:
            raise ValueError(shown)
        optimizer.step()
        return shown

    for _ in range(12):
        step()
    assert twofold.report(step).to_dict()["graph_iterations"] > 6
    before = [p.grad for p in model.parameters()]
    values = [gradient.clone() for gradient in before]
    fails["early"] = True
    with pytest.raises(ValueError, match=r"^\d"):
        step()
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, values))
    fails.update(early=False, late=True)
    with pytest.raises(ValueError, match=r"^\d"):
        step()
    after = [p.grad for p in model.parameters()]
    assert all((gradient is new) is not set_to_none for gradient, new in zip(before, after, strict=True))
    fails["late"] = False
    step()
    assert all((p.grad is not new) is set_to_none for p, new in zip(model.parameters(), after, strict=True))


def test_a_gradient_that_the_program_holds_outlives_a_unit_that_is_left() -> None:
    """The unit reads a gradient that the program has already, and takes another way than known."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    held: list[Any] = []

    @twofold.function(engine="coexecution", backend="replay", background=False)
    def step(x: torch.Tensor, is_other: bool) -> None:
        held.append(weight.grad)
        optimizer.zero_grad(set_to_none=False)
        (weight * x).sum().backward()
        if is_other:
            weight.detach().neg()
        optimizer.step()

    for number in range(12):
        x = torch.randn(4)
        step(x, number > 8)
        assert weight.grad is not None
        assert torch.equal(weight.grad, x)
    assert twofold.report(step).to_dict()["graph_iterations"] > 6
    assert all(torch.equal(gradient, weight.grad) for gradient in held[1:])


def test_gradient_that_is_also_held_is_not_taken_for_another() -> None:
    """What is `.grad` in one unit is a tensor of the program's own, apart from `.grad`, in another."""

    def make(parts: Parts) -> Callable[..., Any]:
        mine = parts.seen["mine"] = torch.ones(3, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.loss(x, y).backward()
            mine.mul_(0.5)
            parts.optimizer.step()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model.last.weight.grad = parts.seen["mine"] if number % 12 < 6 else torch.ones(3, 4)

    same(coins(make, between=between), STEPS)


@pytest.mark.parametrize("kind", ["one tensor", "overlapping parts", "parts"])
def test_gradients_that_share_memory_with_one_another(kind: str) -> None:
    """Recorded apart; later the first two weights accumulate into memory that they share."""

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: (parts.loss(x, y).backward(), parts.optimizer.step())[1]

    def between(number: int, parts: Parts) -> None:
        first, last = (block.weight for block in parts.model.blocks)
        flat = torch.ones(32)
        shared = {"one tensor": (0, 0), "overlapping parts": (0, 8), "parts": (0, 16)}[kind]
        begins = shared if number % 12 < 6 else None
        for index, weight in enumerate((first, last)):
            weight.grad = torch.ones(4, 4) if begins is None else flat[begins[index] :][:16].view(4, 4)

    report = same(coins(make, between=between), STEPS)
    codes = {entry["code"] for entry in report["fallbacks"]}
    assert ("mutated_outside" in codes) is (kind != "parts")


def test_deep_copy_of_a_leaf_has_its_gradient() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        weight = parts.seen["weight"] = torch.ones(4, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % 3:
                optimizer.zero_grad()
            copied = copy.deepcopy(weight)
            (x * weight).sum().backward()
            optimizer.step()
            return copied.grad

        return step

    same(training(make), 24)


# ---- at random ---------------------------------------------------------------------------------------------------

ACTS = (
    "zero", "zero", "zero in place", "zero one", "zero other", "look", "look one", "put", "hold", "write held", "train",
    "train", "train half", "step", "step", "step other", "clip", "read", "forward", "raise",
)  # fmt: skip


class Script:
    """Steps that do what a list of acts says; the lists come again, in any order."""

    def __init__(self, parts: Parts, seed: int) -> None:
        chance = random.Random(seed)
        self.parts = parts
        self.other = torch.optim.Adagrad(parts.model.last.parameters(), lr=0.05)
        self.scripts = [chance.choices(ACTS, k=chance.randint(3, 7)) for _ in range(3)]
        self.held = parts.seen["held"] = [torch.ones(3, 4)]

    def __call__(self, number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        found: list[Any] = []
        for act in self.scripts[random.randrange(3)]:
            self.do(act, x, y, found)
        return found

    def do(self, act: str, x: torch.Tensor, y: torch.Tensor, found: list[Any]) -> None:
        model, optimizer, weight = self.parts.model, self.parts.optimizer, self.parts.model.last.weight
        match act:
            case "zero":
                optimizer.zero_grad()
            case "zero in place":
                model.zero_grad(set_to_none=False)
            case "zero one":
                weight.grad = None
            case "zero other":
                self.other.zero_grad()
            case "look":
                found.append([p.grad is None for p in model.parameters()])
            case "look one":
                found.append(None if weight.grad is None else weight.grad.sum())
            case "put":
                weight.grad = self.held[-1]
            case "hold":
                self.held += [] if weight.grad is None else [weight.grad]
                del self.held[:-2]
            case "write held":
                self.held[-1].mul_(0.5)
            case "train":
                self.parts.loss(x, y).backward()
            case "train half":
                self.parts.loss(x[:3], y[:3]).backward()
            case "step":
                optimizer.step()
            case "step other":
                self.other.step()
            case "clip":
                found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            case "read":
                found.append(self.parts.loss(x, y).item() > 1)
            case "forward":
                found.append(self.parts.loss(x, y).detach())
            case _:
                if random.random() < 0.2:
                    raise ValueError("now")


@pytest.mark.parametrize("configuration", [function, program])
@pytest.mark.parametrize("seed", range(8))
def test_random_scripts(seed: int, configuration: Callable[..., Twofold]) -> None:
    for engine in ENGINES if configuration is function else ENGINES[:1]:
        runner = configuration(engine=engine, numerics="exact", backend=exact_backend(), background=False)
        observe = "each_step" if configuration is function else "end"
        assert_same(coins(lambda parts: Script(parts, seed)), STEPS, runner, observe=observe)

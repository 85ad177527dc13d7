"""Tensors from outside that require a gradient in one unit, or in one part of it, and not in another."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.differential import exact_backend
from tests.hazards.programs import MODES, Mode, Parts, net, runs_as_graph, same, summary, training
from twofold.capture import match, trace_graph
from twofold.run.followed_unit import FollowedUnit
from twofold.run.speculation.unit import TensorWork

STEPS = 16
TURNS = 5, 10
"""The steps before which something requires a gradient from then on, and none any more."""


# ---- said between units ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network with a buffer that may be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x * self.scale)


def buffer(parts: Parts) -> torch.Tensor:
    return parts.model.scale


def constant(parts: Parts) -> torch.Tensor:
    return parts.seen["constant"]


@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
@pytest.mark.parametrize("which", [buffer, constant])
def test_what_is_no_parameter_requires_a_gradient_for_some_units(
    which: Callable[[Parts], torch.Tensor], engine: str
) -> None:
    def between(number: int, parts: Parts) -> None:
        if number in TURNS:
            parts.seen["gradient"] = which(parts).grad
            which(parts).requires_grad_(number == TURNS[0])

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["constant"] = torch.full((4,), 0.5)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x + parts.seen["constant"], y).detach()

        return step

    factory = training(make, model=Scaled, between=between)
    if engine == "program":
        runs_as_graph(factory, STEPS, "program", at_least=4)
    else:
        runs_as_graph(factory, STEPS, engine=engine, at_least=9)


# ---- said within units -------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(4, 3)
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


Compute = Callable[[Parts, Any, torch.Tensor, torch.Tensor], Any]


def adversarial(compute: Compute) -> Any:
    def make(parts: Parts) -> Callable[..., Any]:
        rival = torch.optim.SGD(parts.model.critic.parameters(), lr=0.1)
        return lambda number, x, y: compute(parts, rival, x, y)

    def generator_only(model: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.generator.parameters(), lr=0.01)

    return training(make, model=Pair, optimizer=generator_only)


def freeze(critic: nn.Module, is_frozen: bool) -> None:
    for parameter in critic.parameters():
        parameter.requires_grad = not is_frozen


def in_two_units(parts: Parts, rival: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    model = parts.model
    model.critic.requires_grad_(True)
    rival.zero_grad()
    wrong = model.critic(model.generator(x).detach()).mean() - model.critic(y).mean()
    wrong.backward()
    rival.step()
    model.critic.requires_grad_(False)
    parts.optimizer.zero_grad()
    right = -model.critic(model.generator(x)).mean()
    right.backward()
    parts.optimizer.step()
    return wrong.item(), right.item()


def in_one_unit(parts: Parts, rival: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The generator's output is used on both sides of the first step."""
    model = parts.model
    made = model.generator(x)
    freeze(model.critic, False)
    rival.zero_grad()
    wrong = model.critic(made.detach()).mean() - model.critic(y).mean()
    wrong.backward()
    rival.step()
    freeze(model.critic, True)
    parts.optimizer.zero_grad()
    right = F.mse_loss(made, y) - model.critic(made).mean()
    right.backward()
    parts.optimizer.step()
    return wrong.detach(), right.detach()


def thawed_at_the_end(parts: Parts, rival: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    model = parts.model
    rival.zero_grad()
    wrong = model.critic(y).square().mean()
    wrong.backward()
    rival.step()
    freeze(model.critic, True)
    parts.optimizer.zero_grad()
    (-model.critic(model.generator(x)).mean()).backward()
    parts.optimizer.step()
    freeze(model.critic, False)
    return wrong.item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", [in_two_units, in_one_unit, thawed_at_the_end])
def test_discriminator_is_frozen_while_the_generator_steps(compute: Compute, mode: Mode) -> None:
    units = 1 if compute is in_one_unit else 2
    runs_as_graph(adversarial(compute), 12, mode, at_least=8 * units)


Turn = Callable[[int, Parts], Any]


def frozen_in_turns(number: int, parts: Parts) -> Any:
    parts.model[0].requires_grad_(number % 2 == 0)
    parts.model[2].requires_grad_(number % 2 == 1)


def told(number: int, parts: Parts) -> Any:
    """Python asks for what it has said."""
    weight = parts.model[0].weight
    seen = [weight.requires_grad]
    weight.requires_grad_(not weight.requires_grad)
    seen.append(weight.requires_grad)
    return seen


def there_and_back(number: int, parts: Parts) -> Any:
    with torch.no_grad():
        parts.model.requires_grad_(False)
        parts.model(torch.ones(1, 4))
        parts.model.requires_grad_(True)


def turning(turn: Turn, then: Callable[[int, Parts], Any] | None = None) -> Any:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            seen = turn(number, parts)
            loss = parts.train(x, y).detach()
            return seen, loss, None if then is None else then(number, parts)

        return step

    return training(make)


@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
@pytest.mark.parametrize("turn", [frozen_in_turns, told, there_and_back])
def test_parameters_are_frozen_within_units(turn: Turn, engine: str) -> None:
    if engine == "program":
        runs_as_graph(turning(turn), STEPS, "program", at_least=STEPS // 2)
    else:
        report = runs_as_graph(turning(turn), STEPS, engine=engine, at_least=STEPS // 2)
        if engine == "speculation" and turn is not told:
            assert report["speculated_iterations"] >= STEPS // 3, summary(report)


def test_harness_catches_a_call_without_its_python_that_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorWork, "set_requires_grad", lambda *_: None)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(turning(frozen_in_turns), STEPS, engine="speculation")


def thaws_and_leaves() -> Any:
    """What is frozen when a unit begins is used, thawed and used again; then the unit takes a way that is new."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            first = parts.model[0]
            first.requires_grad_(False)
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            norm = sum(p.grad.norm() for p in parts.model.parameters() if p.grad is not None)
            first.requires_grad_(True)
            if number == 8:
                parts.loss(x * 2, y).backward()
            if number == 10 and float(norm) > 0:
                raise ValueError(number)
            parts.optimizer.step()
            return norm

        return step

    return training(make, model=net)


@pytest.mark.parametrize("mode", MODES)
def test_unit_is_left_after_it_has_thawed_something(mode: Mode) -> None:
    runs_as_graph(thaws_and_leaves(), STEPS, mode, at_least=8 if mode == "function" else 1)


def test_harness_catches_what_stays_thawed_when_the_unit_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    discard = FollowedUnit.discard

    def without(unit: FollowedUnit) -> None:
        unit._required.clear()
        discard(unit)

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            parts.model[0].requires_grad_(False)
            if number == 8:
                parts.loss(x * 2, y).backward()
            parts.optimizer.step()
            parts.model[0].requires_grad_(True)

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[0].requires_grad_(True)

    factory = training(make, between=between)
    runs_as_graph(factory, STEPS, engine="coexecution", at_least=9)
    monkeypatch.setattr(FollowedUnit, "discard", without)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(factory, STEPS, engine="coexecution")


# ---- batches -----------------------------------------------------------------------------------------------


Prepare = Callable[[int, torch.Tensor], torch.Tensor]


def asked_within(number: int, x: torch.Tensor) -> torch.Tensor:
    return x


def asked_outside(number: int, x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def with_gradients_now_and_then(number: int, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    if number in (7, 8, 11):
        x.grad = torch.full_like(x, 0.5)
    return x


def hooked_now_and_then(number: int, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    if number in (7, 11):
        x.register_hook(lambda gradient: gradient * 2)
    return x


def frozen_now_and_then(number: int, x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_(number not in (7, 8, 11))


Given = Callable[[Parts, torch.Tensor, torch.Tensor], Any]


def adds_up(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    parts.seen["batch"] = x  # its gradient is looked at
    return parts.train(x, y).detach()


def signs(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    """As a tutorial of PyTorch attacks a network."""
    x.requires_grad = True
    parts.seen["batch"] = x
    parts.model.zero_grad()
    parts.loss(x, y).backward()
    moved = torch.clamp(x + 0.1 * x.grad.data.sign(), -1, 1).detach()
    return parts.train(moved, y).detach()


def asks(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    seen = [x.requires_grad]
    loss = signs(parts, x, y)
    return seen, loss, x.requires_grad


def takes_the_gradient(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    (gradient,) = torch.autograd.grad(parts.loss(x.requires_grad_(), y), x)
    return parts.train((x + gradient).detach(), y).detach()


def drops_the_gradient(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Any:
    x.grad = None
    return adds_up(parts, x, y)


def given(prepare: Prepare, compute: Given) -> Any:
    """Each batch is a tensor of its own, as those of a loader are."""

    def build() -> Any:
        program = training(lambda parts: lambda number, x, y: compute(parts, x, y))()
        batches, seen = program.batches, program.observed["seen"]

        def fresh(number: int) -> tuple[Any, ...]:
            if "batch" in seen:
                seen[f"gradient {number}"] = seen["batch"].grad
            number, x, y = batches(number)
            return number, prepare(number, x.clone()), y

        program.batches = fresh
        return program

    return build


GIVEN = [
    (asked_within, signs),
    (asked_within, asks),
    (asked_within, takes_the_gradient),
    (asked_outside, adds_up),
    (asked_outside, signs),
    (with_gradients_now_and_then, adds_up),
    (with_gradients_now_and_then, drops_the_gradient),
    (frozen_now_and_then, signs),
    (frozen_now_and_then, adds_up),
    (hooked_now_and_then, adds_up),
]


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize(("prepare", "compute"), GIVEN)
def test_batches_that_require_a_gradient_share_a_path(prepare: Prepare, compute: Given, engine: str) -> None:
    report = runs_as_graph(given(prepare, compute), STEPS, engine=engine, at_least=STEPS // 2)
    assert report["paths"] <= 2, summary(report)
    if engine == "speculation" and compute is not asks:
        assert report["speculated_iterations"] >= STEPS // 3, summary(report)


@pytest.mark.parametrize(("prepare", "compute"), GIVEN)
def test_batches_that_require_a_gradient_in_a_whole_program(prepare: Prepare, compute: Given) -> None:
    same(given(prepare, compute), STEPS, "program")


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_harness_catches_gradients_of_batches_that_are_not_looked_at(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_fed(event: Any, role_of: Any) -> Any:
        return presence_of(event, role_of)[0], {}

    presence_of = match.presence_of
    monkeypatch.setattr(match, "presence_of", without_fed)
    monkeypatch.setattr(trace_graph, "presence_of", without_fed)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(given(with_gradients_now_and_then, adds_up), STEPS, engine=engine)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_harness_catches_hooks_of_batches_that_are_not_looked_at(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "has_hooks", lambda _: False)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(given(hooked_now_and_then, adds_up), STEPS, engine=engine)


@pytest.mark.parametrize("compute", [signs, takes_the_gradient, adds_up])
def test_batches_that_require_a_gradient_are_let_go(compute: Given) -> None:
    program = given(asked_outside, compute)()
    step = twofold.function(program.step, numerics="exact", backend=exact_backend(), background=False)
    batches: list[weakref.ref[torch.Tensor]] = []
    for number in range(24):
        arguments = program.batches(number)
        batches.append(weakref.ref(arguments[1]))
        step(*arguments)
    program.observed["seen"].clear()
    del arguments
    gc.collect()
    assert sum(batch() is not None for batch in batches) <= 2


def test_leaves_that_are_trained_by_hand_are_no_batches() -> None:
    """Each has its path, as it is written to."""

    def make(parts: Parts) -> Callable[..., Any]:
        shifts = parts.seen["shifts"] = [torch.zeros(4, requires_grad=True) for _ in range(2)]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            shift = shifts[number % 2]
            loss = parts.train(x + shift, y)
            with torch.no_grad():
                shift -= 0.1 * shift.grad
                shift.grad.zero_()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 9:
            parts.seen["shifts"][0].requires_grad_(False)
            parts.seen["shifts"][0].requires_grad_(True)

    runs_as_graph(training(make, between=between), STEPS, at_least=STEPS // 2)


def pairs(looks: bool) -> Any:
    """Two leaves are given, which are now and then one."""

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["gradients"] = []

        def step(left: torch.Tensor, right: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(left) * 2 - parts.model(right), y)
            loss.backward()
            if looks:
                print(left.grad.sum().item())
            parts.optimizer.step()
            return loss.detach()

        return step

    def build() -> Any:
        program = training(make)()
        batches, gradients = program.batches, program.observed["seen"]["gradients"]

        def both(number: int) -> tuple[Any, ...]:
            _, left, y = batches(number)
            _, right, _ = batches(number + 1)
            given = left.clone().requires_grad_(), right.clone().requires_grad_()
            if number in (7, 8, 12):
                given = given[:1] * 2
            gradients.append(given)
            if number:
                gradients[number - 1] = [one.grad for one in gradients[number - 1]]
            return *given, y

        program.batches = both
        return program

    return build


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("engine", ["coexecution", "speculation", "program"])
def test_two_leaves_that_are_given_are_now_and_then_one(looks: bool, engine: str) -> None:
    if engine == "program":
        same(pairs(looks), STEPS, "program")
    else:
        runs_as_graph(pairs(looks), STEPS, engine=engine, at_least=STEPS // 2)


def test_a_leaf_that_is_trained_by_hand_is_now_and_then_the_batch() -> None:
    def build() -> Any:
        def make(parts: Parts) -> Callable[..., Any]:
            shift = parts.seen["shift"] = torch.ones(6, 4, requires_grad=True)

            def step(x: torch.Tensor, y: torch.Tensor) -> Any:
                loss = parts.train(x * 2 + shift, y)
                parts.seen["gradients"] = [shift.grad.clone(), x.grad.clone()]
                shift.grad = x.grad = None
                return loss.detach()

            return step

        program = training(make)()
        batches, shift = program.batches, program.observed["seen"]["shift"]

        def given(number: int) -> tuple[Any, ...]:
            _, x, y = batches(number)
            return shift if number in (8, 11) else x.clone().requires_grad_(), y

        program.batches = given
        return program

    runs_as_graph(build, STEPS, at_least=STEPS // 2)

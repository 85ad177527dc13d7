"""Optimizers, schedulers and everything that happens around `step()`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import twofold
from tests.differential import FUSED, assert_same, exact_backend, function
from tests.hazards.programs import MODES, Mode, Parts, accounted, runs_as_graph, same, training


def plain(parts: Parts) -> Callable[..., Any]:
    return lambda number, x, y: parts.train(x, y)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "damped": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5, maximize=True),
    "sgd in a loop": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.01),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adam in a loop": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, t0=3),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str, mode: Mode) -> None:
    factory = training(plain, optimizer=lambda model: OPTIMIZERS[name](model.parameters()))
    runs_as_graph(factory, 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_learning_rate_is_a_tensor(name: str, mode: Mode) -> None:
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

    def between(number: int, parts: Parts) -> None:
        if number == 5:
            parts.optimizer.param_groups[0]["lr"].mul_(0.1)

    factory = training(plain, optimizer=lambda m: kinds[name](m.parameters(), lr=torch.tensor(0.1)), between=between)
    accounted(factory, 10, mode)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_learning_rate_follows_the_loss_of_the_same_unit(kind: Any) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            value = loss.item()
            parts.optimizer.param_groups[0]["lr"] = 0.01 * value
            loss.backward()
            parts.optimizer.step()
            return value

        return step

    configuration = function(numerics="fused", backend="replay", background=False)
    factory = training(make, optimizer=lambda m: kind(m.parameters(), lr=0.1))
    report = assert_same(factory, 12, configuration, tolerance=replace(FUSED, hyper_parameters=True))
    assert report["graph_iterations"] >= 8


@pytest.mark.parametrize("mode", MODES)
def test_lbfgs_with_a_closure(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            def closure() -> torch.Tensor:
                parts.optimizer.zero_grad()
                loss = parts.loss(x, y)
                loss.backward()
                return loss

            return parts.optimizer.step(closure)

        return step

    factory = training(make, optimizer=lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=4))
    accounted(factory, 6, mode)


def test_sgd_with_a_closure_sometimes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            def closure() -> torch.Tensor:
                parts.optimizer.zero_grad()
                loss = parts.loss(x, y)
                loss.backward()
                return loss

            if number in (5, 6):
                return parts.optimizer.step(closure)
            return parts.train(x, y)

        return step

    for mode in MODES:
        runs_as_graph(training(make), 10, mode)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["momentum", "adam", "adam fused"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, kind: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        scheduler = SCHEDULERS[name](parts.optimizer)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            scheduler.step()
            return loss.detach(), scheduler.get_last_lr()

        return step

    factory = training(make, optimizer=lambda m: OPTIMIZERS[kind](m.parameters()))
    runs_as_graph(factory, 16, mode)


@pytest.mark.parametrize("mode", MODES)
def test_reduce_on_plateau(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        scheduler = lr_scheduler.ReduceLROnPlateau(parts.optimizer, factor=0.5, patience=1)
        parts.seen["scheduler"] = scheduler.state_dict

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            scheduler.step(loss)
            parts.seen["bad"] = scheduler.num_bad_epochs
            return scheduler.get_last_lr(), scheduler.best

        return step

    runs_as_graph(training(make), 14, mode)


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_parameter_groups(name: str) -> None:
    def optimizer(model: Any) -> Any:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.002}]
        return OPTIMIZERS[name](groups)

    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.optimizer.param_groups[1]["lr"] = 0.2

    for mode in MODES:
        runs_as_graph(training(plain, optimizer=optimizer, between=between), 12, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_group_is_added_midway(name: str, mode: Mode) -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.optimizer.add_param_group({"params": list(parts.model[2].parameters()), "lr": 0.01})

    factory = training(plain, optimizer=lambda m: OPTIMIZERS[name](m[0].parameters()), between=between)
    runs_as_graph(factory, 14, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["momentum", "adam", "adam fused"])
def test_optimizer_state_is_loaded_midway(name: str, mode: Mode) -> None:
    saved: list[Any] = []

    def between(number: int, parts: Parts) -> None:
        if number == 4:
            saved[:] = [torch.utils._pytree.tree_map(_copied, parts.optimizer.state_dict())]
        if number in (7, 10):
            parts.optimizer.load_state_dict(saved[0])

    factory = training(plain, optimizer=lambda m: OPTIMIZERS[name](m.parameters()), between=between)
    runs_as_graph(factory, 16, mode)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", ["momentum", "adam", "adam fused"])
def test_optimizer_state_is_cleared_or_edited(name: str) -> None:
    def between(number: int, parts: Parts) -> None:
        state = parts.optimizer.state
        if number == 6:
            state.clear()
        if number == 10:
            for entry in state.values():
                for value in entry.values():
                    value.mul_(0.5)

    factory = training(plain, optimizer=lambda m: OPTIMIZERS[name](m.parameters()), between=between)
    runs_as_graph(factory, 16)


def test_optimizer_is_replaced() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.optimizer = OPTIMIZERS["adam"](parts.model.parameters())

    for mode in MODES:
        runs_as_graph(training(plain, between=between), 14, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adam fused"])
def test_two_optimizers_take_turns(kind: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        critic = nn.Linear(3, 1)
        rival = OPTIMIZERS[kind](critic.parameters())
        parts.seen["critic"] = list(critic.parameters())

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            rival.zero_grad()
            fake = parts.model(x)
            worse = critic(fake.detach()).mean() - critic(y).mean()
            worse.backward()
            rival.step()
            parts.optimizer.zero_grad()
            loss = -critic(fake).mean()
            loss.backward()
            parts.optimizer.step()
            return worse.detach(), loss.detach()

        return step

    runs_as_graph(training(make, optimizer=lambda m: OPTIMIZERS[kind](m.parameters())), 10, mode)


def losses_of_units_of_two_steps() -> list[float]:
    """Train; what is made of a result after the step makes two steps one unit, which forks between them."""
    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), list[float]()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    kept: torch.Tensor | None = None

    def step(x: torch.Tensor, y: torch.Tensor) -> Any:
        hidden = torch.zeros(2, 4) if kept is None else kept
        made = model(x + hidden)
        loss = (y - made).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, made.median(), x[:1].clone()

    for number in range(40):
        loss, median, row = step(torch.randn(2, 4), torch.randn(2, 1))
        losses.append(loss.item())
        assert median.requires_grad
        kept = torch.cat([row, row]) * 0.5
        if number % 13 == 12:
            kept = None
    return losses


def test_another_way_than_foretold_behind_a_step_outside() -> None:
    expected = losses_of_units_of_two_steps()
    with twofold.program(backend=exact_backend(), numerics="exact", background=False):
        losses = losses_of_units_of_two_steps()
    assert losses == expected


@pytest.mark.parametrize("mode", MODES)
def test_step_is_called_twice_or_not_at_all(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            for _ in range(number % 3):
                parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make, optimizer=lambda m: OPTIMIZERS["adam"](m.parameters())), 24, mode)


@pytest.mark.parametrize("mode", MODES)
def test_step_without_gradients(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            if number % 3:
                parts.loss(x, y).backward()
            parts.optimizer.step()

        return step

    runs_as_graph(training(make, optimizer=lambda m: OPTIMIZERS["adam"](m.parameters())), 18, mode)


@pytest.mark.parametrize("mode", MODES)
def test_hand_written_sgd(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            loss.backward()
            with torch.no_grad():
                for parameter in parts.model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            return loss.detach()

        return step

    same(training(make), 8, mode)


def test_hand_written_momentum_on_data() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        speeds = parts.seen["speeds"] = [torch.zeros_like(p) for p in parts.model.parameters()]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.model.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            for parameter, speed in zip(parts.model.parameters(), speeds, strict=True):
                speed.mul_(0.9).add_(parameter.grad)
                parameter.data.add_(speed, alpha=-0.1)
            return loss.detach()

        return step

    runs_as_graph(training(make), 8)


class HandWritten(torch.optim.Optimizer):
    """An optimizer of the user's own, with a Python counter in it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    parameter.add_(parameter.grad, alpha=-group["lr"] / state["count"])


def test_optimizer_of_the_users_own() -> None:
    for mode in MODES:
        factory = training(plain, optimizer=lambda m: HandWritten(m.parameters(), 0.2))
        runs_as_graph(factory, 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["lerp", "mul", "copy"])
def test_moving_average_of_weights(way: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        averages = parts.seen["averages"] = [p.detach().clone() for p in parts.model.parameters()]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            with torch.no_grad():
                for average, parameter in zip(averages, parts.model.parameters(), strict=True):
                    if way == "lerp":
                        average.lerp_(parameter, 0.1)
                    elif way == "mul":
                        average.mul_(0.9).add_(parameter, alpha=0.1)
                    else:
                        average.copy_(0.9 * average + 0.1 * parameter)
            return loss.detach()

        return step

    runs_as_graph(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_averaged_model(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        averaged = swa_utils.AveragedModel(parts.model)
        parts.seen["averaged"] = averaged.state_dict()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            averaged.update_parameters(parts.model)
            return loss.detach()

        return step

    accounted(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**140])
def test_grad_scaler_skips_steps(scale: float, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, backoff_factor=2.0**-8)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = parts.loss(x, y)
            scaler.scale(loss).backward()
            scaler.unscale_(parts.optimizer)
            nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
            scaler.step(parts.optimizer)
            scaler.update()
            parts.seen["scale"] = scaler.get_scale()
            return loss.detach()

        return step

    same(training(make), 14, mode)


def test_autocast_is_switched_and_changes_type() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            dtype = torch.bfloat16 if number % 3 else torch.float16
            with torch.autocast("cpu", dtype=dtype, enabled=number % 4 != 3):
                output = parts.model(x)
            loss = nn.functional.mse_loss(output.float(), y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), output.dtype

        return step

    for mode in MODES:
        runs_as_graph(training(make), 36, mode)


def test_autocast_is_switched_outside() -> None:
    contexts: list[Any] = []

    def between(number: int, parts: Parts) -> None:
        if number == 5:
            contexts.append(torch.autocast("cpu", dtype=torch.bfloat16))
            contexts[-1].__enter__()
        if number == 10:
            contexts.pop().__exit__(None, None, None)

    runs_as_graph(training(plain, between=between), 14)

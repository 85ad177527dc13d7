"""Python values that a recorded step must not remember: every one of them changes while the program runs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import (
    MODES,
    Mode,
    Parts,
    accounted,
    each_unit_is_a_path,
    net,
    runs_as_graph,
    same,
    training,
)
from twofold.run import followed_unit

TAKES_A_NUMBER: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "alpha": lambda state, x, number: state.copy_(torch.add(state, x.mean(0), alpha=number)),
    "foreach": lambda state, x, number: torch._foreach_lerp_([state], [x.mean(0)], number),
    "fill value": lambda state, x, number: state.add_(torch.full((4,), number)),
    "limit": lambda state, x, number: state.add_(x.mean(0)).clamp_(max=number),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TAKES_A_NUMBER)
def test_number_that_an_operation_takes_out_of_a_tensor(name: str, mode: Mode) -> None:
    """PyTorch unpacks a tensor where an operation wants a number, beneath the call: weights were averaged so."""

    def make(parts: Parts) -> Callable[..., Any]:
        state, number = torch.zeros(4), torch.zeros(())
        parts.seen["state"] = state

        def step(number_of_step: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.no_grad():
                number.add_(0.125)
                TAKES_A_NUMBER[name](state, x, number)
            return parts.train(x, y).detach()

        return step

    accounted(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_learning_rate_that_changes_every_step(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            return parts.train(x, y)

        return step

    runs_as_graph(training(make), 12, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "nesterov"])
def test_hyper_parameter_of_sgd_that_changes_once(key: str, mode: Mode) -> None:
    new = {"lr": 0.02, "momentum": 0.3, "weight_decay": 0.05, "nesterov": False}[key]

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number == 6:
                parts.optimizer.param_groups[0][key] = new
            return parts.train(x, y)

        return step

    def optimizer(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)

    runs_as_graph(training(make, optimizer=optimizer), 12, mode)


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_hyper_parameter_of_adam_that_changes_outside(kind: Any, key: str) -> None:
    new: Any = {
        "lr": 0.002, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1,
        "amsgrad": False, "maximize": True,
    }[key]  # fmt: skip

    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.optimizer.param_groups[0][key] = new

    def optimizer(model: Any) -> Any:
        return kind(model.parameters(), lr=0.01, amsgrad=True)

    factory = training(lambda parts: lambda number, x, y: parts.train(x, y), optimizer=optimizer, between=between)
    runs_as_graph(factory, 12)


def test_dropout_probability_of_a_module_changes() -> None:
    def between(number: int, parts: Parts) -> None:
        parts.model[1].p = 0.5 if number < 6 else 0.1

    factory = training(
        lambda parts: lambda number, x, y: parts.train(x, y),
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)),
        between=between,
    )
    runs_as_graph(factory, 14)


def test_dropout_probability_is_annealed() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(F.dropout(x, 0.05 * number)), y)
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    accounted(training(make), 12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "weight",
    [
        lambda n: 1.0 if n < 6 else 0.25,
        lambda n: 1.0 / (n + 1),
        lambda n: n,
        lambda n: min(1.0, n / 5),
        lambda n: (1, 1.0, True)[n % 3],
        lambda n: (0.0, -0.0)[n // 4 % 2],
        lambda n: np.float64(n / 3),
        lambda n: np.float32(n / 3),
        lambda n: math.inf if n == 6 else 1.0,
        lambda n: math.nan,
    ],
    ids=["once", "annealed", "integer", "saturating", "types", "zeros", "float64", "float32", "inf", "nan"],
)
def test_loss_weight_changes(weight: Callable[[int], Any], mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            penalty = output.abs().mean() * weight(number)
            loss = F.mse_loss(output, y) + penalty
            loss.backward()
            parts.optimizer.step()
            return loss, penalty.detach()

        return step

    accounted(training(make), 14, mode)


NUMBER_USES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "multiplied": lambda loss, number: loss * number,
    "multiplied from the left": lambda loss, number: number * loss,
    "added": lambda loss, number: (loss + number) ** 2,
    "subtracted": lambda loss, number: (loss - number) ** 2,
    "divided by": lambda loss, number: loss / (number + 1),
    "divided": lambda loss, number: number / (loss + 1),
    "in place": lambda loss, number: loss.clone().mul_(number).add_(number),
    "in a function": lambda loss, number: torch.mul(loss, number),
    "compared with": lambda loss, number: loss * (loss < number),
    "twice": lambda loss, number: loss * number + (loss * 0.5) / (1 + number * number),
    "a NumPy number": lambda loss, number: loss * np.float32(number),
}


def feeds_divisors() -> bool:
    """Whether a number that a tensor is divided by can be fed; on CUDA eager multiplies by its reciprocal."""
    return not torch.empty(0).is_cuda


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NUMBER_USES)
def test_annealed_number_is_one_path(name: str, mode: Mode) -> None:
    use = NUMBER_USES[name]

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            penalty = use(output.square().mean(), 1 / (number + 1))
            loss = F.mse_loss(output, y) + penalty
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), penalty.detach()

        return step

    if name in ("divided by", "twice") and not feeds_divisors():
        # A factor is learned with its third value; a whole program has recorded one unit more by then.
        learned = 3 if mode == "function" else 4
        each_unit_is_a_path(training(make), 16, mode, forgotten=learned if name == "twice" else 0)
        return
    report = runs_as_graph(training(make), 16, mode, at_least=16 - 7)
    assert report["paths"] <= (1 if mode == "function" else 2)


@pytest.mark.parametrize("mode", MODES)
def test_annealed_number_in_half_precision_is_not_said_to_be_fed(mode: Mode) -> None:
    """The report said so, and the paths known by then were forgotten."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train((x.bfloat16() * (1 / (number + 1))).float(), y).detach()

        return step

    report = each_unit_is_a_path(training(make), 12, mode)
    assert {entry["code"] for entry in report["fallbacks"]} == {"new_path"}


def test_number_that_is_fetched_and_fed_back() -> None:
    """Gradient clipping by hand: the norm leaves the graph as a number and comes back as one."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss = loss / loss.item()
            loss.backward()
            norm = float(torch.stack([p.grad.norm() for p in parts.model.parameters()]).norm())
            for parameter in parts.model.parameters():
                parameter.grad.mul_(0.5 / (norm + 1e-6))
            parts.optimizer.step()
            parts.seen["norm"] = norm
            return loss.detach()

        return step

    if not feeds_divisors():
        each_unit_is_a_path(training(make), 16)
        return
    report = runs_as_graph(training(make), 16, at_least=9)
    assert report["paths"] == 1


def test_moving_average_of_a_fetched_value_scales_the_loss() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["average"] = 1.0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y) / parts.seen["average"]
            loss.backward()
            parts.optimizer.step()
            parts.seen["average"] = 0.9 * parts.seen["average"] + 0.1 * loss.item()
            return loss.detach()

        return step

    if feeds_divisors():
        runs_as_graph(training(make), 16)
    else:
        each_unit_is_a_path(training(make), 16)


def test_noise_scale_of_the_input_is_annealed() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x + 0.9**number * torch.randn_like(x), y)

        return step

    report = runs_as_graph(training(make), 16, at_least=9)
    assert report["paths"] == 1


def test_fed_number_is_followed_by_an_unknown_path() -> None:
    """The unit is left after the number was fed: what ran so far runs again with the true number."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            hidden = x * (0.3 * number)
            if number in (9, 13):
                hidden = hidden.tanh()
            return parts.train(hidden, y), hidden

        return step

    runs_as_graph(training(make), 18)


def test_fed_number_becomes_a_tensor_then_a_truth_value() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            factor: Any = 0.3 * number
            if number in (9, 13):
                factor = torch.tensor(factor)
            elif number in (11, 14):
                factor = True
            return parts.train(x * factor, y)

        return step

    runs_as_graph(training(make), 18)


def test_harness_catches_a_stale_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the graph keeps the first number it was fed."""
    first: list[torch.Tensor] = []

    def stale(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        first.append(torch.tensor(value, dtype=dtype))
        return first[0]

    monkeypatch.setattr(followed_unit, "number_tensor", stale)

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.train(x * (0.1 * number), y)

    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(make), 12)


@pytest.mark.parametrize("key", ["betas", "eps", "weight_decay"])
def test_hyper_parameter_of_adam_is_annealed(key: str) -> None:
    def between(number: int, parts: Parts) -> None:
        value = 0.9 - 0.02 * number
        parts.optimizer.param_groups[0][key] = (value, 0.99) if key == "betas" else 1e-3 * value

    factory = training(
        lambda parts: lambda number, x, y: parts.train(x, y),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        between=between,
    )
    runs_as_graph(factory, 14)


def test_integer_counter_enters_arithmetic() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["calls"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["calls"] += 1
            correction = 1 - 0.9 ** parts.seen["calls"]
            loss = parts.train(x / correction, y + parts.seen["calls"])
            return loss, x * parts.seen["calls"]

        return step

    accounted(training(make), 12)


def test_exponent_and_shift_alternate() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x ** (1 + number % 2), torch.roll(y, number % 3, 0))

        return step

    runs_as_graph(training(make), 24)


def test_slice_bound_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            keep = 2 + number % 3
            return parts.train(x[:keep], y[:keep])

        return step

    runs_as_graph(training(make), 18)


def test_string_argument_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(x), y, reduction="mean" if number % 4 else "sum") * 0.1
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make), 12)


def test_string_names_the_function() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(getattr(torch, "sin" if number % 3 else "cos")(x), y)

        return step

    runs_as_graph(training(make), 12)


def test_function_in_an_attribute_changes() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 5:
            parts.model[1] = nn.ReLU()

    factory = training(lambda parts: lambda number, x, y: parts.train(x, y), between=between)
    runs_as_graph(factory, 12)


def test_attributes_of_modules_change() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 5:
            parts.model[1].momentum = 0.5
        if number == 8:
            parts.model[1].eps = 0.1
        if number == 11:
            parts.model[2].negative_slope = 0.7

    factory = training(
        lambda parts: lambda number, x, y: parts.train(x, y),
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 3)),
        between=between,
    )
    runs_as_graph(factory, 15)


def test_label_smoothing_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number == 6:
                criterion.label_smoothing = 0.3
            parts.optimizer.zero_grad()
            loss = criterion(parts.model(x), y.argmax(1))
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make), 12)


def test_default_argument_is_mutated() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor, history: list[Any] = []) -> Any:  # noqa: B006
            history.append(number)
            loss = parts.train(x * (0.5 if len(history) > 7 else 1.0), y)
            parts.seen["history"] = list(history)
            return loss, len(history)

        return step

    runs_as_graph(training(make), 14)


def test_closure_is_mutated() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        calls, scale = 0, 1.0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            nonlocal calls, scale
            calls += 1
            if calls % 5 == 0:
                scale *= 0.5
            return parts.train(x * scale, y), calls, scale

        return step

    runs_as_graph(training(make), 18)


def test_closure_tensor_is_replaced() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        offset = torch.ones(4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            nonlocal offset
            loss = parts.train(x + offset, y)
            if number == 5:
                offset = offset * 3
            return loss, offset

        return step

    runs_as_graph(training(make), 14)


SCALE = 1.0


def test_global_is_mutated() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        globals()["SCALE"] = 1.0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            global SCALE
            loss = parts.train(x * SCALE, y)
            if number == 6:
                SCALE = 0.1
            return loss

        return step

    runs_as_graph(training(make), 14)


def test_keywords_and_argument_order_change() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % 3 == 0:
                scaled = torch.add(x, x, alpha=2)
            elif number % 3 == 1:
                scaled = torch.add(x, other=x, alpha=3)
            else:
                scaled = torch.add(x, x)
            return parts.train(scaled, y)

        return step

    runs_as_graph(training(make), 18)


def test_dtype_and_device_arguments_change() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            rounded = x.to(torch.bfloat16 if number % 2 else torch.float16).to(torch.float32)
            return parts.train(rounded, y), x.to("cpu")

        return step

    runs_as_graph(training(make), 12)


def test_default_dtype_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            return loss, torch.ones(2) * number

        return step

    def between(number: int, parts: Parts) -> None:
        torch.set_default_dtype(torch.float64 if number in (5, 6) else torch.float32)

    try:
        same(training(make, between=between), 12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_grad_mode_is_switched_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if not torch.is_grad_enabled():
                return parts.loss(x, y)
            return parts.train(x, y)

        return step

    def between(number: int, parts: Parts) -> None:
        torch.set_grad_enabled(number % 3 != 2)

    try:
        runs_as_graph(training(make, between=between), 18)
    finally:
        torch.set_grad_enabled(True)


def test_wide_and_narrow_models_alternate() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        head = nn.Linear(3, 3)
        parts.seen["head"] = head.weight

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if number % 2:
                output = head(output)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make, model=net), 16)

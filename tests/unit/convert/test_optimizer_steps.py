"""Optimizer steps written as fused kernels do what the optimizers do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.convert.optimizers import Setting, hyper_parameters, lower_step, replays_exactly
from twofold.graph import Value, map_values

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "sgd nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, maximize=True, weight_decay=0.1),
    "sgd whole number": lambda p: SGD(p, lr=1, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.1),
    "adam decay": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, foreach=False),
    "adam amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True, maximize=True),
    "adam decoupled": lambda p: Adam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw amsgrad": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw maximize": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, maximize=True),
    "groups": lambda p: AdamW([{"params": p[:1], "lr": 0.3}, {"params": p[1:], "weight_decay": 0.0}], lr=0.1),
}


def make_parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), ()]]


def lowered_step(optimizer: torch.optim.Optimizer) -> bool:
    """Run the lowered form of one step; False if there is none."""
    environment: dict[Value, Any] = {}

    def value(thing: Any) -> Value:
        made = Value(str(len(environment)), None)
        environment[made] = thing
        return made

    gradients = {
        id(p): value(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    }
    calls = lower_step(optimizer, gradients, value, lambda setting: value(setting.read()))
    if calls is None:
        return False
    for target, arguments, keywords in calls:
        with torch.no_grad():
            target(*map_values(arguments, environment.get), **map_values(keywords, environment.get))
    return True


def set_gradients(parameters: list[torch.Tensor], step: int, skipped: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape)
        parameter.grad = None if index == skipped else gradient
    return [p.grad.clone() for p in parameters if p.grad is not None]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for state in optimizer.state.values() for _, value in sorted(state.items()) if value is not None]


@pytest.mark.parametrize("skipped", [None, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lowered_steps_equal_eager(name: str, skipped: int | None):
    eager, lowered = make_parameters(), make_parameters()
    optimizers = [OPTIMIZERS[name](eager), OPTIMIZERS[name](lowered)]
    for parameters, optimizer in zip((eager, lowered), optimizers, strict=True):
        set_gradients(parameters, 0)
        optimizer.step()
    for step in range(1, 4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / step
        set_gradients(eager, step, skipped)
        gradients = set_gradients(lowered, step, skipped)
        optimizers[0].step()
        assert lowered_step(optimizers[1])
        torch.testing.assert_close(lowered, eager)
        torch.testing.assert_close(state_tensors(optimizers[1]), state_tensors(optimizers[0]))
        assert all(map(torch.equal, gradients, [p.grad for p in lowered if p.grad is not None]))


class OwnAdam(Adam):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p),
        lambda p: OwnAdam(p),
        lambda p: Adam(p, lr=torch.tensor(0.1), foreach=False),
        lambda p: SGD(p, lr=0.1, differentiable=True),
    ],
    ids=["another kind", "subclass", "tensor as learning rate", "differentiable"],
)
def test_no_lowered_form(make: Make):
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    if not optimizer.defaults["differentiable"]:
        optimizer.step()
    before = copy.deepcopy(parameters)
    assert not lowered_step(optimizer)
    assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("name", ["sgd momentum", "adam"])
def test_no_lowered_form_before_there_is_state(name: str):
    parameters = make_parameters()
    optimizer = OPTIMIZERS[name](parameters)
    set_gradients(parameters, 0)
    assert not lowered_step(optimizer)


def test_parameters_of_two_dtypes_have_no_lowered_form():
    parameters: list[torch.Tensor] = [
        torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64)
    ]
    optimizer = SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert not lowered_step(optimizer)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (OPTIMIZERS["sgd nesterov"], True),
        (OPTIMIZERS["adam"], False),
        (lambda p: Adam(p, fused=True), True),
        (lambda p: Adam(p, lr=torch.tensor(0.1), fused=True), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: OwnAdam(p, fused=True), False),
    ],
)
def test_which_recorded_steps_can_be_replayed(make: Make, expected: bool):
    assert replays_exactly(make(make_parameters())) is expected


def test_settings_and_hyper_parameters():
    optimizer = SGD(make_parameters(), lr=0.1, momentum=0.9)
    setting = Setting(optimizer, 0, "lr")
    known = hyper_parameters(optimizer, ("lr",))
    optimizer.param_groups[0]["lr"] = 0.2
    assert setting.read() == 0.2
    assert hyper_parameters(optimizer, ("lr",)) == known
    optimizer.param_groups[0]["momentum"] = 0.8
    assert hyper_parameters(optimizer, ("lr",)) != known

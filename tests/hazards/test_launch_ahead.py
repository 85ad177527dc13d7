"""A device that goes on ahead of Python after a fetch: nobody can tell, whichever way Python goes then.

On a CPU nothing is launched ahead; here it is made to be, so that every way of being wrong is tried without a device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.differential import assert_same, function
from tests.hazards.programs import BATCH, BATCHES, Parts, training
from twofold.convert import from_traces
from twofold.run import graph_runner, installed
from twofold.run.followed_unit import TRUSTED_AFTER
from twofold.run.graph_runner import GraphRunner


class Event:
    """Of a device that is always ready."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have programs on the CPU launched ahead; return the segments that were."""
    launched: list[int] = []
    original = GraphRunner.launch_ahead

    def launch_ahead(self: GraphRunner) -> None:
        before = self.launched
        original(self)
        launched.extend(range(before, self.launched))

    monkeypatch.setattr(from_traces._Builder, "_is_on_accelerator", lambda _: True)
    monkeypatch.setattr(installed, "_is_small_and_remote", lambda _: True)
    monkeypatch.setattr(installed, "_host_memory", lambda value: torch.empty(value.spec.shape, dtype=value.spec.dtype))
    for module in (from_traces, graph_runner):
        monkeypatch.setattr(module, "is_read_in_order", lambda _: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(GraphRunner, "launch_ahead", launch_ahead)
    return launched


def make(react: Callable[[Parts, int, float], None]) -> Callable[[Parts], Callable[..., Any]]:
    """A step that reads a number after its first layer, where `react` is the user's code, and goes on."""

    def make_step(parts: Parts) -> Callable[..., Any]:
        norms = parts.seen.setdefault("norms", [])

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x)
            norms.append(float(hidden.detach().norm()))
            react(parts, number, norms[-1])
            hidden = parts.model[1](hidden)
            norms.append(hidden.detach().sum().item())
            loss = (parts.model[2](hidden) - y).square().mean()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    return make_step


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh()), nn.Linear(8, 3))


EXACT = function(engine="coexecution", numerics="exact", backend="replay", background=False)
STEPS = 6 + 3 * TRUSTED_AFTER


def test_a_steady_way(ahead: list[int]) -> None:
    report = assert_same(training(make(lambda *_: None), model=net), STEPS, EXACT)
    assert report["graph_iterations"] >= STEPS - 4
    assert ahead


def raise_sometimes(parts: Parts, number: int, norm: float) -> None:
    if number == STEPS - 3:
        raise ValueError("the program's own")


def draw_sometimes(parts: Parts, number: int, norm: float) -> None:
    if number % 5 == 4:
        parts.seen["drawn"] = torch.rand(2).tolist()


def change_a_parameter(parts: Parts, number: int, norm: float) -> None:
    if number % 5 == 4:
        with torch.no_grad():
            parts.model[2].weight.mul_(0.5)


def change_a_buffer(parts: Parts, number: int, norm: float) -> None:
    if number % 4 == 3:
        parts.model[1][0].running_mean.zero_()


def freeze(parts: Parts, number: int, norm: float) -> None:
    parts.model[1][1].p = 0.1 if number % 6 == 5 else 0.3


def look(parts: Parts, number: int, norm: float) -> None:
    if number % 4 == 3:
        parts.seen["mean"] = parts.model[1][0].running_mean.tolist()
        parts.seen["state"] = torch.get_rng_state().tolist()


@pytest.mark.parametrize("react", [draw_sometimes, change_a_parameter, change_a_buffer, freeze, look])
def test_a_surprise_after_a_steady_way(react: Callable[[Parts, int, float], None], ahead: list[int]) -> None:
    assert_same(training(make(react), model=net), 2 * STEPS, EXACT)
    assert ahead


def test_an_exception_after_a_steady_way(ahead: list[int]) -> None:
    assert_same(training(make(raise_sometimes), model=net), STEPS, EXACT)
    assert ahead


def test_the_harness_sees_a_discard_that_forgets_what_was_launched_ahead(
    ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphRunner, "_save", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(training(make(change_a_parameter), model=net), 2 * STEPS, EXACT)


def wide_net() -> nn.Module:
    """Its parameters are too much to be copied: what writes to them is not launched ahead."""
    return nn.Sequential(nn.Linear(4, 8192), nn.Dropout(0.3), nn.Linear(8192, 3))


def slowly(model: nn.Module) -> torch.optim.Optimizer:
    """What is not a number would hide every difference."""
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def make_targets(choose: Callable[[Parts, int, torch.Tensor], torch.Tensor]) -> Callable[[Parts], Callable[..., Any]]:
    """A step that uses its last argument, or what `choose` makes of it, only after it has read a number."""

    def make_step(parts: Parts) -> Callable[..., Any]:
        norms = parts.seen.setdefault("norms", [])
        parts.seen["others"] = [torch.randn(BATCH, 3) for _ in range(BATCHES)]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x)
            norms.append(float(hidden.detach().norm()))
            loss = (parts.model[1:](hidden) - choose(parts, number, y)).square().mean()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    return make_step


def keep(parts: Parts, number: int, y: torch.Tensor) -> torch.Tensor:
    return y


def replace(parts: Parts, number: int, y: torch.Tensor) -> torch.Tensor:
    return parts.seen["others"][number % BATCHES] if number % 8 == 7 else y


def change(parts: Parts, number: int, y: torch.Tensor) -> torch.Tensor:
    return y.add_(1.0) if number % 8 == 7 else y


def change_beside(parts: Parts, number: int, y: torch.Tensor) -> torch.Tensor:
    if number % 8 == 7:
        y[0].zero_()
    return y


def test_arguments_of_the_call_are_foretold(ahead: list[int]) -> None:
    report = assert_same(training(make_targets(keep), model=wide_net, optimizer=slowly), STEPS, EXACT)
    assert report["graph_iterations"] >= STEPS - 5
    assert ahead == [1] * len(ahead)
    assert report["segments"] == 3  # before the number, what goes ahead, the update


@pytest.mark.parametrize("choose", [replace, change, change_beside])
def test_an_argument_is_not_what_the_unit_uses(
    choose: Callable[[Parts, int, torch.Tensor], torch.Tensor], ahead: list[int]
) -> None:
    report = assert_same(training(make_targets(choose), model=wide_net, optimizer=slowly), 3 * STEPS, EXACT)
    assert report["discards"]
    assert ahead


def test_the_harness_sees_a_unit_that_is_misled(ahead: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "is_misled", False)
    with pytest.raises(AssertionError):
        assert_same(training(make_targets(replace), model=wide_net, optimizer=slowly), 3 * STEPS, EXACT)


def given_pairs(pair: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A step that uses its second argument only after it has read a number, and then reads a gradient of the first."""

    def make_step(parts: Parts) -> Callable[..., Any]:
        norms = parts.seen.setdefault("norms", [])

        def step(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](left)
            norms.append(float(hidden.detach().norm()))
            loss = (parts.model[1:](hidden) - 2 * parts.model(right)).square().mean()
            loss.backward()
            norms.append(0.0 if left.grad is None else float(left.grad.norm()))
            parts.optimizer.step()
            return loss.detach()

        return step

    def build() -> Any:
        program = training(make_step, model=wide_net, optimizer=slowly)()
        batches = program.batches
        program.batches = lambda number: pair(number, batches(number)[1])
        return program

    return build


def leaves_that_are_one(number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = x.clone().requires_grad_(), (x + 1).requires_grad_()
    return left, left if number % 8 == 7 else right


def leaves_with_gradients(number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = x.clone().requires_grad_(), (x + 1).requires_grad_()
    if number % 8 == 7:
        left.grad = torch.ones_like(x)
    return left, right


def leaves_that_keep_gradients(number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = leaves_with_gradients(7, x)
    return (left, left) if number % 8 == 7 else (left, right)


def one_memory(number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x.detach() if number % 8 != 7 else x + 1


@pytest.mark.parametrize("pair", [leaves_that_are_one, leaves_with_gradients, leaves_that_keep_gradients, one_memory])
def test_arguments_are_otherwise_than_foretold(
    pair: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]], ahead: list[int]
) -> None:
    report = assert_same(given_pairs(pair), 3 * STEPS, EXACT)
    assert report["graph_iterations"] >= STEPS
    assert ahead or pair is leaves_that_keep_gradients

"""Random streams of Python, NumPy and torch, in the order in which eager execution draws from them."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import twofold
from benchmarks.programs import Program
from tests.hazards.programs import (
    MODES,
    Mode,
    Parts,
    accounted,
    net,
    runs_as_graph,
    same,
    sgd,
    stays_eager,
    training,
)


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def plain(parts: Parts) -> Callable[..., Any]:
    return lambda number, x, y: parts.train(x, y)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_anew_each_step(mode: Mode) -> None:
    runs_as_graph(training(plain, model=noisy), 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("library", ["python", "numpy", "torch"])
def test_coin_chooses_the_path(library: str, mode: Mode) -> None:
    flips: dict[str, Callable[[], float]] = {
        "python": random.random,
        "numpy": np.random.rand,
        "torch": lambda: torch.rand(()).item(),
    }

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x)
            if flips[library]() < 0.4:
                hidden = F.dropout(hidden.tanh(), 0.3)
            elif flips[library]() < 0.5:
                hidden = hidden + torch.randn(8)
            loss = F.mse_loss(parts.model[2](hidden), y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make, model=noisy), 30, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_fallback_in_the_middle_of_random_draws(where: str, mode: Mode) -> None:
    """The new path leaves the graph before, between and after random operations; streams must not notice."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            new = number in (5, 8)
            parts.optimizer.zero_grad()
            if new and where == "before":
                x = x.abs()
            x = x + 0.1 * torch.randn_like(x)
            if new and where == "between":
                x = x * torch.rand(4) + random.random()
            output = parts.model(x)
            loss = F.mse_loss(output, y)
            loss.backward()
            if new and where == "after":
                print(loss.exp(), torch.rand(2), np.random.rand())
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make, model=noisy), 12, mode)


def test_fallback_after_a_fetch() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            size = output.abs().mean().item()
            if number in (5, 8):
                output = output * size
            loss = F.mse_loss(F.dropout(output, 0.2), y)
            loss.backward()
            print(loss.item())
            if number == 7:
                parts.model[0].weight.grad.mul_(2)
            parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make, model=noisy), 12, mode)


@pytest.mark.parametrize("mode", MODES)
def test_many_random_functions(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            noise = torch.randn(6, 4) + torch.rand_like(x) + torch.empty(6, 4).uniform_(-1, 1)
            mask = torch.bernoulli(torch.full((6, 4), 0.5)) * torch.randint(0, 3, (6, 4))
            order = torch.randperm(6)
            x = (x + noise * mask)[order] + torch.normal(0.0, 1.0, (4,))
            x = x + torch.distributions.Normal(torch.zeros(4), torch.ones(4)).rsample()
            chosen = torch.multinomial(torch.softmax(x, 1), 1)
            return parts.train(x, y[order]).detach(), chosen, order

        return step

    runs_as_graph(training(make), 8, mode)


@pytest.mark.parametrize("mode", MODES)
def test_manual_seed_inside(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % 2:
                torch.manual_seed(number // 4)
            return parts.train(x, y).detach(), torch.rand(2)

        return step

    accounted(training(make, model=noisy), 12, mode)


def test_seed_in_the_middle() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            first = torch.rand(2)
            torch.manual_seed(7)
            random.seed(7)
            second = torch.rand(2)
            return parts.train(x + first.mean(), y).detach(), second, random.random()

        return step

    same(training(make, model=noisy), 10)


@pytest.mark.parametrize("mode", MODES)
def test_state_is_saved_and_set_back(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            state = torch.get_rng_state()
            first = F.dropout(x, 0.5)
            torch.set_rng_state(state)
            second = F.dropout(x, 0.5)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                third = torch.rand(4)
            return parts.train(first + second + third, y).detach(), first, second

        return step

    same(training(make), 8, mode)


@pytest.mark.parametrize("mode", MODES)
def test_generator_of_the_users_own(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        generator = torch.Generator(torch.empty(0).device).manual_seed(5)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            noise = torch.randn(6, 4, generator=generator)
            if number == 6:
                generator.manual_seed(5)
            parts.seen["state"] = generator.get_state().sum().item()
            return parts.train(x + noise, y).detach(), noise

        return step

    accounted(training(make), 12, mode)


def test_generator_when_a_path_is_left() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        generator = torch.Generator(torch.empty(0).device).manual_seed(5)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            x = x + torch.randn(6, 4, generator=generator)
            loss = parts.loss(x, y)
            print(loss.item())
            if number == 6:
                loss = loss * 2
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    accounted(training(make), 10)


def test_numbers_drawn_by_python_stay_drawn_when_a_path_is_left() -> None:
    """Noise of ever other sizes becomes Python's own, between a fetch, for which a segment runs, and dropout."""

    def make(parts: Parts) -> Callable[..., Any]:
        losses = [torch.zeros(())]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            print((losses[-1] + 1).item())
            noise = torch.randn(1 + number % 9, 4)
            if number in (23, 30):
                x = x.abs()
            losses.append(parts.train(x + noise.mean(0), y).detach())
            return noise

        return step

    for mode in MODES:
        runs_as_graph(training(make, model=noisy), 40, mode)


def test_numbers_drawn_by_python_after_the_units_own() -> None:
    """Dropout, which the graph draws for at the unit's end, and then noise that Python draws at once."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            hidden = F.dropout(parts.model[0](x), 0.5)
            noise = torch.randn(1 + number % 9, 8)
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model[2](hidden + noise.mean(0)), y)
            loss.backward()
            parts.optimizer.step()
            return noise

        return step

    for mode in MODES:
        accounted(training(make), 40, mode)


def test_draws_outside_between_units() -> None:
    def between(number: int, parts: Parts) -> None:
        parts.seen.setdefault("drawn", []).append((torch.rand(1).item(), random.random(), np.random.rand()))

    for mode in MODES:
        runs_as_graph(training(plain, model=noisy, between=between), 8, mode)


def test_initialisation_inside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            probe = nn.Linear(3, 3)
            with torch.no_grad():
                probed = probe(parts.model(x))
            return parts.train(x, y).detach(), probed, probe.weight

        return step

    same(training(make), 8)


@pytest.mark.parametrize("mode", MODES)
def test_minibatches_by_hand(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        inputs, targets = torch.randn(20, 4), torch.randn(20, 3)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            order = torch.randperm(len(inputs))
            total = 0.0
            for start in range(0, len(inputs), 6):
                rows = order[start : start + 6]
                total += parts.train(inputs[rows], targets[rows]).item()
            return total

        return step

    runs_as_graph(training(make, model=noisy), 8, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shuffle", [pytest.param(True, marks=pytest.mark.cpu), False])
def test_data_loader(shuffle: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        data = TensorDataset(torch.randn(20, 4), torch.randn(20, 3))
        loader = DataLoader(data, batch_size=6, shuffle=shuffle)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return [parts.train(inputs, targets).detach() for inputs, targets in loader]

        return step

    runs_as_graph(training(make, model=noisy), 6, mode)


@pytest.mark.cpu
def test_data_loader_outside_of_a_function() -> None:
    def build() -> Program:
        model = noisy()
        parts = Parts(model, sgd(model))
        data = TensorDataset(torch.randn(20, 4), torch.randn(20, 3))

        def stream() -> Any:
            while True:
                yield from DataLoader(data, batch_size=6, shuffle=True)

        batches = stream()
        return Program(parts.train, lambda number: next(batches), {"net": model}, {"sgd": parts.optimizer})

    runs_as_graph(build, 16)


@pytest.mark.cpu
def test_loader_with_random_transforms() -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            noise = random.random() + np.random.rand()
            return torch.randn(4) + noise, np.full(3, index, dtype=np.float32)

    def make(parts: Parts) -> Callable[..., Any]:
        loader = DataLoader(Data(), batch_size=6, shuffle=True, drop_last=True)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            losses = []
            for inputs, targets in loader:
                losses.append(parts.train(inputs, targets).item())
            return losses

        return step

    for mode in MODES:
        runs_as_graph(training(make, model=noisy), 10, mode)


def test_random_with_rejection_loop() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            draws = 0
            while True:
                noise = torch.randn(4)
                draws += 1
                if noise.sum() > 0:
                    break
            return parts.train(x + noise, y).detach(), draws

        return step

    for mode in MODES:
        runs_as_graph(training(make), 16, mode)


def test_evaluation_with_dropout_off_draws_nothing() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y).detach()
            parts.model.eval()
            with torch.no_grad():
                value = parts.model(x).sum()
            parts.model.train()
            return loss, value

        return step

    for mode in MODES:
        same(training(make, model=noisy), 8, mode)


def test_draws_in_place_between_products_that_are_made_at_once() -> None:
    """Dropout came behind the noise, with the product that it has to wait for."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)

    def noisy_sum(x: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(x @ weight, 0.5)
        noise = torch.empty_like(x).uniform_()
        return dropped + noise + (x * 2) @ weight

    graphed = twofold.function(noisy_sum, numerics="fused", backend="replay", background=False)
    for number in range(6):
        x = torch.randn(8, 64)
        torch.manual_seed(number)
        expected, after = noisy_sum(x), torch.get_rng_state()
        torch.manual_seed(number)
        torch.testing.assert_close(graphed(x), expected)
        assert torch.equal(torch.get_rng_state(), after)
    assert twofold.report(graphed).to_dict()["graph_iterations"] >= 3


def drawing(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward of some ten operations, most of which draw, in no order but that of the program."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        choices = random.Random(seed)
        values = [x, x[:, :4] * 2]
        for _ in range(choices.randint(6, 14)):
            v, kind = choices.choice(values), choices.randrange(8)
            if kind == 0:
                values.append(F.dropout(v, 0.5))
            elif kind == 1:
                values.append(v.repeat(1, choices.choice([1, 4])).relu())
            elif kind == 2:
                values.append(F.dropout(v.repeat(1, 8), 0.3))
            elif kind == 3:
                values.append(v.sum(0, keepdim=True).expand(v.shape) + torch.rand_like(v))
            elif kind == 4:
                values.append(torch.randn(v.shape[0], v.shape[1], device=v.device) + v)
            elif kind == 5:
                values.append(v.cumsum(0).tanh())
            elif kind == 6:
                values.append(F.dropout(v.mean(1, keepdim=True), 0.5) * v)
            else:
                values.append(v @ torch.ones(v.shape[1], choices.choice([2, 64]), device=v.device))
        sums = [v.sum(0) for v in values[2:]]
        choices.shuffle(sums)
        return torch.cat(sums)

    return forward


@pytest.mark.parametrize("seed", [5, 11])
def test_compiled_draws_keep_their_order(seed: int) -> None:
    """PyTorch 2.11 moved them past one another."""
    forward = drawing(seed)
    graphed = twofold.function(forward, numerics="fused", backend="inductor", background=False, engine="coexecution")
    x = torch.randn(64, 16)
    with torch.no_grad():
        for number in range(5):
            torch.manual_seed(number)
            expected, after = forward(x), torch.rand(())
            torch.manual_seed(number)
            torch.testing.assert_close(graphed(x), expected, rtol=1e-4, atol=1e-4)
            assert torch.rand(()) == after
    assert twofold.report(graphed).to_dict()["graph_iterations"] >= 2


def test_no_tensors_but_random_numbers() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return random.random(), np.random.rand(), number

        return step

    stays_eager(training(make, model=net), "no_tensor_calls", 6)

"""Units that begin within a region of autocast: eager keeps what it cast of a parameter until the region is left."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.differential import exact_backend
from twofold import driver

ENGINES = ("coexecution", "speculation")
Results = list[torch.Tensor]


def region() -> Any:
    return torch.autocast(torch.empty(0).device.type, dtype=torch.bfloat16)


def decorated(engine: str) -> Callable[[Any], Any]:
    return twofold.function(engine=engine, backend=exact_backend(), numerics="exact", background=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def evaluation(decorate: Callable[[Any], Any]) -> tuple[Results, Any]:
    """Epochs that end with a look at held-out data, all within one region."""
    model = network()
    look = decorate(model.forward)
    batches = [torch.randn(6, 8) for _ in range(3)]
    results: Results = []
    for _ in range(4):
        with torch.no_grad(), region():
            results += [look(batches[number % 3]).clone() for number in range(6)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
    return results, look


def forward_only(decorate: Callable[[Any], Any], lengths: list[int]) -> tuple[Results, Any]:
    """The forward alone is decorated; `backward` and step are within the region too."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward = decorate(model.forward)
    batches = [torch.randn(6, 8) for _ in range(3)]
    results: Results = []
    for length in lengths:
        with region():
            for number in range(length):
                optimizer.zero_grad()
                loss = forward(batches[number % 3]).float().square().mean()
                loss.backward()
                optimizer.step()
                results.append(loss.detach())
    return [*results, *(parameter.detach() for parameter in model.parameters())], forward


def training(
    decorate: Callable[[Any], Any],
    lengths: list[int],
    ways: Callable[[], int],
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> tuple[Results, Any]:
    """Regions around several steps each, or around one."""
    model, other = network(), nn.Linear(8, 4)
    optimizer = make_optimizer([*model.parameters(), *other.parameters()], lr=0.1)

    def step(x: torch.Tensor, y: torch.Tensor, way: int) -> torch.Tensor:
        optimizer.zero_grad()
        out = model(x)
        if way:
            out = out + other(x)
        loss = F.mse_loss((out.sin() if way > 1 else out).float(), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    train = decorate(step)
    batches = [(torch.randn(6, 8), torch.randn(6, 4)) for _ in range(3)]
    results: Results = []
    for length in lengths:
        with region():
            results += [train(*batches[number % 3], ways()).clone() for number in range(length)]
    return [*results, *(parameter.detach() for parameter in model.parameters())], train


def report_if_same(program: Callable[[Callable[[Any], Any]], tuple[Results, Any]], engine: str) -> dict[str, Any]:
    expected, _ = program(lambda function: function)
    got, function = program(decorated(engine))
    differing = [index for index, (a, b) in enumerate(zip(expected, got, strict=True)) if not torch.equal(a, b)]
    assert not differing
    return twofold.report(function).to_dict()


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_within_one_region_uses_the_weights_of_now(engine: str) -> None:
    assert report_if_same(evaluation, engine)["graph_iterations"] >= 20


LENGTHS = [[1] * 12, [12, 3], [1, 1, 1, 1, 4, 4]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("engine", ENGINES)
def test_units_that_train_within_a_region_stay_eager(
    engine: str, make_optimizer: Callable[..., torch.optim.Optimizer], lengths: list[int]
) -> None:
    report = report_if_same(lambda decorate: training(decorate, lengths, lambda: 0, make_optimizer), engine)
    assert report["graph_iterations"] == 0
    assert "unsupported_call" in {entry["code"] for entry in report["fallbacks"]}


@pytest.mark.parametrize("lengths", [[12, 3], [4, 4, 4]], ids=str)
def test_region_in_which_the_program_trains_what_was_decorated(lengths: list[int]) -> None:
    report = report_if_same(lambda decorate: forward_only(decorate, lengths), "coexecution")
    assert report["graph_iterations"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_regions_at_random(engine: str) -> None:
    for seed in range(8):
        lengths = [random.Random(seed).randrange(1, 5) for _ in range(8)]

        def program(decorate: Any, lengths: list[int] = lengths, seed: int = seed) -> tuple[Results, Any]:
            numbers = random.Random(seed)
            return training(decorate, lengths, lambda: numbers.randrange(3))

        report_if_same(program, engine)


def test_casts_from_before_are_seen_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: units begin with the casts that they find."""
    monkeypatch.setattr(driver, "begin_without_casts", lambda: None)
    with pytest.raises(AssertionError):
        report_if_same(evaluation, "coexecution")

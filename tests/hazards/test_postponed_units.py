"""Units that wait to be recorded, and graphs that wait to be built, at any moment: nobody can tell, and all comes."""

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.differential import assert_same, exact_backend, function, program
from tests.equivalence.test_programs import factory
from tests.hazards.programs import MODES, Mode
from tests.hazards.test_loops_without_steps import evaluation_with_metrics, inference, own_sgd, same_in_program
from twofold.options import Options
from twofold.run.pace import Pace, Work

CHANCE = 0.5
"""The first answer is no: so the first unit of a program runs unwatched."""


@pytest.fixture(autouse=True)
def _wait_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    monkeypatch.setattr(Pace, "fits", lambda self, *works: chance.random() < CHANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["mlp", "grad_accumulation", "adversarial", "multi_path", "lm", "lr_schedule", "logging_net"]
)
def test_program_is_eager_whatever_waits(name: str, mode: Mode) -> None:
    options: dict[str, Any] = {"backend": exact_backend(), "numerics": "exact", "background": False}
    configuration = (function if mode == "function" else program)(**options)
    report = assert_same(factory(name, torch.empty(0).device.type), 40, configuration, observe="end")
    assert report["graph_iterations"] > 0


def inference_with_history() -> Any:
    """Nothing tells of its landmark, the module's call, that units can end there, before one was recorded."""
    served = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    return [served(torch.randn(6, 4)).detach() for _ in range(40)]


@pytest.mark.parametrize("loop", [inference, inference_with_history, evaluation_with_metrics, own_sgd])
def test_loop_without_steps_is_seen_after_its_first_unit_ran_unwatched(loop: Any) -> None:
    assert same_in_program(loop)["graph_iterations"] > 0


def test_all_units_of_a_call_are_recorded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second optimizer's unit would count as what follows the call's last step, and never be heard.

    The next call is recorded without being asked for: the units of a warm-up follow one another.
    """
    asked: list[tuple[Work, ...]] = []
    monkeypatch.setattr(Pace, "fits", lambda self, *works: asked.append(works) or len(asked) == 2)
    models = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    x = torch.randn(6, 4)

    @twofold.function(backend="replay")
    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), x).backward()
            optimizer.step()

    traced: list[int] = []
    for _ in range(3):
        step()
        traced.append(twofold.report(step).to_dict()["traced_iterations"])
    assert traced == [0, 2, 4]


def test_a_conversion_that_waits_is_no_failed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that no graph fits and for which one comes later do not count among those that end speculation."""
    converts = [True]
    monkeypatch.setattr(Pace, "fits", lambda self, *works: Work.CONVERT not in works or converts[0])
    weight = torch.randn(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    @twofold.function(backend="replay")
    def step(x: torch.Tensor, times: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.sum()
        for _ in range(times):
            loss = loss * x.sum()
        loss.backward()
        optimizer.step()
        return loss

    x = torch.randn(4)
    for number in range(20):
        step(x, 1 + number // 10)
    converts[0] = False
    for number in range(120):
        step(x, 3 if number % 2 else 2)
    report = twofold.report(step).to_dict()
    assert report["speculated_iterations"] > 60
    assert "assumption_failed" not in {entry["code"] for entry in report["fallbacks"]}


def test_which_options_have_graphs_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Options().is_paced
    assert not Options(backend="replay").is_paced
    assert not Options(background=False).is_paced
    assert not Options(strict=True).is_paced

"""A launch that fails: the unit goes on eagerly from there, and nobody can tell."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.hazards.programs import STEPS, Parts, runs_as_graph, same, training
from twofold.backends.executable import Environment
from twofold.backends.replay import ReplayExecutable
from twofold.run.graph_runner import GraphRunner


def make_step(parts: Parts) -> Any:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        print(f"{loss.item():.4f}")
        loss.backward()
        parts.optimizer.step()
        return loss.detach() * 2

    return step


def adam(model: Any) -> torch.optim.Optimizer:
    """Steps outside the graph."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


PROGRAMS = {"sgd": training(make_step, model=net), "adam": training(make_step, model=net, optimizer=adam)}


def plant(monkeypatch: pytest.MonkeyPatch, segment: int) -> list[int]:
    """Have every other launch of `segment` fail; return the list of these launches."""
    launch, launches = ReplayExecutable.launch, []

    def failing(self: ReplayExecutable, index: int, environment: Environment) -> None:
        if index == segment:
            launches.append(index)
            if len(launches) % 2 == 0:
                raise RuntimeError("the device is lost")
        launch(self, index, environment)

    monkeypatch.setattr(ReplayExecutable, "launch", failing)
    return launches


@pytest.mark.parametrize(("optimizer", "segment"), [("sgd", 0), ("sgd", 1), ("adam", 0), ("adam", 1)])
def test_a_launch_fails(optimizer: str, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = plant(monkeypatch, segment)
    report = runs_as_graph(PROGRAMS[optimizer], STEPS + 2, engine="coexecution", backend="replay")
    assert len(launches) > 1
    failures = [entry for entry in report["fallbacks"] if entry["code"] == "capture_failed"]
    assert sum(entry["count"] for entry in failures) == len(launches) // 2
    assert {entry["reason"] for entry in failures} == {"RuntimeError while a graph ran: the device is lost"}
    assert report["paths"] == 1


def test_harness_catches_a_failure_that_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: running statistics written before the launch that failed stay."""
    plant(monkeypatch, 1)
    monkeypatch.setattr(GraphRunner, "discard", lambda _: None)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(PROGRAMS["sgd"], STEPS + 2, engine="coexecution", backend="replay")

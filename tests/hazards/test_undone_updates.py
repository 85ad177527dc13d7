"""What a segment writes is copied where it may have to be undone: not what is written at the end of a unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.hazards.programs import MODES, Mode, Parts, runs_as_graph, training
from twofold.run.graph_runner import GraphRunner


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


def number_before_backward(parts: Parts) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        parts.optimizer.zero_grad()
        loss = F.mse_loss(parts.model(x), y)
        value = loss.item()
        loss.backward()
        parts.optimizer.step()
        return value

    return step


@pytest.mark.parametrize("mode", MODES)
def test_equals_eager(mode: Mode) -> None:
    runs_as_graph(training(number_before_backward, model=normalised, optimizer=momentum), 16, mode)


def copied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Run a step; say which shapes the last unit copied, to be put back."""
    saved: list[list[torch.Size]] = []
    launch = GraphRunner.launch_through

    def launch_through(self: GraphRunner, count: int) -> None:
        launch(self, count)
        saved.append([copy.shape for copy in self._saved.values()])

    monkeypatch.setattr(GraphRunner, "launch_through", launch_through)
    torch.manual_seed(0)
    model = normalised()
    parts = Parts(model, adam(model))
    step = twofold.function(
        number_before_backward(parts), numerics="fused", backend="replay", background=False, engine="coexecution"
    )
    for number in range(6):
        step(number, torch.randn(5, 4), torch.randn(5, 3))
    return saved[-1]


STATISTICS = [torch.Size([8]), torch.Size([8]), torch.Size([])]


def test_statistics_alone_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """That forward had written to them had all copied that the optimizer writes, in each step."""
    assert sorted(copied(monkeypatch)) == sorted(STATISTICS)

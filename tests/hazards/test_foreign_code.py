"""Parts of a program that other compilers made: `torch.compile`, TorchScript, operators that hold functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import twofold
from tests.hazards.programs import MODES, Mode, Parts, accounted, net, runs_as_graph, stays_eager, training


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_part_compiled_by_torch(fullgraph: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        compiled = torch.compile(parts.model, backend="eager", fullgraph=fullgraph)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(compiled(x), y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make), 6, mode)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_part_stays_compiled_outside_of_units(fullgraph: bool) -> None:
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            runs.append(1)
            return graph(*arguments)

        return counted

    model = net()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    forward = twofold.function(compiled, numerics="exact", backend="replay", background=False)
    x = torch.randn(6, 4)
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(forward(x), model(x))
        assert twofold.report(forward).to_dict()["graph_iterations"] > 0
        assert not runs
        for _ in range(3):
            assert torch.equal(compiled(x), model(x))
    assert len(runs) == 3


def test_what_chooses_kernels_is_compiled_whole_between_units() -> None:
    """Layers of transformers ask whether anything is overridden, and Dynamo knows that function of PyTorch's alone."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    forward = twofold.function(layer, numerics="exact", backend="replay", background=False)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(forward(x), layer(x))
            assert compiled(x).shape == x.shape
    assert twofold.report(forward).to_dict()["graph_iterations"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_operator_that_holds_functions(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = torch.cond(x.sum() > 0, torch.sin, torch.cos, (parts.model(x),))
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    stays_eager(training(make), "foreign_operation", 8, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["script", "trace", "function"])
def test_scripted_part(way: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        scripted: Any
        if way == "script":
            scripted = torch.jit.script(parts.model)
        elif way == "trace":
            scripted = torch.jit.trace(parts.model, torch.zeros(6, 4))
        else:
            inner = torch.jit.script(_scripted)
            scripted = lambda x: inner(parts.model(x))  # noqa: E731

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(scripted(x), y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    # Else TorchScript itself takes other kernels from the third call on.
    with torch.jit.optimized_execution(False):
        accounted(training(make), 8, mode)


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 2.0 + x

"""What PyTorch does beneath one call of the program: shapes changed in place, kernels chosen by who listens."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import MODES, Mode, Parts, net, runs_as_graph, stays_eager, training


class Sequence(nn.Module):
    """A recurrent network over the columns of its input as steps."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.last = cell(1, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, hidden = self.cell(x.unsqueeze(2))
        return self.last(output[:, -1] + hidden[0] + output.mean(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN])
def test_batches_come_first(cell: Any, mode: Mode) -> None:
    """What such a network makes is transposed in place, beneath the call. cuDNN leaves out a gradient: a limit."""

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.train(x, y)

    program = training(make, model=lambda: Sequence(cell))
    if torch.empty(0).is_cuda:
        stays_eager(program, "unsupported_call", 10, mode)
    else:
        runs_as_graph(program, 10, mode)


@pytest.fixture
def partly() -> Iterator[Callable[[torch.Tensor], Any]]:
    """An operation that leaves out one of its results, as cuDNN's backward of recurrent layers without a cell state."""
    library = torch.library.Library("twofold_tests", "FRAGMENT")
    library.define("partly(Tensor x) -> (Tensor, Tensor, Tensor[])")
    library.impl("partly", lambda x: (x * 2.0, None, [x + 1.0, x + 2.0]), "CompositeExplicitAutograd")
    yield torch.ops.twofold_tests.partly
    library._destroy()


@pytest.mark.parametrize("mode", MODES)
def test_a_result_is_left_out_beside_a_list(mode: Mode, partly: Callable[[torch.Tensor], Any]) -> None:
    """Which of the others is which could not be told: a gradient was taken for another."""

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: (partly(x)[2][1], parts.train(x, y))

    stays_eager(training(make), "unsupported_call", 10, mode)


@pytest.fixture
def look_at_all() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """An operation that looks at all of a tensor's storage, as cuDNN's recurrent layers look at all their weights."""

    def look(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, device=x.device).set_(x.untyped_storage()) * 1.0

    library = torch.library.Library("twofold_tests", "FRAGMENT")
    library.define("look_at_all(Tensor x) -> Tensor")
    library.impl("look_at_all", look, "CompositeImplicitAutograd")
    yield torch.ops.twofold_tests.look_at_all
    library._destroy()


@pytest.mark.parametrize("mode", MODES)
def test_all_of_a_storage_is_looked_at(mode: Mode, look_at_all: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What parameters lie in is looked at in a graph, also when they have been moved; anything else may be larger."""

    def move(number: int, parts: Parts) -> None:
        if number in (6, 9):
            bias, weight = parts.model[0].bias, parts.model[0].weight
            flat = torch.cat([torch.full((number,), 9.0), bias.detach(), weight.detach().flatten()])
            bias.data, weight.data = flat[number : number + len(bias)], flat[number + len(bias) :].view_as(weight)

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: (look_at_all(parts.model[0].weight), parts.train(x, y))

    runs_as_graph(training(make, between=move), 12, mode)
    stays_eager(training(lambda _: lambda number, x, y: look_at_all(x[1:])), "unsupported_call", 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_quantile(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            made = parts.model(x)
            loss = F.mse_loss(made, y) + made.quantile(0.5) + made.quantile(0.9, dim=1).sum()
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make), 10, mode)


RESHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "t_": lambda t: t.t_().t_(),
    "transpose_": lambda t: t.transpose_(0, 1).mul_(2).swapaxes_(0, 1),
    "unsqueeze_": lambda t: t.unsqueeze_(0).squeeze_(0),
    "as_strided_": lambda t: t.as_strided_((3, t.numel() // 3), (1, 3)).t_(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RESHAPES)
def test_shape_is_changed_in_place(name: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            hidden = parts.model(x)
            reshaped = RESHAPES[name](hidden)
            parts.optimizer.zero_grad()
            loss = F.mse_loss(hidden, y)
            loss.backward()
            parts.optimizer.step()
            return loss, hidden.shape, hidden.stride(), reshaped is hidden

        return step

    stays_eager(training(make), "unsupported_call", 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_fused_layers_are_taken_that_are_taken_without_modes(mode: Mode) -> None:
    """A transformer's layers in evaluation ask whether somebody hears their calls, and round otherwise if so."""

    def make(parts: Parts) -> Callable[..., Any]:
        layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
        attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.no_grad():
                encoded = layers(x.unsqueeze(0))[0]
                attended = attention(x[None], x[None], x[None], need_weights=False)[0][0]
            return encoded, attended, parts.train(encoded + attended, y)

        return step

    runs_as_graph(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_path_is_left_where_an_array_becomes_a_tensor(mode: Mode) -> None:
    """It is left beneath an operation; what the unit did before must be recorded as it is made again."""

    def make(parts: Parts) -> Callable[..., Any]:
        target = net()
        parts.seen["target"] = target

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % 2:
                target.load_state_dict(parts.model.state_dict())
            noise = torch.from_numpy(np.full(3, number, dtype=np.float32)) if number >= 6 else None
            goal = target(x).detach() + y
            return parts.train(x, goal if noise is None else goal + noise.to(y.device))

        return step

    runs_as_graph(training(make), 20, mode, at_least=8)

"""Tensors that are no plain memory: sparse, compressed, nested and those of oneDNN. Units that meet one stay eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.hazards.programs import MODES, Mode

ROWS = 6


def dense() -> torch.Tensor:
    return torch.eye(ROWS) + torch.diag(torch.full((ROWS - 1,), 0.5), 1)


def compressed() -> torch.Tensor:
    return dense().to_sparse_csr()


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, ROWS), torch.ones(3, ROWS)])


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: dense().to_sparse(),
    "compressed": compressed,
    "nested": nested,
}
if torch.backends.mkldnn.is_available() and torch.empty(0).device.type == "cpu":
    LAYOUTS["oneDNN"] = lambda: dense().to_mkldnn()


def rows(matrix: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """What every kind of matrix can be used for."""
    if matrix.is_nested:
        return model(torch.nested.to_padded_tensor(matrix, 0.0))
    if matrix.is_mkldnn:
        return model(matrix.to_dense())
    return matrix @ model(torch.ones(ROWS, ROWS))


def train(given: Callable[[int], torch.Tensor], mode: Mode | None) -> list[Any]:
    """Return what a training loop computes; `given(number)` is the matrix of a step, `mode` None is eager."""
    torch.manual_seed(0)
    model = nn.Linear(ROWS, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []

    def step(matrix: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(out := rows(matrix, model), torch.zeros_like(out))
        loss.backward()
        optimizer.step()
        return loss.detach()

    options: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False}
    run: Any = twofold.function(step, **options) if mode == "function" else step
    for number in range(12):
        if mode == "program" and not number:
            with twofold.program(**options):
                seen += [run(given(i)).item() for i in range(12)]
            break
        seen.append(run(given(number)).item())
    return [*seen, *(parameter.tolist() for parameter in model.parameters())]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_of_another_layout(layout: str, mode: Mode) -> None:
    def given(_number: int) -> torch.Tensor:
        return LAYOUTS[layout]()

    assert train(given, mode) == train(given, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_of_another_layout_now_and_then(layout: str, mode: Mode) -> None:
    """Where a path takes dense ones, in the place of a feed and of a constant."""
    constant = dense()

    def given(number: int) -> torch.Tensor:
        return LAYOUTS[layout]() if number in (4, 8) else dense() if number % 2 else constant

    assert train(given, mode) == train(given, None)


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradient_is_read(mode: Mode) -> None:
    def run(mode: Mode | None) -> list[Any]:
        torch.manual_seed(0)
        table, seen = nn.Embedding(10, 3, sparse=True), []
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)

        def step(ids: torch.Tensor) -> float:
            loss = table(ids).square().sum()
            optimizer.zero_grad()
            loss.backward()
            seen.append((table.weight.grad.is_sparse, table.weight.grad.to_dense().sum().item()))  # type: ignore[union-attr]
            optimizer.step()
            seen.append(table.weight.grad.layout)  # type: ignore[union-attr]
            return loss.item()

        options: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False}
        batches = [torch.randint(10, (4,)) for _ in range(8)]
        if mode == "program":
            with twofold.program(**options):
                seen += [(step(ids), table.weight.grad.is_sparse) for ids in batches]  # type: ignore[union-attr]
        else:
            run = step if mode is None else twofold.function(step, **options)
            seen += [(run(ids), table.weight.grad.is_sparse) for ids in batches]  # type: ignore[union-attr]
        return [*seen, table.weight.tolist()]

    assert run(mode) == run(None)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_left_out_in_evaluation(mode: Mode) -> None:
    """A transformer encoder packs what its mask leaves into a nested tensor then, of which a unit gives no size."""

    def run(mode: Mode | None) -> list[Any]:
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask = torch.tensor([[False, False, True], [False, False, False]])
        seen: list[Any] = []

        def train(x: torch.Tensor) -> torch.Tensor:
            loss = model.train()(x, src_key_padding_mask=mask).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        @torch.no_grad()
        def evaluate(x: torch.Tensor) -> torch.Tensor:
            return model.eval()(x, src_key_padding_mask=mask)

        def loop(train: Any, evaluate: Any) -> None:
            seen.extend((train(x).item(), evaluate(x).tolist()) for x in [torch.randn(2, 3, 4) for _ in range(6)])

        options: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False}
        if mode == "program":
            with twofold.program(**options):
                loop(train, evaluate)
        elif mode == "function":
            loop(twofold.function(train, **options), twofold.function(evaluate, **options))
        else:
            loop(train, evaluate)
        return seen

    assert run(mode) == run(None)

"""Decompositions against the modules that they stand for: results and gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from twofold.run.recursion.decompositions import binary_cross_entropy_with_logits, cross_entropy, decomposed_apply

CASES: list[tuple[str, nn.Module, Any]] = [
    ("bilinear", nn.Bilinear(3, 4, 2), lambda: (torch.randn(5, 3), torch.randn(5, 4))),
    ("bilinear of vectors", nn.Bilinear(3, 4, 2, bias=False), lambda: (torch.randn(3), torch.randn(4))),
    ("lstm", nn.LSTMCell(3, 4), lambda: (torch.randn(5, 3), (torch.randn(5, 4), torch.randn(5, 4)))),
    ("lstm without state", nn.LSTMCell(3, 4, bias=False), lambda: (torch.randn(5, 3),)),
    ("gru", nn.GRUCell(3, 4), lambda: (torch.randn(5, 3), torch.randn(5, 4))),
    ("gru of vectors", nn.GRUCell(3, 4), lambda: (torch.randn(3),)),
    ("rnn", nn.RNNCell(3, 4), lambda: (torch.randn(5, 3), torch.randn(5, 4))),
    ("rnn with relu", nn.RNNCell(3, 4, nonlinearity="relu"), lambda: (torch.randn(5, 3), torch.randn(5, 4))),
]


def results(run: Any, module: nn.Module, arguments: Any) -> list[torch.Tensor]:
    module.zero_grad()
    held = run(*arguments)
    outputs = list(held) if isinstance(held, tuple) else [held]
    sum((output * (index + 1.0)).sum() for index, output in enumerate(outputs)).backward()  # type: ignore[union-attr]
    return [*outputs, *(parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(("module", "make"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_equals_the_module(module: nn.Module, make: Any) -> None:
    torch.manual_seed(0)
    module, arguments = module.double(), torch.utils._pytree.tree_map(lambda t: t.double(), make())
    expected = results(module, module, arguments)
    got = results(lambda *given: decomposed_apply(module, *given), module, arguments)
    torch.testing.assert_close(got, expected)


def test_other_modules_are_called() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(decomposed_apply(layer, x), layer(x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_cross_entropy(reduction: str) -> None:
    scores = torch.linspace(-40.0, 40.0, 9, dtype=torch.float64).requires_grad_()
    target = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    outcomes = []
    for function in (nn.functional.binary_cross_entropy_with_logits, binary_cross_entropy_with_logits):
        loss = function(scores, target, reduction=reduction)
        outcomes.append((loss, *torch.autograd.grad(loss.sum(), scores)))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 1}])
def test_cross_entropy(rows: int, keywords: dict[str, Any]) -> None:
    scores = torch.linspace(-40.0, 40.0, rows * 4, dtype=torch.float64).view(rows, 4).requires_grad_()
    target = torch.arange(rows) + 1
    outcomes = []
    for function in (nn.functional.cross_entropy, cross_entropy):
        loss = function(scores, target, **keywords)
        outcomes.append((loss, *torch.autograd.grad(loss, scores)))
    torch.testing.assert_close(outcomes[0], outcomes[1], equal_nan=True)


def test_cross_entropy_of_an_ignored_label_is_not_batched() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(torch.zeros(1, 4), torch.tensor([-100]))

"""Operations that `torch.vmap` has no rule for, in terms of others that it has; equal but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.convert.from_source import apply


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `F.bilinear` does, for f[..., in1], f[..., in2], f[out, in1, in2]."""
    out, in1, in2 = weight.shape
    first = torch.matmul(input1, weight.permute(1, 0, 2).reshape(in1, out * in2)).unflatten(-1, (out, in2))
    product = (first * input2.unsqueeze(-2)).sum(-1)
    return product if bias is None else product + bias


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, *rest: Any, reduction: str = "mean", **keywords: Any
) -> Tensor:
    """Do what `F.binary_cross_entropy_with_logits` does; without weights, by operations that have rules."""
    if rest or keywords or input.shape != target.shape:
        return F.binary_cross_entropy_with_logits(input, target, *rest, reduction=reduction, **keywords)
    loss = (1 - target) * input + torch.logaddexp(torch.zeros_like(input), -input)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def cross_entropy(input: Tensor, target: Tensor, *rest: Any, reduction: str = "mean", **keywords: Any) -> Tensor:
    """Do what `F.cross_entropy` does; on a CPU the mean of one row's loss in a third of the operations.

    That raises IndexError for the label to be ignored, whose mean is NaN: a kernel on a GPU could not be stopped.
    """
    single = len(input) == 1 and input.dim() == 2 and target.shape == (1,) and not target.is_floating_point()
    if rest or keywords or reduction != "mean" or not single or input.device.type != "cpu":
        return F.cross_entropy(input, target, *rest, reduction=reduction, **keywords)
    return -input.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze((0, 1))


def _linear_gates(cell: nn.RNNCellBase, input: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(input, cell.weight_ih, cell.bias_ih), F.linear(h, cell.weight_hh, cell.bias_hh)


def lstm_cell(cell: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Do what an `nn.LSTMCell` does."""
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], cell.hidden_size)
        hx = (zeros, zeros)
    h, c = hx
    i, f, g, o = sum(_linear_gates(cell, input, h)).chunk(4, -1)  # type: ignore[union-attr]
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(cell: nn.GRUCell, input: Tensor, hx: Tensor | None = None) -> Tensor:
    """Do what an `nn.GRUCell` does."""
    h = input.new_zeros(*input.shape[:-1], cell.hidden_size) if hx is None else hx
    given, held = _linear_gates(cell, input, h)
    (r, z, n), (r_held, z_held, n_held) = given.chunk(3, -1), held.chunk(3, -1)
    r, z = (r + r_held).sigmoid(), (z + z_held).sigmoid()
    n = (n + r * n_held).tanh()
    return n + z * (h - n)


def rnn_cell(cell: nn.RNNCell, input: Tensor, hx: Tensor | None = None) -> Tensor:
    """Do what an `nn.RNNCell` does."""
    h = input.new_zeros(*input.shape[:-1], cell.hidden_size) if hx is None else hx
    given, held = _linear_gates(cell, input, h)
    return torch.relu(given + held) if cell.nonlinearity == "relu" else torch.tanh(given + held)


def bilinear_module(module: nn.Bilinear, input1: Tensor, input2: Tensor) -> Tensor:
    """Do what an `nn.Bilinear` does."""
    return bilinear(input1, input2, module.weight, module.bias)


_MODULES: dict[type, Callable[..., Any]] = {
    nn.Bilinear: bilinear_module,
    nn.LSTMCell: lstm_cell,
    nn.GRUCell: gru_cell,
    nn.RNNCell: rnn_cell,
}


def decomposed_apply(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call an object as `apply` does, a module by its decomposition if there is one."""
    decomposition = _MODULES.get(type(function))
    if decomposition is not None:
        return decomposition(function, *arguments, **keywords)
    return function(*arguments, **keywords)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    apply: decomposed_apply,
    F.bilinear: bilinear,
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    torch.bilinear: bilinear,
}
"""What takes the place of the callables that nodes name."""

"""Leaf modules of `torch.nn` as single calls.

A `Linear` is one expected event instead of a chain of Python frames, attribute look-ups and a torch function: of the
skeleton of a small network these took two thirds. What a leaf module computes is a pure function of a few attributes
and of the tensors it is given; both are read at each call, so a changed attribute is a different call.

The table is closed. A module is called as a leaf only if its class is exactly one of these, with PyTorch's own
`forward`, and neither it nor the process has module hooks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _hooks

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(_hooks, f"_global{name}") for name in MODULE_HOOKS)
"""PyTorch never puts another dictionary in the place of one of these."""

_Getter = Callable[[Mapping[str, Any]], tuple[Any, ...]]


def _getter(names: tuple[str, ...]) -> _Getter:
    if len(names) > 1:
        return operator.itemgetter(*names)
    return (lambda holder: (holder[names[0]],)) if names else (lambda _: ())


@dataclass(frozen=True, eq=False)
class Leaf:
    """What the `forward` of one class reads from its module."""

    kind: type[nn.Module]
    attributes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    required: tuple[tuple[str, Any], ...] = ()
    """Attributes with the one value under which this class is a leaf."""
    forward: Callable[..., Any] = field(init=False)
    read_attributes: _Getter = field(init=False)
    read_parameters: _Getter = field(init=False)
    read_buffers: _Getter = field(init=False)
    shadowing: frozenset[str] = field(init=False)
    """Names that an instance must not have in its own dictionary."""

    def __post_init__(self) -> None:
        tensors = (*self.parameters, *self.buffers)
        for name, value in (
            ("forward", self.kind.forward),
            ("read_attributes", _getter(self.attributes)),
            ("read_parameters", _getter(self.parameters)),
            ("read_buffers", _getter(self.buffers)),
            ("shadowing", frozenset(("forward", "_call_impl", "_compiled_call_impl", *tensors))),
        ):
            object.__setattr__(self, name, value)


class LeafCall:
    """A leaf module with given attributes as a function: of its tensors, in the table's order, then its inputs."""

    __slots__ = ("__name__", "leaf", "state")

    def __init__(self, leaf: Leaf, attributes: tuple[Any, ...]) -> None:
        self.leaf = leaf
        self.state = dict(zip(leaf.attributes, attributes, strict=True))
        self.__name__ = leaf.kind.__name__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run PyTorch's `forward` on a module that has just these attributes and tensors."""
        leaf = self.leaf
        split, count = len(leaf.parameters), len(leaf.parameters) + len(leaf.buffers)
        module = leaf.kind.__new__(leaf.kind)
        module.__dict__.update(
            self.state,
            _parameters=dict(zip(leaf.parameters, arguments[:split], strict=True)),
            _buffers=dict(zip(leaf.buffers, arguments[split:count], strict=True)),
            _modules={},
        )
        return leaf.forward(module, *arguments[count:], **keywords)

    def __repr__(self) -> str:
        attributes = ", ".join(f"{name}={value!r}" for name, value in self.state.items())
        return f"{self.__name__}({attributes})"


_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
_ZEROS = (("padding_mode", "zeros"),)
_WEIGHTS = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NORM = ("momentum", "eps", "track_running_stats", "training")
_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_LOSS = ("weight",)
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

LEAVES: dict[type, Leaf] = {
    leaf.kind: leaf
    for leaf in (
        Leaf(nn.Linear, (), _WEIGHTS),
        Leaf(nn.Conv1d, _CONVOLUTION, _WEIGHTS, required=_ZEROS),
        Leaf(nn.Conv2d, _CONVOLUTION, _WEIGHTS, required=_ZEROS),
        Leaf(nn.Conv3d, _CONVOLUTION, _WEIGHTS, required=_ZEROS),
        Leaf(nn.ConvTranspose2d, (*_CONVOLUTION, "kernel_size", "output_padding"), _WEIGHTS, required=_ZEROS),
        Leaf(nn.LayerNorm, ("normalized_shape", "eps"), _WEIGHTS),
        Leaf(nn.RMSNorm, ("normalized_shape", "eps"), ("weight",)),
        Leaf(nn.GroupNorm, ("num_groups", "eps"), _WEIGHTS),
        *(Leaf(kind, _NORM, _WEIGHTS, _STATISTICS) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
        Leaf(
            nn.Embedding,
            ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
            ("weight",),
            required=(("max_norm", None), ("sparse", False)),
        ),
        *(Leaf(kind, ("p", "inplace", "training")) for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)),
        *(Leaf(kind, ("inplace",)) for kind in (nn.ReLU, nn.SiLU)),
        *(Leaf(kind) for kind in (nn.Tanh, nn.Sigmoid)),
        Leaf(nn.GELU, ("approximate",)),
        Leaf(nn.LeakyReLU, ("negative_slope", "inplace")),
        Leaf(nn.ELU, ("alpha", "inplace")),
        Leaf(nn.Softplus, ("beta", "threshold")),
        Leaf(nn.MaxPool1d, _POOL),
        Leaf(nn.MaxPool2d, _POOL),
        Leaf(nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")),
        Leaf(nn.AdaptiveAvgPool2d, ("output_size",)),
        Leaf(nn.Flatten, ("start_dim", "end_dim")),
        Leaf(nn.CrossEntropyLoss, ("ignore_index", "reduction", "label_smoothing"), buffers=_LOSS),
        Leaf(nn.NLLLoss, ("ignore_index", "reduction"), buffers=_LOSS),
        *(Leaf(kind, ("reduction",)) for kind in (nn.MSELoss, nn.L1Loss)),
        Leaf(nn.BCELoss, ("reduction",), buffers=_LOSS),
        Leaf(nn.BCEWithLogitsLoss, ("reduction",), buffers=("weight", "pos_weight")),
        *(Leaf(kind, ("hidden_size",), _CELL) for kind in (nn.LSTMCell, nn.GRUCell)),
    )
}


@functools.lru_cache(maxsize=1024)
def call_of(leaf: Leaf, attributes: tuple[Any, ...]) -> LeafCall | None:
    """Return the call of a leaf with these attributes, in the table's order; None if it is no leaf with them."""
    values = dict(zip(leaf.attributes, attributes, strict=True))
    if any(values[name] != value for name, value in leaf.required):
        return None
    if values.get("momentum", 0.0) is None:  # reads how many batches it has seen, as a number
        return None
    return LeafCall(leaf, attributes)


def leaf_of(module: nn.Module) -> Leaf | None:
    """Return the row of the table for a module; None if it is no leaf, has hooks, or a forward of its own."""
    leaf = LEAVES.get(type(module))
    if leaf is None:
        return None
    state = module.__dict__
    if (
        any(state[name] for name in MODULE_HOOKS)
        or any(GLOBAL_HOOKS)
        or leaf.kind.forward is not leaf.forward
        or not state.keys().isdisjoint(leaf.shadowing)
    ):
        return None
    return leaf


def leaf_call(module: nn.Module) -> tuple[LeafCall, tuple[torch.Tensor | None, ...]] | None:
    """Return a module's call as one function, with the tensors to give it first; None if it is no leaf."""
    leaf = leaf_of(module)
    if leaf is None:
        return None
    state = module.__dict__
    try:
        call = call_of(leaf, leaf.read_attributes(state))
        tensors = leaf.read_parameters(state["_parameters"]) + leaf.read_buffers(state["_buffers"])
    except (KeyError, TypeError):  # an attribute was deleted, or holds a list
        return None
    return None if call is None else (call, tensors)

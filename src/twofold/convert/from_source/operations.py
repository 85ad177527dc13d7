"""What operations mean for slicing: which read values, draw random numbers, keep tensors, or have effects."""

from __future__ import annotations

import operator
from typing import Any

import torch

from twofold.convert.targets import unpack
from twofold.graph import Constant

from .expressions import is_library

FETCHES = frozenset({"item", "tolist", "__bool__", "__int__", "__float__"})
"""Methods of tensors that give their values to Python."""
UNREADABLE = frozenset({"numpy", "data_ptr", "__array__"})
"""Methods of tensors that give Python more than values."""
READERS = frozenset(
    {len, tuple, list, dict, set, frozenset, sorted, reversed, range, zip, enumerate, min, max, sum, abs, any, all,
     bool, int, float, str, repr, ascii, format, round, isinstance, hasattr, getattr, unpack, operator.not_,
     operator.contains, operator.is_, operator.is_not}
)  # fmt: skip
"""Functions that have no effect on Python objects."""
READING_METHODS = frozenset(
    {"get", "items", "keys", "values", "index", "count", "startswith", "endswith", "lower", "upper", "strip", "split",
     "join", "copy", "isdigit", "item", "tolist", "__bool__", "__int__", "__float__"}
)  # fmt: skip
"""Methods that have no effect on Python's own objects."""
KEEPERS = frozenset({"append", "add", "insert", "setdefault", "appendleft"})
"""Methods of containers that keep a tensor without looking into it."""
ARITHMETIC = frozenset(
    {
        getattr(operator, name)
        for name in [
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "neg",
            "pos",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "not_",
        ]
    }
)
RANDOM = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "rrelu",
        "gumbel_softmax",
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "normal",
        "normal_",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "poisson",
        "uniform_",
        "batch_norm",
        "exponential_",
        "scaled_dot_product_attention",
    ]
)
RANDOM_MODULES = (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU, torch.nn.modules.batchnorm._NormBase)
SEVERAL = frozenset(
    {"chunk", "split", "tensor_split", "unbind", "topk", "sort", "kthvalue", "mode", "meshgrid", "unsafe_chunk",
     "broadcast_tensors", "hsplit", "vsplit", "dsplit", "var_mean", "std_mean", "qr", "svd", "slogdet", "aminmax",
     "cummax", "cummin", "frexp", "size", "lstm", "gru"}
)  # fmt: skip
"""Functions and methods that return several tensors in one object, or numbers."""
SEVERAL_MODULES = (torch.nn.LSTMCell, torch.nn.RNNBase, torch.nn.MultiheadAttention)
CONTAINERS = (list, tuple, dict, unpack, reversed, zip, enumerate)
NUMBERS = (bool, int, float, type(None), str)


def without_effect(target: Any) -> bool:
    """Say whether a function leaves Python objects as they are: it may be called earlier or later."""
    return target in ARITHMETIC or target in READERS or getattr(target, "__module__", None) in ("_operator", "math")


def has_hook(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_torch(target: Any) -> bool:
    if isinstance(target, Constant) or not is_library(target):
        return False
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, type) or module in ("builtins", "_operator", "math", "operator"):
        return False
    return module.partition(".")[0] == "torch" or (not module and getattr(target, "__self__", None) is None)

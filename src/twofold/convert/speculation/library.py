"""The closed tables of what library code may be called, and how."""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import operator
from typing import Any, Final

import numpy as np
import torch
from torch.overrides import get_overridable_functions

from twofold.graph.names import known_name

from .speculation import (
    apart,
    chosen,
    defined,
    equal,
    inherits,
    instance,
    metadata,
    read,
    referent,
    settled,
    tensor,
    unhooked,
)

_BUILTINS = (
    "abs ascii bin bool bytes chr complex dict divmod float format frozenset hash hex int isinstance len list max min"
    " oct ord pow range repr round set slice sorted str sum tuple type"
)
_OPERATORS = (
    "abs add and_ concat contains countOf eq floordiv ge getitem gt index inv invert is_ is_not le lshift lt matmul mod"
    " mul ne neg not_ or_ pos pow rshift sub truediv truth xor"
)
_NUMPY = (
    "abs absolute add all allclose amax amin any arange argmax argmin argsort around array array_equal asarray"
    " atleast_1d atleast_2d average ceil clip concatenate cos cumprod cumsum diff divide dot empty_like equal exp"
    " expand_dims eye fabs floor full full_like greater greater_equal hstack isclose isfinite isinf isnan less"
    " less_equal linspace log log10 log1p log2 logical_and logical_not logical_or matmul max maximum mean median"
    " min minimum mod multiply negative nonzero norm not_equal ones ones_like outer percentile power prod quantile"
    " ravel reshape round sign sin sort sqrt square squeeze stack std subtract sum tan tanh tile transpose trunc"
    " unique var vstack where zeros zeros_like"
    " arccos arcsin arctan arctan2 argwhere can_cast count_nonzero cosh deg2rad flatnonzero flip fmax fmin hypot"
    " identity inner interp isin issubdtype logaddexp nan_to_num nanmax nanmean nanmin nansum rad2deg"
    " result_type rint roll searchsorted sinh"
)
_NUMPY_TYPES = (
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_, np.dtype,
)  # fmt: skip
_ARRAY_METHODS = (
    "all any argmax argmin argsort astype clip copy cumsum dot flatten item max mean min nonzero prod ravel repeat"
    " reshape round squeeze std sum swapaxes tobytes tolist transpose var view __len__ __getitem__ __abs__"
)

PURE: Final[frozenset[Any]] = frozenset(
    [getattr(builtins, name) for name in _BUILTINS.split()]
    + [getattr(operator, name) for name in _OPERATORS.split()]
    + [value for name, value in vars(math).items() if callable(value) and not name.startswith("_")]
    + [getattr(np, name) for name in _NUMPY.split() if hasattr(np, name)]
    + [np.linalg.norm, *_NUMPY_TYPES]
    + [
        method
        for kind in (str, bytes, int, float, complex, bool, tuple, range)
        for name, method in vars(kind).items()
        if callable(method) and not name.startswith("__")
    ]
    + [dict.get, dict.keys, dict.values, dict.items, dict.copy, list.copy, list.index, list.count, set.copy, set.union]
    + [getattr(np.ndarray, name) for name in _ARRAY_METHODS.split()]
    + [getattr(np.generic, name) for name in _ARRAY_METHODS.split() if hasattr(np.generic, name)]
    + [apart, chosen, defined, equal, inherits, instance, metadata, referent, unhooked, str.join, torch.Size.numel]
)
"""Functions of Python values that depend on nothing else and change nothing."""

UNIT_READS: Final[frozenset[Any]] = frozenset({read, settled, tensor})
"""What asks the unit, and changes nothing that the program can see."""

CONTEXTS: Final[tuple[type, ...]] = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.autocast,
    torch.autograd.profiler.record_function,
    contextlib.nullcontext,
)
"""Context managers that the dry run enters for real."""

LIST_CHANGES: Final = frozenset(["append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"])
DICT_CHANGES: Final = frozenset(["update", "pop", "popitem", "clear", "setdefault"])
SET_CHANGES: Final = frozenset(["add", "discard", "remove", "update", "clear", "pop"])
"""Methods that change a container."""

_LIBRARIES = frozenset({"torch", "numpy", "builtins", "math", "operator", "functools", "itertools", "collections"})


def is_pure(target: Any) -> bool:
    """Whether a target of a host graph's call may be left out where nobody reads its result."""
    try:
        return target in PURE or target in UNIT_READS
    except TypeError:
        return False


def is_torch(function: Any) -> bool:
    """Whether a function is PyTorch's own."""
    if known_name(function) is not None and not _is_operator(function):
        return True
    module = getattr(function, "__module__", None)
    if isinstance(module, str):
        return module == "torch" or module.startswith("torch.")
    owner = getattr(function, "__objclass__", None)
    return owner is not None and issubclass(owner, torch.Tensor)


_SETTERS = ("set_", "_set_", "manual_seed", "seed", "use_deterministic")


def sets_process_state(function: Any) -> bool:
    """Whether a function of PyTorch sets something for the whole process: a dry run must not call it."""
    name = getattr(function, "__name__", "")
    return not name.endswith("_") and name.startswith(_SETTERS) and not hasattr(function, "__objclass__")


def is_change(function: Any) -> bool:
    """Whether a torch function writes to its first argument."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or name in ("__setitem__", "setattr")
        or (name.startswith("__i") and name not in _I_NAMES)
        or (_is_operator(function) and name in _IN_PLACE_OPERATORS)
    )


_AUGMENTED = "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_I_NAMES = frozenset({"__invert__", "__iter__", "__int__", "__index__", "__init__"})
_IN_PLACE_OPERATORS = frozenset({f"i{name}" for name in _AUGMENTED.split()} | {"setitem"})


def is_overridable(function: Any) -> bool:
    """Whether a listener hears a function of PyTorch that is written in Python before it does anything."""
    return function in _overridable()


@functools.cache
def _overridable() -> frozenset[Any]:
    listed = {function for functions in get_overridable_functions().values() for function in functions}
    return frozenset(listed | {torch.autograd.grad, torch.autograd.backward})


def _is_operator(function: Any) -> bool:
    return getattr(function, "__module__", None) in ("_operator", "operator")


def is_library(module: str | None) -> bool:
    """Whether the names of a module are taken to stay what they are."""
    return module is not None and module.partition(".")[0] in _LIBRARIES


def find_in_class(kind: type, name: str) -> tuple[type, Any] | None:
    """Return the class of the MRO that defines a name, and what it defines."""
    for owner in kind.__mro__:
        if name in vars(owner):
            return owner, vars(owner)[name]
    return None


def is_data_descriptor(found: Any) -> bool:
    """Whether an attribute of a class comes before the instance's own."""
    return hasattr(type(found), "__set__") or hasattr(type(found), "__delete__")


def is_plain_class(kind: type) -> bool:
    """Whether instances can be made and filled without running unknown code."""
    return (
        type(kind) is type
        and kind.__new__ is object.__new__
        and kind.__setattr__ is object.__setattr__
        and kind.__getattribute__ is object.__getattribute__
        and not hasattr(kind, "__getattr__")
        and not any("__slots__" in vars(owner) for owner in kind.__mro__[:-1])
        and kind.__mro__[-2].__bases__ == (object,)
    )

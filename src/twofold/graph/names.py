"""Stable names for callables, both ways: `resolve(qualified_name(f)) == f`.

Forms: `torch.nn.functional.linear`, `torch.Tensor.add_`, `torch.Tensor.grad.__get__`, `torch._C._nn.gelu`,
`aten.add.Tensor` (an ATen overload), `torch.ops.library.name.overload` (another operator library),
`operator.add`, and `package.module:qualified.name` for anything else that its module still holds under its
own name.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

# The first that holds a callable names it, so the names that people write come before those of torch._C.
_NAMESPACES = (
    "torch",
    "torch.nn.functional",
    "torch.Tensor",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.functional",
    "torch.nn.init",
    "torch._C._nn",
    "torch._C._VariableFunctions",
    "torch._C._linalg",
    "torch._C._fft",
    "torch._C._special",
    "torch._C._sparse",
    "torch._C._nested",
)
_ACCESSORS = ("__get__", "__set__", "__delete__")


class UnnamedCallableError(ValueError):
    """No name finds a callable again: a local function, a lambda, a bound method of an object."""


def qualified_name(target: Callable[..., Any]) -> str:
    """Return the name that `resolve` turns back into `target`. Raises `UnnamedCallableError`."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if target.namespace == "aten" else f"torch.ops.{name}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return f"torch.ops.{target}"
    known = known_name(target)
    if known is not None:
        return known
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        try:
            if resolve(f"{module}:{name}") == target:
                return f"{module}:{name}"
        except (ImportError, AttributeError):
            pass
    raise UnnamedCallableError(f"{target!r} has no name by which it can be found again")


def known_name(target: Any) -> str | None:
    """Return the name of a function of `torch` or `operator`, None for any other object."""
    try:
        return _known_names().get(target)
    except TypeError:  # not hashable
        return None


def resolve(name: str) -> Callable[..., Any]:
    """Return the callable of that name. Raises ImportError or AttributeError if there is none."""
    module, colon, path = name.partition(":")
    if colon:
        return operator.attrgetter(path)(importlib.import_module(module))
    root, _, path = name.partition(".")
    roots: dict[str, Any] = {"torch": torch, "aten": torch.ops.aten, "operator": operator}
    if root not in roots or not path:
        raise ImportError(f"{name}: expected a name below torch, aten or operator, or module:name")
    return operator.attrgetter(path)(roots[root])


@cache
def _known_names() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for namespace in _NAMESPACES:
        holder = operator.attrgetter(namespace.removeprefix("torch."))(torch) if "." in namespace else torch
        for name, member in _members(holder):
            names.setdefault(member, f"{namespace}.{name}")
    for name in operator.__all__:
        names.setdefault(getattr(operator, name), f"operator.{name}")
    return names


def _members(holder: Any) -> Iterator[tuple[str, Any]]:
    for name in dir(holder):
        # Members found through the class dictionaries are what `getattr` gives, without its deprecation
        # warnings.
        member = vars(holder).get(name) if isinstance(holder, type(torch)) else getattr(holder, name, None)
        if isinstance(member, type) or name.startswith("__py"):
            continue
        if callable(member):
            try:
                hash(member)
            except TypeError:
                continue
            yield name, member
        elif holder is torch.Tensor:
            for accessor in _ACCESSORS:
                method = getattr(member, accessor, None)
                if method is not None:
                    yield f"{name}.{accessor}", method

"""Which nodes can be noticed other than through their results.

The answer errs towards yes: a callable of unknown behaviour has an effect. Reading is not an effect (feeds,
attributes, items), nor is an exception that a dead operation would have raised.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.overrides import get_overridable_functions

from .ir import Graph, Node, SubGraph, all_nodes
from .names import known_name
from .ops import OPS

_OVERLOAD = torch._ops.OpOverload

# Names whose schema or spelling hides what they do: running statistics, hooks, gradients, Python-side
# random numbers.
_EFFECTFUL_NAMES = frozenset(
    {
        "backward",
        "retain_grad",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "module_load",
        "__setitem__",
        "__setstate__",
        "__set__",
        "__delete__",
        "gumbel_softmax",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
        "fractional_max_pool2d_with_indices",
        "fractional_max_pool3d_with_indices",
        "rrelu",
    }
)
_EFFECTFUL_PARTS = ("batch_norm", "instance_norm", "dropout", "rand", "prepack")
_CONVERSIONS = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy})
_RENORMALISING = {"embedding": 3, "embedding_bag": 4}
"""Functions that write to their weight if `max_norm` is given, with its position in torch.nn.functional."""


def has_effect(node: Node, effectful: Container[str] | None = None) -> bool:
    """Say whether running the node can be noticed other than through its results.

    `effectful` holds the names of the SubGraphs that have an effect (`effectful_subgraphs`); without it,
    every `invoke` is taken to have one.
    """
    effect = OPS[node.op].effect
    if effect != "depends":
        return effect == "always"
    if node.op == "invoke":
        return effectful is None or str(node.target) in effectful
    if node.subgraphs:
        return any(has_effect(inner, effectful) for body in node.subgraphs for inner in body.nodes)
    return call_has_effect(node.target, node.arguments, dict(node.keywords))


def effectful_subgraphs(graph: Graph) -> frozenset[str]:
    """Return the names of the SubGraphs in the table that have an effect, their own invocations followed."""
    effectful: set[str] = set()
    while True:
        found = {
            name
            for name, body in graph.subgraphs.items()
            if name not in effectful and _body_has_effect(body, effectful)
        }
        if not found:
            return frozenset(effectful)
        effectful |= found


def _body_has_effect(body: SubGraph, effectful: Container[str]) -> bool:
    return any(has_effect(node, effectful) for node in all_nodes(body))


def call_has_effect(target: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Say whether a call can be noticed other than through its result; unknown callables can."""
    if keywords.get("out") is not None or keywords.get("inplace", False) is not False:
        return True
    if target_has_effect(target):
        return True
    name = getattr(target, "__name__", "")
    if name in _RENORMALISING:
        position = _RENORMALISING[name]
        return keywords.get("max_norm") is not None or any(a is not None for a in arguments[position:])
    place = _inplace_position(target)
    return place is not None and place < len(arguments) and arguments[place] is not False


def target_has_effect(target: Callable[..., Any]) -> bool:
    """Say whether a callable has an effect whatever it is given; unknown callables have one."""
    if isinstance(target, _OVERLOAD):
        return _overload_has_effect(target)
    # Unknown callables never reach the cache, which would keep alive what they hold.
    name = known_name(target)
    return name is None or _known_has_effect(target, name)


@cache
def _overload_has_effect(target: torch._ops.OpOverload) -> bool:
    return target._schema.is_mutable or _is_random(target) or _hides_effect(target._schema.name)


@cache
def _known_has_effect(target: Callable[..., Any], qualified: str) -> bool:
    name = target.__name__
    if _spells_effect(name) or _hides_effect(name):
        return True
    if qualified.startswith("operator."):
        return name in {"setitem", "delitem", "call", "methodcaller"} or name in _inplace_operators()
    overloads = aten_overloads(name)
    if not overloads and target not in _overridable() and target not in _CONVERSIONS:
        return True
    return any(_is_random(overload) or _writes_operand(overload) for overload in overloads)


def _spells_effect(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    in_place_operator = name.startswith("__i") and name.endswith("__") and name[3:-2] in _AUGMENTED
    return in_place or in_place_operator


_AUGMENTED = frozenset(
    {
        "add",
        "and",
        "div",
        "floordiv",
        "lshift",
        "matmul",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    }
)


def _inplace_operators() -> frozenset[str]:
    return frozenset({f"i{name}" for name in _AUGMENTED} | {"iconcat"})


def _hides_effect(name: str) -> bool:
    short = name.rpartition("::")[2]
    return short in _EFFECTFUL_NAMES or any(part in short for part in _EFFECTFUL_PARTS)


@cache
def _overridable() -> frozenset[Any]:
    return frozenset(function for functions in get_overridable_functions().values() for function in functions)


def aten_overloads(name: str) -> list[torch._ops.OpOverload]:
    """Return the ATen overloads of that name that have a kernel; those without serve scripts alone."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return [overload for overload in overloads if torch._C._dispatch_has_kernel(overload.name())]


def _is_random(overload: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags


def _writes_operand(overload: torch._ops.OpOverload) -> bool:
    """Say whether an overload writes to an argument that is not its `out`."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write and not argument.kwarg_only
        for argument in overload._schema.arguments
    )


@cache
def _inplace_position(target: Any) -> int | None:
    code = getattr(target, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return None
    return code.co_varnames.index("inplace")

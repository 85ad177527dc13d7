"""Choices and loops in bodies that are built by hand: `if_` and `while_` become nodes, or run if nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from twofold.capture.intercept import user_origin
from twofold.errors import DeclarationError
from twofold.graph import SubGraphBuilder, TensorSpec, Value

from .symbolic import SymbolicTensor, Tracer, tensors


def if_(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Return what one of two functions returns: tensors, in the same structure and with the same specs.

    The functions take no arguments and use the tensors around them. Outside a body, and for a predicate that is
    no symbolic tensor, this is an ordinary `if`. Raises `DeclarationError`.
    """
    tracer = Tracer.active()
    if tracer is None or not isinstance(predicate, SymbolicTensor):
        return then() if predicate else otherwise()
    chosen = tracer.value_of(predicate)
    _check_predicate(chosen, "if_")
    bodies = [tracer.body.body(name) for name in ("then", "else")]
    (values, structure), (others, other) = (
        _traced(tracer, body, function, []) for body, function in zip(bodies, (then, otherwise), strict=True)
    )
    if structure != other:
        raise DeclarationError(f"if_: expected the same structure of both branches, got {structure} and {other}")
    pairs = [(_tensor_spec(a), _tensor_spec(b)) for a, b in zip(values, others, strict=True)]
    for place, (one, two) in enumerate(pairs):
        if not one.agrees_with(two):
            raise _different(f"if_: result {place}", one, two)
    specs = [_joined(one, two) for one, two in pairs]
    subgraphs = [body.finish(each) for body, each in zip(bodies, (values, others), strict=True)]
    results = tracer.body.node("if", None, [chosen], None, specs, subgraphs, user_origin())
    return pytree.tree_unflatten([tracer.symbol(value) for value in results], structure)


def while_(condition: Callable[..., Any], body: Callable[..., Any], *carried: torch.Tensor) -> Any:
    """Return the carried tensors after `carried = body(*carried)` was done as long as `condition(*carried)` holds.

    `body` returns as many tensors as it is given, of the same specs; a single one may be returned as it is.
    It is run more than once when a size turns out to differ between iterations.
    Outside a body this is an ordinary `while`. Raises `DeclarationError`.
    """
    tracer = Tracer.active()
    if tracer is None:
        while condition(*carried):
            carried = _as_tuple(body(*carried))
    else:
        carried = _while(tracer, condition, body, tensors(carried, "while_: argument"))
    return carried[0] if len(carried) == 1 else carried


def _while(
    tracer: Tracer, condition: Callable[..., Any], body: Callable[..., Any], carried: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    start = [tracer.value_of(each) for each in carried]
    specs = [_tensor_spec(value) for value in start]
    while True:  # until no size turns out to differ between iterations
        builder = tracer.body.body("body")
        inputs = [builder.input(None, spec) for spec in specs]
        values, _ = _traced(tracer, builder, lambda *given: _as_tuple(body(*given)), inputs)
        if len(values) != len(start):
            raise DeclarationError(f"while_: expected {len(start)} carried tensors from the body, got {len(values)}")
        for place, (spec, value) in enumerate(zip(specs, values, strict=True)):
            if not _unsized(spec).agrees_with(_tensor_spec(value)):
                raise _different(f"while_: tensor {place}", spec, value.spec)
        wider = [_joined(spec, _tensor_spec(value)) for spec, value in zip(specs, values, strict=True)]
        if wider == specs:
            break
        specs = wider
    again = tracer.body.body("condition")
    predicate, _ = _traced(tracer, again, condition, [again.input(None, spec) for spec in specs])
    if len(predicate) != 1:
        raise DeclarationError(f"while_: expected one bool tensor from the condition, got {len(predicate)} tensors")
    _check_predicate(predicate[0], "while_")
    subgraphs = [again.finish(predicate), builder.finish(values)]
    results = tracer.body.node("while", None, start, None, specs, subgraphs, user_origin())
    return tuple(tracer.symbol(value) for value in results)


def _as_tuple(returned: Any) -> tuple[Any, ...]:
    return tuple(returned) if isinstance(returned, tuple | list) else (returned,)


def _traced(
    tracer: Tracer, builder: SubGraphBuilder, function: Callable[..., Any], inputs: Sequence[Value]
) -> tuple[list[Value], Any]:
    """Run a function with its nodes sent to a builder; return its results and their structure."""
    with tracer.building(builder):
        leaves, structure = pytree.tree_flatten(function(*map(tracer.symbol, inputs)))
        return [tracer.value_of(each) for each in tensors(leaves, f"body {builder.name}: result")], structure


def _tensor_spec(value: Value) -> TensorSpec:
    assert value.spec is not None
    return TensorSpec(value.spec.shape, value.spec.dtype, value.spec.device)


def _unsized(spec: TensorSpec) -> TensorSpec:
    return TensorSpec((None,) * len(spec.shape), spec.dtype, spec.device)


def _joined(one: TensorSpec, two: TensorSpec) -> TensorSpec:
    """Return what is known of a tensor that is one of two: a size that differs is unknown."""
    shape = tuple(size if size == other else None for size, other in zip(one.shape, two.shape, strict=True))
    return TensorSpec(shape, one.dtype, one.device)


def _different(where: str, one: TensorSpec, two: TensorSpec | None) -> DeclarationError:
    return DeclarationError(f"{where}: expected the same spec either way, got {one} and {two}")


def _check_predicate(value: Value, where: str) -> None:
    if value.spec is None or value.spec.dtype != torch.bool or any(size != 1 for size in value.spec.shape):
        raise DeclarationError(f"{where}: expected a bool tensor of one element as predicate, got {value.spec}")

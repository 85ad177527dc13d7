"""Passes: functions from graph to graph that nobody can tell from the outside."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import torch

from .effects import aten_overloads, effectful_subgraphs, has_effect
from .ir import (
    Argument,
    Constant,
    Graph,
    Node,
    SubGraph,
    Value,
    all_nodes,
    map_values,
    outer_references,
    values_in,
)
from .names import known_name
from .verify import verify

Pass: TypeAlias = Callable[[Graph], Graph]


def optimize(graph: Graph) -> Graph:
    """Run all passes in order, verifying after each."""
    for run_pass in PASSES:
        graph = run_pass(graph)
        verify(graph)
    return graph


def eliminate_dead_code(graph: Graph) -> Graph:
    """Drop every node that has no effect and no live result, and every SubGraph that is then invoked by none.

    Inputs are kept even when unread, because they are the signature. One backward sweep of each body: the
    readers of a node come after it, so its liveness is final when the sweep reaches it.
    """
    effectful = effectful_subgraphs(graph)
    main = _live_body(graph, effectful)
    bodies = {name: _live_body(body, effectful) for name, body in graph.subgraphs.items()}
    reached: set[str] = set()
    frontier = [main]
    while frontier:
        body = frontier.pop()
        invoked = {str(node.target) for node in all_nodes(body) if node.op == "invoke"} - reached
        reached |= invoked
        frontier += [bodies[name] for name in invoked]
    table = {name: body for name, body in bodies.items() if name in reached}
    return Graph(main.name, main.inputs, main.nodes, main.outputs, table)


def _live_body(body: SubGraph, effectful: Container[str]) -> SubGraph:
    live = {value for output in body.outputs for value in values_in(output)}
    kept: list[Node] = []
    for node in reversed(body.nodes):
        if not (has_effect(node, effectful) or not live.isdisjoint(node.results)):
            continue
        bodies = tuple(_live_body(nested, effectful) for nested in node.subgraphs)
        live.update(node.operands, outer_references(*bodies))
        kept.append(replace(node, subgraphs=bodies) if bodies else node)
    return SubGraph(body.name, body.inputs, tuple(reversed(kept)), body.outputs)


def eliminate_common_subexpressions(graph: Graph) -> Graph:
    """Compute once what two calls in the same body compute alike.

    Conservative. Nothing is merged in a graph in which anything may write to a tensor, run a hook or draw a
    random number. Otherwise the calls must be alike in target, arguments and ambient, make new tensors
    without autograd history, and be read by nothing but such calls and asserts: a tensor that can be
    reached from outside, itself or through a view, stays one of its own. With history, merging would change
    the order in which gradients are summed.
    """
    writes = any(
        has_effect(node) and node.op not in {"fetch", "assert"} and not node.subgraphs
        for body in (graph, *graph.subgraphs.values())
        for node in all_nodes(body)
        if node.op != "invoke"
    )
    if writes:
        return graph
    private = _private_values(graph)
    merged = _merge_body(graph, private, {})
    table = {name: _merge_body(body, private, {}) for name, body in graph.subgraphs.items()}
    return Graph(merged.name, merged.inputs, merged.nodes, merged.outputs, table)


def _private_values(graph: Graph) -> frozenset[Value]:
    """Return the results of fresh calls that only fresh calls and asserts read."""
    made: set[Value] = set()
    exposed: set[Value] = set()
    for body in (graph, *graph.subgraphs.values()):
        exposed.update(_outputs_within(body))
        for node in all_nodes(body):
            fresh = _is_fresh(node)
            if fresh:
                made.update(node.results)
            elif node.op != "assert":
                exposed.update(node.operands)
    return frozenset(made - exposed)


def _outputs_within(body: SubGraph) -> Iterator[Value]:
    for inner in (body, *(nested for node in all_nodes(body) for nested in node.subgraphs)):
        for output in inner.outputs:
            yield from values_in(output)


def _is_fresh(node: Node) -> bool:
    """Say whether the node is a call without effect that returns new tensors without autograd history."""
    if node.op != "call" or has_effect(node) or not node.results:
        return False
    if any(value.spec is None or value.spec.requires_grad for value in node.results):
        return False
    return _makes_new_tensors(node.target)


@cache
def _makes_new_tensors(target: Any) -> bool:
    """Say whether the schemas of a target promise new tensors that depend on the arguments alone."""
    if isinstance(target, torch._ops.OpOverload):
        return _promises_new_tensors(target)
    overloads = aten_overloads((known_name(target) or "").rpartition(".")[2])
    return bool(overloads) and all(map(_promises_new_tensors, overloads))


def _promises_new_tensors(overload: torch._ops.OpOverload) -> bool:
    schema = overload._schema
    # Composite operators may return views that their schemas do not tell of; `empty` and its like return
    # anything.
    composite = overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if composite or "empty" in schema.name:
        return False
    # Whether `out` is given, and so returned, is for `has_effect` to see.
    takes_out = any(argument.is_out for argument in schema.arguments)
    return takes_out or all(result.alias_info is None for result in schema.returns)


def _merge_body(body: SubGraph, private: frozenset[Value], replaced: dict[Value, Value]) -> SubGraph:
    """Merge within one body, and in those nested in it; `replaced` collects what now stands for what."""

    def current(argument: Argument) -> Any:
        return map_values(argument, lambda value: replaced.get(value, value))

    first: dict[Any, Node] = {}
    nodes: list[Node] = []
    for old in body.nodes:
        node = replace(
            old,
            arguments=tuple(current(argument) for argument in old.arguments),
            keywords=tuple((name, current(argument)) for name, argument in old.keywords),
            subgraphs=tuple(_merge_body(nested, private, replaced) for nested in old.subgraphs),
        )
        if private.issuperset(node.results) and _is_fresh(node):
            earlier = first.setdefault(_key(node), node)
            if earlier is not node:
                replaced.update(zip(node.results, earlier.results, strict=True))
                continue
        nodes.append(node)
    outputs = tuple(current(output) for output in body.outputs)
    return SubGraph(body.name, body.inputs, tuple(nodes), outputs)


def _key(node: Node) -> Any:
    keywords = sorted(node.keywords, key=lambda pair: pair[0])
    return (node.target, node.ambient, _argument_key(node.arguments), _argument_key(dict(keywords)))


def _argument_key(argument: Any) -> Any:
    """Return a hashable stand-in that two arguments share only if no callable can tell them apart."""
    kind = type(argument)
    if kind is Value or kind is Constant:
        return argument
    if kind is tuple or kind is list:
        return (kind, *(_argument_key(item) for item in argument))
    if kind is dict:
        return (kind, *((_argument_key(key), _argument_key(item)) for key, item in argument.items()))
    if kind is slice:
        return (kind, *(_argument_key(part) for part in (argument.start, argument.stop, argument.step)))
    return (kind, repr(argument))


PASSES: tuple[Pass, ...] = (eliminate_common_subexpressions, eliminate_dead_code)
"""What `optimize` runs, in this order."""

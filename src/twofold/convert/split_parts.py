"""In-place operations on the parts of a split, put so that a compiler computes what eager execution does.

`unsafe_split` gives parts that share memory with what is split, but are no views by their schema. An LSTM cell computes
its gates in place there. A compiler takes each part for a tensor of its own: what is written to it is not seen in what
was split, and it comes out with other strides than eager's, which what is compiled apart refuses. The LSTM loop of 35
steps, whose backward is a piece of its own, failed at every launch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from twofold.graph import Graph, Node, Value, map_values, values_in

from .segments import root_of, view_nodes, writes_of

aten: Any = torch.ops.aten

_VIEWING: dict[Any, Any] = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}


def settle_split_parts(graph: Graph) -> Graph:
    """Return a straight-line graph that computes the same, bit for bit, with no unseen writes to parts of a split.

    Where nothing shows that parts share memory, what is written to them becomes a tensor of its own. All other splits
    whose parts are written to become views.
    """
    written = {value for node in graph.nodes if node.op == "call" for value in writes_of(node)}
    splits = [node for node in graph.nodes if node.target in _VIEWING and not written.isdisjoint(node.results)]
    if not splits:
        return graph
    apart = _apart(graph, splits)
    now: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        arguments = map_values(node.arguments, lambda value: now.get(value, value))
        keywords = map_values(node.keywords, lambda value: now.get(value, value))
        if node in splits and apart.isdisjoint(node.results):
            node = replace(node, target=_VIEWING[node.target])
        elif node.operands and node.operands[0] in apart and writes_of(node):
            (result,) = node.results
            own = Value(result.name, replace(_spec(result), stride=None))
            node = replace(node, target=_functional(node), results=(own,))
            now[node.operands[0]] = now[result] = own
        nodes.append(replace(node, arguments=arguments, keywords=keywords))
    return replace(graph, nodes=tuple(nodes))


def _apart(graph: Graph, splits: list[Node]) -> set[Value]:
    """Return the parts of those splits of which no value but the parts themselves shows the memory from then on."""
    views = view_nodes(graph.nodes)
    given_out = {root_of(value, views) for output in graph.outputs for value in values_in(output)}
    given_out |= {root_of(value, views) for node in graph.nodes if node.op != "call" for value in node.operands}
    seen = given_out | {root_of(value, views) for value in views}
    last_use = {root_of(value, views): index for index, node in enumerate(graph.nodes) for value in node.operands}
    times = Counter(root_of(node.operands[0], views) for node in graph.nodes if node.target in _VIEWING)
    made = {result for node in graph.nodes if node.op == "call" for result in node.results}
    apart: set[Value] = set()
    for split in splits:
        base = root_of(split.operands[0], views)
        alone = base in made and base not in given_out and times[base] == 1
        if alone and graph.nodes[last_use[base]] is split and seen.isdisjoint(split.results):
            apart.update(split.results)
    for node in graph.nodes:
        touched = apart.intersection(writes_of(node)) if node.op == "call" else set[Value]()
        if touched and _functional(node) is None:
            apart -= next(set(split.results) for split in splits if not touched.isdisjoint(split.results))
    return apart


def _functional(node: Node) -> Any:
    """Return what computes the same of one tensor out of place, in plain order of its items; None if nothing does."""
    stride = None if len(node.results) != 1 else _spec(node.results[0]).stride
    if stride is None or list(stride) != sorted(stride, reverse=True) or len(node.operands) != 1:
        return None
    target: Any = node.target
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    functional = getattr(packet, target._overloadname, None)
    return functional if functional is not None and torch.Tag.pointwise in functional.tags else None


def _spec(value: Value) -> Any:
    assert value.spec is not None
    return value.spec

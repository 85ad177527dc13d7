"""Rewriting traced graphs so that fewer operations are called; each rewrite keeps what is computed but for rounding."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_UNARY = (aten.sigmoid.default, aten.tanh.default, aten.relu.default)


def fuse_products(graph: fx.Graph, rows: dict[fx.Node, tuple[int, int]] | None = None) -> None:
    """Turn `x + a * b` into one `addcmul` where nothing else takes the product. What is known of `rows` is kept."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for product, other in (node.args[::-1], node.args):
            if _is_sole_product(product) and isinstance(other, fx.Node) and _alike(node, product, other, *product.args):
                with graph.inserting_before(node):
                    fused = graph.call_function(aten.addcmul.default, (other, *product.args))
                if rows is not None and node in rows:
                    rows[fused] = rows[node]
                _replace(graph, node, fused)
                break
    graph.eliminate_dead_code()


def _is_sole_product(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is aten.mul.Tensor
        and len(node.users) == 1
        and all(isinstance(factor, fx.Node) for factor in node.args)
    )


def _alike(*nodes: Any) -> bool:
    first = nodes[0].meta["val"]
    return first.dtype.is_floating_point and all(
        n.meta["val"].shape == first.shape and n.meta["val"].dtype == first.dtype for n in nodes
    )


def merge_equal(graph: fx.Graph) -> None:
    """Compute once what is the same operation on the same arguments; none has an effect or draws random numbers."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            first = known.setdefault((node.target, _hashable(node.args), _hashable(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _hashable(argument: Any) -> Any:
    if isinstance(argument, tuple | list):
        return type(argument), tuple(map(_hashable, argument))
    if isinstance(argument, dict):
        return tuple((name, _hashable(held)) for name, held in argument.items())
    return argument if isinstance(argument, fx.Node) else (type(argument), argument)


def join_gates(graph: fx.Graph) -> None:
    """Apply a function once to neighbouring chunks of a split to each of which, and nothing else, it is applied."""
    for split in list(graph.nodes):
        if split.target is not aten.split.Tensor or type(split.args[1]) is not int:
            continue
        chunks = {node.args[1]: node for node in split.users if node.target is operator.getitem}
        run: list[fx.Node] = []
        for index in range(len(chunks) + 1):
            gate = _only_use(chunks.get(index))
            if run and (gate is None or gate.target is not run[0].target):
                _join(graph, split, index - len(run), run)
                run = []
            if gate is not None:
                run.append(gate)
    graph.eliminate_dead_code()


def _only_use(chunk: fx.Node | None) -> fx.Node | None:
    users = list(chunk.users) if chunk is not None else []
    return users[0] if len(users) == 1 and users[0].target in _UNARY else None


def _join(graph: fx.Graph, split: fx.Node, first: int, gates: list[fx.Node]) -> None:
    """Replace the gates of chunks `first` and following, all of one size, by one gate that is split."""
    source, size, *rest = split.args
    dimension: Any = rest[0] if rest else 0
    assert isinstance(source, fx.Node)
    assert isinstance(size, int)
    shape = source.meta["val"].shape
    if len(gates) < 2 or shape[dimension] % size:
        return
    start, stop = first * size, (first + len(gates)) * size
    example = source.meta["val"].narrow(dimension, start, stop - start)
    earliest = min(gates, key=list(graph.nodes).index)
    with graph.inserting_before(earliest):
        part = _noted(graph.call_function(aten.slice.Tensor, (source, dimension, start, stop)), example)
        gate = _noted(graph.call_function(gates[0].target, (part,)), torch.empty_like(example))  # type: ignore[arg-type]
        again = _noted(graph.call_function(aten.split.Tensor, (gate, size, dimension)), None)
        for index, old in enumerate(gates):
            item = graph.call_function(operator.getitem, (again, index))
            _replace(graph, old, item)


def _noted(node: fx.Node, example: Any) -> fx.Node:
    node.meta["val"] = example
    return node


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    graph.erase_node(old)

"""Less work a level: factors known before the levels, and one operation for what is done to neighbours.

Three rewrites of a joint graph, none of which changes what is computed but for rounding:

    f(g * r, s)                  becomes g * f(r, s)         where f is linear in its first argument, elementwise
    cat([g * r, g * s])          becomes g * cat([r, s])
    the same place of k children becomes one tensor          of k rows for an invocation, and so do their gradients

Here g comes from parents, level by level, and r, s do not: they are computed for all invocations at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .rewrite import fuse_products
from .vectorize import SIZES, Joint, Rows

aten = torch.ops.aten

_LINEAR = frozenset(
    {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.sigmoid_backward.default,
        aten.tanh_backward.default,
        aten.threshold_backward.default,
        aten.gelu_backward.default,
        aten.silu_backward.default,
        aten.leaky_relu_backward.default,
        aten.hardtanh_backward.default,
    }
)
"""Elementwise operations that are linear in their first argument."""


Table = tuple[str, int]
"""A function and the number of one of its results."""


@dataclass(frozen=True)
class Link:
    """The results of one table that an invocation of a block takes: those of `operands`, in turn."""

    table: Table
    operands: tuple[int, ...]


def join_children(joint: Joint, tables: Mapping[int, Table]) -> dict[fx.Node, Link]:
    """Make one input of the operands of each table, with a row for each; `tables` has the table of each operand."""
    joined: dict[fx.Node, Link] = {}
    for table, operands in _by_table(tables).items():
        nodes = [joint.inputs[index] for index in operands]
        first, rest = nodes[0], tuple(nodes[0].meta["val"].shape[1:])
        if len(nodes) > 1:
            first = joint.placeholder(f"children_{operands[0]}", nodes[0], (len(nodes) * SIZES[0], *rest))
            _replace_children(joint, nodes, first)
            for node in list(joint.graph.nodes):
                _see_children_joined(joint, node, first)
        joined[first] = Link(table, operands)
    return joined


def _by_table(tables: Mapping[int, Table]) -> dict[Table, tuple[int, ...]]:
    found: dict[Table, tuple[int, ...]] = {}
    for index, table in sorted(tables.items()):
        found[table] = (*found.get(table, ()), index)
    return found


def _replace_children(joint: Joint, nodes: Sequence[fx.Node], children: fx.Node) -> None:
    before = next(node for node in joint.graph.nodes if node.op not in ("placeholder", "get_attr"))
    rows, *rest = nodes[0].meta["val"].shape
    shape = rows, len(nodes), *rest
    each = joint.call(before, aten.view.default, (children, [Rows(1), *shape[1:]]), shape)
    for index, node in enumerate(nodes):
        node.replace_all_uses_with(joint.call(before, aten.select.int, (each, 1, index), (rows, *rest)))


def _see_children_joined(joint: Joint, node: fx.Node, children: fx.Node) -> None:
    """Turn a `cat` of all children, one after the other, into a view of them."""
    if node.target is not aten.cat.default:
        return
    parts: Any = node.args[0]
    dimension = _joined_dimension(node)
    if len(parts) * SIZES[0] != children.meta["val"].shape[0] or dimension < 1:
        return
    if all(_is_child(part, children, index) for index, part in enumerate(parts)) and _flat(parts[0], dimension):
        shape = node.meta["val"].shape
        node.replace_all_uses_with(joint.call(node, aten.view.default, (children, [Rows(1), *shape[1:]]), shape))
        joint.graph.erase_node(node)


def _joined_dimension(node: fx.Node) -> int:
    given: Any = node.args[1] if len(node.args) > 1 else 0
    return given % node.meta["val"].dim()


def _is_child(node: fx.Node, children: fx.Node, index: int) -> bool:
    if node.target is not aten.select.int or node.args[1:] != (1, index):
        return False
    each = node.args[0]
    return isinstance(each, fx.Node) and each.target is aten.view.default and each.args[0] is children


def _flat(node: fx.Node, dimension: int) -> bool:
    """Say whether what is joined in a dimension lies, for one invocation, one behind the other."""
    return math.prod(node.meta["val"].shape[1:dimension]) == 1


def join_gradients(joint: Joint, tables: Mapping[int, Table]) -> list[Link]:
    """Make one tensor of the gradients of the operands of each table; they come first among those of inputs."""
    outputs, gradients, parameters = joint.wanted
    links = [Link(*item) for item in _by_table({i: t for i, t in tables.items() if gradients[i] is not None}).items()]
    joined: list[fx.Node | None] = []
    for link in links:
        nodes: Any = [gradients[index] for index in link.operands]
        held = nodes[0]
        if len(nodes) > 1:
            rows, *rest = held.meta["val"].shape
            base = _sliced(nodes)
            if base is None:
                base = joint.call(joint.end, aten.stack.default, (nodes, 1), (rows, len(nodes), *rest))
            shape = rows * len(nodes), *rest
            held = joint.call(joint.end, aten.view.default, (base, [Rows(len(nodes)), *rest]), shape)
        joined.append(held)
    others = [gradient for index, gradient in enumerate(gradients) if index not in tables]
    joint.want(outputs, [*joined, *others], parameters)
    return links


def _sliced(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """Return what the nodes are consecutive slices of, from first to last, if rows of it are rows of them in turn."""
    if any(node.target is not aten.slice.Tensor or len(node.args) != 4 for node in nodes):
        return None
    base, dimension = nodes[0].args[:2]
    assert isinstance(base, fx.Node)
    assert isinstance(dimension, int)
    size = base.meta["val"].shape[dimension] // len(nodes)
    places = [(base, dimension, index * size, (index + 1) * size) for index in range(len(nodes))]
    whole = base.meta["val"].shape[dimension] == size * len(nodes)
    fits = whole and dimension > 0 and [node.args for node in nodes] == places
    return base if fits and _flat(base, dimension) else None


def join_views(joint: Joint) -> None:
    """Make one view of a view of a view."""
    for node in joint.graph.nodes:
        while node.target is aten.view.default and node.args[0].target is aten.view.default:
            node.args = (node.args[0].args[0], *node.args[1:])
    joint.graph.eliminate_dead_code()


def hoist_factors(joint: Joint, tangents: Iterable[fx.Node]) -> None:
    """Multiply factors that do not come from `tangents` with one another first, and take neighbours together."""
    varying = set(tangents)
    for node in list(joint.graph.nodes):
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(_reassociated(joint, node, varying))
    fuse_products(joint.graph, joint.rows)
    varying = set(tangents)
    for node in list(joint.graph.nodes):
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
            if node.target in (aten.cat.default, aten.stack.default) and node.op == "call_function":
                _take_together(joint, node, varying)
    joint.graph.eliminate_dead_code()


def _reassociated(joint: Joint, node: fx.Node, varying: set[fx.Node]) -> fx.Node:
    """Rewrite f(g * r, s) as g * f(r, s)."""
    if node.target not in _LINEAR or not isinstance(node.args[0], fx.Node) or joint.rows.get(node, (1, 0))[0] != 0:
        return node
    first, shape = node.args[0], node.meta["val"].shape
    others = [other for other in node.all_input_nodes if other is not first]
    if first in node.args[1:] or not varying.isdisjoint(others) or not _same_shape(node, first, *others):
        return node
    factors = _factors(first, varying)
    if factors is None or len(first.users) > 1:
        return node
    factor = joint.call(node, node.target, (factors[1], *node.args[1:]), shape)
    factor.kwargs = node.kwargs
    product = joint.call(node, aten.mul.Tensor, (factors[0], factor), shape)
    node.replace_all_uses_with(product)
    joint.graph.erase_node(node)
    joint.graph.erase_node(first)
    return product


def _same_shape(*nodes: fx.Node) -> bool:
    return all(node.meta["val"].shape == nodes[0].meta["val"].shape for node in nodes)


def _factors(node: fx.Node, varying: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Return g and r of g * r, of which only g varies."""
    if node.target is not aten.mul.Tensor or not all(isinstance(factor, fx.Node) for factor in node.args):
        return None
    left, right = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if (left in varying) == (right in varying) or not _same_shape(node, left, right):
        return None
    return (left, right) if left in varying else (right, left)


def _take_together(joint: Joint, node: fx.Node, varying: set[fx.Node]) -> None:
    """Rewrite runs of g * r, g * s among what a `cat` or `stack` joins as one product."""
    parts: Any = node.args[0]
    dimension = _joined_dimension(node)
    if dimension < 1 or joint.rows.get(node, (1, 0))[0] != 0:
        return
    products = [_factors(part, varying) if len(part.users) == 1 else None for part in parts]
    shapes = [part.meta["val"].shape for part in parts]
    joined: list[fx.Node] = []
    runs = itertools.groupby(range(len(parts)), lambda i: (products[i][0] if products[i] else None, shapes[i]))  # type: ignore[index]
    for (common, _), indices in runs:
        run = list(indices)
        factors = [product[1] for index in run if (product := products[index]) is not None]
        if common is None or len(run) == 1 or (node.target is aten.stack.default and len(run) < len(parts)):
            joined += [parts[index] for index in run]
        else:
            joined.append(_product(joint, node, common, factors, dimension))
            varying.add(joined[-1])
    if len(joined) == 1:
        node.replace_all_uses_with(joined[0])
        joint.graph.erase_node(node)
    elif len(joined) < len(parts):
        node.args = (joined, *node.args[1:])


def _product(joint: Joint, node: fx.Node, common: fx.Node, factors: list[fx.Node], dimension: int) -> fx.Node:
    shape = tuple(common.meta["val"].shape)
    side_by_side = (*shape[:dimension], len(factors), *shape[dimension:])
    stacked = joint.call(node, aten.stack.default, (factors, dimension), side_by_side)
    wide = (*shape[:dimension], 1, *shape[dimension:])
    broad = joint.call(node, aten.unsqueeze.default, (common, dimension), wide)
    product = joint.call(node, aten.mul.Tensor, (broad, stacked), side_by_side)
    if node.target is aten.stack.default:
        return product
    end_to_end = (*shape[:dimension], len(factors) * shape[dimension], *shape[dimension + 1 :])
    arguments = (product, [Rows(shape[0] // SIZES[0]), *end_to_end[1:]])
    return joint.call(node, aten.view.default, arguments, end_to_end)

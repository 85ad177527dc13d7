"""Views that are made once for all levels: what a level reads and writes is cut by level when it has been viewed.

A view that keeps the rows of invocations apart can be made of all rows at once. Making it of each level's rows costs as
much as an operation: 20 views a level took a fifth of the time of a level of the binary TreeLSTM.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .parts import is_view
from .vectorize import SIZES, Joint, Rows

aten = torch.ops.aten

IN_PLACE = frozenset({aten.sigmoid.default, aten.tanh.default})
"""Operations that may write their result over their argument."""


def chain_to(node: fx.Node, inside: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """Return what a node shows the memory of, and the views between, outermost last.

    `inside` are values that lie in the memory of others.
    """
    chain: list[fx.Node] = []
    while is_view(node) or node in inside:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, chain[::-1]


def keeps_rows(joint: Joint, base: fx.Node, chain: Iterable[fx.Node]) -> bool:
    """Say whether views of all rows, cut by invocation, are the views of an invocation's rows, and share memory."""
    chain = list(chain)
    tensors = [base, *(node for node in chain if isinstance(node.meta.get("val"), Tensor))]
    if not all(map(joint.keeps_rows_first, tensors)) or any(map(cuts_rows, chain)):
        return False
    whole = _indices(base)
    return shown(whole, chain).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def cuts_rows(node: fx.Node) -> bool:
    """Say whether a view may show some invocations' rows alone."""
    if node.target in (aten.slice.Tensor, aten.select.int):
        return bool(len(node.args) < 2 or node.args[1] == 0)
    if node.target is aten.split.Tensor:
        return bool(len(node.args) < 3 or node.args[2] == 0)
    return False


def disjoint(base: fx.Node, chains: Iterable[list[fx.Node]]) -> bool:
    """Say whether no two views show the same element."""
    whole = _indices(base)
    elements = torch.cat([shown(whole, chain).reshape(-1) for chain in chains])
    return len(elements.unique()) == len(elements)


def _indices(base: fx.Node) -> Tensor:
    shape = base.meta["val"].shape
    return torch.arange(shape.numel()).reshape(shape)


def shown(whole: Any, chain: Iterable[fx.Node]) -> Tensor:
    """Return the view of a tensor with as many rows as were traced."""
    for node in chain:
        if node.target is operator.getitem:
            whole = whole[node.args[1]]
        elif is_view(node):
            rest: Any = map_aggregate(node.args[1:], _traced)
            target: Callable[..., Any] = aten.reshape.default if node.target is aten.view.default else node.target  # type: ignore[assignment]
            whole = target(whole, *rest, **node.kwargs)
    return whole


def _traced(argument: Any) -> Any:
    return argument.each * SIZES[0] if isinstance(argument, Rows) else argument


def in_place(joint: Joint, room: fx.Node, own: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Return the operations, of those in `own`, that may write over what they read of a value: all that read it.

    None of them if they read an element twice.
    """
    leaves: list[tuple[fx.Node, list[fx.Node]]] = []
    waiting: list[tuple[fx.Node, list[fx.Node]]] = [(room, [])]
    while waiting:
        node, chain = waiting.pop()
        for user in node.users:
            (waiting if is_view(user) else leaves).append((user, [*chain, user] if is_view(user) else chain))
    chains = [chain for _, chain in leaves]
    alike = all(leaf.target in IN_PLACE and leaf in own and not leaf.kwargs for leaf, _ in leaves)
    if not leaves or not alike or any(leaf.meta["val"].dtype is not room.meta["val"].dtype for leaf, _ in leaves):
        return []
    apart = all(keeps_rows(joint, room, chain) for chain in chains) and disjoint(room, chains)
    return [leaf for leaf, _ in leaves] if apart else []

"""Structural equality of graphs: equal up to the identity and the names of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ir import Constant, Graph, Node, SubGraph, Value


def equivalent(a: SubGraph, b: SubGraph) -> bool:
    """Say whether two bodies have the same form, node for node, under a renaming of values.

    Names of bodies, specs, origins and modes count; names of values do not. Numbers are equal if they have
    the same type and text, so that 1, 1.0 and True differ and NaN equals itself; a `Constant` equals one of
    the same object.
    """
    renaming = _Renaming()
    if isinstance(a, Graph) != isinstance(b, Graph) or not renaming.same_body(a, b):
        return False
    if not (isinstance(a, Graph) and isinstance(b, Graph)):
        return True
    same_names = list(a.subgraphs) == list(b.subgraphs)
    return same_names and all(renaming.same_body(body, b.subgraphs[name]) for name, body in a.subgraphs.items())


class _Renaming:
    """Pairs each value of one graph with one of the other, as definitions are met."""

    def __init__(self) -> None:
        self._partner: dict[Value, Value] = {}

    def same_body(self, a: SubGraph, b: SubGraph) -> bool:
        return (
            a.name == b.name
            and self._pair(a.inputs, b.inputs)
            and len(a.nodes) == len(b.nodes)
            and all(self._same_node(x, y) for x, y in zip(a.nodes, b.nodes, strict=True))
            and self._same(a.outputs, b.outputs)
        )

    def _pair(self, a: Sequence[Value], b: Sequence[Value]) -> bool:
        if [value.spec for value in a] != [value.spec for value in b]:
            return False
        self._partner.update(zip(a, b, strict=True))
        return True

    def _same_node(self, a: Node, b: Node) -> bool:
        return (
            (a.op, a.target, a.origin, a.ambient) == (b.op, b.target, b.origin, b.ambient)
            and self._same(a.arguments, b.arguments)
            and [name for name, _ in a.keywords] == [name for name, _ in b.keywords]
            and self._same([argument for _, argument in a.keywords], [argument for _, argument in b.keywords])
            and len(a.subgraphs) == len(b.subgraphs)
            and all(self.same_body(x, y) for x, y in zip(a.subgraphs, b.subgraphs, strict=True))
            and self._pair(a.results, b.results)
        )

    def _same(self, a: Any, b: Any) -> bool:
        if type(a) is not type(b):
            return False
        if isinstance(a, Value):
            return self._partner.get(a) is b
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(self._same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return self._same(list(a), list(b)) and self._same(list(a.values()), list(b.values()))
        if isinstance(a, slice):
            return self._same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return a == b if isinstance(a, Constant) else repr(a) == repr(b)

"""Nodes of Python work as the text of Python expressions, for functions that are generated from graphs."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Sequence
from typing import Any

from twofold.graph import Node

from .targets import apply, method

INFIX: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.is_: "is",
    operator.is_not: "is not",
}
"""Functions that have an operator, which is faster."""

PREFIX: dict[Any, str] = {operator.not_: "not ", operator.truth: "not not ", operator.neg: "-"}


def operation(node: Node, arguments: Sequence[str], keywords: Sequence[str], name: Callable[[Any], str]) -> str:
    """Return what does the work of a node, as a statement or an expression.

    `arguments` and `keywords` (`k=v`) are the texts of the node's own; `name` returns the name of an object.
    """
    target: Any = node.target
    match node.op:
        case "get_attr":
            return _attribute(node, arguments) or f"{name(getattr)}({arguments[0]}, {arguments[1]})"
        case "set_attr":
            place = _attribute(node, arguments)
            return f"{place} = {arguments[2]}" if place else f"{name(setattr)}({', '.join(arguments)})"
        case "get_item":
            return f"{arguments[0]}[{arguments[1]}]"
        case "set_item":
            return f"{arguments[0]}[{arguments[1]}] = {arguments[2]}"
        case _:
            pass
    if target in INFIX:
        return f"{arguments[0]} {INFIX[target]} {arguments[1]}"
    if target in PREFIX:
        return PREFIX[target] + arguments[0]
    if target is method and _is_name(node.arguments[1]):
        return f"{arguments[0]}.{node.arguments[1]}({', '.join([*arguments[2:], *keywords])})"
    if target is apply:
        return f"{arguments[0]}({', '.join([*arguments[1:], *keywords])})"
    return f"{name(target)}({', '.join([*arguments, *keywords])})"


def _attribute(node: Node, arguments: Sequence[str]) -> str:
    return f"{arguments[0]}.{node.arguments[1]}" if _is_name(node.arguments[1]) else ""


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)

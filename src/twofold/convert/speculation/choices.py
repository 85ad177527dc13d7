"""Conditional expressions that choose a number: which one is no assumption, since a node of the host graph chooses."""

from __future__ import annotations

import ast
import operator

from twofold.convert.refusals import Refused

from .calls import Calls
from .items import Dynamic, Item, Known, Outside
from .library import find_in_class, is_data_descriptor
from .objects import Raised
from .speculation import chosen


class Choices(Calls):
    """Choosing among numbers."""

    def evaluate(self, node: ast.expr) -> Item:
        """Return what an expression is."""
        raise NotImplementedError

    def choose(self, condition: Dynamic, one: ast.expr, other: ast.expr) -> Item | None:
        """Return the number that a condition chooses; None if both are not numbers of one type that can be had at once.

        Both are evaluated, so to evaluate them must have no effect and cannot fail.
        """
        numbers = [number for side in (one, other) if (number := self._number(side)) is not None]
        if len(numbers) < 2 or type(self.sample(numbers[0])) is not type(self.sample(numbers[1])):
            return None
        return self.compute(chosen, condition, *numbers)

    def _number(self, node: ast.expr) -> Item | None:
        item: Item | None = None
        match node:
            case ast.Constant():
                item = Known(node.value)
            case ast.Name():
                item = self._bound(node)
            case ast.Attribute(value=ast.Name() as holder):
                item = self._attribute_of(self._bound(holder), node.attr)
            case ast.UnaryOp(op=ast.USub()):
                operand = self._number(node.operand)
                item = None if operand is None else self.compute(operator.neg, operand)
            case _:
                pass
        is_number = isinstance(item, Known | Dynamic) and type(self.sample(item)) in (int, float)
        return item if is_number else None

    def _bound(self, name: ast.Name) -> Item | None:
        try:
            return self.evaluate(name)
        except (Raised, Refused):
            return None

    def _attribute_of(self, holder: Item | None, name: str) -> Item | None:
        """Return what an object from outside has of its own; None for what its class may compute."""
        if not isinstance(holder, Outside) or name not in getattr(holder.object, "__dict__", ()):
            return None
        kind = type(holder.object)
        defined = find_in_class(kind, name)
        is_computed = defined is not None and is_data_descriptor(defined[1])
        is_plain = kind.__getattribute__ is object.__getattribute__ and not is_computed
        return self.attribute(holder, name) if is_plain else None

"""Expressions of a function body to nodes of its SubGraph."""

from __future__ import annotations

import ast
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from twofold.convert.targets import apply, method, unpack
from twofold.graph import UnnamedCallableError, Value, qualified_name

from .functions import Outer, Recursive, Source
from .scope import UNDEFINED, Record, record_keys

_BINARY: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.MatMult: operator.matmul,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[..., Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARE: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
STATIC_HOLDERS = (ModuleType, torch.nn.Module, type)
"""Objects whose attributes are read while converting, and whose values are guarded afterwards."""


def is_library(function: Any) -> bool:
    """Say whether a callable is PyTorch's: known by what it computes and not by its source."""
    if isinstance(function, BuiltinFunctionType | type | torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return True
    if (getattr(function, "__module__", None) or "").partition(".")[0] == "torch":
        return True
    try:
        return qualified_name(function).startswith(("torch.", "aten."))
    except UnnamedCallableError:
        return False


class Expressions(ABC):
    """Converts the expressions of one body; each method returns what the expression holds."""

    source: Source
    variables: dict[str, Any]

    @abstractmethod
    def lookup(self, name: str) -> Any:
        """Return what a name holds: a variable, or something from outside."""

    @abstractmethod
    def use(self, held: Any) -> Any:
        """Return what is held as an Argument of a node."""

    @abstractmethod
    def assume(self, held: Outer) -> None:
        """Note that the conversion relies on something outside being what it was."""

    @abstractmethod
    def node(self, at: ast.AST, op: str, arguments: Sequence[Any], count: int = 1) -> Any:
        """Append a node and return its result, or None if it has none."""

    @abstractmethod
    def call(self, at: ast.AST, target: Callable[..., Any], *arguments: Any, **keywords: Any) -> Value:
        """Append a `call` and return its result."""

    @abstractmethod
    def assign(self, target: ast.expr, held: Any) -> None:
        """Assign to a name, an attribute, an item, or several of these."""

    @abstractmethod
    def choose(self, at: ast.AST, test: Any, then: Callable[[], Any], orelse: Callable[[], Any]) -> Any:
        """Convert an `if` whose sides are made by the two functions; return what either side holds."""

    @abstractmethod
    def comprehension(self, at: ast.AST, element: ast.expr, generators: list[ast.comprehension]) -> Value:
        """Convert a list comprehension."""

    @abstractmethod
    def recursive(self, target: Any) -> Recursive | None:
        """Return something as a recursive function, if it is one."""

    @abstractmethod
    def invoke(self, at: ast.AST, target: Recursive, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a recursive function."""

    @abstractmethod
    def module(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a module."""

    @abstractmethod
    def inline(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a Python function by its source."""

    @abstractmethod
    def record(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Record:
        """Convert the making of an object that only holds its parts."""

    @abstractmethod
    def inline_local(self, at: ast.AST, callee: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a function made inside."""

    def convert(self, node: ast.expr) -> Any:
        """Return what an expression holds: an Argument, an `Outer`, or nested tuples of these."""
        convert = getattr(self, f"_{type(node).__name__}", None)
        if convert is None:
            raise self.source.refuse("unsupported_syntax", f"{type(node).__name__} expression", node)
        return convert(node)

    def value(self, node: ast.expr) -> Any:
        """Return an expression as an Argument of a node."""
        return self.use(self.convert(node))

    def _Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bytes):
            raise self.source.refuse("unsupported_syntax", "bytes constant", node)
        return node.value

    def _Name(self, node: ast.Name) -> Any:
        held = self.lookup(node.id)
        if held is UNDEFINED:
            raise self.source.refuse("unsupported_syntax", f"{node.id} may be unassigned here", node)
        if held is None and node.id not in self.variables:
            raise self.source.refuse("unsupported_call", f"{node.id} is not defined", node)
        return held

    def _Attribute(self, node: ast.Attribute) -> Any:
        return self.attribute(self.convert(node.value), node.attr, node)

    def attribute(self, holder: Any, name: str, node: ast.AST) -> Any:
        """Return an attribute of what an expression holds."""
        if isinstance(holder, Record) and name in holder.keys and holder.kind is not dict:
            return holder.values[holder.keys.index(name)]
        if isinstance(holder, Outer) and isinstance(holder.object, STATIC_HOLDERS):
            try:
                return holder.attribute(name)
            except AttributeError as error:
                raise self.source.refuse("unsupported_call", str(error), node) from None
        return self.node(node, "get_attr", (self.use(holder), name))

    def _Subscript(self, node: ast.Subscript) -> Any:
        holder = self.convert(node.value)
        if isinstance(node.slice, ast.Slice):
            key: Any = self._Slice(node.slice)
        else:
            key = self.value(node.slice)
        if isinstance(holder, Record) and type(key) is str and key in holder.keys and holder.kind is dict:
            return holder.values[holder.keys.index(key)]
        if isinstance(holder, Record) and holder.is_tuple:
            holder = holder.values
        if type(holder) is tuple and type(key) in (int, slice) and not any(isinstance(k, Value) for k in [key]):
            try:
                return holder[key]  # pyright: ignore[reportCallIssue, reportArgumentType]
            except IndexError:
                pass
        return self.node(node, "get_item", (self.use(holder), key))

    def _Slice(self, node: ast.Slice) -> Any:
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else self.value(part) for part in parts))

    def _Tuple(self, node: ast.Tuple) -> Any:
        return tuple(self._items(node.elts))

    def _List(self, node: ast.List) -> Any:
        return self._items(node.elts)

    def _items(self, nodes: list[ast.expr]) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            if not isinstance(node, ast.Starred):
                items.append(self.use(self.convert(node)))
                continue
            spread = self.convert(node.value)
            if type(spread) not in (tuple, list):
                raise self.source.refuse("unsupported_syntax", "* of a sequence of unknown length", node)
            items.extend(spread)
        return items

    def _Dict(self, node: ast.Dict) -> Any:
        items = [
            (None if key is None else self.value(key), self.value(value))
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        return self.call(node, dict, [tuple(item) for item in items])

    def _BinOp(self, node: ast.BinOp) -> Any:
        return self.call(node, _BINARY[type(node.op)], self.value(node.left), self.value(node.right))

    def binary(self, node: ast.AugAssign) -> Callable[..., Any]:
        """Return the in-place form of an augmented assignment's operator."""
        name = _BINARY[type(node.op)].__name__.rstrip("_")
        return getattr(operator, f"i{name}")

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        operand = self.value(node.operand)
        if isinstance(node.op, ast.USub) and type(operand) in (int, float):
            return -operand
        return self.call(node, _UNARY[type(node.op)], operand)

    def _Compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        return self._comparisons(node, left, list(zip(node.ops, node.comparators, strict=True)))

    def _comparisons(self, node: ast.Compare, left: Any, rest: list[tuple[ast.cmpop, ast.expr]]) -> Any:
        (kind, expression), *others = rest
        right = self.value(expression)
        outcome = self._comparison(node, kind, left, right)
        if not others:
            return outcome
        return self.choose(node, outcome, lambda: self._comparisons(node, right, others), lambda: outcome)

    def _comparison(self, node: ast.AST, kind: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(kind, ast.Is | ast.IsNot) and type(left) is tuple and right is None:
            return isinstance(kind, ast.IsNot)
        if isinstance(kind, ast.In):
            return self.call(node, operator.contains, right, left)
        if isinstance(kind, ast.NotIn):
            return self.call(node, operator.not_, self.call(node, operator.contains, right, left))
        return self.call(node, _COMPARE[type(kind)], left, right)

    def _BoolOp(self, node: ast.BoolOp) -> Any:
        first, *rest = node.values
        left = self.value(first)
        for expression in rest:

            def right(expression: ast.expr = expression) -> Any:
                return self.value(expression)

            def kept(left: Any = left) -> Any:
                return left

            sides = (right, kept) if isinstance(node.op, ast.And) else (kept, right)
            left = self.choose(node, left, *sides)
        return left

    def _IfExp(self, node: ast.IfExp) -> Any:
        test = self.value(node.test)
        return self.choose(node, test, lambda: self.convert(node.body), lambda: self.convert(node.orelse))

    def _NamedExpr(self, node: ast.NamedExpr) -> Any:
        held = self.convert(node.value)
        self.assign(node.target, held)
        return held

    def _JoinedStr(self, node: ast.JoinedStr) -> Any:
        text: Any = ""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                shown: Any = self.value(part.value)
                if part.conversion != -1:
                    shown = self.call(node, {115: str, 114: repr, 97: ascii}[part.conversion], shown)
                form = "" if part.format_spec is None else self.value(part.format_spec)
                text = self.call(node, operator.add, text, self.call(node, format, shown, form))
            else:
                text = self.call(node, operator.add, text, self.value(part))
        return text

    def _ListComp(self, node: ast.ListComp) -> Any:
        return self.comprehension(node, node.elt, node.generators)

    def _GeneratorExp(self, node: ast.GeneratorExp) -> Any:
        return self.comprehension(node, node.elt, node.generators)

    def _Call(self, node: ast.Call) -> Any:
        callee = self._callee(node.func)
        arguments = self._items(node.args)
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.source.refuse("unsupported_syntax", "** in a call", node)
            keywords[keyword.arg] = self.value(keyword.value)
        if isinstance(callee, tuple):
            receiver, name = callee
            return self.call(node, method, self.use(receiver), name, *arguments, **keywords)
        return self.call_held(node, callee, arguments, keywords)

    def _callee(self, node: ast.expr) -> Any:
        """Return what is called: something held, or a pair of receiver and method name."""
        if not isinstance(node, ast.Attribute):
            return self.convert(node)
        holder = self.convert(node.value)
        if isinstance(holder, Outer) and isinstance(holder.object, STATIC_HOLDERS):
            return self.attribute(holder, node.attr, node)
        if isinstance(holder, Outer) and self.recursive(getattr(type(holder.object), node.attr, None)) is not None:
            return holder.attribute(node.attr)
        return holder, node.attr

    def call_held(self, node: ast.Call, callee: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of something held."""
        if hasattr(callee, "definition"):
            return self.inline_local(node, callee, arguments, keywords)
        if not isinstance(callee, Outer):
            return self.call(node, apply, self.use(callee), *arguments, **keywords)
        target = callee.object
        self.assume(callee)
        if record_keys(target) is not None:
            return self.record(node, callee, arguments, keywords)
        recursive = self.recursive(target)
        if recursive is not None:
            return self.invoke(node, recursive, arguments, keywords)
        if target in (tuple, list) and len(arguments) == 1 and type(arguments[0]) is tuple:
            return arguments[0] if target is tuple else list(arguments[0])
        if isinstance(target, torch.nn.Module):
            return self.module(node, callee, arguments, keywords)
        if isinstance(target, BuiltinFunctionType) and not isinstance(target.__self__, ModuleType | None):
            receiver = Outer.fixed(target.__qualname__, target.__self__)
            return self.call(node, method, self.use(receiver), target.__name__, *arguments, **keywords)
        if isinstance(target, FunctionType | MethodType) and not is_library(target):
            return self.inline(node, callee, arguments, keywords)
        if is_library(target) and not isinstance(target, MethodType):
            return self.call(node, target, *arguments, **keywords)
        return self.call(node, apply, self.use(callee), *arguments, **keywords)

    def items(self, node: ast.AST, held: Any, count: int) -> tuple[Any, ...]:
        """Return the `count` items that an assignment to several targets unpacks."""
        held = held.values if isinstance(held, Record) and held.is_tuple else held
        if type(held) in (tuple, list) and len(held) == count:
            return tuple(held)
        items = self.call(node, unpack, self.use(held), count)
        return tuple(self.node(node, "get_item", (items, index)) for index in range(count))

"""Expressions."""

from __future__ import annotations

import ast
import builtins
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .choices import Choices
from .heap import is_lasting, is_value
from .items import (
    NONE,
    Closure,
    Dynamic,
    Instance,
    Item,
    Known,
    Mapping,
    Method,
    Outside,
    Place,
    Scope,
    Sequence,
    Stream,
    Tensor,
    View,
)
from .library import find_in_class
from .objects import DICTS, LISTS

OPERATORS: dict[type, tuple[Callable[..., Any], str]] = {
    ast.Add: (operator.add, "add"), ast.Sub: (operator.sub, "sub"), ast.Mult: (operator.mul, "mul"),
    ast.Div: (operator.truediv, "truediv"), ast.FloorDiv: (operator.floordiv, "floordiv"),
    ast.Mod: (operator.mod, "mod"), ast.Pow: (operator.pow, "pow"), ast.LShift: (operator.lshift, "lshift"),
    ast.RShift: (operator.rshift, "rshift"), ast.BitOr: (operator.or_, "or"), ast.BitXor: (operator.xor, "xor"),
    ast.BitAnd: (operator.and_, "and"), ast.MatMult: (operator.matmul, "matmul"),
}  # fmt: skip
UNARY: dict[type, tuple[Callable[..., Any], str]] = {
    ast.USub: (operator.neg, "__neg__"), ast.UAdd: (operator.pos, "__pos__"), ast.Invert: (operator.inv, "__invert__"),
}  # fmt: skip
COMPARISONS: dict[type, tuple[Callable[..., Any], str, str]] = {
    ast.Eq: (operator.eq, "__eq__", "__eq__"), ast.NotEq: (operator.ne, "__ne__", "__ne__"),
    ast.Lt: (operator.lt, "__lt__", "__gt__"), ast.LtE: (operator.le, "__le__", "__ge__"),
    ast.Gt: (operator.gt, "__gt__", "__lt__"), ast.GtE: (operator.ge, "__ge__", "__le__"),
}  # fmt: skip


class Expressions(Choices):
    """Evaluates expressions."""

    def evaluate(self, node: ast.expr) -> Item:
        """Return what an expression is."""
        method = getattr(self, "_evaluate_" + type(node).__name__, None)
        outer, self.node = self.node, node
        try:
            if method is None:
                raise self.refuse("unsupported_syntax", f"{type(node).__name__} is not converted")
            self.host.origin = self.scope.code.origin(node)
            return self.heap.current(method(node))
        finally:
            self.node = outer

    # ---- names and literals ------------------------------------------------------------------------------

    def _evaluate_Constant(self, node: ast.Constant) -> Item:
        return Known(node.value)

    def _evaluate_Name(self, node: ast.Name) -> Item:
        return self.lookup(node.id)

    def _evaluate_NamedExpr(self, node: ast.NamedExpr) -> Item:
        item = self.evaluate(node.value)
        self.bind_name(node.target.id, item)
        return item

    def lookup(self, name: str) -> Item:
        """Return what a name refers to."""
        scope: Scope | None = self.scope
        while scope is not None:
            if name in scope.names:
                if name not in scope.variables:
                    raise self.refuse("raises", f"UnboundLocalError: {name}")
                return scope.variables[name]
            if scope.code.declared.get(name) == "global":
                break
            if scope.parent is None and name in scope.code.cells:
                return self.heap.read(self._cell(scope, name), "get_attr", "cell_contents")
            scope = scope.parent
        return self._global(name)

    def _cell(self, scope: Scope, name: str) -> Outside:
        cell = scope.code.cells[name]
        return Outside(cell, self.host.root(name, cell), Place(name, id(cell), False))

    def _globals(self) -> Outside:
        held = self.scope.code.globals
        return Outside(held, self.host.root("globals", held), Place("globals()", id(held), False))

    def _global(self, name: str) -> Item:
        held = self.scope.code.globals
        holder = self._globals()
        written = self.heap.overwritten(holder, "get_item", name)
        if written is not None:
            return written
        if name in held:
            if self.scope.code.is_library and is_lasting(held[name]):
                return Known(held[name])
            return self.heap.read(holder, "get_item", name)
        if not hasattr(builtins, name):
            raise self.refuse("raises", f"NameError: name '{name}' is not defined")
        if not self.scope.code.is_library:
            place = Place(f"{name} not in globals()", (id(held), "not in", name), False)
            self.host.assume_absent(holder.value, name, place)
        return Known(getattr(builtins, name))

    def bind_name(self, name: str, item: Item) -> None:
        """Assign to a name."""
        scope = self.scope
        while scope.code.declared.get(name) != "global":
            if name in scope.names:
                scope.variables[name] = item
                return
            if scope.parent is None:
                break
            scope = scope.parent
        if name in scope.code.cells:
            self.heap.write(self._cell(scope, name), "set_attr", "cell_contents", item)
        else:
            self.heap.write(self._globals(), "set_item", name, item)

    # ---- displays ----------------------------------------------------------------------------------------

    def _elements(self, nodes: list[ast.expr]) -> list[Item]:
        items: list[Item] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items.extend(self.iterate(self.evaluate(node.value)))
            else:
                items.append(self.evaluate(node))
        return items

    def _evaluate_List(self, node: ast.List) -> Item:
        return Sequence(list, self._elements(node.elts))

    def _evaluate_Tuple(self, node: ast.Tuple) -> Item:
        return Sequence(tuple, self._elements(node.elts))

    def _evaluate_Set(self, node: ast.Set) -> Item:
        return self.make_mapping(set, [Sequence(list, self._elements(node.elts))], {})

    def _evaluate_Dict(self, node: ast.Dict) -> Item:
        made = Mapping(dict, {})
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self.container_method(made, dict.update, [self.evaluate(value)], {})
            else:
                wanted = self.key(self.evaluate(key))
                made.entries[wanted] = self.evaluate(value)
        return made

    def _evaluate_Slice(self, node: ast.Slice) -> Item:
        parts = [NONE if part is None else self.evaluate(part) for part in (node.lower, node.upper, node.step)]
        return Known(slice(*(self._index(part) for part in parts)))

    def _index(self, item: Item) -> Any:
        return self.known(item)

    # ---- comprehensions ----------------------------------------------------------------------------------

    def _evaluate_ListComp(self, node: ast.ListComp) -> Item:
        return Sequence(list, list(self._comprehend(node.generators, lambda: self.evaluate(node.elt))))

    def _evaluate_SetComp(self, node: ast.SetComp) -> Item:
        listed = Sequence(list, list(self._comprehend(node.generators, lambda: self.evaluate(node.elt))))
        return self.make_mapping(set, [listed], {})

    def _evaluate_DictComp(self, node: ast.DictComp) -> Item:
        def entry() -> Item:
            key = self.evaluate(node.key)
            return Sequence(tuple, [key, self.evaluate(node.value)])

        listed = Sequence(list, list(self._comprehend(node.generators, entry)))
        return self.make_mapping(dict, [listed], {})

    def _evaluate_GeneratorExp(self, node: ast.GeneratorExp) -> Item:
        return Stream(self._comprehend(node.generators, lambda: self.evaluate(node.elt)), types.GeneratorType)

    def _comprehend(self, generators: list[ast.comprehension], result: Callable[[], Item]) -> Iterator[Item]:
        """Yield the elements of a comprehension; each part is evaluated in the scope of the comprehension."""
        names = {n.id for g in generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        inner = Scope(self.scope.code, frozenset(names), self.scope)
        first = self.iterate(self.evaluate(generators[0].iter))  # in the scope around it
        return self._nested(generators, first, inner, result)

    def _nested(
        self, generators: list[ast.comprehension], source: Iterator[Item], scope: Scope, result: Callable[[], Item]
    ) -> Iterator[Item]:
        generator, *others = generators
        if generator.is_async:
            raise self.refuse("unsupported_syntax", "an asynchronous comprehension")
        for item in source:
            with _Within(self, scope):
                self.assign(generator.target, item)
                if not all(self.truth(self.evaluate(condition)) for condition in generator.ifs):
                    continue
                inner = self.iterate(self.evaluate(others[0].iter)) if others else None
                made = result() if inner is None else None
            if inner is not None:
                yield from self._nested(others, inner, scope, result)
            elif made is not None:
                yield made

    def assign(self, target: ast.expr, item: Item) -> None:
        """Assign to a target."""
        raise NotImplementedError

    # ---- functions ---------------------------------------------------------------------------------------

    def _evaluate_Lambda(self, node: ast.Lambda) -> Item:
        return self.make_closure(node)

    def make_closure(self, node: ast.FunctionDef | ast.Lambda) -> Closure:
        """Return the function that a definition makes."""
        arguments = node.args
        defaults = [self.evaluate(default) for default in arguments.defaults]
        named = {
            argument.arg: self.evaluate(default)
            for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            if default is not None
        }
        return Closure(self.scope.code.nested(node), self.scope, defaults, named)

    def _evaluate_Call(self, node: ast.Call) -> Item:
        callee = self.evaluate(node.func)
        arguments = self._elements(node.args)
        keywords: dict[str, Item] = {}
        for keyword in node.keywords:
            item = self.evaluate(keyword.value)
            if keyword.arg is None:
                keywords.update((str(k), self.subscript(item, Known(k))) for k in self.iterate_known(item))
            else:
                keywords[keyword.arg] = item
        self.host.origin = self.scope.code.origin(node)
        return self.call(callee, arguments, keywords)

    # ---- operators ---------------------------------------------------------------------------------------

    def _evaluate_BinOp(self, node: ast.BinOp) -> Item:
        function, name = OPERATORS[type(node.op)]
        return self.operate(function, name, self.evaluate(node.left), self.evaluate(node.right))

    def operate(self, function: Callable[..., Any], name: str, left: Item, right: Item) -> Item:
        """Apply a binary operator."""
        own = self._own_operator(left, f"__{name}__", right) or self._own_operator(right, f"__r{name}__", left)
        if own is not None:
            return own
        if name in ("add", "mul") and not isinstance(left, Tensor) and not isinstance(right, Tensor):
            joined = self._join(name, left, right)
            if joined is not None:
                return joined
        if isinstance(left, Mapping) and isinstance(right, Mapping) and name == "or":
            return Mapping(left.kind, left.entries | right.entries)
        return self.compute(function, left, right)

    def _own_operator(self, item: Item, method: str, other: Item) -> Item | None:
        if not isinstance(item, Instance | Outside) or isinstance(getattr(item, "object", None), (*LISTS, *DICTS, set)):
            return None
        found = find_in_class(self.type_of(item), method)
        if found is None or not isinstance(found[1], types.FunctionType):
            return None
        return self.call(Method(Known(found[1]), item), [other], {})

    def _join(self, name: str, left: Item, right: Item) -> Item | None:
        """Return the sum of two lists or tuples, or a list so many times; None if it is neither."""
        kinds = [self._list_kind(item) for item in (left, right)]
        if name == "add" and kinds[0] is not None and kinds[0] is kinds[1]:
            return Sequence(kinds[0], [*self.iterate(left), *self.iterate(right)])
        if name == "mul" and (kinds[0] is None) != (kinds[1] is None):
            listed, times = (left, right) if kinds[0] is not None else (right, left)
            if isinstance(listed, Sequence | Outside):
                return Sequence(kinds[0] or kinds[1] or list, list(self.iterate(listed)) * self.known(times))
        return None

    def _list_kind(self, item: Item) -> type | None:
        kind = item.kind if isinstance(item, Sequence) else type(getattr(item, "object", None))
        return kind if kind in (list, tuple) else None

    def _evaluate_UnaryOp(self, node: ast.UnaryOp) -> Item:
        item = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            return self._negate(item)
        function, _ = UNARY[type(node.op)]
        return self.compute(function, item)

    def _negate(self, item: Item) -> Item:
        if isinstance(item, Dynamic) and not isinstance(item.sample, np.ndarray):
            return self.compute(operator.not_, item)
        if isinstance(item, Tensor):
            return self.compute(operator.not_, self.native(bool, [item], {}))
        return Known(not self.truth(item))

    def _evaluate_BoolOp(self, node: ast.BoolOp) -> Item:
        for value in node.values[:-1]:
            item = self.evaluate(value)
            if self.truth(item) is isinstance(node.op, ast.Or):
                return item
        return self.evaluate(node.values[-1])

    def _evaluate_IfExp(self, node: ast.IfExp) -> Item:
        condition = self.evaluate(node.test)
        if isinstance(condition, Dynamic) and (number := self.choose(condition, node.body, node.orelse)) is not None:
            return number
        return self.evaluate(node.body if self.truth(condition) else node.orelse)

    def _evaluate_Compare(self, node: ast.Compare) -> Item:
        left = self.evaluate(node.left)
        result: Item = Known(True)
        for index, (kind, operand) in enumerate(zip(node.ops, node.comparators, strict=True)):
            right = self.evaluate(operand)
            result = self._compare(kind, left, right)
            if index < len(node.ops) - 1 and not self.truth(result):
                return result
            left = right
        return result

    def _compare(self, kind: ast.cmpop, left: Item, right: Item) -> Item:
        if isinstance(kind, ast.Is | ast.IsNot):
            return self._identical(left, right, isinstance(kind, ast.Is))
        if isinstance(kind, ast.In | ast.NotIn):
            found = self._contains(right, left)
            return found if isinstance(kind, ast.In) else self._negate(found)
        function, method, mirrored = COMPARISONS[type(kind)]
        own = self._own_operator(left, method, right) or self._own_operator(right, mirrored, left)
        if own is not None:
            return own
        for one in (left, right):
            if isinstance(one, Outside | Instance) and not isinstance(
                getattr(one, "object", None), (*LISTS, *DICTS, set)
            ):
                if method in ("__eq__", "__ne__"):
                    return self._identical(left, right, method == "__eq__")
                raise self.refuse("unsupported_object", f"compares {self.describe(one)}")
        if any(isinstance(one, Outside) for one in (left, right)):
            left, right = (self._spread_out(one) for one in (left, right))
        return self.compute(function, left, right)

    def _spread_out(self, item: Item) -> Item:
        return self.spread(item) if isinstance(item, Outside) and isinstance(item.object, LISTS) else item

    def _identical(self, left: Item, right: Item, wanted: bool) -> Item:
        if isinstance(left, Dynamic) or isinstance(right, Dynamic):
            return self.compute(operator.is_ if wanted else operator.is_not, left, right)
        held = [self._identity(item) for item in (left, right)]
        return Known((held[0] is held[1]) is wanted)

    def _identity(self, item: Item) -> Any:
        match self.heap.current(item):
            case (Known() | Outside()) as held:
                return held.object
            case Tensor() as held:
                return held.sample
            case held:
                return held

    def _contains(self, container: Item, item: Item) -> Item:
        match container:
            case Mapping():
                return Known(self.key(item) in container.entries)
            case Outside() if isinstance(container.object, DICTS):
                return Known(self.contains(container, self.known(item)))
            case View() if container.name == "keys":
                return self._contains(self.heap.current(container.mapping), item)
            case Sequence() | Stream() | View():
                for one in self.iterate(container):
                    same = self._identity(one) is self._identity(item)
                    if same or (not isinstance(one, Tensor) and self.truth(self._compare(ast.Eq(), one, item))):
                        return Known(True)
                return Known(False)
            case Outside() if isinstance(container.object, LISTS) and id(container.object) not in self.heap.changed:
                return self._contains(self.spread(container), item)
            case Outside() if isinstance(container.object, set) and is_value(self.sample(item)):
                late = id(container.object) in self.heap.changed
                found = self.sample(item) in self.heap.copy_of(container.object)
                value = self.host.call(operator.contains, container.value, self.host.nested(item), late=late)
                return Dynamic(found, value)
            case Outside() | Instance():
                return self.call(self.attribute(container, "__contains__"), [item], {})
            case _:
                return self.compute(operator.contains, container, item)

    # ---- attributes, items, text -------------------------------------------------------------------------

    def _evaluate_Attribute(self, node: ast.Attribute) -> Item:
        return self.attribute(self.evaluate(node.value), node.attr)

    def _evaluate_Subscript(self, node: ast.Subscript) -> Item:
        holder = self.evaluate(node.value)
        return self.subscript(holder, self.evaluate(node.slice))

    def _evaluate_JoinedStr(self, node: ast.JoinedStr) -> Item:
        parts = [self.evaluate(value) for value in node.values]
        if all(isinstance(part, Known) for part in parts):
            return Known("".join(str(self.known(part)) for part in parts))
        return self.compute(str.join, Known(""), Sequence(list, parts))

    def _evaluate_FormattedValue(self, node: ast.FormattedValue) -> Item:
        item = self.evaluate(node.value)
        if node.conversion != -1:
            item = self.to_text({ord("s"): str, ord("r"): repr, ord("a"): ascii}[node.conversion], item)
        spec = Known("") if node.format_spec is None else self.evaluate(node.format_spec)
        return self.to_text(format, item, spec)

    def to_text(self, function: Callable[..., Any], item: Item, *rest: Item) -> Item:
        """Apply `str`, `repr` or `format`."""
        match item:
            case Tensor():
                return self.native(function, [item, *rest], {})
            case Outside() | Instance():
                method = {str: "__str__", repr: "__repr__"}.get(function, "__format__")
                found = find_in_class(self.type_of(item), method)
                if found is not None and isinstance(found[1], types.FunctionType):
                    return self.call(Method(Known(found[1]), item), list(rest), {})
                if isinstance(item, Outside) and isinstance(item.object, (*LISTS, *DICTS)):
                    return self.compute(function, item, *rest)
                raise self.refuse("unsupported_object", f"writes {self.describe(item)} as text")
            case _:
                return self.compute(function, item, *rest)


class _Within:
    """Evaluates in another scope."""

    def __init__(self, owner: Expressions, scope: Scope) -> None:
        self.owner, self.scope = owner, scope

    def __enter__(self) -> None:
        self.outer, self.owner.scope = self.owner.scope, self.scope

    def __exit__(self, *_error: object) -> None:
        self.owner.scope = self.outer

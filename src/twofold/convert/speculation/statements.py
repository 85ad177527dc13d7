"""Statements: the interpreter as a whole."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from enum import Enum
from types import GeneratorType
from typing import Any

import numpy as np

from .builtin_functions import BuiltinFunctions
from .expressions import OPERATORS
from .items import NONE, Dynamic, Instance, Item, Known, Mapping, Method, Outside, Scope, Sequence, Stream, Tensor
from .library import CONTEXTS, find_in_class
from .objects import LISTS, Raised
from .source import Code

MAX_ITERATIONS = 20_000
"""Iterations of one loop: longer ones are no part of a training step."""


class Flow(Enum):
    """How a statement ended."""

    NEXT = 0
    BREAK = 1
    CONTINUE = 2
    RETURN = 3


class Interpreter(BuiltinFunctions):
    """Runs functions as syntax, with items for objects."""

    _result: Item = NONE

    def run(self, code: Code, scope: Scope) -> Item:
        """Run the body of a function."""
        if code.is_generator:
            return self.collect(code)
        flow = self.execute_all(code.body)
        result, self._result = self._result, NONE
        return result if flow is Flow.RETURN else NONE

    def collect(self, code: Code) -> Item:
        """Run a generator of the library to its end, and return one of what it yields."""
        outer, self.yielded = self.yielded, []
        try:
            self.execute_all(code.body)
            return Stream(iter(self.yielded), GeneratorType)
        finally:
            self.yielded = outer

    def execute_all(self, body: list[ast.stmt]) -> Flow:
        """Run statements in order, until one of them leaves."""
        for statement in body:
            flow = self.execute(statement)
            if flow is not Flow.NEXT:
                return flow
        return Flow.NEXT

    def execute(self, node: ast.stmt) -> Flow:
        """Run one statement."""
        method: Callable[[Any], Flow | None] | None = getattr(self, "_execute_" + type(node).__name__, None)
        self.node = node
        self.host.origin = self.scope.code.origin(node)
        if method is None:
            raise self.refuse("unsupported_syntax", f"{_WORDS.get(type(node), type(node).__name__)} is not converted")
        return method(node) or Flow.NEXT

    # ---- simple statements -------------------------------------------------------------------------------

    def _execute_Expr(self, node: ast.Expr) -> None:
        self.evaluate(node.value)

    def _execute_Pass(self, node: ast.Pass) -> None:
        del node

    def _execute_Global(self, node: ast.Global) -> None:
        del node

    def _execute_Nonlocal(self, node: ast.Nonlocal) -> None:
        del node

    def _execute_Return(self, node: ast.Return) -> Flow:
        self._result = NONE if node.value is None else self.evaluate(node.value)
        return Flow.RETURN

    def _execute_Break(self, node: ast.Break) -> Flow:
        del node
        return Flow.BREAK

    def _execute_Continue(self, node: ast.Continue) -> Flow:
        del node
        return Flow.CONTINUE

    def _execute_FunctionDef(self, node: ast.FunctionDef) -> None:
        made: Item = self.make_closure(node)
        for decorator in reversed(node.decorator_list):
            made = self.call(self.evaluate(decorator), [made], {})
        self.bind_name(node.name, made)

    def _execute_Assert(self, node: ast.Assert) -> None:
        if not self.truth(self.evaluate(node.test)):
            raise Raised(AssertionError(*[] if node.msg is None else [self.known(self.evaluate(node.msg))]))

    def _execute_Raise(self, node: ast.Raise) -> None:
        if node.exc is None or node.cause is not None:
            raise self.refuse("raises", "raises an exception again")
        raised = self.evaluate(node.exc)
        held = raised.object if isinstance(raised, Known) else None
        if isinstance(held, type) and issubclass(held, Exception):
            held = held()
        if not isinstance(held, Exception):
            raise self.refuse("raises", "raises an exception")
        raise Raised(held)

    def _execute_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id in self.scope.names:
                if self.scope.variables.pop(target.id, None) is None:
                    raise self.refuse("raises", f"UnboundLocalError: {target.id}")
            elif isinstance(target, ast.Subscript):
                self.delete_item(self.evaluate(target.value), self.evaluate(target.slice))
            else:
                raise self.refuse("unsupported_syntax", "deletes an attribute")

    # ---- assignment --------------------------------------------------------------------------------------

    def _execute_Assign(self, node: ast.Assign) -> None:
        item = self.evaluate(node.value)
        for target in node.targets:
            self.assign(target, item)

    def _execute_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.evaluate(node.value))

    def assign(self, target: ast.expr, item: Item) -> None:
        """Assign to a target."""
        match target:
            case ast.Name():
                self.bind_name(target.id, item)
            case ast.Attribute():
                self.set_attribute(self.evaluate(target.value), target.attr, item)
            case ast.Subscript():
                self.set_item(self.evaluate(target.value), self.evaluate(target.slice), item)
            case ast.Tuple() | ast.List():
                self._unpack(target.elts, list(self.iterate(item)))
            case _:
                raise self.refuse("unsupported_syntax", f"assigns to {type(target).__name__}")

    def _unpack(self, targets: list[ast.expr], items: list[Item]) -> None:
        starred = next((i for i, target in enumerate(targets) if isinstance(target, ast.Starred)), None)
        wanted = len(targets) if starred is None else len(targets) - 1
        if len(items) < wanted or (starred is None and len(items) > wanted):
            raise Raised(_unpacking_error(len(items), wanted, starred is not None))
        if starred is not None:
            after = len(targets) - starred - 1
            middle = Sequence(list, items[starred : len(items) - after])
            items = [*items[:starred], middle, *items[len(items) - after :]]
        for target, item in zip(targets, items, strict=True):
            self.assign(target.value if isinstance(target, ast.Starred) else target, item)

    def _execute_AugAssign(self, node: ast.AugAssign) -> None:
        target = node.target
        match target:
            case ast.Name():
                self.bind_name(target.id, self._augment(node, self.lookup(target.id)))
            case ast.Attribute():
                holder = self.evaluate(target.value)
                self.set_attribute(holder, target.attr, self._augment(node, self.attribute(holder, target.attr)))
            case _:
                holder, key = self.evaluate(target.value), self.evaluate(target.slice)
                self.set_item(holder, key, self._augment(node, self.subscript(holder, key)))

    def _augment(self, node: ast.AugAssign, item: Item) -> Item:
        function, name = OPERATORS[type(node.op)]
        value = self.evaluate(node.value)
        in_place: Any = getattr(operator, "i" + name.rstrip("_"))
        if isinstance(item, Tensor):
            return self.native(in_place, [item, value], {})
        if isinstance(item, Dynamic) and isinstance(item.sample, np.ndarray):
            return self.change_array(item, in_place, [value], {})
        is_list = (isinstance(item, Sequence) and item.kind is list) or (
            isinstance(item, Outside) and isinstance(item.object, LISTS) and not isinstance(item.object, tuple)
        )
        if is_list and name == "add":
            self.container_method(item, list.extend, [value], {})
            return item
        if isinstance(item, Instance | Outside):
            found = find_in_class(self.type_of(item), f"__i{name}__")
            if found is not None:
                return self.call(Method(Known(found[1]), item), [value], {})
        if isinstance(item, Sequence | Mapping | Dynamic):
            kind = type(item.sample) if isinstance(item, Dynamic) else item.kind
            if hasattr(kind, f"__{in_place.__name__}__"):
                return self._change_in_place(item, in_place, value)
        return self.operate(function, name, item, value)

    def _change_in_place(self, item: Item, in_place: Any, value: Item) -> Item:
        """Do what changes a container of the call, which may have other names, and is none of the cases above."""
        match item:
            case Sequence() if item.kind is list and item.value is None:
                item.items[:] = item.items * self.known(value)
            case Mapping() if item.kind is dict and item.value is None and in_place is operator.ior:
                self._mapping_method(item, "update", [value], {})
            case Mapping() if item.kind is set and item.value is None:
                entries = set(item.entries)
                changed = self.dry_run(in_place, [entries, self.known(value)], {})
                for key in list(item.entries):
                    if key not in changed:
                        del item.entries[key]
                item.entries.update((key, Known(key)) for key in changed if key not in item.entries)
            case _:
                raise self.refuse("unsupported_object", f"changes {self.describe(item)} in place")
        return item

    # ---- control flow ------------------------------------------------------------------------------------

    def _execute_If(self, node: ast.If) -> Flow:
        return self.execute_all(node.body if self.truth(self.evaluate(node.test)) else node.orelse)

    def _execute_While(self, node: ast.While) -> Flow:
        for _ in range(MAX_ITERATIONS):
            if not self.truth(self.evaluate(node.test)):
                return self.execute_all(node.orelse)
            flow = self.execute_all(node.body)
            if flow is Flow.BREAK:
                return Flow.NEXT
            if flow is Flow.RETURN:
                return flow
        self.node = node
        raise self.refuse("unsupported_syntax", f"a loop of more than {MAX_ITERATIONS} iterations")

    def _execute_For(self, node: ast.For) -> Flow:
        items: Iterator[Item] = self.iterate(self.evaluate(node.iter))
        for _ in range(MAX_ITERATIONS):
            item = next(items, None)
            if item is None:
                return self.execute_all(node.orelse)
            self.assign(node.target, item)
            flow = self.execute_all(node.body)
            if flow is Flow.BREAK:
                return Flow.NEXT
            if flow is Flow.RETURN:
                return flow
        self.node = node
        raise self.refuse("unsupported_syntax", f"a loop of more than {MAX_ITERATIONS} iterations")

    def _execute_With(self, node: ast.With) -> Flow:
        return self._enter(node, 0)

    def _enter(self, node: ast.With, index: int) -> Flow:
        if index == len(node.items):
            return self.execute_all(node.body)
        manager = self.evaluate(node.items[index].context_expr)
        target = node.items[index].optional_vars
        if isinstance(manager, Known) and isinstance(manager.object, CONTEXTS):
            with manager.object as entered:
                if target is not None:
                    self.assign(target, Known(entered))
                return self._enter(node, index + 1)
        entered = self.call(self.attribute(manager, "__enter__"), [], {})
        if target is not None:
            self.assign(target, entered)
        try:
            flow = self._enter(node, index + 1)
        except Raised:
            raise self.refuse("raises", "an exception passes through a with statement") from None
        result = self._result
        self.call(self.attribute(manager, "__exit__"), [NONE, NONE, NONE], {})
        self._result = result
        return flow

    def _execute_Try(self, node: ast.Try) -> Flow:
        try:
            flow = self._try(node)
        except Raised:
            self.execute_all(node.finalbody)
            raise
        result = self._result
        final = self.execute_all(node.finalbody)
        if final is not Flow.NEXT:
            return final
        self._result = result
        return flow

    def _try(self, node: ast.Try) -> Flow:
        depth, scope = self._depth, self.scope
        try:
            flow = self.execute_all(node.body)
        except Raised as raised:
            self._depth, self.scope = depth, scope
            handler = next((h for h in node.handlers if self._handles(h, raised.error)), None)
            if handler is None:
                raise
            if handler.name is not None:
                self.bind_name(handler.name, Known(raised.error))
            return self.execute_all(handler.body)
        return self.execute_all(node.orelse) if flow is Flow.NEXT else flow

    def _handles(self, handler: ast.ExceptHandler, error: Exception) -> bool:
        if handler.type is None:
            return True
        return isinstance(error, self.known(self.evaluate(handler.type)))


def _unpacking_error(given: int, wanted: int, is_starred: bool) -> ValueError:
    """Return what Python raises, in its own words."""
    names = [f"a{index}" for index in range(wanted)] + ["*rest"] * is_starred
    try:
        exec(f"[{', '.join(names)}] = range({given})", {})
    except ValueError as error:
        return error
    raise AssertionError("expected another count")


_WORDS: dict[type, str] = {
    ast.ClassDef: "a class defined within the function",
    ast.Import: "an import within the function",
    ast.ImportFrom: "an import within the function",
    ast.AsyncFunctionDef: "a coroutine",
    ast.Match: "match",
}

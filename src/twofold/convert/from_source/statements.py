"""Statements of a function body, and its control flow, to a SubGraph."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import torch

from twofold.convert.targets import fail
from twofold.graph import Ambient, SubGraph, SubGraphBuilder, Value

from .calls import Calls, LocalFunction, Outside
from .functions import Outer, Source
from .host_code import always_assigned
from .loops import jumps, without_jumps
from .scope import UNDEFINED, Record, assigned, flatten, rebuild, record_dict, returns, same, same_form

_MISSING: Any = object()
CONSTANT_TYPES = (torch.dtype, torch.device, torch.memory_format, torch.layout, NoneType)
"""Objects from outside that a graph holds by value."""


class Body(Calls):
    """Converts the statements of one function into the body that `at` builds."""

    def __init__(self, converter: Outside, source: Source, at: SubGraphBuilder, variables: dict[str, Any]) -> None:
        self.source = source
        self.variables = variables
        self._converter = converter
        self._at = at
        self._ambient = Ambient()

    def within(self, source: Source, variables: dict[str, Any]) -> Body:
        """Return what converts the body of another function at the same place."""
        body = Body(self._converter, source, self._at, variables)
        body._ambient, body._inlining = self._ambient, self._inlining
        return body

    # Names and nodes.

    def lookup(self, name: str) -> Any:
        """Return what a name holds: a variable, or something from outside."""
        if name in self.variables:
            return self.variables[name]
        return self.source.outer(name)

    def use(self, held: Any) -> Any:
        """Return what is held as an Argument of a node."""
        if isinstance(held, Outer):
            if isinstance(held.object, CONSTANT_TYPES):
                self.assume(held)
                return held.object
            return self._converter.outer(held)
        if isinstance(held, LocalFunction):
            return self.made_by_host(held)
        if isinstance(held, Record):
            parts = {key: self.use(value) for key, value in zip(held.keys, held.values, strict=True)}
            return self.call(self.source.definition, held.kind, **parts)
        if type(held) in (tuple, list):
            return type(held)(self.use(item) for item in held)
        return held

    def assume(self, held: Outer) -> None:
        """Note that the conversion relies on something outside being what it was."""
        self._converter.assume(held)

    def node(self, at: ast.AST, op: str, arguments: Sequence[Any], count: int = 1) -> Any:
        """Append a node and return its result, or None if it has none."""
        results = self._at.node(
            op, None, arguments, results=[None] * count, origin=self.source.origin(at), ambient=self._ambient
        )
        return results[0] if results else None

    def call(self, at: ast.AST, target: Callable[..., Any], *arguments: Any, **keywords: Any) -> Value:
        """Append a `call` and return its result."""
        origin = self.source.origin(at)
        return self._at.node("call", target, arguments, keywords, [None], origin=origin, ambient=self._ambient)[0]

    def assign(self, target: ast.expr, held: Any) -> None:
        """Assign to a name, an attribute, an item, or several of these."""
        match target:
            case ast.Name():
                self.variables[target.id] = self.call(target, list, held) if type(held) is list else held
            case ast.Tuple() | ast.List():
                if any(isinstance(part, ast.Starred) for part in target.elts):
                    raise self.source.refuse("unsupported_syntax", "* in an assignment", target)
                parts = self.items(target, held, len(target.elts))
                for part, item in zip(target.elts, parts, strict=True):
                    self.assign(part, item)
            case ast.Attribute():
                holder = self.convert(target.value)
                if isinstance(holder, Record):
                    raise self.source.refuse(
                        "unsupported_syntax", "assignment to an attribute of what is made inside", target
                    )
                if isinstance(holder, Outer):
                    raise self.source.refuse("unsupported_syntax", "assignment to an attribute from outside", target)
                self.node(target, "set_attr", (self.use(holder), target.attr, self.use(held)), 0)
            case ast.Subscript():
                holder, key = self.convert(target.value), self.value(target.slice)
                if isinstance(holder, Record | tuple):
                    raise self.source.refuse("unsupported_syntax", "assignment to an item of a result", target)
                holder = self.use(holder)
                self.node(target, "set_item", (holder, key, self.use(held)), 0)
            case _:
                raise self.source.refuse("unsupported_syntax", f"assignment to {type(target).__name__}", target)

    # Statements.

    def statements(self, statements: Sequence[ast.stmt]) -> Any:
        """Convert statements in order; return what they return, or `_MISSING` if they fall through."""
        for index, statement in enumerate(statements):
            match statement:
                case ast.Return():
                    return None if statement.value is None else self._returned(statement.value)
                case ast.For() | ast.While() if jumps(statement.body):
                    if statement.orelse:
                        raise self.source.refuse("return_in_loop", "else of a loop", statement)
                    return self.statements([*without_jumps(statement), *statements[index + 1 :]])
                case ast.If() if returns([statement]):
                    rest = list(statements[index + 1 :])
                    test = self.value(statement.test)
                    sides = (statement.body + rest, statement.orelse + rest)
                    then, orelse = ((lambda side=side: self.whole(side)) for side in sides)
                    return self.choose(statement, test, then, orelse)
                case ast.Raise() if statement.exc is not None:
                    cause = None if statement.cause is None else self.value(statement.cause)
                    self.call(statement, fail, self.value(statement.exc), cause)
                    return None
                case _:
                    self._statement(statement)
        return _MISSING

    def _returned(self, node: ast.expr) -> Any:
        """Return what a return statement returns: a dict, of which nobody else has hold, by its parts."""
        match node:
            case ast.Dict() if record_dict(node):
                keys = tuple(key.value for key in node.keys)  # type: ignore[union-attr]
                return Record(dict, keys, tuple(self._returned(value) for value in node.values))
            case ast.Tuple() if not any(isinstance(item, ast.Starred) for item in node.elts):
                return tuple([self._returned(item) for item in node.elts])
            case _:
                return self.convert(node)

    def whole(self, statements: Sequence[ast.stmt]) -> Any:
        """Convert statements up to the end of the function; return what they return."""
        held = self.statements(statements)
        return None if held is _MISSING else held

    def _statement(self, statement: ast.stmt) -> None:
        convert = getattr(self, f"_{type(statement).__name__}", None)
        if convert is None:
            raise self.source.refuse("unsupported_syntax", f"{type(statement).__name__} statement", statement)
        convert(statement)

    def _Pass(self, statement: ast.Pass) -> None:
        pass

    def _Expr(self, statement: ast.Expr) -> None:
        if not isinstance(statement.value, ast.Constant):
            self.convert(statement.value)

    def _Assign(self, statement: ast.Assign) -> None:
        held = self.convert(statement.value)
        if type(held) is list and len(statement.targets) > 1:
            held = self.call(statement, list, held)
        for target in statement.targets:
            self.assign(target, held)

    def _AnnAssign(self, statement: ast.AnnAssign) -> None:
        if statement.value is not None:
            self.assign(statement.target, self.convert(statement.value))

    def _AugAssign(self, statement: ast.AugAssign) -> None:
        target = statement.target
        load = ast.copy_location(ast.parse(ast.unparse(target), mode="eval").body, target)
        for part in ast.walk(load):
            ast.copy_location(part, target)
        left, right = self.value(load), self.value(statement.value)
        self.assign(target, self.call(statement, self.binary(statement), left, right))

    def _FunctionDef(self, statement: ast.FunctionDef) -> None:
        self.variables[statement.name] = self.local_function(statement)

    def _Assert(self, statement: ast.Assert) -> None:
        test = self.value(statement.test)

        def failing() -> Any:
            message = [] if statement.msg is None else [self.value(statement.msg)]
            self.call(statement, fail, self.call(statement, AssertionError, *message))

        self.choose(statement, test, lambda: None, failing)

    def _With(self, statement: ast.With) -> None:
        grad = self._ambient.grad
        for item in statement.items:
            manager = item.context_expr
            callee = self.convert(manager.func) if isinstance(manager, ast.Call) else None
            modes = {torch.no_grad: False, torch.enable_grad: True}
            if not isinstance(callee, Outer) or callee.object not in modes or item.optional_vars is not None:
                raise self.source.refuse("unsupported_syntax", "with, except for torch.no_grad()", statement)
            grad = modes[callee.object]
        if returns(statement.body):
            raise self.source.refuse("unsupported_syntax", "return inside with", statement)
        before, self._ambient = self._ambient, replace(self._ambient, grad=grad)
        self.statements(statement.body)
        self._ambient = before

    def _If(self, statement: ast.If) -> None:
        test = self.value(statement.test)
        names = list(assigned([statement]))

        def side(body: Sequence[ast.stmt]) -> Callable[[], Any]:
            def convert() -> Any:
                self.statements(body)
                return tuple(self.variables.get(name, UNDEFINED) for name in names)

            return convert

        held = self.choose(statement, test, side(statement.body), side(statement.orelse))
        self.variables.update(zip(names, held, strict=True))

    def choose(self, at: ast.AST, test: Any, then: Callable[[], Any], orelse: Callable[[], Any]) -> Any:
        """Convert an `if` whose sides are made by the two functions; return what either side holds."""
        if test is True or test is False or test is None:
            return then() if test else orelse()
        bodies = [self._nested(name, make) for name, make in (("then", then), ("else", orelse))]
        (first, left), (second, right) = bodies
        if not same_form(left, right):
            left, right = self._align(at, first, left, second, right)
        pairs = list(zip(flatten(left), flatten(right), strict=True))
        kept = [index for index, pair in enumerate(pairs) if not same(*pair) and UNDEFINED not in pair]
        bodies = [
            self._finish(builder, [side[index] for index in kept])
            for builder, side in ((first, flatten(left)), (second, flatten(right)))
        ]
        origin = self.source.origin(at)
        results = self._at.node("if", None, [test], results=[None] * len(kept), subgraphs=bodies, origin=origin)
        leaves = [UNDEFINED if UNDEFINED in pair else pair[0] for pair in pairs]
        for index, result in zip(kept, results, strict=True):
            leaves[index] = result
        return rebuild(left, iter(leaves))

    def _align(self, at: ast.AST, first: SubGraphBuilder, left: Any, second: SubGraphBuilder, right: Any) -> Any:
        """Unpack the side that is no tuple where the other one is; what one side leaves unassigned is so."""
        if left is UNDEFINED or right is UNDEFINED:
            return UNDEFINED, UNDEFINED
        if (
            isinstance(left, Record)
            and isinstance(right, Record)
            and (left.kind, left.keys) == (right.kind, right.keys)
        ):
            values = self._align(at, first, left.values, second, right.values)
            return left.like(values[0]), right.like(values[1])
        if type(left) is tuple and type(right) is tuple and len(left) == len(right):
            pairs = [
                (a, b) if same_form(a, b) else self._align(at, first, a, second, b)
                for a, b in zip(left, right, strict=True)
            ]
            return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
        for builder, held, other in ((first, left, right), (second, right, left)):
            if type(other) is tuple and isinstance(held, Value):
                outside, self._at = self._at, builder
                items = self.items(at, held, len(other))
                self._at = outside
                return (items, other) if held is left else (other, items)
        raise self.source.refuse("inconsistent_results", "the two sides of this choice give different structures", at)

    def _nested(self, name: str, make: Callable[[], Any]) -> tuple[SubGraphBuilder, Any]:
        """Convert into a nested body; return its builder and what it holds. Variables are as before afterwards."""
        outside, variables = self._at, self.variables
        self._at, self.variables = outside.body(name), dict(variables)
        held = make()
        builder, self._at, self.variables = self._at, outside, variables
        return builder, held

    def _finish(self, builder: SubGraphBuilder, outputs: Sequence[Any]) -> SubGraph:
        outside, self._at = self._at, builder
        body = builder.finish([self.use(output) for output in outputs])
        self._at = outside
        return body

    # Loops.

    def _For(self, statement: ast.For) -> None:
        if statement.orelse:
            raise self.source.refuse("return_in_loop", "else of a loop", statement)
        names = self._carried(statement.body)

        def body() -> None:
            self.statements(statement.body)

        self._loop(statement, statement.target, statement.iter, names, body)
        self._forget(statement, names)

    def _carried(self, body: Sequence[ast.stmt]) -> list[str]:
        """Return the variables that a loop assigns to and that exist before it."""
        return [name for name in assigned(body) if self.variables.get(name, UNDEFINED) is not UNDEFINED]

    def _forget(self, loop: ast.stmt, carried: Sequence[str]) -> None:
        """Take the other variables that a loop assigns to as unassigned: it may not have run."""
        self.variables.update(dict.fromkeys([name for name in assigned([loop]) if name not in carried], UNDEFINED))

    def _While(self, statement: ast.While) -> None:
        if statement.orelse:
            raise self.source.refuse("return_in_loop", "else of a loop", statement)
        if any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement.test)):
            raise self.source.refuse("unsupported_syntax", ":= in the condition of a loop", statement)
        names = self._carried(statement.body)
        before = tuple(self.variables[name] for name in names)
        carried = [self.use(leaf) for leaf in flatten(before)]

        def begin() -> None:
            inputs = [self._at.input(None, None) for _ in carried]
            self.variables.update(zip(names, rebuild(before, iter(inputs)), strict=True))

        def condition() -> Any:
            begin()
            return self.value(statement.test)

        def body() -> Any:
            begin()
            self.statements(statement.body)
            return tuple(self.variables[name] for name in names)

        asking, test = self._nested("condition", condition)
        doing, after = self._nested("body", body)
        self._check_carried(statement, before, after)
        bodies = [self._finish(asking, [test]), self._finish(doing, flatten(after))]
        origin = self.source.origin(statement)
        results = self._at.node("while", None, carried, None, [None] * len(carried), bodies, origin)
        self.variables.update(zip(names, rebuild(before, iter(results)), strict=True))
        self._forget(statement, names)

    def _check_carried(self, at: ast.AST, before: Any, after: Any) -> None:
        if not same_form(before, after) or UNDEFINED in flatten(after):
            raise self.source.refuse("unsupported_syntax", "a variable changes its structure in this loop", at)

    def _Try(self, statement: ast.Try) -> None:
        """Have the host run a `try` as it is; tensors are not to be had in it."""
        if returns([statement]) or jumps([statement]):
            raise self.source.refuse("unsupported_syntax", "return, break or continue inside try", statement)
        given = self.given_to_host(statement)
        results = always_assigned(statement)
        returned = ast.Return(ast.Tuple([ast.Name(name, ast.Load()) for name in results], ast.Load()))
        held = self.host_call(statement, [statement, ast.copy_location(returned, statement)], given)
        self.variables.update(dict.fromkeys(assigned([statement]), UNDEFINED))
        self.variables.update(zip(results, self.items(statement, held, len(results)), strict=True))

    def _loop(
        self, at: ast.AST, target: ast.expr, iterable: ast.expr, names: list[str], body: Callable[[], None]
    ) -> None:
        """Convert a loop over a sequence that carries the named variables."""
        sequence = self.call(at, tuple, self.value(iterable))
        count = self.call(at, len, sequence)
        before = tuple(self.variables[name] for name in names)
        carried = [self.use(leaf) for leaf in flatten(before)]

        def convert() -> Any:
            index = self._at.input(None, None)
            inputs = [self._at.input(None, None) for _ in carried]
            self.variables.update(zip(names, rebuild(before, iter(inputs)), strict=True))
            self.assign(target, self.node(at, "get_item", (sequence, index)))
            body()
            return tuple(self.variables[name] for name in names)

        builder, after = self._nested("body", convert)
        self._check_carried(at, before, after)
        nested = self._finish(builder, flatten(after))
        origin = self.source.origin(at)
        results = self._at.node("loop", None, [count, *carried], None, [None] * len(carried), [nested], origin)
        self.variables.update(zip(names, rebuild(before, iter(results)), strict=True))

    def comprehension(self, at: ast.AST, element: ast.expr, generators: list[ast.comprehension]) -> Value:
        """Convert a list comprehension: a loop that appends to a new list."""
        collected = self.call(at, list)

        def clauses(rest: list[ast.comprehension]) -> None:
            if not rest:
                self.call(at, list.append, collected, self.value(element))
                return
            clause, *others = rest
            if clause.is_async:
                raise self.source.refuse("unsupported_syntax", "async comprehension", at)
            self._loop(at, clause.target, clause.iter, [], lambda: filters(clause.ifs, others))

        def filters(tests: list[ast.expr], others: list[ast.comprehension]) -> None:
            if not tests:
                clauses(others)
                return
            test = self.value(tests[0])
            self.choose(at, test, lambda: filters(tests[1:], others), lambda: None)

        variables, self.variables = self.variables, dict(self.variables)
        clauses(generators)
        self.variables = variables
        return collected

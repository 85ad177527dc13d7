"""Statements of a function body, and its control flow, to a SubGraph."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import NoneType
from typing import Any, Protocol

import torch

from twofold.convert.refusals import Refused
from twofold.convert.targets import apply, fail
from twofold.graph import SCALAR_TYPES, Ambient, SubGraph, SubGraphBuilder, Value

from .expressions import Expressions
from .functions import Function, Outer, Recursive, Source
from .scope import UNDEFINED, assigned, flatten, rebuild, returns, same, same_form

_MISSING: Any = object()
CONSTANT_TYPES = (torch.dtype, torch.device, torch.memory_format, torch.layout, NoneType)
"""Objects from outside that a graph holds by value."""


class Outside(Protocol):
    """What bodies need of the graph that they belong to."""

    def declare(self, recursive: Recursive) -> Function:
        """Declare the SubGraph of a function; its body is converted later."""
        ...

    def outer(self, held: Outer) -> Value:
        """Return something from outside as a value."""
        ...

    def assume(self, held: Outer) -> None:
        """Note that the conversion relies on something outside being what it was."""
        ...

    def entering(self, source: Source, refuse: Callable[[], Refused]) -> AbstractContextManager[None]:
        """Mark a helper function as being converted, to see one that calls itself."""
        ...


class Body(Expressions):
    """Converts the statements of one function into the body that `at` builds."""

    def __init__(self, converter: Outside, source: Source, at: SubGraphBuilder, variables: dict[str, Any]) -> None:
        self.source = source
        self.variables = variables
        self._converter = converter
        self._at = at
        self._ambient = Ambient()

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
                if isinstance(holder, Outer):
                    raise self.source.refuse("unsupported_syntax", "assignment to an attribute from outside", target)
                self.node(target, "set_attr", (self.use(holder), target.attr, self.use(held)), 0)
            case ast.Subscript():
                holder, key = self.value(target.value), self.value(target.slice)
                self.node(target, "set_item", (holder, key, self.use(held)), 0)
            case _:
                raise self.source.refuse("unsupported_syntax", f"assignment to {type(target).__name__}", target)

    # Statements.

    def statements(self, statements: Sequence[ast.stmt]) -> Any:
        """Convert statements in order; return what they return, or `_MISSING` if they fall through."""
        for index, statement in enumerate(statements):
            match statement:
                case ast.Return():
                    return None if statement.value is None else self.convert(statement.value)
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
        """Unpack the side that is no tuple where the other one is."""
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
        if statement.orelse or returns(statement.body):
            raise self.source.refuse("return_in_loop", "return, or else, of a for loop", statement)
        names = [name for name in assigned(statement.body) if self.variables.get(name, UNDEFINED) is not UNDEFINED]

        def body() -> None:
            self.statements(statement.body)

        self._loop(statement, statement.target, statement.iter, names, body)
        for name in assigned([statement]):
            if name not in names:
                self.variables[name] = UNDEFINED

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
        if not same_form(before, after) or UNDEFINED in flatten(after):
            raise self.source.refuse("unsupported_syntax", "a variable changes its structure in this loop", at)
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

    # Calls of Python functions.

    def invoke(self, at: ast.AST, target: Recursive, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a recursive function."""
        callee = self._converter.declare(target)
        bound = self._bind(at, callee.source, arguments, keywords, target.receiver)
        operands = [self.use(bound[name]) for name in callee.parameters]
        results = self._at.invoke(callee.name, *operands, origin=self.source.origin(at), ambient=self._ambient)
        return results[0] if callee.results is None else results

    def module(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a module: PyTorch's own as one operation, others by their forward's source."""
        module: torch.nn.Module = callee.object
        if type(module).__module__.startswith("torch."):
            return self.call(at, apply, self.use(callee), *arguments, **keywords)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise self.source.refuse("module_hook", f"{type(module).__name__} has a hook", at)
        return self.inline(at, callee.attribute("forward"), arguments, keywords)

    def inline(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a Python function by its source; what has none is called by the host."""
        mark = self._at.mark()
        try:
            return self._inlined(at, callee, arguments, keywords)
        except Refused as refused:
            if refused.refusal.code == "recursive_helper":
                raise
            self._at.rewind(mark)
            return self.call(at, apply, self.use(callee), *arguments, **keywords)

    def _inlined(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        receiver = getattr(callee.object, "__self__", None)
        source = Source.of(getattr(callee.object, "__func__", callee.object))
        variables = self._bind(at, source, arguments, keywords, receiver)
        with self._converter.entering(source, lambda: self.source.refuse("recursive_helper", "it calls itself", at)):
            body = Body(self._converter, source, self._at, variables)
            body._ambient = self._ambient
            return body.whole(source.definition.body)

    def _bind(self, at: ast.AST, source: Source, arguments: list[Any], keywords: dict[str, Any], receiver: Any) -> Any:
        """Return what each parameter of a function holds in a call."""
        if source.definition.args.vararg or source.definition.args.kwarg:
            raise source.refuse("unsupported_syntax", "*arguments or **keywords", source.definition)
        first = [] if receiver is None else [Outer.fixed("self", receiver)]
        bound = source.signature.bind(*first, *arguments, **keywords)
        for name, parameter in source.signature.parameters.items():
            if name not in bound.arguments:
                plain = type(parameter.default) in SCALAR_TYPES
                bound.arguments[name] = parameter.default if plain else Outer.fixed(name, parameter.default)
        return dict(bound.arguments)

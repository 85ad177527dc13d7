"""Calls to nodes of a SubGraph: recursive calls, helpers by their source, and what the host runs as it is."""

from __future__ import annotations

import ast
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from twofold.convert.refusals import Refused
from twofold.convert.targets import apply
from twofold.graph import SCALAR_TYPES, Ambient, SubGraphBuilder, Value

from .expressions import Expressions
from .functions import Function, Outer, Recursive, Source
from .host_code import compiled, names_read
from .scope import UNDEFINED, Record, rebuild


class Outside(Protocol):
    """What bodies need of the graph that they belong to."""

    known: Callable[[Any], Recursive | None]
    """Return what is called as a recursive function, if it is one."""

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


@dataclass(frozen=True, eq=False)
class LocalFunction:
    """A function or lambda that is made inside: called, it is inlined; otherwise it is made by the host."""

    definition: ast.FunctionDef | ast.Lambda
    signature: inspect.Signature

    @classmethod
    def of(cls, definition: ast.FunctionDef | ast.Lambda, defaults: Sequence[Any]) -> LocalFunction:
        """Take a definition, with what the defaults of positional parameters hold, then those of the others."""
        arguments, kinds = definition.args, inspect.Parameter
        positional = [*arguments.posonlyargs, *arguments.args]
        plain = len(positional) - len(arguments.defaults)
        values = [kinds.empty] * plain + list(defaults[: len(arguments.defaults)])
        rest = iter(defaults[len(arguments.defaults) :])
        parameters = [
            kinds(arg.arg, kinds.POSITIONAL_OR_KEYWORD, default=value)
            for arg, value in zip(positional, values, strict=True)
        ]
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            value = kinds.empty if default is None else next(rest)
            parameters.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=value))
        return cls(definition, inspect.Signature(parameters))


class Calls(Expressions):
    """Converts the calls of one body."""

    _converter: Outside
    _at: SubGraphBuilder
    _ambient: Ambient
    _inlining: tuple[ast.AST, ...] = ()

    @abstractmethod
    def within(self, source: Source, variables: dict[str, Any]) -> Calls:
        """Return what converts the body of another function at the same place."""

    @abstractmethod
    def whole(self, statements: Sequence[ast.stmt]) -> Any:
        """Convert statements up to the end of the function; return what they return."""

    def recursive(self, target: Any) -> Recursive | None:
        """Return something as a recursive function, if it is one."""
        return self._converter.known(target)

    def invoke(self, at: ast.AST, target: Recursive, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a recursive function."""
        callee = self._converter.declare(target)
        bound = self._bind(at, callee.source, arguments, keywords, target.receiver)
        operands = [self.use(bound[name]) for name in callee.parameters]
        if not self._ambient.grad:
            raise self.source.refuse("unsupported_syntax", "a recursive call inside torch.no_grad()", at)
        results = self._at.invoke(callee.name, *operands, origin=self.source.origin(at), ambient=self._ambient)
        return rebuild(callee.form, iter(results))

    def record(self, at: ast.AST, callee: Outer, arguments: list[Any], keywords: dict[str, Any]) -> Record:
        """Convert the making of an object that only holds its parts."""
        signature = inspect.signature(callee.object)
        bound = signature.bind(*arguments, **keywords)
        for name, parameter in signature.parameters.items():
            if name not in bound.arguments and type(parameter.default) not in SCALAR_TYPES:
                raise self.source.refuse("unsupported_syntax", f"a default of {callee.name} that is no number", at)
        bound.apply_defaults()
        return Record(callee.object, tuple(bound.arguments), tuple(bound.arguments.values()))

    def parts(self, at: ast.AST, held: Any, form: Any) -> list[Any]:
        """Return the single values in something of a form. Refuses what has a structure that the form has not."""
        if isinstance(form, Record):
            if not (isinstance(held, Record) and held.kind is form.kind):
                op = "get_item" if form.kind is dict else "get_attr"
                held = form.like([self.node(at, op, (self.use(held), key)) for key in form.keys])
            form, held = form.values, held.values
        if type(form) is tuple:
            items = self.items(at, held, len(form))
            return [part for item, inner in zip(items, form, strict=True) for part in self.parts(at, item, inner)]
        if isinstance(held, tuple | list | Record | LocalFunction):
            raise self.source.refuse("result_structure", f"a {_shown(held)} among the results", at)
        return [held]

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
        recursive = self.recursive(callee.object)
        if recursive is not None:
            return self.invoke(at, recursive, arguments, keywords)
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
            return self.within(source, variables).whole(source.definition.body)

    def _bind(self, at: ast.AST, source: Source, arguments: list[Any], keywords: dict[str, Any], receiver: Any) -> Any:
        """Return what each parameter of a function holds in a call."""
        if source.definition.args.kwarg:
            raise source.refuse("unsupported_syntax", "**keywords", source.definition)
        first = [] if receiver is None else [Outer.fixed("self", receiver)]
        bound = source.signature.bind(*first, *arguments, **keywords)
        for name, parameter in source.signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments.setdefault(name, ())
            elif name not in bound.arguments:
                plain = type(parameter.default) in SCALAR_TYPES
                bound.arguments[name] = parameter.default if plain else Outer.fixed(name, parameter.default)
        return dict(bound.arguments)

    # Functions made inside.

    def local_function(self, node: ast.FunctionDef | ast.Lambda) -> LocalFunction:
        """Return a function that is made inside."""
        if node.args.vararg or node.args.kwarg or getattr(node, "decorator_list", ()):
            raise self.source.refuse("unsupported_syntax", "*, ** or a decorator of a function made inside", node)
        defaults = [*node.args.defaults, *(default for default in node.args.kw_defaults if default is not None)]
        return LocalFunction.of(node, [self.convert(default) for default in defaults])

    def _Lambda(self, node: ast.Lambda) -> Any:
        return self.local_function(node)

    def inline_local(self, at: ast.AST, callee: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Convert a call of a function made inside, which sees the variables as they are now."""
        definition = callee.definition
        if definition in self._inlining:
            raise self.source.refuse("recursive_helper", "it calls itself", at)
        bound = callee.signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        body = self.within(self.source, {**self.variables, **bound.arguments})
        body._inlining = (*self._inlining, definition)
        return body.convert(definition.body) if isinstance(definition, ast.Lambda) else body.whole(definition.body)

    def made_by_host(self, function: LocalFunction) -> Value:
        """Have the host make a function as it is. Its variables keep what they hold."""
        node = function.definition
        given = self.given_to_host(node)
        changing = [name for name in given if name in self.variables and self.source.assignments(name) > 1]
        if changing:
            construct = f"a function of {changing[0]}, which is assigned more than once, used as a value"
            raise self.source.refuse("unsupported_syntax", construct, node)
        if isinstance(node, ast.Lambda):
            return self.host_call(node, [ast.copy_location(ast.Return(node), node)], given)
        returned = ast.copy_location(ast.Return(ast.Name(node.name, ast.Load())), node)
        return self.host_call(node, [node, returned], given)

    def given_to_host(self, node: ast.AST) -> list[str]:
        """Return the variables that the host needs to run a piece of syntax."""
        free = self.source.function.__code__.co_freevars
        names: list[str] = []
        for name in names_read(node):
            outer = None if name in self.variables else self.source.outer(name)
            if outer is not None and self.recursive(outer.object) is not None:
                raise self.source.refuse("unsupported_syntax", "a recursive call inside try or lambda", node)
            if self.variables.get(name, UNDEFINED) is not UNDEFINED or (name in free and name not in self.variables):
                names.append(name)
        return names

    def host_call(self, node: ast.AST, body: list[ast.stmt], given: list[str]) -> Value:
        """Have the host run statements that return something, given the variables that they read."""
        function = Outer.fixed(type(node).__name__.lower(), compiled(self.source, given, body))
        return self.call(node, apply, self.use(function), *(self.use(self.lookup(name)) for name in given))


def _shown(held: Any) -> str:
    return held.kind.__name__ if isinstance(held, Record) else type(held).__name__

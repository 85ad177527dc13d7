"""From a recursive Python function to a graph of SubGraphs.

Each function becomes a SubGraph that is declared before its body, so that it can invoke itself and the others (Jeong
et al., EuroSys 2018, section 3: forward declaration). Python's objects are values without a spec, attribute reads and
indexing are nodes, and what is read from outside is an input of the graph (outer references). Which part is computed
by tensors and which by Python is decided afterwards, in `slices`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from twofold.convert.refusals import Refused
from twofold.graph import Graph, GraphBuilder, SubGraphBuilder, Value

from .functions import Function, Outer, Recursive, Source
from .scope import flatten, result_form
from .statements import Body


@dataclass(frozen=True)
class Converted:
    """The graph of a recursive function.

    `outer` says how the graph's inputs are read; `assumed` is what must be what it was for the graph to hold.
    """

    graph: Graph
    functions: Mapping[str, Function]
    outer: Mapping[Value, Outer]
    assumed: tuple[Outer, ...]
    entry: str


def convert(recursive: Recursive) -> Converted:
    """Convert a function and all recursive functions that it reaches. Raises `Refused`."""
    converter = Converter(recursive.known)
    entry = converter.declare(recursive)
    return converter.finish(entry)


class Converter:
    """Holds what the bodies of one graph share."""

    def __init__(self, known: Callable[[Any], Recursive | None]) -> None:
        """`known` returns what is called as a recursive function, if it is one."""
        self.known = known
        self._builder = GraphBuilder("recursion")
        self._functions: dict[tuple[int, int], Function] = {}
        self._builders: dict[str, SubGraphBuilder] = {}
        self._waiting: list[Function] = []
        self._outer: dict[Value, Outer] = {}
        self._inputs: dict[tuple[Any, ...], Value] = {}
        self._assumed: dict[tuple[Any, ...], Outer] = {}
        self._open: list[Source] = []

    def declare(self, recursive: Recursive) -> Function:
        """Declare the SubGraph of a function; its body is converted later."""
        known = self._functions.get(recursive.identity)
        if known is not None:
            return known
        source = Source.of(recursive.function)
        if source.definition.args.vararg or source.definition.args.kwarg:
            raise source.refuse("unsupported_syntax", "*arguments or **keywords", source.definition)
        names = list(source.signature.parameters)
        parameters = tuple(names if recursive.receiver is None else names[1:])
        try:
            form = result_form(source.definition, lambda node: _named(source, node))
        except ValueError as error:
            raise source.refuse("inconsistent_results", str(error), source.definition) from None
        name = source.function.__name__
        while name in self._builders:
            name += "_"
        function = Function(name, source, parameters, form, recursive)
        self._builders[name] = self._builder.declare(name, dict.fromkeys(parameters), flatten(form))
        self._functions[recursive.identity] = function
        self._waiting.append(function)
        return function

    def finish(self, entry: Function) -> Converted:
        """Convert the bodies of all declared functions."""
        while self._waiting:
            self._convert_body(self._waiting.pop())
        graph = self._builder.finish([])
        return Converted(
            graph, {f.name: f for f in self._functions.values()}, self._outer, tuple(self._assumed.values()), entry.name
        )

    def _convert_body(self, function: Function) -> None:
        builder, source = self._builders[function.name], function.source
        variables: dict[str, object] = dict(zip(function.parameters, builder.inputs, strict=True))
        receiver = function.recursive.receiver
        if receiver is not None:
            variables[next(iter(source.signature.parameters))] = Outer.fixed("self", receiver)
        body = Body(self, source, builder, variables)
        held = body.whole(source.definition.body)
        outputs = body.parts(source.definition, held, function.form)
        builder.finish([body.use(output) for output in outputs])

    def outer(self, held: Outer) -> Value:
        """Return something from outside as a value: an input of the graph."""
        known = self._inputs.get(held.key)
        if known is None:
            known = self._inputs[held.key] = self._builder.input(held.name, None)
            self._outer[known] = held
        return known

    def assume(self, held: Outer) -> None:
        """Note that the conversion relies on something outside being what it was."""
        self._assumed[held.key] = held

    @contextmanager
    def entering(self, source: Source, refuse: Callable[[], Refused]) -> Generator[None]:
        """Mark a helper function as being converted, to see one that calls itself."""
        if any(source.function is other.function for other in self._open):
            raise refuse()
        self._open.append(source)
        try:
            yield
        finally:
            self._open.pop()


def _named(source: Source, node: ast.expr) -> Any:
    """Return the object outside that an expression names; None if there is none."""
    if isinstance(node, ast.Attribute):
        return getattr(_named(source, node.value), node.attr, None)
    outer = source.outer(node.id) if isinstance(node, ast.Name) else None
    return None if outer is None else outer.object

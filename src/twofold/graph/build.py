"""Building graphs: the one mutable stage of a graph's life.

A builder hands out values with fresh names and collects nodes; `finish` freezes them. `GraphBuilder.finish`
verifies the whole graph, so that a malformed one never leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .ir import Ambient, Argument, Graph, MalformedGraphError, Node, Origin, SubGraph, TensorSpec, Value
from .verify import verify

Spec: TypeAlias = TensorSpec | None


class Names:
    """Hands out names that are unique in one graph: the one asked for, with a number if it is taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next = 0

    def fresh(self, wanted: str | None = None) -> str:
        """Return a name that was never returned before."""
        name = wanted
        while name is None or name in self._taken:
            name = str(self._next) if wanted is None else f"{wanted}_{self._next}"
            self._next += 1
        self._taken.add(name)
        return name


@dataclass(frozen=True, slots=True)
class Declaration:
    """A SubGraph's signature, known before its body."""

    inputs: tuple[Value, ...]
    outputs: tuple[Spec, ...]


class SubGraphBuilder:
    """Collects the nodes of one body. Made by `GraphBuilder.declare` or by `body`."""

    def __init__(
        self, name: str, names: Names, declarations: dict[str, Declaration], inputs: Sequence[Value] = ()
    ) -> None:
        self.name = name
        self._names = names
        self._declarations = declarations
        self._inputs = list(inputs)
        self._nodes: list[Node] = []

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The inputs so far."""
        return tuple(self._inputs)

    def input(self, name: str | None, spec: Spec) -> Value:
        """Add an input. The name gets a number if another value of the graph has it."""
        value = Value(self._names.fresh(name), spec)
        self._inputs.append(value)
        return value

    def node(
        self,
        op: str,
        target: Callable[..., Any] | str | None = None,
        arguments: Sequence[Argument] = (),
        keywords: Mapping[str, Argument] | None = None,
        results: Sequence[Spec] = (),
        subgraphs: Sequence[SubGraph] = (),
        origin: Origin | None = None,
        ambient: Ambient = Ambient(),  # noqa: B008 - immutable
        names: Sequence[str] = (),
    ) -> tuple[Value, ...]:
        """Append a node and return its results, which take their names from `names` as far as it goes."""
        wanted = [*names, *[None] * (len(results) - len(names))]
        values = tuple(Value(self._names.fresh(n), spec) for n, spec in zip(wanted, results, strict=True))
        pairs = tuple((keywords or {}).items())
        self._nodes.append(Node(op, target, tuple(arguments), pairs, values, tuple(subgraphs), origin, ambient))
        return values

    def call(
        self,
        target: Callable[..., Any],
        *arguments: Argument,
        result: Spec | Sequence[Spec] = (),
        origin: Origin | None = None,
        ambient: Ambient = Ambient(),  # noqa: B008 - immutable
        **keywords: Argument,
    ) -> Any:
        """Append a `call`. Return one value if `result` is one spec (or None: a Python object), else a tuple.

        A call whose own keywords are named like parameters of this method is built with `node`.
        """
        single = result is None or isinstance(result, TensorSpec)
        results: Sequence[Spec] = (result,) if result is None or isinstance(result, TensorSpec) else result
        values = self.node("call", target, arguments, keywords, results, origin=origin, ambient=ambient)
        return values[0] if single else values

    def invoke(
        self,
        name: str,
        *arguments: Argument,
        origin: Origin | None = None,
        ambient: Ambient = Ambient(),  # noqa: B008
    ) -> tuple[Value, ...]:
        """Append an invocation of a declared SubGraph; the results have the specs of its declared outputs."""
        outputs = self._declared(name).outputs
        return self.node("invoke", name, arguments, results=outputs, origin=origin, ambient=ambient)

    def body(self, name: str) -> SubGraphBuilder:
        """Return a builder for a nested body, which may read the values made so far here."""
        return SubGraphBuilder(name, self._names, self._declarations)

    def mark(self) -> int:
        """Return a mark to `rewind` to."""
        return len(self._nodes)

    def rewind(self, mark: int) -> None:
        """Drop the nodes appended since the mark: an attempt that did not work out."""
        del self._nodes[mark:]

    def finish(self, outputs: Sequence[Argument]) -> SubGraph:
        """Freeze the body."""
        return SubGraph(self.name, tuple(self._inputs), tuple(self._nodes), tuple(outputs))

    def _declared(self, name: str) -> Declaration:
        if name not in self._declarations:
            raise MalformedGraphError(f"invoke {name}: expected a declared SubGraph of that name")
        return self._declarations[name]


class NamedSubGraphBuilder(SubGraphBuilder):
    """Builds the body of a declared SubGraph; `finish` puts it into the graph's table."""

    def __init__(
        self,
        name: str,
        names: Names,
        declarations: dict[str, Declaration],
        table: dict[str, SubGraph | None],
    ) -> None:
        super().__init__(name, names, declarations, declarations[name].inputs)
        self._table = table

    def finish(self, outputs: Sequence[Argument]) -> SubGraph:
        """Freeze the body and enter it into the table of the graph being built."""
        declared = self._declared(self.name).outputs
        if len(outputs) != len(declared):
            raise MalformedGraphError(
                f"SubGraph {self.name}: expected the {len(declared)} declared outputs, got {len(outputs)}"
            )
        body = super().finish(outputs)
        self._table[self.name] = body
        return body


class GraphBuilder(SubGraphBuilder):
    """Builds one graph, the SubGraphs of its table included."""

    def __init__(self, name: str) -> None:
        super().__init__(name, Names(), {})
        self._table: dict[str, SubGraph | None] = {}

    def declare(
        self, name: str, inputs: Sequence[Spec] | Mapping[str, Spec], outputs: Sequence[Spec]
    ) -> NamedSubGraphBuilder:
        """Declare a SubGraph, so that every body can invoke it, its own too; return its builder."""
        if name in self._declarations:
            raise MalformedGraphError(f"SubGraph {name}: declared twice")
        named = inputs.items() if isinstance(inputs, Mapping) else [(None, spec) for spec in inputs]
        values = tuple(Value(self._names.fresh(wanted), spec) for wanted, spec in named)
        self._declarations[name] = Declaration(values, tuple(outputs))
        self._table[name] = None
        return NamedSubGraphBuilder(name, self._names, self._declarations, self._table)

    def finish(self, outputs: Sequence[Argument]) -> Graph:
        """Freeze and verify the graph. Raises `MalformedGraphError`."""
        table: dict[str, SubGraph] = {}
        for name, body in self._table.items():
            if body is None:
                raise MalformedGraphError(f"SubGraph {name}: declared but never finished")
            table[name] = body
        graph = Graph(self.name, tuple(self._inputs), tuple(self._nodes), tuple(outputs), table)
        verify(graph)
        return graph

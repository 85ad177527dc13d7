"""SubGraphs built by hand: declared by their specs, defined by a function, invoked anywhere, their own body included.

::

    total = DeclaredSubGraph("total", inputs=["i64[]"], outputs=["f32[]"])

    @total.define
    def body(node):
        return if_(left[node] < 0, lambda: values[node], lambda: total(left[node]) + total(right[node]))

    total(torch.tensor(0)).backward()        # reaches `values`

After Jeong et al., "Improving the Expressivity of Deep Learning Frameworks with Recursion" (EuroSys 2018): the
declaration comes first, so that a body may invoke what is not defined yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from twofold.capture.intercept import user_origin
from twofold.errors import DeclarationError
from twofold.graph import Ambient, Graph, GraphBuilder, GraphSyntaxError, TensorSpec, ambient_context, interpret
from twofold.graph.autodiff import Derivative, differentiate
from twofold.graph.build import NamedSubGraphBuilder
from twofold.graph.parse import parse_spec

from .symbolic import Tracer, tensors


class DeclaredSubGraph:
    """A function on tensors as a SubGraph of its own, which may be recursive.

    `inputs` and `outputs` are specs, as `TensorSpec` or as graphs print them: `f32[8,?]` is a float32 tensor
    of two dimensions, of which the second is unknown. `define` gives the body. Calling it within a body
    appends an `invoke`; calling it with tensors runs it, differentiably. It returns one tensor, or a tuple if
    more outputs are declared.

    Tensors that the body uses without being given them (parameters, tables) are outer references: they are found
    when the graph is built, at the first call, and receive gradients. Nothing that the body does on Python
    objects is repeated after that. Raises `DeclarationError`.
    """

    def __init__(self, name: str, *, inputs: Sequence[str | TensorSpec], outputs: Sequence[str | TensorSpec]) -> None:
        self.name = name
        self.inputs = tuple(_read_spec(spec, f"{name}: input {place}") for place, spec in enumerate(inputs))
        self.outputs = tuple(_read_spec(spec, f"{name}: output {place}") for place, spec in enumerate(outputs))
        if not self.outputs or not name or any(character in name for character in " (\n"):
            raise DeclarationError(f"SubGraph {name!r}: expected a name without spaces and parentheses, and an output")
        self._function: Callable[..., Any] | None = None
        self._built: _Built | None = None

    def define(self, function: Callable[..., Any]) -> DeclaredSubGraph:
        """Take the function that computes the outputs, a tensor each, from as many symbolic tensors as inputs."""
        if self._function is not None:
            raise DeclarationError(f"SubGraph {self.name}: defined twice, by {self._function!r} and by {function!r}")
        self._function = function
        return self

    @property
    def graph(self) -> Graph:
        """The graph of one call; `show` prints it. Its inputs are those declared, then the outer references."""
        return self._build().graph

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Invoke it in the body that is being built, or run it on tensors."""
        tracer = Tracer.active()
        if isinstance(tracer, _Building):
            outputs = self._invoke(tracer, arguments)
        else:
            specs = [TensorSpec.of(each) for each in tensors(arguments, f"{self.name}: argument")]
            _check(specs, self.inputs, f"{self.name}: argument")
            outputs = self._build().run(arguments)
        return outputs[0] if len(self.outputs) == 1 else tuple(outputs)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"DeclaredSubGraph({self.name}: ({inputs}) -> ({outputs}))"

    def _invoke(self, building: _Building, arguments: Sequence[Any]) -> Sequence[torch.Tensor]:
        values = [building.value_of(each) for each in tensors(arguments, f"{self.name}: argument")]
        _check([value.spec for value in values], self.inputs, f"{self.name}: argument")
        results = building.body.invoke(building.declare(self), *values, origin=user_origin())
        return [building.symbol(value) for value in results]

    def _build(self) -> _Built:
        if self._built is None:
            self._built = _Building(GraphBuilder(self.name)).finish(self)
        return self._built

    def trace(self, building: Tracer, builder: NamedSubGraphBuilder) -> None:
        """Run the function on symbolic tensors; what it does becomes the body that `builder` builds."""
        if self._function is None:
            raise DeclarationError(
                f"SubGraph {self.name}: declared and invoked, but its body was never defined; give it one with"
                " its method define"
            )
        with building.building(builder):
            returned = self._function(*map(building.symbol, builder.inputs))
            results = returned if isinstance(returned, tuple | list) else [returned]
            values = [building.value_of(each) for each in tensors(results, f"{self.name}: result")]
        _check([value.spec for value in values], self.outputs, f"{self.name}: result")
        builder.finish(values)


class _Building(Tracer):
    """The graph of one declared SubGraph, with all that it invokes."""

    def __init__(self, root: GraphBuilder) -> None:
        super().__init__(root)
        self._declared: list[tuple[DeclaredSubGraph, NamedSubGraphBuilder]] = []

    def declare(self, subgraph: DeclaredSubGraph) -> str:
        """Return the name under which the graph holds a SubGraph, whose body is traced later."""
        known = [other for other, _ in self._declared if other.name == subgraph.name]
        if not known:
            builder = self.root.declare(subgraph.name, subgraph.inputs, subgraph.outputs)
            self._declared.append((subgraph, builder))
        elif known[0] is not subgraph:
            raise DeclarationError(f"SubGraph {subgraph.name}: two of that name are invoked in one graph")
        return subgraph.name

    def finish(self, subgraph: DeclaredSubGraph) -> _Built:
        """Trace all bodies under the default modes, which the bodies may change, and close the graph."""
        inputs = [self.root.input(None, spec) for spec in subgraph.inputs]
        results = self.root.invoke(self.declare(subgraph), *inputs)
        with ambient_context(Ambient()):
            for each, builder in self._declared:  # grows meanwhile
                each.trace(self, builder)
        captured = [tensor for tensor, _ in self.captured.values()]
        return _Built(self.root.finish(results), captured)


@dataclass
class _Built:
    """A graph, the tensors that it reads beside its arguments, and its derivatives by what requires gradients."""

    graph: Graph
    captured: list[torch.Tensor]
    derivatives: dict[tuple[int, ...], Derivative] = field(default_factory=dict[tuple[int, ...], Derivative])

    def run(self, arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run the graph; keep residuals only if something requires gradients."""
        given = [*arguments, *self.captured]
        wanted = tuple(place for place, tensor in enumerate(given) if tensor.requires_grad)
        if not (wanted and torch.is_grad_enabled()):
            return interpret(self.graph, [tensor.detach() for tensor in given]).outputs
        if wanted not in self.derivatives:
            self.derivatives[wanted] = differentiate(self.graph, wanted)
        outputs: Any = _Differentiated.apply(self.derivatives[wanted], *given)
        return outputs


class _Differentiated(torch.autograd.Function):
    """A run of the forward graph, to autograd; backward is a run of the backward graph on its residuals."""

    @staticmethod
    def forward(ctx: Any, derivative: Derivative, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *outputs, ctx.residuals = interpret(derivative.forward, inputs).outputs
        ctx.derivative, ctx.places = derivative, len(inputs)
        continuous = {id(outputs[place]) for place in derivative.outputs}
        ctx.mark_non_differentiable(*(output for output in outputs if id(output) not in continuous))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        derivative: Derivative = ctx.derivative
        given = [gradients[place] for place in derivative.outputs]
        found = interpret(derivative.backward, [ctx.residuals, *given]).outputs
        by_place = dict(zip(derivative.inputs, found, strict=True))
        return None, *(by_place.get(place) for place in range(ctx.places))


def _read_spec(spec: str | TensorSpec, where: str) -> TensorSpec:
    try:
        read = parse_spec(spec) if isinstance(spec, str) else spec
    except (GraphSyntaxError, RuntimeError) as error:
        raise DeclarationError(f"SubGraph {where}: {error}") from None
    if not isinstance(read, TensorSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DeclarationError(f"SubGraph {where}: expected the spec of a tensor, like f32[8,?], got {spec!r}")
    return read


def _check(got: Sequence[TensorSpec | None], declared: Sequence[TensorSpec], where: str) -> None:
    """Raise unless these specs are among those that the declared ones allow."""
    if len(got) != len(declared):
        raise DeclarationError(f"SubGraph {where}s: expected {len(declared)} as declared, got {len(got)}")
    for place, (spec, expected) in enumerate(zip(got, declared, strict=True)):
        if spec is None or not _allows(expected, spec):
            raise DeclarationError(f"SubGraph {where} {place}: expected {expected} as declared, got {spec}")


def _allows(expected: TensorSpec, spec: TensorSpec) -> bool:
    sizes = zip(expected.shape, spec.shape, strict=False)
    return expected.agrees_with(spec) and all(size is None or size == other for size, other in sizes)

"""Which values of a graph may carry a gradient, to a fixed point over loops and recursion.

A tensor carries one if it is of a floating or complex type and is computed, with gradients enabled, from a
value that does. An object carries one if it is computed from such a value: it may hold tensors (`torch.max`
as an object) or not (a shape); where it matters, running tells. The answer errs towards yes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

from .ir import Argument, Graph, Node, SubGraph, TensorSpec, Value, all_nodes, outer_references, values_in
from .ops import CONTROL_FLOW


def continuous(spec: TensorSpec | None) -> bool:
    """Say whether tensors of that spec have derivatives; objects have none of their own."""
    return spec is not None and (spec.dtype.is_floating_point or spec.dtype.is_complex)


class Activity:
    """The activity of one graph, given the inputs that are differentiated."""

    def __init__(self, graph: Graph, sources: Iterable[Value]) -> None:
        self.graph = graph
        self._active = set(sources)
        known = -1
        while known != len(self._active):
            known = len(self._active)
            for body in (graph, *graph.subgraphs.values()):
                self._propagate(body)
        self._reads: dict[str, tuple[Value, ...]] = dict.fromkeys(graph.subgraphs, ())
        before = None
        while before != self._reads:
            before = dict(self._reads)
            self._reads = {name: self.reads(body) for name, body in graph.subgraphs.items()}

    def carries(self, argument: Argument) -> bool:
        """Say whether an argument is, or contains, a value that may carry a gradient."""
        return any(value in self._active for value in values_in(argument))

    def differentiable(self, argument: Argument) -> TypeGuard[Value]:
        """Say whether an argument is a tensor that may carry a gradient."""
        return isinstance(argument, Value) and argument.spec is not None and argument in self._active

    def reads(self, *bodies: SubGraph) -> tuple[Value, ...]:
        """Return the differentiable tensors that bodies read from outside, in SubGraphs that they invoke too."""
        found = dict.fromkeys(value for value in outer_references(*bodies) if self.differentiable(value))
        for body in bodies:
            for node in all_nodes(body):
                if node.op == "invoke":
                    found.update(dict.fromkeys(self.reads_of(str(node.target))))
        return tuple(found)

    def reads_of(self, name: str) -> tuple[Value, ...]:
        """Return the differentiable inputs of the graph that an invocation of a SubGraph reads."""
        return self._reads[name]

    def _propagate(self, body: SubGraph) -> None:
        for node in body.nodes:
            for nested in node.subgraphs:
                self._propagate(nested)
            if node.op in CONTROL_FLOW:
                for source, target in self._flows(node):
                    self._mark(target, self.carries(source))
            elif node.ambient.grad and not node.ambient.inference:
                carried = any(value in self._active for value in node.operands)
                for result in node.results:
                    self._mark(result, carried)

    def _mark(self, value: Value, carried: bool) -> None:
        if carried and (value.spec is None or continuous(value.spec)):
            self._active.add(value)

    def _flows(self, node: Node) -> Iterator[tuple[Argument, Value]]:
        """Yield each way that a value takes in or out of the bodies of a control-flow node."""
        match node.op:
            case "if" | "switch":
                for body in node.subgraphs:
                    yield from zip(node.arguments[1:], body.inputs, strict=True)
                    yield from zip(body.outputs, node.results, strict=True)
            case "invoke":
                body = self.graph.subgraphs[str(node.target)]
                yield from zip(node.arguments, body.inputs, strict=True)
                yield from zip(body.outputs, node.results, strict=True)
            case _:
                body = node.subgraphs[-1]
                index = 1 if node.op == "loop" else 0
                receivers = [body.inputs[index:], node.results, *(each.inputs for each in node.subgraphs[:-1])]
                for receiver in receivers:
                    yield from zip(node.arguments[index:], receiver, strict=True)
                    yield from zip(body.outputs, receiver, strict=True)

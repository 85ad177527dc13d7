"""Automatic differentiation: from a graph to the graphs of its values and gradients.

Straight-line regions are differentiated by PyTorch (`autodiff_calls`), control flow and recursion by rules on the
graph (`autodiff_rules`). A SubGraph `f` that carries gradients becomes two: `f.forward`, which returns what `f`
returns and the residuals of that invocation, and `f.backward`, which takes the residuals with the gradients of
the outputs, and returns those of the inputs and of the graph's inputs that `f` reads. Both are declared
before any is built, so that the gradient of a recursive SubGraph invokes itself. Gradients of what many invocations
read are summed over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from twofold.errors import DifferentiationError

from .autodiff_activity import Activity, continuous
from .autodiff_calls import Residuals, constant
from .autodiff_rules import Body, Known, copy_body, enter, gradient_spec, spec_of
from .build import GraphBuilder, SubGraphBuilder
from .effects import has_effect
from .ir import Argument, Graph, Node, SubGraph, TensorSpec, Value, all_nodes
from .ops import CONTROL_FLOW
from .passes import eliminate_dead_code
from .verify import describe, verify

_DRAWS = (
    torch.nn.functional.dropout,
    torch.nn.functional.multi_head_attention_forward,
    torch.nn.functional.scaled_dot_product_attention,
    torch.bernoulli,
    torch.gru,
    torch.lstm,
    torch.normal,
    torch.rand,
    torch.rand_like,
    torch.randn,
    torch.randn_like,
)
"""Functions that may draw random numbers and write to nothing, unless asked to by `out` or `inplace`."""


@dataclass(frozen=True, slots=True)
class Derivative:
    """A graph's derivative, in one piece and in two.

    ==========  ==============================================  ===============================================
    graph       inputs                                          outputs
    ==========  ==============================================  ===============================================
    joint       the graph's, gradients of `outputs`             the graph's, gradients of `inputs`
    forward     the graph's                                     the graph's, residuals (one object)
    backward    residuals, gradients of `outputs`               gradients of `inputs`
    ==========  ==============================================  ===============================================

    `inputs` and `outputs` are positions. The outputs carry no autograd history. The other inputs are constants,
    whether they require gradients or not. `backward` may run more than once on the same residuals.
    """

    joint: Graph
    forward: Graph
    backward: Graph
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def differentiate(
    graph: Graph, inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None
) -> Derivative:
    """Differentiate outputs of a graph by inputs, both by position; by default all that are floating or complex.

    Raises `DifferentiationError` for what writes or has an unknown effect, for positions that have no
    derivative, and for differentiated tensors that enter or leave a body inside a container.
    """
    _refuse_effects(graph)
    sources = _positions(graph.inputs, inputs, "input")
    wanted = _positions(graph.outputs, outputs, "output")
    by = [graph.inputs[place] for place in sources]
    activity = Activity(graph, by)
    root = GraphBuilder(graph.name)
    forward, backward = root.body(f"{graph.name}.forward"), root.body(f"{graph.name}.backward")
    known: Known = {}
    enter(graph.inputs, forward, known)
    table = _differentiate_table(activity, root, known)
    residuals = backward.input("residuals", None)
    main = Body(activity, forward, backward, residuals, known)
    returned = main.run(graph)
    results = [_cut(old, new, activity, forward) for old, new in zip(graph.outputs, returned, strict=True)]
    pairs = [(output, _gradient_input(backward, output)) for output in (graph.outputs[place] for place in wanted)]
    back = backward.finish(main.differentiate(pairs, by))
    there = forward.finish([*results, residuals])
    there = replace(there, nodes=(*there.nodes, Node("call", Residuals, (main.kept,), (), (residuals,))))
    both = SubGraph(
        f"{graph.name}.gradients",
        (*there.inputs, *back.inputs[1:]),
        (*there.nodes, *back.nodes),
        (*results, *back.outputs),
    )
    return Derivative(_close(both, table), _close(there, table), _close(back, table), sources, wanted)


def _refuse_effects(graph: Graph) -> None:
    for body in (graph, *graph.subgraphs.values()):
        for node in all_nodes(body):
            if node.op not in CONTROL_FLOW | {"fetch", "assert"} and has_effect(node) and not _only_draws(node):
                raise DifferentiationError(
                    f"{describe(node)}: expected an operation that neither writes nor has an unknown effect in a"
                    " graph that is differentiated; compute a new tensor in place of writing to one"
                )


def _only_draws(node: Node) -> bool:
    """Say whether the only effect is on the random state: the forward graph runs it once, as the graph does."""
    keywords = dict(node.keywords)
    inplace = node.arguments[3:] if node.target is torch.nn.functional.dropout else ()
    writes = keywords.get("out") is not None or keywords.get("inplace", False) is not False or inplace
    return not writes and any(node.target is draw for draw in _DRAWS)


def _positions(arguments: Sequence[Argument], asked: Sequence[int] | None, kind: str) -> tuple[int, ...]:
    possible = [place for place, argument in enumerate(arguments) if continuous(spec_of(argument))]
    for place in asked or ():
        if place not in possible:
            raise DifferentiationError(
                f"{kind} {place}: expected the position of a floating or complex tensor, one of {possible}"
            )
    return tuple(possible if asked is None else asked)


def _differentiate_table(activity: Activity, root: GraphBuilder, known: Known) -> dict[str, SubGraph]:
    """Return all SubGraphs as they are and, of those that carry gradients, both directions."""
    subgraphs = activity.graph.subgraphs
    directions = {
        name: (_declare_forward(root, body), _declare_backward(root, body, activity))
        for name, body in subgraphs.items()
        if any(map(activity.carries, body.outputs))
    }
    originals = {
        name: _declare(root, name, body.inputs, map(spec_of, body.outputs)) for name, body in subgraphs.items()
    }
    table: dict[str, SubGraph] = {}
    for name, (forward, backward) in directions.items():
        there, back = _differentiate_body(activity, subgraphs[name], forward, backward, dict(known))
        table |= {there.name: there, back.name: back}
    for name, builder in originals.items():
        inner = known | dict(zip(subgraphs[name].inputs, builder.inputs, strict=True))
        table[name] = copy_body(subgraphs[name], builder, inner, inner.__getitem__)
    return table


def _declare(
    root: GraphBuilder, name: str, inputs: Iterable[Value], outputs: Iterable[TensorSpec | None]
) -> SubGraphBuilder:
    return root.declare(name, {value.name: value.spec for value in inputs}, list(outputs))


def _declare_forward(root: GraphBuilder, body: SubGraph) -> SubGraphBuilder:
    return _declare(root, f"{body.name}.forward", body.inputs, [*map(spec_of, body.outputs), None])


def _declare_backward(root: GraphBuilder, body: SubGraph, activity: Activity) -> SubGraphBuilder:
    given = {
        f"d_{place}": gradient_spec(output)
        for place, output in enumerate(body.outputs)
        if activity.differentiable(output)
    }
    returned = map(gradient_spec, _sources(body, activity))
    return root.declare(f"{body.name}.backward", {"residuals": None} | given, list(returned))


def _sources(body: SubGraph, activity: Activity) -> list[Value]:
    """Return what an invocation of a SubGraph has gradients for."""
    return [*filter(activity.differentiable, body.inputs), *activity.reads_of(body.name)]


def _differentiate_body(
    activity: Activity, body: SubGraph, forward: SubGraphBuilder, backward: SubGraphBuilder, known: Known
) -> tuple[SubGraph, SubGraph]:
    known.update(zip(body.inputs, forward.inputs, strict=True))
    residuals, *cotangents = backward.inputs
    inner = Body(activity, forward, backward, residuals, known)
    outputs = inner.run(body)
    pairs = zip(filter(activity.differentiable, body.outputs), cotangents, strict=True)
    gradients = inner.differentiate(pairs, _sources(body, activity))
    return forward.finish([*outputs, inner.kept]), backward.finish(gradients)


def _gradient_input(backward: SubGraphBuilder, output: Argument) -> Value:
    assert isinstance(output, Value)
    return backward.input(f"d_{output.name}", gradient_spec(output))


def _cut(old: Argument, new: Argument, activity: Activity, builder: SubGraphBuilder) -> Argument:
    """Return an output without the autograd history that it has within the forward graph."""
    if activity.differentiable(old):
        return builder.call(torch.Tensor.detach, new, result=gradient_spec(old))
    if activity.carries(old):
        return builder.call(constant, new, name=getattr(old, "name", ""), result=None)
    return new


def _close(body: SubGraph, table: Mapping[str, SubGraph]) -> Graph:
    """Return a body as a graph of its own, with the SubGraphs that it needs."""
    graph = eliminate_dead_code(Graph(body.name, body.inputs, body.nodes, body.outputs, table))
    verify(graph)
    return graph

"""Derivatives of random graphs, with autograd over the reference interpreter and finite differences as oracles.

The last tests plant faults in the rules and show that the oracle sees each.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofold.graph import (
    Ambient,
    Graph,
    GraphBuilder,
    MalformedGraphError,
    Node,
    SubGraph,
    SubGraphBuilder,
    TensorSpec,
    Value,
    equivalent,
    interpret,
    parse,
    show,
)
from twofold.graph.autodiff import Derivative, differentiate
from twofold.graph.autodiff_activity import Activity

VECTOR = TensorSpec((3,), torch.float64)
INDEX = TensorSpec((), torch.int64)
NO_GRAD = Ambient(grad=False)
SMOOTH: tuple[tuple[Callable[..., Any], int], ...] = (
    (torch.mul, 2),
    (torch.sin, 1),
    (torch.tanh, 1),
    (torch.add, 2),
    (torch.Tensor.contiguous, 1),  # returns its operand
    (torch.flip, 1),
    (torch.detach, 1),
)
KINDS = ("smooth", "smooth", "smooth", "smooth", "object", "split", "index", "no_grad", "shared")
CUTS = ("object", "no_grad", torch.detach)
"""What finite differences see and autograd does not, or not in the same way at a kink."""
CONTROL_FLOW = ("if", "switch", "while", "loop", "invoke", "pair")


class Program:
    """Draws one graph whose bodies make vectors of vectors, read those around them, and recurse.

    Where it `is_smooth`, it means the same to finite differences as to autograd.
    """

    def __init__(self, draw: st.DrawFn, is_smooth: bool) -> None:
        self.draw = draw
        self.kinds = tuple(kind for kind in KINDS if not is_smooth or kind not in CUTS)
        self.smooth = tuple(pair for pair in SMOOTH if not is_smooth or pair[0] not in CUTS)
        self.root = GraphBuilder("program")
        self.inputs = [self.root.input(name, VECTOR) for name in ("x", "y", "w")]
        self.index = self.root.input("i", INDEX)
        self.flag = self.root.input("flag", None)
        builders = [
            self.root.declare("down", {"n": None, "a": VECTOR}, [VECTOR]),
            self.root.declare("pair", {"n": None, "b": VECTOR, "c": VECTOR}, [VECTOR, INDEX, VECTOR]),
        ]
        self.recursion(builders[0], "pair")
        self.mutual(builders[1], "down")
        vectors = list(self.inputs)
        for _ in range(self.draw(st.integers(1, 3))):
            vectors += self.control_flow(self.root, self.pick(CONTROL_FLOW), vectors, depth=2)
        self.run(self.root, vectors, depth=0)
        self.graph = self.root.finish([vectors[-1], self.index, self.pick(vectors[-2:]), self.pick(vectors)])

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def recursion(self, builder: SubGraphBuilder, other: str) -> None:
        """Two invocations of itself, or one of the other, until the count is 0."""
        count, carried = builder.inputs
        positive = builder.call(operator.gt, count, 0, result=None)
        then = builder.body("then")
        less = then.call(operator.sub, count, 1, result=None)
        vectors = [carried, self.pick(self.inputs)]
        self.run(then, vectors, depth=0)
        (left,) = then.invoke("down", less, self.pick(vectors))
        (right,) = then.invoke("down", less, self.pick(vectors))
        vectors += [left, self.curved(then, left, right)]
        if self.draw(st.booleans()):
            vectors.append(then.invoke(other, less, vectors[-1], self.pick(vectors))[self.pick((0, 2))])
        self.run(then, vectors, depth=0)
        other_side = builder.body("else")
        leaf = self.curved(other_side, carried, self.pick(self.inputs))
        bodies = [then.finish([self.pick(vectors[-2:])]), other_side.finish([self.pick((leaf, carried))])]
        builder.finish(builder.node("if", None, [positive], None, [VECTOR], bodies))

    def mutual(self, builder: SubGraphBuilder, other: str) -> None:
        """Two vectors and an integer; the same vector perhaps twice, an input perhaps as it is."""
        count, *vectors = builder.inputs
        vectors += builder.invoke(other, self.pick((count, 0)), self.pick(vectors))
        self.run(builder, vectors, depth=0)
        builder.finish([self.pick(vectors), self.index, self.pick(vectors)])

    def run(self, builder: SubGraphBuilder, vectors: list[Value], depth: int) -> None:
        kinds = self.kinds + (CONTROL_FLOW * 2 if depth else ())
        for _ in range(self.draw(st.integers(1, 4))):
            kind = self.pick(kinds)
            if kind in CONTROL_FLOW:
                vectors += self.control_flow(builder, kind, vectors, depth)
            else:
                vectors += self.straight(builder, kind, vectors)

    def straight(self, builder: SubGraphBuilder, kind: str, vectors: list[Value]) -> tuple[Value, ...]:
        vector = self.pick(vectors)
        match kind:
            case "object":
                whole = builder.call(torch.max, vector, 0, keepdim=True, result=None)
                (largest,) = builder.node("get_item", None, [whole, 0], None, [TensorSpec((1,), torch.float64)])
                return (builder.call(torch.Tensor.expand_as, largest, vector, result=VECTOR),)
            case "split":
                parts = [TensorSpec((size,), torch.float64) for size in (1, 2)]
                one, two = builder.node("call", torch.split, [vector, [1, 2]], None, parts)
                return builder.node("call", torch.cat, [[two, one]], None, [VECTOR])
            case "index":
                item = builder.call(torch.Tensor.__getitem__, vector, self.index, result=TensorSpec((), torch.float64))
                return (builder.call(torch.mul, item, self.pick(vectors), result=VECTOR),)
            case "no_grad":
                return builder.node("call", torch.cos, [vector], None, [VECTOR], ambient=NO_GRAD)
            case "shared":
                return (builder.call(torch.mul, vector, vector, result=VECTOR),)
            case _:
                target, arity = self.pick(self.smooth)
                operands = [vector, self.pick(vectors), (0,)]
                used = [vector, (0,)] if target is torch.flip else operands[:arity]
                return builder.node("call", target, used, None, [VECTOR])

    def curved(self, builder: SubGraphBuilder, one: Value, two: Value) -> Value:
        """Return a vector that depends on both, and whose gradient depends on both."""
        wave = builder.call(torch.sin, one, result=VECTOR)
        return builder.call(torch.mul, wave, builder.call(torch.tanh, two, result=VECTOR), result=VECTOR)

    def body(self, builder: SubGraphBuilder, name: str, indexed: bool, outer: list[Value], depth: int) -> SubGraph:
        inner = builder.body(name)
        if indexed:
            inner.input(None, None)
        carried = [inner.input(None, VECTOR), inner.input(None, VECTOR)]
        vectors = [*outer, *carried]
        self.run(inner, vectors, depth - 1)
        return inner.finish([self.curved(inner, carried[0], vectors[-1]), self.pick(vectors)])

    def control_flow(self, builder: SubGraphBuilder, kind: str, vectors: list[Value], depth: int) -> tuple[Value, ...]:
        start = [self.pick(vectors), self.pick(vectors)]
        if kind == "invoke":
            return builder.invoke("down", self.pick((2, 0)), start[0])
        if kind == "pair":
            first, _, second = builder.invoke("pair", self.pick((1, 0)), *start)
            return first, second
        if kind == "while":
            return self.while_(builder, start, vectors, depth)
        names = {"if": ("then", "else"), "switch": ("one", "two", "three"), "loop": ("body",)}[kind]
        subgraphs = [self.body(builder, name, kind == "loop", vectors, depth) for name in names]
        first = {"if": self.flag, "switch": self.pick((0, 2)), "loop": self.pick((3, 0))}[kind]
        return builder.node(kind, None, [first, *start], None, [VECTOR, VECTOR], subgraphs)

    def while_(
        self, builder: SubGraphBuilder, start: list[Value], vectors: list[Value], depth: int
    ) -> tuple[Value, ...]:
        condition, body = builder.body("condition"), builder.body("body")
        count, *_ = [condition.input(None, spec) for spec in (None, VECTOR, VECTOR)]
        limit = self.pick((0, 2))
        again = condition.finish([condition.call(operator.lt, count, limit, result=None)])
        count, *carried = [body.input(None, spec) for spec in (None, VECTOR, VECTOR)]
        inner = [*vectors, *carried]
        self.run(body, inner, depth - 1)
        more = body.call(operator.add, count, 1, result=None)
        bodies = [again, body.finish([more, self.curved(body, carried[0], inner[-1]), self.pick(inner)])]
        return builder.node("while", None, [0, *start], None, [None, VECTOR, VECTOR], bodies)[1:]


@st.composite
def graphs(draw: st.DrawFn, is_smooth: bool = False) -> Graph:
    return Program(draw, is_smooth).graph


def inputs(flag: bool) -> list[Any]:
    x, y, w = torch.tensor([[0.5, -1.0, 0.25], [1.5, 0.75, -0.5], [-0.3, 0.9, 1.1]], dtype=torch.float64)
    return [x, y, w, torch.tensor(1), flag]


GIVEN = tuple(torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64) * scale for scale in (1.0, 0.7, -1.3))


def by_autograd(graph: Graph, wanted: tuple[int, ...], flag: bool) -> list[Tensor]:
    """The gradients of inputs by PyTorch, from the nodes as the interpreter runs them."""
    values = [thing.clone().requires_grad_() if place in wanted else thing for place, thing in enumerate(inputs(flag))]
    first, _, second, third = interpret(graph, values).outputs
    pairs = [(out, cot) for out, cot in zip((first, second, third), GIVEN, strict=True) if out.requires_grad]
    sources = [values[place] for place in wanted]
    if not pairs:
        return [torch.zeros_like(source) for source in sources]
    outs, cots = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, sources, cots, allow_unused=True, materialize_grads=True))


def agree(graph: Graph, derivative: Derivative) -> bool:
    """Say whether values are those of the graph, bit for bit, and gradients those of autograd."""
    for flag in (True, False):
        expected = by_autograd(graph, derivative.inputs, flag)
        values = interpret(graph, inputs(flag)).outputs
        *outputs, residuals = interpret(derivative.forward, inputs(flag)).outputs
        apart = interpret(derivative.backward, [residuals, *GIVEN]).outputs
        joint = interpret(derivative.joint, [*inputs(flag), *GIVEN]).outputs
        if any(out.requires_grad for out in (*joint, *outputs)):
            return False
        if not all(map(torch.equal, values, outputs)) or not all(map(torch.equal, values, joint)):
            return False
        for found in (apart, joint[len(values) :]):
            if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found, expected, strict=True)):
                return False
    return True


QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SOURCES = st.sampled_from([(0, 1, 2), (0,), (2,), (1, 2)])


@QUICK
@given(graphs(), SOURCES)
def test_gradients_are_those_of_autograd(graph: Graph, sources: tuple[int, ...]):
    assert agree(graph, differentiate(graph, sources))


@settings(QUICK, max_examples=40)
@given(graphs())
def test_text_round_trip(graph: Graph):
    derivative = differentiate(graph)
    for each in (derivative.joint, derivative.forward, derivative.backward):
        again = parse(show(each))
        assert equivalent(again, each)
        assert show(again) == show(each)


def slopes_agree(graph: Graph, joint: Graph, flag: bool) -> bool:
    """Say whether the gradients are the slopes of central differences, one for each number of each input."""

    def total(*vectors: Tensor) -> Tensor:
        first, _, second, third = interpret(graph, [*vectors, *inputs(flag)[3:]]).outputs
        return sum((out @ cot for out, cot in zip((first, second, third), GIVEN, strict=True)), torch.tensor(0.0))

    found = interpret(joint, [*inputs(flag), *GIVEN]).outputs[4:]
    step = 1e-6
    vectors = inputs(flag)[:3]
    for place, gradient in enumerate(found):
        for axis in range(3):
            shift = torch.zeros(3, dtype=torch.float64)
            shift[axis] = step
            up, down = (
                total(*[vector + sign * shift if at == place else vector for at, vector in enumerate(vectors)])
                for sign in (1, -1)
            )
            slope = (up - down) / (2 * step)
            if not torch.isclose(slope, gradient[axis], rtol=1e-4, atol=1e-4 * (1 + up.abs().item())):
                return False
    return True


@settings(QUICK, max_examples=30)
@given(graphs(is_smooth=True), st.booleans())
def test_gradients_are_those_of_finite_differences(graph: Graph, flag: bool):
    assert slopes_agree(graph, differentiate(graph).joint, flag)


def test_finite_differences_see_a_planted_fault():
    find(
        graphs(is_smooth=True),
        lambda graph: not slopes_agree(graph, changed(differentiate(graph).joint, drop_accumulation), True),
        settings=SEARCH,
    )


def swap_branches(node: Node, earlier: Sequence[Node]) -> Node:
    return replace(node, subgraphs=node.subgraphs[::-1]) if node.op == "if" else node


def confuse_invocations(node: Node, earlier: Sequence[Node]) -> Node:
    for other in earlier:
        if node.op == "invoke" and other.target == node.target:
            return replace(node, arguments=(other.arguments[0], *node.arguments[1:]))
    return node


def drop_accumulation(node: Node, earlier: Sequence[Node]) -> Node:
    return replace(node, keywords=(("alpha", 0),)) if node.target is torch.add else node


def repeat_iteration(node: Node, earlier: Sequence[Node]) -> Node:
    if node.op != "loop":
        return node
    (body,) = node.subgraphs
    return replace(node, subgraphs=(replace(body, outputs=(body.inputs[1], *body.outputs[1:])),))


Change = Callable[[Node, Sequence[Node]], Node]
PLANTED: tuple[Change, ...] = (swap_branches, confuse_invocations, drop_accumulation, repeat_iteration)


def changed(body: Any, change: Change) -> Any:
    """Return a backward graph, or one of its bodies, with a fault in its own nodes, which are all without grad."""
    nodes: list[Node] = []
    for node in body.nodes:
        inner = replace(node, subgraphs=tuple(changed(nested, change) for nested in node.subgraphs))
        nodes.append(change(inner, nodes) if node.ambient == NO_GRAD else inner)
    result = replace(body, nodes=tuple(nodes))
    if isinstance(body, Graph):
        table = {name: changed(each, change) for name, each in body.subgraphs.items()}
        return replace(result, subgraphs=table)
    return result


def is_seen(graph: Graph, derivative: Derivative) -> bool:
    """Say whether the oracle sees wrong numbers; a fault that makes running fail is no test of it."""
    try:
        return not agree(graph, derivative)
    except (RuntimeError, IndexError, TypeError, MalformedGraphError):
        return False


SEARCH = settings(QUICK, max_examples=1_000, phases=[Phase.generate])


@pytest.mark.parametrize("change", PLANTED, ids=lambda change: change.__name__)
def test_the_oracle_sees_a_planted_fault(change: Change):
    def wrong(graph: Graph) -> bool:
        derivative = differentiate(graph)
        faulty = replace(derivative, backward=changed(derivative.backward, change))
        return is_seen(graph, faulty)

    find(graphs(), wrong, settings=SEARCH)


def test_the_oracle_sees_what_is_read_from_outside_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Activity, "reads", lambda *_: ())
    find(graphs(), lambda graph: is_seen(graph, differentiate(graph)), settings=SEARCH)

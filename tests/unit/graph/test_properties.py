"""Properties of random graphs: text round trips, and passes that nobody can tell from the outside.

The last tests turn the same oracle on passes that are broken on purpose.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from twofold.graph import (
    Ambient,
    AssertionFailed,
    Graph,
    GraphBuilder,
    Node,
    Origin,
    Outcome,
    SubGraph,
    SubGraphBuilder,
    TensorSpec,
    Value,
    eliminate_common_subexpressions,
    equivalent,
    interpret,
    map_values,
    optimize,
    parse,
    show,
)

VECTOR = TensorSpec((2,), torch.float32)
FLAG = TensorSpec((), torch.bool)
AMBIENTS = (Ambient(), Ambient(grad=False), Ambient(autocast=(("cpu", torch.bfloat16),)))
ORIGINS = (None, Origin("train.py", 3), Origin("a b/model.py", 1_000, "Model.forward"))
PURE: tuple[tuple[Callable[..., Any], int], ...] = (
    (torch.add, 2),
    (torch.mul, 2),
    (torch.sin, 1),
    (torch.Tensor.exp, 1),
    (torch.Tensor.view_as, 2),
    (torch.ops.aten.neg.default, 1),
)
EFFECTFUL: tuple[tuple[Callable[..., Any], int], ...] = (
    (torch.rand_like, 1),
    (torch.Tensor.neg_, 1),
    (torch.Tensor.copy_, 2),
)
WITHOUT_WRITES = ("pure", "pure", "pure", "foreach", "slice", "fetch", "assert", "feed", "read")
STATEMENTS = (*WITHOUT_WRITES, "effectful", "effectful", "write")
CONTROL_FLOW = ("if", "switch", "while", "loop", "invoke")


class Program:
    """Draws one graph. All its bodies make vectors of vectors, so that any value fits in any place."""

    def __init__(self, draw: st.DrawFn, statements: tuple[str, ...]) -> None:
        self.draw = draw
        self.statements = statements
        self.root = GraphBuilder("program")
        vectors = [self.root.input(name, VECTOR) for name in ("x", "y")]
        self.flag = self.root.input("flag", FLAG)
        self.box = self.root.input("box", None)
        self.declare_countdown()
        self.run(self.root, vectors, depth=2)
        self.graph = self.root.finish([self.pick(vectors), {"pair": (self.pick(vectors), 1)}])

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def declare_countdown(self) -> None:
        """A recursive SubGraph: it invokes itself with its count lowered, until that is 0."""
        builder = self.root.declare("countdown", {"n": None, "a": VECTOR}, [VECTOR])
        count, carried = builder.inputs
        positive = builder.call(operator.gt, count, 0, result=None)
        then = builder.body("then")
        less = then.call(operator.sub, count, 1, result=None)
        vectors = [carried]
        self.run(then, vectors, depth=0)
        then.invoke("countdown", less, self.pick(vectors))
        bodies = [then.finish([self.pick(vectors)]), builder.body("else").finish([carried])]
        builder.finish(builder.node("if", None, [positive], None, [VECTOR], bodies))

    def run(self, builder: SubGraphBuilder, vectors: list[Value], depth: int) -> None:
        kinds = self.statements + (CONTROL_FLOW if depth else ())
        for _ in range(self.draw(st.integers(0, 5))):
            kind = self.pick(kinds)
            if kind in CONTROL_FLOW:
                vectors += self.control_flow(builder, kind, vectors, depth)
            else:
                vectors += self.straight(builder, kind, vectors)

    def straight(self, builder: SubGraphBuilder, kind: str, vectors: list[Value]) -> tuple[Value, ...]:
        common = {"origin": self.pick(ORIGINS), "ambient": self.pick(AMBIENTS)}
        vector = self.pick(vectors)
        match kind:
            case "pure" | "effectful":
                target, arity = self.pick(PURE if kind == "pure" else EFFECTFUL)
                operands = [vector, self.pick(vectors)][:arity]
                return builder.node("call", target, operands, results=[VECTOR], **common)
            case "foreach":
                pair = [[vector, self.pick(vectors)], 2.0]
                return builder.node("call", torch._foreach_mul, pair, results=[VECTOR, VECTOR], **common)
            case "slice":
                place = (slice(None), ...)
                return builder.node("call", torch.Tensor.__getitem__, [vector, place], results=[VECTOR], **common)
            case "fetch":
                return builder.node("fetch", None, [vector], {"name": "v"}, **common)
            case "assert":
                return builder.node("assert", None, [self.flag], {"message": "a flag"}, **common)
            case "feed":
                return builder.node("feed", None, [], {"name": "batch"}, [VECTOR], **common)
            case "read":
                return builder.node("get_item", None, [self.box, self.pick((0, 1))], None, [VECTOR], **common)
            case _:
                return builder.node("set_item", None, [self.box, 0, vector], **common)

    def body(self, builder: SubGraphBuilder, name: str, indexed: bool, outer: list[Value], depth: int) -> SubGraph:
        inner = builder.body(name)
        if indexed:
            inner.input(None, None)
        vectors = [*outer, inner.input(None, VECTOR)]
        self.run(inner, vectors, depth - 1)
        return inner.finish([self.pick(vectors)])

    def control_flow(self, builder: SubGraphBuilder, kind: str, vectors: list[Value], depth: int) -> tuple[Value, ...]:
        start = self.pick(vectors)
        if kind == "invoke":
            return builder.invoke("countdown", self.pick((0, 2)), start)
        if kind == "while":
            return self.while_(builder, start, vectors, depth)
        names = {"if": ("then", "else"), "switch": ("one", "two", "three"), "loop": ("body",)}[kind]
        subgraphs = [self.body(builder, name, kind == "loop", vectors, depth) for name in names]
        first = {"if": self.flag, "switch": self.pick((0, 2)), "loop": self.pick((0, 3))}[kind]
        return builder.node(kind, None, [first, start], None, [VECTOR], subgraphs)

    def while_(self, builder: SubGraphBuilder, start: Value, vectors: list[Value], depth: int) -> tuple[Value, ...]:
        condition, body = builder.body("condition"), builder.body("body")
        count, _ = condition.input(None, None), condition.input(None, VECTOR)
        again = condition.finish([condition.call(operator.lt, count, 2, result=None)])
        count, carried = body.input(None, None), body.input(None, VECTOR)
        inner = [*vectors, carried]
        self.run(body, inner, depth - 1)
        more = body.call(operator.add, count, 1, result=None)
        return builder.node(
            "while", None, [0, start], None, [None, VECTOR], [again, body.finish([more, self.pick(inner)])]
        )[1:]


@st.composite
def graphs(draw: st.DrawFn, statements: tuple[str, ...] = STATEMENTS) -> Graph:
    return Program(draw, statements).graph


def observe(graph: Graph, flag: bool) -> Outcome | str:
    """Run the graph on inputs that are the same each time, and return all that can be observed."""
    torch.manual_seed(0)
    x = torch.tensor([0.5, -1.0])
    box = {0: x, 1: torch.tensor([3.0, 4.0])}
    try:
        return interpret(graph, [x, torch.ones(2), torch.tensor(flag), box], read_feed=lambda _: torch.full((2,), 0.25))
    except AssertionFailed as failure:
        return str(failure)


def indistinguishable(a: Graph, b: Graph) -> bool:
    for flag in (True, False):
        left, right = observe(a, flag), observe(b, flag)
        same = left.same_as(right) if isinstance(left, Outcome) and isinstance(right, Outcome) else left == right
        if not same:
            return False
    return True


QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@QUICK
@given(graphs())
def test_text_round_trip(graph: Graph):
    again = parse(show(graph))
    assert equivalent(again, graph)
    assert show(again) == show(graph)


@QUICK
@given(graphs())
def test_a_graph_is_run_alike_each_time(graph: Graph):
    assert indistinguishable(graph, parse(show(graph)))


@QUICK
@given(graphs())
def test_optimize_cannot_be_told_from_outside(graph: Graph):
    optimized = optimize(graph)
    assert indistinguishable(graph, optimized)
    assert equivalent(optimize(optimized), optimized)


@QUICK
@given(graphs(WITHOUT_WRITES))
def test_optimize_of_graphs_without_writes_cannot_be_told_from_outside(graph: Graph):
    assert indistinguishable(graph, optimize(graph))


def test_some_random_graphs_have_common_subexpressions():
    find(
        graphs(WITHOUT_WRITES),
        lambda graph: not equivalent(graph, eliminate_common_subexpressions(graph)),
        settings=settings(QUICK, max_examples=1_000, phases=[Phase.generate]),
    )


def drop(graph: Graph, dropped: Callable[[Node], bool]) -> Graph:
    """A broken pass: drop the nodes, letting readers of an in-place result read its operand instead."""
    instead: dict[Value, Value] = {}

    def body_without(body: SubGraph) -> SubGraph:
        nodes: list[Node] = []
        for node in body.nodes:
            if dropped(node):
                instead.update((result, current(node.operands[0])) for result in node.results)
                continue
            arguments = tuple(rewrite(argument) for argument in node.arguments)
            nodes.append(replace(node, arguments=arguments, subgraphs=tuple(map(body_without, node.subgraphs))))
        return SubGraph(body.name, body.inputs, tuple(nodes), tuple(rewrite(output) for output in body.outputs))

    def current(value: Value) -> Value:
        return instead.get(value, value)

    def rewrite(argument: Any) -> Any:
        return map_values(argument, current)

    table = {name: body_without(body) for name, body in graph.subgraphs.items()}
    main = body_without(graph)
    return Graph(main.name, main.inputs, main.nodes, main.outputs, table)


PLANTED: dict[str, Callable[[Node], bool]] = {
    "assert": lambda node: node.op == "assert",
    "fetch": lambda node: node.op == "fetch",
    "set_item": lambda node: node.op == "set_item",
    "in place": lambda node: node.target in (torch.Tensor.neg_, torch.Tensor.copy_),
    "random": lambda node: node.target is torch.rand_like,
}


@pytest.mark.parametrize("dropped", PLANTED.values(), ids=PLANTED.keys())
def test_the_oracle_sees_a_pass_that_drops_effects(dropped: Callable[[Node], bool]):
    fault = find(
        graphs(),
        lambda graph: not indistinguishable(graph, drop(graph, dropped)),
        settings=settings(QUICK, max_examples=1_000, phases=[Phase.generate]),
    )
    assert not equivalent(fault, drop(fault, dropped))

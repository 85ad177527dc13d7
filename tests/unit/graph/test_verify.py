"""Each rule that `verify` checks, broken once."""

from dataclasses import replace

import pytest
import torch

from twofold.graph import (
    Graph,
    GraphBuilder,
    MalformedGraphError,
    Node,
    SubGraph,
    TensorSpec,
    Value,
    parse,
    verify,
)

VECTOR = TensorSpec((2,), torch.float32)


def graph_of(lines: str, subgraphs: str = "") -> Graph:
    indented = "\n".join(f"  {line}" for line in lines.strip("\n").split("\n"))
    return parse(f"graph g(%x: f32[2], %p: bool[], %n: object):\n{indented}\n{subgraphs}")


BROKEN = {
    "no results": ("%0: f32[2], %1: f32[2] = get_item(%x, 0)\nreturn", "expected 1 results, got 2"),
    "too few arguments": ("fetch()\nreturn", "expected 1 arguments, got 0"),
    "feed without name": ("%0: f32[2] = feed()\nreturn", "expected the keyword name"),
    "unknown keyword": ("fetch(%x, label=1)\nreturn", "expected only the keywords ['name'], each once"),
    "keyword twice": ("call torch.add(%x, other=1, other=2)\nreturn", "each once"),
    "name of an attribute": ("%0: f32[2] = get_attr(%n, 3)\nreturn", "expected an attribute name, got 3"),
    "target of fetch": ("fetch torch.add(%x)\nreturn", "expected a target of kind none"),
    "mixed results": ("%0: f32[2], %1: object = call torch.sort(%x)\nreturn", "or one Python object"),
    "name twice": ("%x: f32[2] = call torch.neg(%x)\nreturn", "new in its scope, got %x again"),
    "predicate": ("assert(%x)\nreturn", "expected a predicate"),
    "bodies of if": ("if(%p):\n  then():\n    return\nreturn", "expected 2 subgraphs, got 1"),
    "outputs of if": (
        "%0: f32[2] = if(%p):\n  then():\n    return\n  else():\n    return %x\nreturn",
        "outputs of then: expected 1, got 0",
    ),
    "branches agree": (
        "%0: f32[2] = if(%p):\n  then():\n    return %x\n  else():\n    return %p\nreturn",
        "outputs of else: expected f32[2] at position 0, got bool[]",
    ),
    "tensor and object": (
        "%0: f32[2] = if(%p):\n  then():\n    return %x\n  else():\n    return 1\nreturn",
        "expected f32[2] at position 0, got object",
    ),
    "inputs of a branch": (
        "switch(%n, %x):\n  one(%a: f32[3]):\n    return\nreturn",
        "inputs of one: expected f32[2] at position 0, got f32[3]",
    ),
    "index of switch": (
        "switch(%x):\n  one():\n    return\nreturn",
        "expected an int or a Python object as the branch",
    ),
    "condition": (
        "%0: f32[2] = while(%x):\n  c(%a: f32[2]):\n    return %a\n  b(%d: f32[2]):\n    return %d\nreturn",
        "expected a condition that yields one bool",
    ),
    "carried": (
        "%0: f32[2] = while(%x):\n  c(%a: f32[2]):\n    return %p\n  b(%d: f32[2]):\n    return %p\nreturn",
        "outputs of b: expected f32[2] at position 0, got bool[]",
    ),
    "index of loop": ("loop(3):\n  b():\n    return\nreturn", "expected a body that takes the index"),
    "trip count": ("loop(%p):\n  b(%i: object):\n    return\nreturn", "as the trip count"),
    "invoke target": ("invoke f(%x)\nreturn", "expected a SubGraph of the table"),
}


@pytest.mark.parametrize(("lines", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_is_named(lines: str, message: str):
    with pytest.raises(MalformedGraphError) as caught:
        graph_of(lines)
    assert message in str(caught.value)


def test_invoke_agrees_with_its_subgraph():
    body = "subgraph f(%a: f32[2]):\n  return %a\n"
    graph_of("%0: f32[2] = invoke f(%x)\nreturn %0", body)
    with pytest.raises(MalformedGraphError, match="arguments: expected 1, got 0"):
        graph_of("%0: f32[2] = invoke f()\nreturn %0", body)
    with pytest.raises(MalformedGraphError, match=r"results: expected f32\[2\] at position 0, got f32\[3\]"):
        graph_of("%0: f32[3] = invoke f(%x)\nreturn %0", body)


def test_unknown_size_agrees_with_any():
    graph_of("%0: f32[?] = if(%p):\n  then():\n    return %x\n  else():\n    return %x\nreturn %0")


def test_message_names_node_and_origin():
    with pytest.raises(MalformedGraphError, match=r"^%0 = get_attr \(train\.py:7\): expected an attribute name"):
        graph_of("%0: f32[2] = get_attr(%n, 3)  # train.py:7\nreturn")


def _call(*arguments: object, result: Value) -> Node:
    return Node("call", torch.neg, arguments, (), (result,))  # type: ignore[arg-type]


X, Y, Z = Value("x", VECTOR), Value("y", VECTOR), Value("z", VECTOR)


def test_use_before_definition():
    nodes = (_call(Y, result=Z), _call(X, result=Y))
    with pytest.raises(MalformedGraphError, match="expected %y to be defined before its use"):
        verify(Graph("g", (X,), nodes, (Z,)))


def test_second_definition():
    with pytest.raises(MalformedGraphError, match="expected a single assignment of %y"):
        verify(Graph("g", (X,), (_call(X, result=Y), _call(X, result=Y)), ()))


def test_value_of_a_body_is_out_of_scope_after_it():
    body = SubGraph("b", (), (_call(X, result=Y),), ())
    node = Node("switch", None, (0,), (), (), (body,))
    with pytest.raises(MalformedGraphError, match="outputs of g: expected %y to be defined"):
        verify(Graph("g", (X,), (node,), (Y,)))


def test_nested_body_reads_outer_values_and_named_subgraph_only_the_inputs():
    body = SubGraph("b", (), (_call(Y, result=Z),), ())
    main = (_call(X, result=Y), Node("switch", None, (0,), (), (), (body,)))
    verify(Graph("g", (X,), main, ()))
    inner = Value("inner", VECTOR)
    verify(Graph("g", (X,), main, (), {"f": SubGraph("f", (), (_call(X, result=inner),), ())}))
    with pytest.raises(MalformedGraphError, match="expected %y to be defined"):
        verify(Graph("g", (X,), main, (), {"f": SubGraph("f", (), (_call(Y, result=inner),), ())}))


def test_same_body_in_two_nodes_assigns_twice():
    body = SubGraph("b", (), (_call(X, result=Y),), ())
    nodes = tuple(Node("switch", None, (0,), (), (), (body,)) for _ in range(2))
    with pytest.raises(MalformedGraphError, match="single assignment"):
        verify(Graph("g", (X,), nodes, ()))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (torch.zeros(1), "expected an argument type, got Tensor"),
        (object(), "wrap it in Constant"),
        ([{1}], "got set"),
        ({X: 1}, "dictionary keys without values"),
    ],
)
def test_argument_of_unknown_type(argument: object, message: str):
    with pytest.raises(MalformedGraphError, match=message):
        verify(Graph("g", (X,), (_call(argument, result=Y),), ()))


def test_unknown_op_and_bad_names():
    with pytest.raises(MalformedGraphError, match="expected one of the ops"):
        verify(Graph("g", (X,), (replace(_call(X, result=Y), op="goto"),), ()))
    with pytest.raises(MalformedGraphError, match="expected a name of letters"):
        verify(Graph("g", (Value("a b", VECTOR),), (), ()))
    with pytest.raises(MalformedGraphError, match="expected a name without spaces"):
        verify(Graph("my graph", (), (), ()))
    with pytest.raises(MalformedGraphError, match="expected the name that it has in the table"):
        verify(Graph("g", (), (), (), {"f": SubGraph("h", (), (), ())}))


def test_builder_gives_fresh_names_and_refuses_what_was_not_declared():
    builder = GraphBuilder("g")
    names = [builder.input("x", VECTOR).name, builder.input("x", VECTOR).name, builder.input(None, None).name]
    assert len(set(names)) == 3
    with pytest.raises(MalformedGraphError, match="expected a declared SubGraph"):
        builder.invoke("f")
    builder.declare("f", {"a": VECTOR}, [VECTOR])
    with pytest.raises(MalformedGraphError, match="declared twice"):
        builder.declare("f", [], [])
    with pytest.raises(MalformedGraphError, match="declared but never finished"):
        builder.finish([])


def test_body_keeps_to_its_declaration():
    builder = GraphBuilder("g")
    with pytest.raises(MalformedGraphError, match="expected the 1 declared outputs, got 0"):
        builder.declare("f", [VECTOR], [VECTOR]).finish([])

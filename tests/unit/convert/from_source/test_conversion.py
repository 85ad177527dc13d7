"""Conversion of recursive functions: source in, SubGraph out as text; what is refused, and how."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from twofold.convert.from_source import Recursive, convert, make_block, planner_source, slice_graph
from twofold.graph import parse, show

layer = nn.Linear(3, 3)
weights = torch.ones(5, 3)


def text_of(function: Any) -> str:
    """Return the text of a function's graph without origins."""
    return re.sub(r"  # .*", "", show(convert(function).graph))


def encode(node: Any) -> Any:
    if node.left is None:
        return weights[node.word]
    return layer(encode(node.left)) + encode(node.right)


def total(node: Any) -> Any:
    state = weights[node.word]
    for child in node.children:
        state = state + total(child)
    return state


encode = Recursive(encode)
total = Recursive(total)


def test_a_choice_and_two_invocations() -> None:
    apply = "twofold.convert.targets:apply"
    assert text_of(encode) == (
        "graph recursion(%weights: object, %layer: object):\n"
        "  return\n\n"
        "subgraph encode(%node: object):\n"
        '  %0: object = get_attr(%node, "left")\n'
        "  %1: object = call operator.is_(%0, None)\n"
        "  %10: object = if(%1):\n"
        "    then():\n"
        '      %2: object = get_attr(%node, "word")\n'
        "      %3: object = get_item(%weights, %2)\n"
        "      return %3\n"
        "    else():\n"
        '      %4: object = get_attr(%node, "left")\n'
        "      %5: object = invoke encode(%4)\n"
        f"      %6: object = call {apply}(%layer, %5)\n"
        '      %7: object = get_attr(%node, "right")\n'
        "      %8: object = invoke encode(%7)\n"
        "      %9: object = call operator.add(%6, %8)\n"
        "      return %9\n"
        "  return %10\n"
    )


def test_a_loop_carries_what_it_assigns() -> None:
    text = text_of(total)
    assert "= loop(%4, %1):\n    body(%5: object, %6: object):\n" in text
    assert (
        "      %8: object = invoke total(%7)\n      %9: object = call operator.add(%6, %8)\n      return %9\n" in text
    )


def test_the_text_parses_back() -> None:
    for function in (encode, total):
        text = show(convert(function).graph)
        assert show(parse(text)) == text


def test_every_node_has_its_line() -> None:
    text = show(convert(encode).graph)
    lines = [line for line in text.splitlines() if " = " in line]
    assert lines
    assert all(re.search(r"# .*test_conversion\.py:\d+ in encode$", line) for line in lines)


@dataclass(eq=False)
class Waiting:
    """What waits of a block with one host value and two invocations at most."""

    steering: tuple[int, ...]
    tasks: list[int] = field(default_factory=list)
    invocations: tuple[list[int], list[int]] = ([], [])
    hosts: tuple[list[Any]] = ([],)


def planner_of_encode(steering: tuple[int, ...]) -> str:
    converted = convert(encode)
    waiting = {(1,): Waiting(steering), (0,): Waiting(steering)}
    waiting[1,].invocations, waiting[0,].hosts = (), ()  # type: ignore[assignment]
    text = planner_source(converted, slice_graph(converted, frozenset()), "encode", waiting.__getitem__, {}).text
    return text[text.index("def plan_encode") :].rstrip() + "\n"


def test_the_planner_adds_what_waits_to_columns() -> None:
    assert planner_of_encode(steering=()) == (
        "def plan_encode(v1):\n"
        "    v2 = v1.left\n"
        "    v3 = v2 is None\n"
        "    if v3:\n"
        "        v4 = v1.word\n"
        "        if type(v4) in plain:\n"
        "            n5 = len(heights)\n"
        "            heights.append(0)\n"
        "            c1.append(n5)\n"
        "            c2.append(v4)\n"
        "            yield n5\n"
        "        yield emit(c3, (), (v4, ), ())\n"
        "    else:\n"
        "        v6 = v1.left\n"
        "        i7 = yield plan_encode(v6)\n"
        "        v8 = v1.right\n"
        "        i9 = yield plan_encode(v8)\n"
        "        n10 = len(heights)\n"
        "        m11 = heights[i7]\n"
        "        if heights[i9] > m11: m11 = heights[i9]\n"
        "        heights.append(m11 + 1)\n"
        "        c4.append(n10)\n"
        "        c5.append(i7)\n"
        "        c6.append(i9)\n"
        "        yield n10\n"
    )


def test_the_planner_has_the_host_slice_alone() -> None:
    assert planner_of_encode(steering=(0,)) == (
        "def plan_encode(v1):\n"
        "    v2 = v1.left\n"
        "    v3 = v2 is None\n"
        "    if v3:\n"
        "        v4 = v1.word\n"
        "        yield emit(c1, (), (v4, ), ())\n"
        "    else:\n"
        "        v5 = v1.left\n"
        "        i6 = yield plan_encode(v5)\n"
        "        v7 = v1.right\n"
        "        i8 = yield plan_encode(v7)\n"
        "        yield emit(c2, (i6, i8, ), (), ())\n"
    )


def test_a_block_is_the_tensor_slice_of_one_way() -> None:
    converted = convert(total)
    block = make_block(converted, slice_graph(converted, frozenset()), "total", (2,))
    assert [(operand.invocation, operand.result) for operand in block.operands] == [(0, 0), (1, 0)]
    assert re.sub(r"  # .*", "", show(block.body)).splitlines()[1:] == [
        "  %2: object = get_item(<Tensor f32[5, 3]>, %1)",
        "  %4: object = call operator.add(%2, %3)",
        "  %6: object = call operator.add(%4, %5)",
        "  return %6",
    ]


def on_memory(node: Any) -> Any:
    h = layer(weights[:1])
    if h.detach().numpy()[0, 0] > 0:
        return h
    return on_memory(node.left)


def with_a_list_argument(node: Any, states: Any) -> Any:
    return with_a_list_argument(node.left, [layer(weights[:1]), weights[0]])


def else_of_a_loop(node: Any) -> Any:
    for child in node.children:
        if child is None:
            break
    else:
        return else_of_a_loop(node.left)
    return weights[0]


def trying(node: Any) -> Any:
    try:
        return trying(node.left)
    except ValueError:
        return weights[0]


def trying_tensors(node: Any) -> Any:
    h = weights[0]
    try:
        h = h * 2.0
    except ValueError:
        h = weights[1]
    return trying_tensors(node.left) + h


def recursive_in_a_lambda(node: Any) -> Any:
    total = max(node, key=lambda child: recursive_in_a_lambda(child))
    return weights[total]


def generating(node: Any) -> Any:
    yield weights[0]


def drawing(node: Any) -> Any:
    return torch.dropout(drawing(node.left), 0.5, True)


def printing(node: Any) -> Any:
    print(weights[0] + printing(node.left))
    return weights[0]


def uneven(node: Any) -> Any:
    if node.left is None:
        return weights[0], 1
    return weights[0], 1, 2


def writing(node: Any) -> Any:
    weights.add_(1.0)
    return writing(node.left)


@pytest.mark.parametrize(
    ("function", "code", "line"),
    [
        (on_memory, "tensor_fetch", "if h.detach().numpy()[0, 0] > 0:"),
        (
            with_a_list_argument,
            "tensor_argument",
            "return with_a_list_argument(node.left, [layer(weights[:1]), weights[0]])",
        ),
        (else_of_a_loop, "return_in_loop", "for child in node.children:"),
        (trying, "unsupported_syntax", "try:"),
        (trying_tensors, "unsupported_call", "try:"),
        (
            recursive_in_a_lambda,
            "unsupported_syntax",
            "total = max(node, key=lambda child: recursive_in_a_lambda(child))",
        ),
        (generating, "unsupported_syntax", "yield weights[0]"),
        (drawing, "random", "return torch.dropout(drawing(node.left), 0.5, True)"),
        (printing, "unsupported_call", "print(weights[0] + printing(node.left))"),
        (uneven, "inconsistent_results", "def uneven(node: Any) -> Any:"),
        (writing, "unsupported_call", "weights.add_(1.0)"),
    ],
)
def test_what_is_refused_names_the_line_and_what_to_write(
    function: Any, code: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decorated = twofold.subgraph(function, strict=True)
    monkeypatch.setitem(function.__globals__, function.__name__, decorated)
    with pytest.raises(twofold.NotConvertibleError) as raised:
        decorated(None, *[None] * (function.__code__.co_argcount - 1))
    refusal = decorated.refusal
    assert refusal is not None
    assert (refusal.code, refusal.line.strip()) == (code, line)
    assert refusal.hint in str(raised.value)


def test_a_refused_function_runs_as_plain_python() -> None:
    @twofold.subgraph
    def depth(node: Any) -> Any:
        try:
            return depth(node[0]) + 1
        except IndexError:
            return torch.zeros(())

    assert depth([[[]]]).item() == 2
    assert depth.refusal is not None
    assert depth.refusal.code == "unsupported_syntax"

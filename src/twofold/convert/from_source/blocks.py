"""What a block is, and which nodes of a function are part of one.

The host decides, invocation by invocation, which side of each choice is taken and how often each loop runs. One
sequence of decisions makes one block: choices resolved, loops unrolled, helpers inlined. All invocations with the same
decisions run the same block, and so can run it together.

Where a recursive call is given tensors, or the host reads the value of one, an invocation is *cut*: what is computed
up to there is a block by itself, a piece, whose results later blocks of the invocation and the callee take as they
take results of invocations. `walk` makes blocks and cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twofold.convert.targets import method
from twofold.graph import Node, SubGraph, Value, values_in

from .convert import Converted
from .slices import Kind, Slices


@dataclass(frozen=True)
class Operand:
    """A tensor that a block takes: result number `result` of its source number `invocation`, a call of `callee`."""

    invocation: int
    callee: str
    result: int


@dataclass(frozen=True)
class Block:
    """Straight-line tensor code of one sequence of decisions.

    The inputs of `body` are one value for each of `operands`, then one for each host value. Its outputs are the
    function's tensor results, then the tensors that the host is handed to keep; `results` numbers them: the former as
    the function lists them, the latter -1, -2, ...
    """

    function: str
    decisions: tuple[Any, ...]
    body: SubGraph
    operands: tuple[Operand, ...]
    hosts: int
    results: tuple[int, ...]
    callees: tuple[str, ...]
    """The function called by each invocation that it takes results from, in order. Pieces count as such."""
    sources: tuple[int, ...]
    """Which of the invocations and pieces met up to here these are."""
    places: tuple[int, ...]
    """Which of the host values met up to here it takes."""


@dataclass(frozen=True)
class Cut:
    """What is to be computed before an invocation goes on: `blocks`, each a source from then on.

    `wanted` says where the values are that the host reads; the sources of these count from the first one met.
    """

    blocks: tuple[Block, ...]
    wanted: tuple[Operand, ...]


def in_tensor_slice(node: Node, slices: Slices) -> bool:
    """Say whether a plain node belongs to the tensor slice."""
    if node.results and slices.kinds[node.results[0]] >= Kind.MIXED:
        return True
    if id(node) in slices.exports:
        return False
    return (
        bool(node.arguments) and slices.kind(node.arguments[0]) is Kind.MIXED and node.target in (list.append, method)
    )


def in_host_slice(node: Node, slices: Slices) -> bool:
    """Say whether a plain node belongs to the host slice."""
    return not node.results or slices.kinds[node.results[0]] in (Kind.HOST, Kind.MIXED)


def matters(body: SubGraph, slices: Slices) -> bool:
    """Say whether anything in a body, or its outputs, concerns the tensor slice."""
    return any(
        node.op == "invoke"
        or id(node) in slices.exports
        or id(node) in slices.fetches
        or (
            any(matters(nested, slices) for nested in node.subgraphs)
            if node.subgraphs
            else in_tensor_slice(node, slices)
        )
        for node in body.nodes
    ) or any(slices.kind(output) >= Kind.MIXED for output in body.outputs)


def decides(node: Node, slices: Slices) -> bool:
    """Say whether a choice or loop is one of a block's decisions."""
    joined = any(slices.kinds[result] is Kind.TENSOR for result in node.results)
    joined = joined or (node.op == "while" and id(node) in slices.fetches)
    return joined or any(matters(body, slices) for body in node.subgraphs)


def host_values(node: Node, slices: Slices) -> Iterator[Value]:
    """Yield the host values that a node of the tensor slice takes, in order."""
    for value in node.operands:
        if slices.kinds[value] is Kind.HOST:
            yield value


def handed_over(node: Node, slices: Slices) -> list[Value]:
    """Return the tensors that the host is handed at a node."""
    return [value for value in node.operands if slices.kinds[value] is Kind.TENSOR]


def read_by_host(node: Node, slices: Slices) -> list[Value]:
    """Return the tensors whose values the host reads at a node."""
    if id(node) not in slices.fetches:
        return []
    if node.op == "while":
        values = values_in(node.subgraphs[0].outputs)
    else:
        values = values_in(node.arguments[0]) if node.op == "if" else node.operands
    return list(dict.fromkeys(value for value in values if slices.kinds[value] is Kind.TENSOR))


def tensor_parameters(body: SubGraph, slices: Slices) -> tuple[int, ...]:
    """Return which inputs of a function's body are tensors."""
    return tuple(index for index, value in enumerate(body.inputs) if slices.kinds[value] is Kind.TENSOR)


def is_cut(converted: Converted, slices: Slices, body: SubGraph) -> bool:
    """Say whether invocations of a function are cut, or take tensors from their callers."""
    subgraphs = converted.graph.subgraphs

    def cuts(node: Node) -> bool:
        passes = node.op == "invoke" and tensor_parameters(subgraphs[str(node.target)], slices)
        return bool(passes) or id(node) in slices.fetches or any(map(cuts_in, node.subgraphs))

    def cuts_in(body: SubGraph) -> bool:
        return any(map(cuts, body.nodes))

    return bool(tensor_parameters(body, slices)) or cuts_in(body)


def tensor_results(body: SubGraph, slices: Slices) -> tuple[int, ...]:
    """Return which outputs of a function's body are tensors."""
    return tuple(index for index, output in enumerate(body.outputs) if slices.given(output) is Kind.TENSOR)

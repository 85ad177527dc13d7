"""Which tensors the host keeps, and whether each would be an object and memory of its own in plain Python too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twofold.convert.refusals import Refusal, Refused, line_of
from twofold.convert.targets import method
from twofold.graph import Argument, Node, SubGraph, Value, all_nodes, values_in

from .blocks import handed_over, tensor_results
from .convert import Converted
from .slices import Slices

_VIEWS = frozenset(
    {"chunk", "split", "unbind", "view", "view_as", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "t",
     "transpose", "permute", "expand", "expand_as", "narrow", "select", "detach", "contiguous", "to", "float", "T",
     "double", "half", "tensor_split", "swapaxes", "movedim", "diagonal", "unfold", "squeeze_", "unsqueeze_", "unpack",
     "real", "type", "cpu", "alias", "requires_grad_", "getitem", "broadcast_to", "atleast_1d", "atleast_2d", "mT"}
)  # fmt: skip
"""Functions and methods whose result may be the tensor that they are given, or show its memory."""


def check_exposure(converted: Converted, slices: Slices) -> None:
    """Refuse a function of which the host keeps a tensor twice, or one that a call returned or that was passed in.

    A batch hands out each of these as a tensor of its own. What the invocation computes itself, and the host keeps
    once, is fresh memory either way. Raises `Refused`.
    """
    kept_and_returned = False
    hands_on = False
    for name, body in converted.graph.subgraphs.items():
        makers = {value: node for node in all_nodes(body) for value in node.results}
        kept: set[Value] = set()
        for node in all_nodes(body):
            for value in handed_over(node, slices) if id(node) in slices.exports else ():
                sources = set(_sources(value, makers, set()))
                if not sources or any(source not in makers or makers[source].op == "invoke" for source in sources):
                    raise _refused("a tensor that a call returned, or that comes from outside, is kept", node)
                if not kept.isdisjoint(sources):
                    raise _refused("a tensor is kept twice", node)
                kept |= sources
        if name in converted.functions:
            returned = _returned(body, makers, slices)
            kept_and_returned |= not kept.isdisjoint(returned)
            hands_on |= any(source in makers and makers[source].op == "invoke" for source in returned)
    if kept_and_returned and hands_on:
        origin = converted.functions[converted.entry].source
        construct = "a tensor that is kept may be returned by another call, too"
        raise origin.refuse("kept_tensor", construct, origin.definition)


def _returned(body: SubGraph, makers: dict[Value, Node], slices: Slices) -> set[Value]:
    outputs = [body.outputs[index] for index in tensor_results(body, slices)]
    return {source for output in outputs for value in values_in(output) for source in _sources(value, makers, set())}


def _sources(value: Value, makers: dict[Value, Node], seen: set[Value]) -> Iterator[Value]:
    """Yield the values that a value is, or shows the memory of: those of operations that make memory, or no node's."""
    if value in seen:
        return
    seen.add(value)
    node = makers.get(value)
    if node is None or node.op == "invoke":
        yield value
    elif node.subgraphs:
        index = node.results.index(value)
        handed: list[Argument] = [side.outputs[index] for side in node.subgraphs if index < len(side.outputs)]
        for inner in values_in(tuple(handed) + tuple(node.arguments)):
            yield from _sources(inner, makers, seen)
    elif node.op in ("get_item", "get_attr") or _name(node) in _VIEWS:
        for inner in values_in(node.arguments[0]):
            yield from _sources(inner, makers, seen)
    else:
        yield value


def _name(node: Node) -> Any:
    return node.arguments[1] if node.target is method else getattr(node.target, "__name__", "")


def _refused(construct: str, node: Node) -> Refused:
    origin = node.origin
    return Refused(Refusal("kept_tensor", construct, origin, line_of(origin) if origin else ""))

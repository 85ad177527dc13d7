"""Graphs as text, both ways: `equivalent(parse(show(graph)), graph)`.

    graph step(%x: f32[32,64], %w: f32[64,10]!):
      %0: f32[32,10]! = call torch.matmul(%x, %w)  # train.py:12 in forward
      %1: f32[] = if(%flag) {no_grad}:
        then():
          …
      fetch(%0)
      return %0

    subgraph name(…):
      …

A value shows its spec where it is defined (`object` for one that is not a tensor). Modes other than the
default follow the arguments in braces, the origin follows as a comment. A `Constant`, and a callable
without a name of its own, print as `<…>`: such text is for reading, and `parse` refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from .equivalence import equivalent
from .ir import Ambient, Argument, Constant, Graph, Node, Origin, SubGraph, Value, dtype_name
from .names import UnnamedCallableError, qualified_name
from .parse import GraphSyntaxError, parse

__all__ = ["GraphSyntaxError", "equivalent", "parse", "show", "show_argument"]

_INDENT = "  "


def show(graph: SubGraph) -> str:
    """Return the text of a graph with its table of SubGraphs, or of a single body."""
    tables = graph.subgraphs.values() if isinstance(graph, Graph) else ()
    keyword = "graph" if isinstance(graph, Graph) else "subgraph"
    parts = [_body_lines(graph, f"{keyword} ", 0)]
    parts += [_body_lines(body, "subgraph ", 0) for body in tables]
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _body_lines(body: SubGraph, keyword: str, depth: int) -> Iterator[str]:
    inputs = ", ".join(_definition(value) for value in body.inputs)
    yield f"{_INDENT * depth}{keyword}{body.name}({inputs}):"
    for node in body.nodes:
        yield from _node_lines(node, depth + 1)
    outputs = ", ".join(show_argument(output) for output in body.outputs)
    yield f"{_INDENT * (depth + 1)}return {outputs}".rstrip()


def _node_lines(node: Node, depth: int) -> Iterator[str]:
    results = ", ".join(_definition(value) for value in node.results)
    arguments = [show_argument(argument) for argument in node.arguments]
    arguments += [f"{name}={show_argument(argument)}" for name, argument in node.keywords]
    head = f"{results} = {node.op}" if results else node.op
    target = "" if node.target is None else f" {_target(node.target)}"
    colon = ":" if node.subgraphs else ""
    call = f"{head}{target}({', '.join(arguments)}){_ambient(node.ambient)}{colon}{_origin(node.origin)}"
    yield _INDENT * depth + call
    for body in node.subgraphs:
        yield from _body_lines(body, "", depth + 1)


def _definition(value: Value) -> str:
    return f"%{value.name}: {value.spec or 'object'}"


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    try:
        return qualified_name(target)
    except UnnamedCallableError:
        return f"<{getattr(target, '__qualname__', type(target).__qualname__)}>".replace("<<", "<")


def _ambient(ambient: Ambient) -> str:
    words = [] if ambient.grad else ["no_grad"]
    words += ["inference"] if ambient.inference else []
    words += [f"autocast:{device}={dtype_name(dtype)}" for device, dtype in ambient.autocast]
    words += [] if ambient.autocast_cache else ["no_autocast_cache"]
    return f" {{{' '.join(words)}}}" if words else ""


def _origin(origin: Origin | None) -> str:
    if origin is None:
        return ""
    return f"  # {origin}" + (f" in {origin.function}" if origin.function else "")


def show_argument(argument: Argument) -> str:
    """Return the text of one argument."""
    match argument:
        case Value():
            return f"%{argument.name}"
        case Constant():
            return _show_constant(argument)
        case str():
            return json.dumps(argument)
        case complex():
            return f"complex({argument.real!r}, {argument.imag!r})"
        case torch.device():
            return f'device("{argument}")'
        case torch.Size():
            return f"Size({list(argument)})"
        case range():
            return f"range({argument.start}, {argument.stop}, {argument.step})"
        case slice():
            parts = (argument.start, argument.stop, argument.step)
            return f"slice({', '.join(show_argument(part) for part in parts)})"
        case tuple():
            return f"({', '.join(map(show_argument, argument))}{',' if len(argument) == 1 else ''})"
        case list():
            return f"[{', '.join(map(show_argument, argument))}]"
        case dict():
            items = (f"{show_argument(key)}: {show_argument(item)}" for key, item in argument.items())
            return f"{{{', '.join(items)}}}"
        case _ if argument is ...:
            return "..."
        case _:
            return repr(argument)


def _show_constant(constant: Constant) -> str:
    kind = type(constant.object)
    if isinstance(constant.object, torch.Tensor):
        return f"<{kind.__qualname__} {dtype_name(constant.object.dtype)}{list(constant.object.shape)}>"
    return f"<{kind.__module__}.{kind.__qualname__}>"

"""Verification: the rules that every graph keeps, checked after it is built and after each pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .ir import (
    SCALAR_TYPES,
    Argument,
    Graph,
    MalformedGraphError,
    Node,
    SubGraph,
    TensorSpec,
    Value,
    values_in,
)
from .ops import OPS

_NAME = re.compile(r"[A-Za-z0-9_.]+")
_BODY_NAME = re.compile(r"[^\s(]+")


def verify(graph: Graph) -> None:
    """Raise `MalformedGraphError`, naming the node and what was expected, if the graph breaks a rule."""
    verifier = _Verifier(graph)
    scope = verifier.define({}, graph.inputs, f"graph {graph.name}")
    verifier.check_body(graph, scope)
    for name, body in graph.subgraphs.items():
        where = f"SubGraph {name}"
        if body.name != name:
            _fail(where, f"expected the name that it has in the table, got {body.name}")
        inputs = verifier.define({value.name: value for value in graph.inputs}, body.inputs, where)
        verifier.check_body(body, inputs)


def describe(node: Node) -> str:
    """Return a short line for messages: results, op, target and origin."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    results = ", ".join(f"%{value.name}" for value in node.results)
    head = f"{results} = {node.op}" if results else node.op
    named = head if node.target is None else f"{head} {target}"
    return f"{named} ({node.origin})" if node.origin else named


def _fail(where: str, expectation: str) -> NoReturn:
    raise MalformedGraphError(f"{where}: {expectation}")


Scope = dict[str, Value]


class _Verifier:
    """Walks one graph; remembers every value defined so far, to see a second definition."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._defined: set[Value] = set()

    def define(self, scope: Scope, values: Sequence[Value], where: str) -> Scope:
        """Return the scope with the values added; the given scope is left as it is."""
        inner = dict(scope)
        self._add(inner, values, where)
        return inner

    def _add(self, scope: Scope, values: Sequence[Value], where: str) -> None:
        for value in values:
            if value in self._defined:
                _fail(where, f"expected a single assignment of %{value.name}, which is already defined")
            if _NAME.fullmatch(value.name) is None:
                _fail(where, f"expected a name of letters, digits, '_' and '.', got {value.name!r}")
            if value.name in scope:
                _fail(where, f"expected a name that is new in its scope, got %{value.name} again")
            self._defined.add(value)
            scope[value.name] = value

    def check_body(self, body: SubGraph, scope: Scope) -> None:
        """Check the nodes and outputs of a body whose inputs are in scope; add its values to the scope."""
        if _BODY_NAME.fullmatch(body.name) is None:
            _fail(f"body {body.name!r}", "expected a name without spaces and parentheses")
        for node in body.nodes:
            where = describe(node)
            _check_form(node, where)
            for argument in (*node.arguments, *(argument for _, argument in node.keywords)):
                _check_argument(argument, scope, where)
            for nested in node.subgraphs:
                self.check_body(nested, self.define(scope, nested.inputs, f"{where}, body {nested.name}"))
            self._check_control_flow(node, where)
            self._add(scope, node.results, where)
        for output in body.outputs:
            _check_argument(output, scope, f"outputs of {body.name}")

    def _check_control_flow(self, node: Node, where: str) -> None:
        match node.op:
            case "if" | "switch":
                _check_choice(node, where)
            case "while":
                _check_while(node, where)
            case "loop":
                body = node.subgraphs[0]
                _check_number(node.arguments[0], "trip count", where)
                index, *carried = body.inputs or _fail(where, "expected a body that takes the index")
                _check_number(index, "index", where)
                _check_agree(carried, node.arguments[1:], f"{where}: inputs of {body.name}")
                _check_agree(body.outputs, carried, f"{where}: outputs of {body.name}")
                _check_agree(node.results, carried, f"{where}: results")
            case "invoke":
                self._check_invoke(node, where)
            case _:
                pass

    def _check_invoke(self, node: Node, where: str) -> None:
        body = self._graph.subgraphs.get(str(node.target))
        if body is None:
            _fail(where, f"expected a SubGraph of the table, which has {sorted(self._graph.subgraphs)}")
        _check_agree(node.arguments, body.inputs, f"{where}: arguments")
        _check_agree(node.results, body.outputs, f"{where}: results")


def _check_form(node: Node, where: str) -> None:
    op = OPS.get(node.op)
    if op is None:
        _fail(where, f"expected one of the ops {', '.join(OPS)}")
    counts = (("arguments", op.arguments), ("results", op.results), ("subgraphs", op.subgraphs))
    for field, count in counts:
        number = len(getattr(node, field))
        if number not in count:
            _fail(where, f"expected {count} {field}, got {number}")
    target = node.target
    kind = "none" if target is None else "name" if isinstance(target, str) else "callable"
    if kind != op.target:
        _fail(where, f"expected a target of kind {op.target}, got {target!r}")
    names = [name for name, _ in node.keywords]
    if len(names) != len(set(names)) or (op.keywords is not None and not op.keywords.issuperset(names)):
        allowed = "keywords" if op.keywords is None else f"only the keywords {sorted(op.keywords)}"
        _fail(where, f"expected {allowed}, each once, got {names}")
    _check_details(node, where)


def _check_details(node: Node, where: str) -> None:
    match node.op:
        case "feed":
            if not isinstance(dict(node.keywords).get("name"), str):
                _fail(where, "expected the keyword name, a string")
        case "fetch" | "assert":
            if any(not isinstance(argument, str) for _, argument in node.keywords):
                _fail(where, "expected a string for the keyword")
            if node.op == "assert":
                _check_truth(node.arguments[0], where)
        case "get_attr" | "set_attr":
            if not isinstance(node.arguments[1], str):
                _fail(where, f"expected an attribute name, got {node.arguments[1]!r}")
        case "call":
            if len(node.results) > 1 and any(value.spec is None for value in node.results):
                _fail(where, "expected tensors, or one Python object, as the results of a call")
        case _:
            pass


def _check_argument(argument: Any, scope: Scope, where: str) -> None:
    for value in values_in(argument):
        if scope.get(value.name) is not value:
            _fail(where, f"expected %{value.name} to be defined before its use and in scope")
    kind = type(argument)
    if kind is tuple or kind is list:
        items: Sequence[Any] = argument
    elif kind is dict:
        items = [*argument, *argument.values()]
        if any(type(key) is Value for key in argument):
            _fail(where, "expected dictionary keys without values")
    elif kind is slice:
        items = (argument.start, argument.stop, argument.step)
    elif kind is Value or kind in SCALAR_TYPES:
        return
    else:
        _fail(where, f"expected an argument type, got {kind.__qualname__} (wrap it in Constant)")
    for item in items:
        _check_argument(item, scope, where)


def _check_choice(node: Node, where: str) -> None:
    if node.op == "if":
        _check_truth(node.arguments[0], where)
    else:
        _check_number(node.arguments[0], "branch index", where)
    for body in node.subgraphs:
        _check_agree(body.inputs, node.arguments[1:], f"{where}: inputs of {body.name}")
        _check_agree(body.outputs, node.results, f"{where}: outputs of {body.name}")
    first, *others = node.subgraphs
    for body in others:
        _check_agree(body.outputs, first.outputs, f"{where}: outputs of {body.name} and {first.name}")


def _check_while(node: Node, where: str) -> None:
    condition, body = node.subgraphs
    for nested in (condition, body):
        _check_agree(nested.inputs, node.arguments, f"{where}: inputs of {nested.name}")
    if len(condition.outputs) != 1 or not _is_truth(condition.outputs[0], only_bool=True):
        _fail(where, f"expected a condition that yields one bool, got {list(condition.outputs)}")
    _check_agree(body.outputs, body.inputs, f"{where}: outputs of {body.name}")
    _check_agree(node.results, body.inputs, f"{where}: results")


def _check_truth(argument: Argument, where: str) -> None:
    if not _is_truth(argument, only_bool=False):
        _fail(where, f"expected a predicate, a bool or a tensor of one element, got {argument!r}")


def _is_truth(argument: Argument, only_bool: bool) -> bool:
    if not isinstance(argument, Value):
        return isinstance(argument, bool)
    spec = argument.spec
    if spec is None:
        return True
    return all(size in (1, None) for size in spec.shape) and (spec.dtype == torch.bool or not only_bool)


def _check_number(argument: Argument, role: str, where: str) -> None:
    """Check that the argument is an int or a Python object that may be one; tensors must be fetched first."""
    if not (type(argument) is int or (isinstance(argument, Value) and argument.spec is None)):
        _fail(where, f"expected an int or a Python object as the {role}, got {argument!r}")


def _check_agree(got: Sequence[Argument], expected: Sequence[Argument], where: str) -> None:
    if len(got) != len(expected):
        _fail(where, f"expected {len(expected)}, got {len(got)}")
    for number, (left, right) in enumerate(zip(got, expected, strict=True)):
        a, b = _spec(left), _spec(right)
        if (a is None) != (b is None) or (a is not None and b is not None and not a.agrees_with(b)):
            _fail(where, f"expected {b or 'object'} at position {number}, got {a or 'object'}")


def _spec(argument: Argument) -> TensorSpec | None:
    return argument.spec if isinstance(argument, Value) else None

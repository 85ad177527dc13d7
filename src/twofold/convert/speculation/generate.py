"""A scheduled host graph as one Python function: straight-line code over local names.

A node whose only reader comes next is written into it. Constants are globals of the function, which a read of costs
nothing more than a local name. A failed `assert` returns what `unit.failed(index)` returns.
"""

from __future__ import annotations

import builtins
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.hooks import RemovableHandle

from twofold.convert.python_text import INFIX, PREFIX, operation
from twofold.graph import Constant, Graph, Node, Value, ambient_context, values_in

from .library import is_torch
from .schedule import is_effect
from .speculation import commit, draw, equal, give, launch, put, read, step, tensor, unhooked

DEEPEST = 6
"""Expressions are nested so deep and no deeper."""

_ON_UNIT: dict[Any, str] = {
    function: function.__name__ for function in (draw, give, put, read, step, tensor, launch, commit)
}
_NOT_ATOMS = frozenset({*INFIX, *PREFIX, equal, unhooked})
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class HostFunction:
    """The text of the function `call(unit, arguments, keywords)`, and the function."""

    text: str
    call: Callable[..., Any]


def generate(graph: Graph, roots: Mapping[Value, Any]) -> HostFunction:
    """Write a scheduled host graph as a function of the unit, the positional arguments and the keywords.

    `roots` are what the other inputs stand for. Raises ValueError for nodes that hold SubGraphs or have two results.
    """
    text, scope = _Writer(graph, roots).written()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the program may well ask whether 1 is 2
        code = compile(text, f"<speculation {graph.name} {next(_NUMBERS)}>", "exec")
    exec(code, scope)
    return HostFunction(text, scope["call"])


@dataclass(frozen=True, slots=True)
class _Expression:
    text: str
    depth: int = 0
    is_infix: bool = False

    def nested(self) -> str:
        """Return the text as part of another expression."""
        return f"({self.text})" if self.is_infix else self.text


class _Writer:
    def __init__(self, graph: Graph, roots: Mapping[Value, Any]) -> None:
        self._graph = graph
        self._lines: list[str] = []
        self._scope: dict[str, Any] = {}
        self._names_of: dict[int, str] = {}
        self._locals = itertools.count()
        self._known: dict[Value, _Expression] = {}
        """What stands for each value: its name, or, if it is not computed yet, its expression."""
        self._pending: list[Value] = []
        self._uses = _uses(graph)
        inputs = zip(graph.inputs[:3], ("unit", "arguments", "keywords"), strict=True)
        self._known.update((value, _Expression(name)) for value, name in inputs)
        self._known.update((value, _Expression(self._name(held))) for value, held in roots.items())

    def written(self) -> tuple[str, dict[str, Any]]:
        """Return the text of the function and its globals."""
        for node in self._graph.nodes:
            self._node(node)
        outputs = self._graph.outputs[:1]
        self._take(values_in(outputs))
        self._line(f"return {''.join(map(self._text, outputs)) or None}")
        return "def call(unit, arguments, keywords):\n" + "\n".join(self._lines) + "\n", self._scope

    # ---- nodes -------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if node.subgraphs or len(node.results) > 1:
            raise ValueError(f"{node.op}: expected a node of straight-line Python work with at most one result")
        if node.op == "assert":
            self._take(node.operands)
            self._line(f"if not {self._text(node.arguments[0])}:")
            self._line(f"    return unit.failed({int(str(dict(node.keywords)['message']))})")
        elif node.target in _ON_UNIT:
            self._take(node.operands)
            unit, *arguments = [self._text(argument) for argument in node.arguments]
            arguments += [f"{name}={self._text(argument)}" for name, argument in node.keywords]
            self._statement(node, f"{unit}.{_ON_UNIT[node.target]}({', '.join(arguments)})")
        else:
            self._work(node)

    def _work(self, node: Node) -> None:
        arguments = [self._text(argument) for argument in node.arguments]
        keywords = [f"{name}={self._text(argument)}" for name, argument in node.keywords]
        text = self._check(node, arguments) or operation(node, arguments, keywords, self._name)
        if node.op == "call" and is_torch(node.target):
            self._take(node.operands)
            self._line(f"with {self._name(ambient_context)}({self._name(node.ambient)}):")
            self._statement(node, text, "    ")
            return
        depth = 1 + max((self._known[value].depth for value in node.operands), default=0)
        if not is_effect(node) and self._uses.get(node.results[0]) == 1 and depth < DEEPEST:
            self._pending = [value for value in self._pending if value not in node.operands]
            self._known[node.results[0]] = _Expression(text, depth, node.target in _NOT_ATOMS)
            self._pending.append(node.results[0])
            return
        self._take(node.operands)
        self._statement(node, text)

    def _check(self, node: Node, arguments: list[str]) -> str:
        """Return a faster text for the predicates that most guards are made of; nothing for all other nodes."""
        checked = arguments[0] if arguments else ""
        if node.target is unhooked and checked.isidentifier():
            # Every hook of PyTorch is registered with a handle of its own, and handles are numbered.
            self._scope.update(_RemovableHandle=RemovableHandle, _handles=RemovableHandle.next_id)
            called = f"(_RemovableHandle.next_id == _handles or {self._name(unhooked)}({checked}))"
            return f"{called} and {checked}._compiled_call_impl is None and 'forward' not in {checked}.__dict__"
        if node.target is not equal:
            return ""
        expected: Any = node.arguments[1]
        if type(expected) is tuple and all(type(item) is str for item in expected):
            return f"{checked} == {self._name(expected)}"
        held = self._name(expected.object if isinstance(expected, Constant) else expected)
        bound, again = (checked, checked) if checked.isidentifier() else (f"(held := {checked})", "held")
        return f"{bound} is {held} or {self._name(equal)}({again}, {held})"

    # ---- lines and names ---------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        self._lines.append("    " + text)

    def _statement(self, node: Node, text: str, indent: str = "") -> None:
        target = ""
        if node.results and self._uses.get(node.results[0]):
            target = self._local(node.results[0]) + " = "
        self._line(indent + target + text)

    def _local(self, value: Value) -> str:
        self._known[value] = _Expression(f"v{next(self._locals)}")
        return self._known[value].text

    def _take(self, operands: Iterable[Value]) -> None:
        """Compute what waits for its reader, less what the next line computes itself.

        That line may change what the others read.
        """
        taken = set(operands)
        waiting, self._pending = self._pending, []
        for value in waiting:
            if value not in taken:
                text = self._known[value].text
                self._line(f"{self._local(value)} = {text}")

    def _text(self, argument: Any) -> str:
        kind = type(argument)
        if isinstance(argument, Value):
            return self._known[argument].nested()
        if isinstance(argument, Constant):
            return self._name(argument.object)
        if kind is tuple:
            return f"({''.join(self._text(item) + ', ' for item in argument)})"
        if kind is list:
            return f"[{', '.join(map(self._text, argument))}]"
        if kind is dict:
            return f"{{{', '.join(f'{self._text(key)}: {self._text(item)}' for key, item in argument.items())}}}"
        if isinstance(argument, slice):
            return f"slice({self._text(argument.start)}, {self._text(argument.stop)}, {self._text(argument.step)})"
        if kind is str or argument is None or argument is True or argument is False:
            return repr(argument)
        if kind is int:
            return repr(argument) if argument >= 0 else f"({argument!r})"
        return self._name(argument)

    def _name(self, held: Any) -> str:
        """Return the global name of an object: its own where it is a builtin."""
        known = self._names_of.get(id(held))
        if known is None:
            known = getattr(held, "__name__", None)
            if not isinstance(known, str) or getattr(builtins, known, None) is not held:
                known = f"{known if isinstance(known, str) and known.isidentifier() else 'c'}_{len(self._scope)}"
            self._names_of[id(held)] = known
            self._scope[known] = held
        return known


def _uses(graph: Graph) -> dict[Value, int]:
    uses: dict[Value, int] = {}
    for value in itertools.chain(*(node.operands for node in graph.nodes), values_in(tuple(graph.outputs))):
        uses[value] = uses.get(value, 0) + 1
    return uses

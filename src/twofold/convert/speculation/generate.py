"""A scheduled host graph as one Python function: straight-line code over local names.

A node whose only reader comes next is written into it. Constants are globals of the function, which a read of costs
nothing more than a local name. A failed `assert` leaves the code that runs when all holds, which is the shorter for it,
and returns what `unit.failed(index)` returns.

Modules answer every read of an attribute through their class's `__getattr__`, 60 ns each; what a guard reads of a
module is read in its `__dict__`, which is got once.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from twofold.convert.python_text import INFIX, PREFIX, operation
from twofold.graph import Ambient, Constant, Graph, Node, Value, ambient_context, values_in

from .library import is_torch
from .schedule import is_effect
from .speculation import change, commit, draw, equal, give, inherits, launch, put, read, step, tensor, unhooked

DEEPEST = 6
"""Expressions are nested so deep and no deeper."""

_ON_UNIT: dict[Any, str] = {
    function: function.__name__ for function in (change, draw, give, put, read, step, tensor, launch, commit)
}
_NOT_ATOMS = frozenset({*INFIX, *PREFIX, equal, inherits, unhooked})
_NUMBERS = itertools.count()
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})
"""What modules of all classes have in their `__dict__`."""


@dataclass(frozen=True)
class HostFunction:
    """The text of the function `call(unit, arguments, keywords)`, and the function."""

    text: str
    call: Callable[..., Any]


def generate(graph: Graph, roots: Mapping[Value, Any], ambient: Ambient | None = None) -> HostFunction:
    """Write a scheduled host graph as a function of the unit, the positional arguments and the keywords.

    `roots` are what the other inputs stand for, `ambient` are the modes that all calls are made under, if they are
    known. Raises ValueError for nodes that hold SubGraphs or have two results.
    """
    text, scope = _Writer(graph, roots, ambient).written()
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
    def __init__(self, graph: Graph, roots: Mapping[Value, Any], ambient: Ambient | None) -> None:
        self._graph = graph
        self._ambient = ambient
        self._lines: list[str] = []
        self._scope: dict[str, Any] = {}
        self._names_of: dict[int, str] = {}
        self._locals = itertools.count()
        self._known: dict[Value, _Expression] = {}
        """What stands for each value: its name, or, if it is not computed yet, its expression."""
        self._pending: list[Value] = []
        self._uses = _uses(graph)
        self._makers = {value: node for node in graph.nodes for value in node.results}
        self._modules: dict[Value, nn.Module] = {}
        """Values that an assertion has found to be a module."""
        self._states: dict[Value, str] = {}
        """The local names of their `__dict__`."""
        self._is_committed = False
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
        lines = ["def call(unit, arguments, keywords):"]
        if any(node.target is unhooked for node in self._graph.nodes):
            # Every hook of PyTorch is registered with a handle of its own, and handles are numbered.
            self._scope.update(_RemovableHandle=RemovableHandle, _handles=RemovableHandle.next_id)
            lines.append("    has_no_new_hooks = _RemovableHandle.next_id == _handles")
        lines += ["    while True:", *self._lines]
        if any(node.op == "assert" for node in self._graph.nodes):
            lines.append("    return unit.failed(failed)")
        return "\n".join(lines) + "\n", self._scope

    # ---- nodes -------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if node.subgraphs or len(node.results) > 1:
            raise ValueError(f"{node.op}: expected a node of straight-line Python work with at most one result")
        if node.op == "assert":
            self._take(node.operands)
            self._line(f"if not {self._text(node.arguments[0])}:")
            self._line(f"    failed = {int(str(dict(node.keywords)['message']))}")
            self._line("    break")
            self._note_module(node.arguments[0])
        elif node.target in _ON_UNIT:
            self._take(node.operands)
            unit, *arguments = [self._text(argument) for argument in node.arguments]
            arguments += [f"{name}={self._text(argument)}" for name, argument in node.keywords]
            self._statement(node, f"{unit}.{_ON_UNIT[node.target]}({', '.join(arguments)})")
            self._is_committed = self._is_committed or node.target is commit
        else:
            self._work(node)

    def _note_module(self, predicate: Any) -> None:
        maker = self._makers.get(predicate) if isinstance(predicate, Value) else None
        if maker is not None and maker.target is operator.is_:
            value, expected = maker.arguments
            if isinstance(value, Value) and isinstance(expected, Constant) and isinstance(expected.object, nn.Module):
                self._modules[value] = expected.object

    def _work(self, node: Node) -> None:
        arguments = [self._text(argument) for argument in node.arguments]
        keywords = [f"{name}={self._text(argument)}" for name, argument in node.keywords]
        text = self._check(node, arguments) or self._in_state(node) or operation(node, arguments, keywords, self._name)
        if node.op == "call" and is_torch(node.target) and node.ambient != self._ambient:
            self._take(node.operands)
            self._line(f"with {self._name(ambient_context)}({self._name(node.ambient)}):")
            self._statement(node, text, "    ")
            return
        depth = 1 + max((self._known[value].depth for value in node.operands), default=0)
        may_wait = not is_effect(node) and not (node.op == "call" and is_torch(node.target))
        if may_wait and self._uses.get(node.results[0]) == 1 and depth < DEEPEST:
            self._pending = [value for value in self._pending if value not in node.operands]
            self._known[node.results[0]] = _Expression(text, depth, node.target in _NOT_ATOMS)
            self._pending.append(node.results[0])
            return
        self._take(node.operands)
        self._statement(node, text)

    def _check(self, node: Node, arguments: list[str]) -> str:
        """Return a faster text for the predicates that most guards are made of; nothing for all other nodes."""
        checked = arguments[0] if arguments else ""
        if node.target is unhooked:
            state = self._state_of(node.arguments[0])
            if state:
                plain = f"has_no_new_hooks and '_compiled_call_impl' not in {state} and 'forward' not in {state}"
                return f"{plain} or {self._name(unhooked)}({checked})"
            return ""
        if node.target is inherits:
            return f"{arguments[1]} not in {self._state_of(node.arguments[0]) or checked + '.__dict__'}"
        if node.target is not equal:
            return ""
        expected: Any = node.arguments[1]
        if type(expected) is tuple and all(type(item) is str for item in expected):
            return f"{checked} == {self._name(expected)}"
        held = self._name(expected.object if isinstance(expected, Constant) else expected)
        bound, again = (checked, checked) if checked.isidentifier() else (f"(held := {checked})", "held")
        return f"{bound} is {held} or {self._name(equal)}({again}, {held})"

    def _in_state(self, node: Node) -> str:
        """Return the text of a guard's read in the `__dict__` of a module; nothing for all other nodes.

        Where it is no longer there, the look-up fails, and the call is given back to Python.
        """
        if node.op != "get_attr" or self._is_committed:
            return ""
        of, name = node.arguments
        module = self._modules.get(of) if isinstance(of, Value) else None
        if module is None or not isinstance(name, str) or not _lies_in_state(module, name):
            return ""
        return f"{self._state_of(of)}[{name!r}]"

    def _state_of(self, module: Any) -> str:
        """Return the local name of the `__dict__` of a value that is known to be a module; nothing for others."""
        if module not in self._modules:
            return ""
        if module not in self._states:
            self._take((module,))
            self._states[module] = f"s{len(self._states)}"
            self._line(f"{self._states[module]} = {self._text(module)}.__dict__")
        return self._states[module]

    # ---- lines and names ---------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        self._lines.append("        " + text)

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


def _lies_in_state(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is what its `__dict__` holds: by its class, whose code is PyTorch's."""
    kind = type(module)
    if name not in module.__dict__ or kind.__getattribute__ is not object.__getattribute__:
        return False
    if name not in _TABLES and not kind.__module__.startswith("torch.nn."):
        return False
    return not inspect.isdatadescriptor(inspect.getattr_static(kind, name, None))


def _uses(graph: Graph) -> dict[Value, int]:
    uses: dict[Value, int] = {}
    for value in itertools.chain(*(node.operands for node in graph.nodes), values_in(tuple(graph.outputs))):
        uses[value] = uses.get(value, 0) + 1
    return uses

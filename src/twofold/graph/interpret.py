"""The reference interpreter: what graphs mean, and the oracle for passes, autodiff and executors.

`interpret` runs a graph node by node on real tensors and returns everything that can be observed: outputs and
effects. It favours plainness over speed; `run_node` alone is meant for executors too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from .ambient import AmbientSwitch, ambient_context
from .ir import Constant, Graph, MalformedGraphError, Node, Origin, SubGraph, Value
from .observe import Observer, Outcome
from .ops import CONTROL_FLOW
from .verify import describe

Environment: TypeAlias = MutableMapping[Value, Any]
# Bodies and control flow are generators that yield the generator they wait for, so that the depth of a
# recursion is bounded by memory and not by Python's stack.
_Task: TypeAlias = Generator[Any, list[Any], list[Any]]


class AssertionFailed(Exception):
    """An `assert` node found its predicate false."""

    def __init__(self, origin: Origin | None, message: str = "") -> None:
        super().__init__(f"{message or 'assertion failed'} ({origin or 'no origin'})")
        self.origin = origin
        self.message = message


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    read_feed: Callable[[str], Any] | Mapping[str, Any] | None = None,
) -> Outcome:
    """Run a graph and return its outputs and its effects in order.

    The inputs are used as they are: a graph that writes to them writes to the caller's objects. Raises
    `AssertionFailed`, and whatever the operations raise. Recursion may be as deep as memory allows.
    """
    if len(inputs) != len(graph.inputs):
        raise TypeError(f"{graph.name}: expected {len(graph.inputs)} inputs, got {len(inputs)}")
    with AmbientSwitch() as modes:
        interpreter = _Interpreter(graph, inputs, read_feed, modes)
        outputs = _run(interpreter.body(graph, inputs, {}))
        return Outcome(tuple(outputs), interpreter.observer.effects())


def run_node(node: Node, environment: Environment) -> None:
    """Run one node that is neither control flow nor an exchange with Python, under its ambient.

    Reads its operands from the environment and puts its results there. Raises `AssertionFailed` for an
    `assert`, and ValueError for `feed`, `fetch` and the operations in `ops.CONTROL_FLOW`, which need an
    executor.
    """
    arguments = [evaluate(argument, environment) for argument in node.arguments]
    with ambient_context(node.ambient):
        match node.op:
            case "call":
                target: Any = node.target
                keywords = {name: evaluate(argument, environment) for name, argument in node.keywords}
                _bind(node, target(*arguments, **keywords), environment)
            case "get_attr":
                environment[node.results[0]] = getattr(*arguments)
            case "set_attr":
                setattr(*arguments)
            case "get_item":
                holder, key = arguments
                environment[node.results[0]] = holder[key]
            case "set_item":
                holder, key, value = arguments
                holder[key] = value
            case "assert":
                if not arguments[0]:
                    raise AssertionFailed(node.origin, str(dict(node.keywords).get("message", "")))
            case _:
                raise ValueError(f"{describe(node)}: expected an operation that runs by itself")


def evaluate(argument: Any, environment: Mapping[Value, Any]) -> Any:
    """Return the Python object that an argument stands for."""
    kind = type(argument)
    if kind is Value:
        return environment[argument]
    if kind is Constant:
        return argument.object
    if kind is tuple:
        return tuple([evaluate(item, environment) for item in argument])
    if kind is list:
        return [evaluate(item, environment) for item in argument]
    if kind is dict:
        return {key: evaluate(item, environment) for key, item in argument.items()}
    if kind is slice:
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(evaluate(part, environment) for part in parts))
    return argument


def _bind(node: Node, returned: Any, environment: Environment) -> None:
    results = node.results
    if not results:
        return
    if results[0].spec is None:
        environment[results[0]] = returned
        return
    leaves = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    if len(leaves) != len(results):
        raise MalformedGraphError(f"{describe(node)}: expected {len(results)} tensors, got {len(leaves)}")
    environment.update(zip(results, leaves, strict=True))


def _run(task: _Task) -> list[Any]:
    waiting = [task]
    outputs: Any = None
    while waiting:
        try:
            waiting.append(waiting[-1].send(outputs))
            outputs = None
        except StopIteration as stop:
            waiting.pop()
            outputs = stop.value
    return outputs


class _Interpreter:
    """One run of one graph."""

    def __init__(
        self,
        graph: Graph,
        inputs: Sequence[Any],
        read_feed: Callable[[str], Any] | Mapping[str, Any] | None,
        modes: AmbientSwitch,
    ) -> None:
        self._graph = graph
        self._inputs = dict(zip(graph.inputs, inputs, strict=True))
        self._read_feed = read_feed.__getitem__ if isinstance(read_feed, Mapping) else read_feed
        self._modes = modes
        self.observer = Observer(self._inputs)

    def body(self, body: SubGraph, inputs: Sequence[Any], environment: Environment) -> _Task:
        """Run a body in an environment, which has the values of the bodies around it."""
        environment.update(zip(body.inputs, inputs, strict=True))
        for node in body.nodes:
            if node.op in CONTROL_FLOW:
                outputs = yield self._control_flow(node, environment)
                environment.update(zip(node.results, outputs, strict=True))
            else:
                self._step(node, environment)
        return [evaluate(output, environment) for output in body.outputs]

    def _step(self, node: Node, environment: Environment) -> None:
        self._modes.to(node.ambient)
        self.observer.before(node)
        match node.op:
            case "feed":
                name = str(dict(node.keywords)["name"])
                if self._read_feed is None:
                    raise ValueError(f"{describe(node)}: expected read_feed to be given, for feed {name!r}")
                environment[node.results[0]] = self._read_feed(name)
            case "fetch":
                pass
            case _:
                run_node(node, environment)
        arguments = [evaluate(argument, environment) for argument in node.arguments]
        self.observer.after(node, arguments, environment)

    def _control_flow(self, node: Node, environment: Environment) -> _Task:
        arguments = [evaluate(argument, environment) for argument in node.arguments]
        match node.op:
            case "if":
                chosen = node.subgraphs[0] if arguments[0] else node.subgraphs[1]
                return (yield self.body(chosen, arguments[1:], environment))
            case "switch":
                return (yield self.body(_branch(node, arguments[0]), arguments[1:], environment))
            case "while":
                condition, body = node.subgraphs
                while (yield self.body(condition, arguments, environment))[0]:
                    arguments = yield self.body(body, arguments, environment)
                return arguments
            case "loop":
                trips, *carried = arguments
                for index in range(trips):
                    carried = yield self.body(node.subgraphs[0], [index, *carried], environment)
                return carried
            case _:
                # A new environment: each invocation has values of its own, and reads the graph's inputs
                # besides.
                invoked = self._graph.subgraphs[str(node.target)]
                return (yield self.body(invoked, arguments, dict(self._inputs)))


def _branch(node: Node, index: int) -> SubGraph:
    if not 0 <= index < len(node.subgraphs):
        raise IndexError(f"{describe(node)}: expected an index below {len(node.subgraphs)}, got {index}")
    return node.subgraphs[index]

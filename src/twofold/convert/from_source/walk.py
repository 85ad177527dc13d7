"""Walking a function along a sequence of decisions: its blocks, and where it is cut.

`_Walk` defines the order in which decisions, sources and host values occur; the planner that `planner` generates
follows it. A cut is a decision too: a mark, `CUT`, says that the invocation went on.

A piece has what the values asked for depend on, and all else that depends on no invocation's results, so that calls
next to one another stay independent. Lists and dicts made inside are made anew by each block that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from twofold.convert.targets import method
from twofold.graph import Argument, Constant, Node, SubGraph, Value, map_values, values_in

from .blocks import (
    Block,
    Cut,
    Operand,
    decides,
    handed_over,
    host_values,
    in_tensor_slice,
    is_cut,
    read_by_host,
    tensor_parameters,
    tensor_results,
)
from .convert import Converted
from .slices import Kind, Slices

CUT = "cut"
"""The decision that stands for a cut."""
_END: Any = object()
_HOSTS: Any = object()


def arguments_of(function: str) -> str:
    """Return the name under which the tensor arguments of a function's invocations are kept."""
    return f"{function}.arguments"


def make_block(converted: Converted, slices: Slices, function: str, decisions: tuple[Any, ...]) -> Block:
    """Build the last block of a function for one sequence of decisions."""
    return _Walk(converted, slices, function, decisions).block()


def make_cut(converted: Converted, slices: Slices, function: str, decisions: tuple[Any, ...]) -> Cut:
    """Build what is computed where a sequence of decisions ends in a cut."""
    walk = _Walk(converted, slices, function, decisions)
    try:
        walk.block()
    except _Reached as reached:
        return reached.cut
    raise AssertionError(f"{function} is not cut after {decisions}")


def make_entry(function: str, body: SubGraph, slices: Slices) -> Block:
    """Build the block that takes the tensor arguments of an outermost call from the host."""
    values = tuple(Value(str(index), None) for index in range(len(tensor_parameters(body, slices))))
    name, places = arguments_of(function), tuple(range(len(values)))
    return Block(name, (), SubGraph(name, values, (), values), (), len(values), places, (), (), places)


class _Reached(Exception):
    """The decisions are used up."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut


@dataclass
class _Walk:
    converted: Converted
    slices: Slices
    function: str
    decisions: tuple[Any, ...]
    bound: dict[Value, Argument] = field(default_factory=dict[Value, Argument])
    nodes: list[Node] = field(default_factory=list[Node])
    """What is not part of a piece yet."""
    where: dict[Value, Operand] = field(default_factory=dict[Value, Operand])
    """The values that are results of sources."""
    settled: set[Value] = field(default_factory=set[Value])
    """Those of them that are results of pieces, or arguments."""
    hosts: list[Value] = field(default_factory=list[Value])
    exports: list[Argument] = field(default_factory=list[Argument])
    sources: list[str] = field(default_factory=list[str])
    mixed: set[Value] = field(default_factory=set[Value])
    done: set[int] = field(default_factory=set[int])
    """Nodes of the function, by id, that will not be met again."""
    loops: int = 0
    names: int = 0

    def block(self) -> Block:
        """Walk the function's body to its end. Raises `_Reached` where the decisions end in a cut."""
        body = self.converted.graph.subgraphs[self.function]
        self._rest, self._pieces = iter(self.decisions), 0
        self._whole = not is_cut(self.converted, self.slices, body)
        self._uses = None if self._whole else _uses(body)
        parameters = tensor_parameters(body, self.slices)
        if parameters:
            values = [self._fresh() for _ in parameters]
            self.bound.update(zip((body.inputs[index] for index in parameters), values, strict=True))
            self._source(arguments_of(self.function), values)
            self.settled.update(values)
        self._body(body)
        results = tensor_results(body, self.slices)
        outputs = [self._joined(body.outputs[index]) for index in results]
        numbers = (*results, *(-1 - index for index in range(len(self.exports))))
        return self._block(self.function, self.nodes, (*outputs, *self.exports), numbers)

    def _block(
        self, function: str, nodes: Sequence[Node], outputs: Sequence[Argument], results: tuple[int, ...]
    ) -> Block:
        """Make a block; unless the function is cut, it takes all sources and host values, in order."""
        used = {value for node in nodes for value in node.operands}
        used.update(value for output in outputs for value in values_in(output))
        operands = {value: operand for value, operand in self.where.items() if value in used}
        sources = sorted({operand.invocation for operand in operands.values()})
        hosts = [value for value in self.hosts if value in used]
        if self._whole:
            sources, hosts = list(range(len(self.sources))), self.hosts
        name = f"{function}.{'.'.join(str(decision) for decision in self.decisions)}".rstrip(".")
        return Block(
            function,
            self.decisions,
            SubGraph(name, (*operands, *hosts), tuple(nodes), tuple(outputs)),
            tuple(replace(operand, invocation=sources.index(operand.invocation)) for operand in operands.values()),
            len(hosts),
            results,
            tuple(self.sources[source] for source in sources),
            tuple(sources),
            tuple(self.hosts.index(value) for value in hosts),
        )

    def _source(self, callee: str, values: Sequence[Value]) -> None:
        """Take note of an invocation or piece that gives values."""
        for index, value in enumerate(values):
            self.where[value] = Operand(len(self.sources), callee, index)
        self.sources.append(callee)

    def _fresh(self) -> Value:
        self.names += 1
        return Value(str(self.names), None)

    # Bodies.

    def _body(self, body: SubGraph) -> None:
        for node in body.nodes:
            match node.op:
                case "if":
                    self._if(node)
                case "loop":
                    self._loop(node)
                case "while":
                    self._while(node)
                case "invoke":
                    self._invoke(node)
                case _:
                    self._plain(node)
            if not self.loops and self._uses is not None:
                self.done.update(_ids(node))

    def _if(self, node: Node) -> None:
        self._read(node)
        if not decides(node, self.slices):
            return
        side = node.subgraphs[0 if next(self._rest) else 1]
        self._body(side)
        for result, output in zip(node.results, side.outputs, strict=True):
            self._bind(result, output)

    def _loop(self, node: Node) -> None:
        if not decides(node, self.slices):
            return
        (body,) = node.subgraphs
        carried = body.inputs[1:]
        held = node.arguments[1:]
        for value, first in zip(carried, held, strict=True):
            self._bind(value, first)
        self.loops += 1
        for _ in range(next(self._rest)):
            self._body(body)
            after = [self._value(value, output) for value, output in zip(carried, body.outputs, strict=True)]
            self.bound.update((v, a) for v, a in zip(carried, after, strict=True) if a is not _HOSTS)
        self.loops -= 1
        self._copy(carried, node.results)

    def _while(self, node: Node) -> None:
        condition, body = node.subgraphs
        if not decides(node, self.slices):
            return
        for value, first in zip(condition.inputs, node.arguments, strict=True):
            self._bind(value, first)
        self.loops += 1
        while True:
            self._body(condition)
            self._read(node)
            if not next(self._rest):
                break
            self._copy(condition.inputs, body.inputs)
            self._body(body)
            after = [self._value(value, output) for value, output in zip(body.inputs, body.outputs, strict=True)]
            self.bound.update((c, a) for c, a in zip(condition.inputs, after, strict=True) if a is not _HOSTS)
        self.loops -= 1
        self._copy(condition.inputs, node.results)

    def _invoke(self, node: Node) -> None:
        callee = self.converted.graph.subgraphs[str(node.target)]
        parameters = tensor_parameters(callee, self.slices)
        if parameters:
            given = [self._joined(node.arguments[index]) for index in parameters]
            piece = self._piece(given)
            name = arguments_of(str(node.target))
            entry = self._block(name, (), given, tuple(range(len(given))))
            self._source(name, ())
            self._cut([*piece, entry], ())
        values = [self._fresh() for _ in node.results]
        self._source(str(node.target), values)
        self.bound.update(zip(node.results, values, strict=True))

    def _copy(self, values: Sequence[Value], copies: Sequence[Value]) -> None:
        for value, copied in zip(values, copies, strict=True):
            if value in self.bound:
                self.bound[copied] = self.bound[value]

    def _bind(self, value: Value, argument: Argument) -> None:
        held = self._value(value, argument)
        if held is not _HOSTS:
            self.bound[value] = held

    def _value(self, value: Value, argument: Argument) -> Argument:
        """Return what a value of the tensor slice is bound to; `_HOSTS` if it is the host's."""
        if self.slices.kinds[value] is Kind.TENSOR:
            return self._joined(argument)
        return self._argument(argument) if self.slices.kinds[value] is Kind.MIXED else _HOSTS

    def _joined(self, argument: Argument) -> Argument:
        """Return an argument that becomes a tensor value: a host value among its sources is an input of the block."""
        return map_values(argument, lambda v: self._host() if self.slices.kinds[v] is Kind.HOST else self._bound(v))

    def _host(self) -> Value:
        value = self._fresh()
        self.hosts.append(value)
        return value

    def _plain(self, node: Node) -> None:
        self._read(node)
        if id(node) in self.slices.exports:
            self.exports += [self._argument(value) for value in handed_over(node, self.slices)]
        if not in_tensor_slice(node, self.slices):
            return
        taken = {value: self._host() for value in dict.fromkeys(host_values(node, self.slices))}

        def rename(argument: Argument) -> Argument:
            return map_values(argument, lambda value: taken[value] if value in taken else self._argument(value))

        results = tuple(self._fresh() for _ in node.results)
        arguments = tuple(rename(argument) for argument in node.arguments)
        keywords = tuple((name, rename(argument)) for name, argument in node.keywords)
        self.nodes.append(replace(node, arguments=arguments, keywords=keywords, results=results))
        self.bound.update(zip(node.results, results, strict=True))
        self.mixed.update(r for r, value in zip(results, node.results, strict=True) if self._is_mixed(value))

    def _is_mixed(self, value: Value) -> bool:
        return self.slices.kinds[value] is Kind.MIXED

    def _argument(self, argument: Argument) -> Argument:
        return map_values(argument, self._bound)

    def _bound(self, value: Value) -> Argument:
        if value in self.bound:
            return self.bound[value]
        held = self.slices.fixed[value]
        return held if type(held) in (int, float, bool, str, type(None)) else Constant(held)

    # Cuts.

    def _cut(self, blocks: Sequence[Block], wanted: Sequence[Operand]) -> None:
        if next(self._rest, _END) is _END:
            raise _Reached(Cut(tuple(blocks), tuple(wanted)))

    def _read(self, node: Node) -> None:
        """Cut where the host reads the values of tensors."""
        values = [self._argument(value) for value in read_by_host(node, self.slices)]
        if not values:
            return
        loose = [value for value in values if not isinstance(value, Value) or value in self.hosts]
        placed = {id(value): self._fresh() for value in loose}
        piece = self._piece(values, {placed[id(value)]: value for value in loose})
        self._cut(piece, [self.where[placed.get(id(value), value)] for value in values])  # type: ignore[arg-type]

    def _piece(self, asked: Sequence[Argument], loose: dict[Value, Argument] | None = None) -> list[Block]:
        """Make the piece that has the values in `asked`, if they are not results of sources yet.

        `loose` has what is no value of its own, and the value that it shall be.
        """
        needed = {value for argument in asked for value in values_in(argument)}
        needed.difference_update(self.where, self.hosts)
        if not needed and not loose:
            return []
        nodes = self._closure(needed)
        moved = [node for node in nodes if not self._is_container(node)]
        made = [value for node in moved for value in node.results]
        left = [node for node in self.nodes if node not in moved]
        outputs = [value for value in made if value in needed or self._is_used(value, left)]
        named = {value: value for value in outputs} | (loose or {})
        name = f"{self.function}#{'.'.join(map(str, self.decisions[: self._steps()]))}"
        block = self._block(name, nodes, list(named.values()), tuple(range(len(named))))
        self.nodes = left
        self._source(name, list(named))
        self.settled.update(named)
        return [block]

    def _steps(self) -> int:
        """Return how many decisions were taken so far."""
        return len(self.decisions) - sum(1 for _ in copy(self._rest))

    def _closure(self, needed: Iterable[Value]) -> list[Node]:
        """Return the nodes that a piece consists of, in order."""
        if any(_writes(node) for node in self.nodes):
            return list(self.nodes)
        free: set[Value] = {*self.settled, *self.hosts}
        wanted, chosen = set(needed), set[Node]()
        for node in self.nodes:
            if not self._is_container(node) and free.issuperset(node.operands):
                free.update(node.results)
                chosen.add(node)
                wanted.update(node.operands)
        for node in reversed(self.nodes):
            changed = self.mixed.intersection(node.operands) if self._is_container(node) else ()
            if node in chosen or not wanted.isdisjoint((*node.results, *changed)):
                chosen.add(node)
                wanted.update(node.operands)
        return [node for node in self.nodes if node in chosen]

    def _is_container(self, node: Node) -> bool:
        """Say whether a node makes, or may change, a list or dict that holds tensors."""
        changes = node.target in (method, list.append) and node.arguments[0] in self.mixed
        return not node.results or changes or not self.mixed.isdisjoint(node.results)

    def _is_used(self, value: Value, left: Sequence[Node]) -> bool:
        """Say whether a value may be asked for later on."""
        if any(value in node.operands for node in left) or any(value in values_in(e) for e in self.exports):
            return True
        assert self._uses is not None
        return any(
            not self.done.issuperset(self._uses.get(static, ()))
            for static, held in self.bound.items()
            if value in values_in(held)
        )


def _writes(node: Node) -> bool:
    """Say whether a node writes to a tensor."""
    name = node.arguments[1] if node.target is method else getattr(node.target, "__name__", "")
    in_place = isinstance(name, str) and name.endswith("_") and not name.endswith("__")
    return bool(node.results) and (in_place or name in ("iadd", "isub", "imul", "itruediv"))


def _ids(node: Node) -> Iterator[int]:
    yield id(node)
    for body in node.subgraphs:
        for nested in body.nodes:
            yield from _ids(nested)


def _uses(body: SubGraph) -> dict[Value, set[int]]:
    """Return the nodes, by id, that use each value; an output of the function is used by none that is ever done."""
    uses: dict[Value, set[int]] = {}

    def collect(body: SubGraph, owner: int) -> None:
        for node in body.nodes:
            for value in node.operands:
                uses.setdefault(value, set()).add(id(node))
            for nested in node.subgraphs:
                collect(nested, id(node))
        for value in values_in(body.outputs):
            uses.setdefault(value, set()).add(owner)

    collect(body, 0)
    return uses

"""Cut a graph into bodies that can be compiled and launched one by one.

What crosses a cut is memory, never a view of it: a view is made again from its base where it is needed. So a body
never gets two inputs that alias each other unless the unit itself did.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from twofold.capture.trace import hidden_writes
from twofold.graph import Graph, Node, Value, values_in


@dataclass(frozen=True, eq=False)
class Segment:
    """A straight run of nodes that is launched as one. Its outputs are what anyone reads afterwards."""

    graph: Graph

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(value for output in self.graph.outputs for value in values_in(output))


def is_view(node: Node) -> bool:
    """Whether an operation only looks at its first operand in another way, by its schema."""
    return node.op == "call" and isinstance(node.target, torch._ops.OpOverload) and _returns_views(node.target)


@functools.cache
def _returns_views(target: torch._ops.OpOverload) -> bool:
    schema = target._schema
    if schema.is_mutable or not schema.returns:
        return False
    return all(result.alias_info is not None for result in schema.returns)


def view_nodes(nodes: Sequence[Node]) -> dict[Value, Node]:
    """Map each value that is a view to the node that makes it."""
    return {result: node for node in nodes if is_view(node) for result in node.results}


def root_of(value: Value, views: dict[Value, Node]) -> Value:
    """Return the value whose memory `value` shows."""
    while value in views:
        value = views[value].operands[0]
    return value


def is_read_in_order(tensor: torch.Tensor) -> bool:
    """Whether what is launched now reads a tensor before any later write of Python's: the stream orders them."""
    return tensor.is_cuda


MAX_UNDONE_BYTES = 64 * 1024
"""The largest memory that a segment launched ahead of Python may write to: it is copied before, to be put back."""
MAX_UNDONE_TENSORS = 3
"""Of such memory, how many tensors one operation may write to. A batch norm writes to three; an optimizer to the
counters of all parameters, each of which would be copied by itself, and all that the optimizer writes with them."""


@dataclass(frozen=True, eq=False)
class Cuts:
    """A unit's graph in segments. `positions`: for each fetch in order, how many segments run before it."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]


def cut(
    graph: Graph, views: dict[Value, Node], finals: Collection[Value], late: Sequence[Collection[Value]] | None = None
) -> Cuts:
    """Cut a unit's graph at each fetch. `views` loses the views that a segment hands out by themselves.

    `late`: for each fetch in order, the feeds that Python gives only after it. If given, what follows a fetch is cut
    once more: before the first node that reads such a feed or writes to much or many of what outlives the unit. The
    first part can be launched while Python still looks at the fetched value.
    """
    runs: list[list[Node]] = [[]]
    needed: list[set[Value]] = [set()]
    positions: list[int] = []
    goes_ahead = False
    lasting = set(graph.inputs)

    def begin_run() -> None:
        runs.append([])
        needed.append(set())

    for node in graph.nodes:
        if node.op == "fetch":
            needed[-1].update(node.operands)
            positions.append(len(runs))
            begin_run()
            goes_ahead = late is not None and len(positions) <= len(late)
        elif node.op == "call":
            if goes_ahead and late is not None and _must_wait(node, views, late[len(positions) - 1], lasting):
                goes_ahead = False
                if runs[-1]:
                    begin_run()
            runs[-1].append(node)
    bodies = carve(runs, needed, views, finals, "segment")
    return Cuts(tuple(Segment(body) for body in bodies), tuple(positions))


def _must_wait(node: Node, views: dict[Value, Node], late: Collection[Value], lasting: Collection[Value]) -> bool:
    if any(root_of(value, views) in late for value in node.operands):
        return True
    written = [root for value in writes_of(node) if (root := root_of(value, views)) in lasting]
    return len(written) > MAX_UNDONE_TENSORS or any(bytes_of(root) > MAX_UNDONE_BYTES for root in written)


def bytes_of(value: Value) -> int:
    """Return the memory that a value of known size takes; 0 for what is no tensor."""
    spec = value.spec
    return 0 if spec is None else math.prod(n for n in spec.shape if n is not None) * spec.dtype.itemsize


def carve(
    runs: Sequence[Sequence[Node]],
    needed: Sequence[set[Value]],
    views: dict[Value, Node],
    finals: Collection[Value],
    name: str,
) -> list[Graph]:
    """Make one graph of each run of nodes. `needed`: what is read between a run and the next."""
    wanted_after: list[set[Value]] = [set() for _ in runs]
    later = set(finals)
    for index in range(len(runs) - 1, -1, -1):
        later |= needed[index]
        wanted_after[index] = set(later)
        later |= {value for node in runs[index] for value in node.operands}
    bodies: list[Graph] = []
    for index, run in enumerate(runs):
        body = _Body(run, views, wanted_after[index])
        bodies.append(body.graph(f"{name}{index}"))
    return bodies


class _Body:
    def __init__(self, run: Sequence[Node], views: dict[Value, Node], wanted: set[Value]) -> None:
        self.views = views
        self.nodes: list[Node] = []
        self.inputs: dict[Value, None] = {}
        self.own = {result for node in run for result in node.results}
        self.made: set[Value] = set()
        for node in run:
            self._require(node)
            self.nodes.append(node)
            self.made.update(node.results)
        self.outputs = self._outputs(wanted)

    def _require(self, node: Node) -> None:
        for value in node.operands:
            if value in self.made or value in self.inputs:
                continue
            maker = self.views.get(value)
            if maker is None:
                self.inputs[value] = None
            else:
                self._require(maker)
                self.nodes.append(maker)
                self.made.update(maker.results)

    def _outputs(self, wanted: set[Value]) -> tuple[Value, ...]:
        shown: dict[Value, list[Value]] = {}
        for value in sorted(wanted & self.own, key=_by_name):
            shown.setdefault(root_of(value, self.views), []).append(value)
        outputs: list[Value] = []
        for root, values in shown.items():
            if root not in self.own:
                continue
            if len(values) == 1 and len(self._results_of(values[0])) == 1:
                self.views.pop(values[0], None)
                outputs.append(values[0])
            else:
                outputs.append(root)
        return tuple(outputs)

    def _results_of(self, value: Value) -> tuple[Value, ...]:
        maker = self.views.get(value)
        return (value,) if maker is None else maker.results

    def graph(self, name: str) -> Graph:
        return Graph(name, tuple(self.inputs), tuple(self.nodes), self.outputs)


def _by_name(value: Value) -> str:
    return value.name


def writes_of(node: Node) -> tuple[Value, ...]:
    """Return the values whose memory a call changes, batch norm's unannounced running statistics included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # a fused optimizer kernel called by its builtin: it may write to all it is given
        return node.operands
    hidden = hidden_writes(node.target, node.arguments)
    if hidden:
        return tuple(value for index in hidden for value in values_in(node.arguments[index]))
    if not schema.is_mutable:
        return ()
    keywords = dict(node.keywords)
    written: list[Value] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.arguments[index] if index < len(node.arguments) else keywords.get(argument.name)
            written.extend(values_in(given))
    return tuple(written)


def _is_update(node: Node) -> bool:
    return getattr(node.target, "__name__", "").startswith("_fused_")


def before_last_updates(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return nodes less those that cannot fail once they have begun, for they allocate nothing.

    These are the updates in place at the end, as of an optimizer that goes over its parameters one by one, and fused
    updates, with the counting of steps right before each.
    """
    kept: list[Node] = []
    follows_update = False
    for node in reversed(nodes):
        is_update = _is_update(node)
        is_count = follows_update and node.target is torch.ops.aten._foreach_add_.Scalar
        if not is_update and not is_count and (kept or not _allocates_nothing(node)):
            kept.append(node)
        follows_update = is_update  # in reverse: what comes before an update
    return tuple(reversed(kept))


def _allocates_nothing(node: Node) -> bool:
    """Whether an operation changes the elements of a tensor in place, and no operand has to be converted for that."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    if writes_of(node) != node.operands[:1]:  # `Tag.inplace`, which PyTorch 2.11 does not have
        return False
    specs = [operand.spec for operand in node.operands if operand.spec is not None]  # numbers have none
    return len({(spec.dtype, spec.shape, spec.device) for spec in specs}) == 1


def unnoticed_roots(segment: Segment, views: dict[Value, Node], is_captured: bool) -> list[Value]:
    """Return the values of other bodies that a segment changes with no version counter of PyTorch's noticing.

    Fused updates of optimizers never advance it, and nothing that a captured graph does. One for each change.
    """
    made = view_nodes(segment.graph.nodes) | views
    written = [
        root_of(value, made)
        for node in segment.graph.nodes
        if is_captured or _is_update(node)
        for value in writes_of(node)
    ]
    return [root for root in written if root in segment.inputs]


def written_roots(segment: Segment, views: dict[Value, Node]) -> set[Value]:
    """Return the values of other bodies whose memory a segment changes."""
    made = view_nodes(segment.graph.nodes) | views
    roots = {root_of(value, made) for node in segment.graph.nodes for value in writes_of(node)}
    return roots & set(segment.inputs)

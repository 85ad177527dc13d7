"""The stages of a block: which node runs when, and the text that runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from .vectorize import Joint, NotBatchableError, Rows

aten = torch.ops.aten


class Stage(IntEnum):
    """When a node runs. `LEVEL` and `BACK` run once for each level, the others once for all invocations."""

    BEFORE = 0
    LEVEL = 1
    AFTER = 2
    TURN = 3
    BACK = 4
    FINISH = 5


BY_LEVEL = (Stage.LEVEL, Stage.BACK)

_VIEWS = frozenset(
    {
        aten.t.default,
        aten.view.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.unsqueeze.default,
        aten.squeeze.dims,
        aten.squeeze.dim,
        aten.expand.default,
        aten.select.int,
        aten.permute.default,
        aten.transpose.int,
    }
)


def _is_view(node: fx.Node) -> bool:
    """Say whether a node is so cheap that each stage makes its own."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in _VIEWS
    return node.target in _VIEWS


@dataclass(frozen=True)
class Crossing:
    """A value that one stage takes from another: rows are along `dimension`, `each` for an invocation; or it has none.

    Without rows, what `BACK` makes is a sum over them (a parameter's gradient), and anything else the same for all.
    """

    name: str
    source: Stage | None
    dimension: int | None
    each: int = 1


@dataclass
class StageCode:
    """One stage as a function `run(n, *taken)`; `taken` says what it needs, `given` names what it returns."""

    run: Callable[..., tuple[Any, ...]]
    taken: list[Crossing]
    given: list[str]
    text: str


@dataclass
class Staged:
    """A block cut into stages. Names are of values; those in `inputs` and `tangents` come from the executor."""

    stages: dict[Stage, StageCode]
    inputs: list[str]
    tangents: list[str | None]
    outputs: list[str]
    input_gradients: list[str | None]
    parameter_gradients: list[str | None]
    crossings: dict[str, Crossing]
    chained: frozenset[tuple[str, int]]
    """The tables through which invocations depend on one another level by level."""
    written: list[tuple[int, tuple[str, int]]]
    """Which outputs are written to which table."""


def own_term(joint: Joint, output: int, children: Iterable[int]) -> fx.Node | None:
    """Return the term that an output adds to the sum of its children's; None if it is no such sum.

    `children` are the inputs that are the same result of other invocations. Each must be used once, in the sum.
    """
    places = {joint.inputs[index] for index in children}
    terms: list[Any] = []
    found: list[fx.Node] = []

    def take_apart(node: Any, shape: Any) -> bool:
        if not isinstance(node, fx.Node) or node.meta["val"].dim() == 0:
            terms.append(node)
            return True
        if node.meta["val"].shape != shape:
            return False
        if node in places:
            found.append(node)
            return True
        if node.target is aten.add.Tensor and not node.kwargs and not places.isdisjoint(_ancestors(node)):
            return take_apart(node.args[0], shape) and take_apart(node.args[1], shape)
        terms.append(node)
        return places.isdisjoint(_ancestors(node))

    root = joint.outputs[output]
    if root not in joint.rows or not take_apart(root, root.meta["val"].shape):
        return None
    if len(set(found)) != len(found) or any(len(place.users) > 1 for place in found):
        return None
    if any(place.users for place in places.difference(found)):
        return None
    graph = joint.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "output")):
        full = [term for term in terms if isinstance(term, fx.Node) and term in joint.rows]
        total = full[0] if full else _zeros_like(joint, root)
        if full:
            terms.remove(total)
        for term in terms:
            total = _like(joint, root, graph.call_function(aten.add.Tensor, (total, term)))
    return total


def _like(joint: Joint, model: fx.Node, made: fx.Node) -> fx.Node:
    made.meta["val"] = model.meta["val"]
    joint.rows[made] = joint.rows[model]
    return made


def _zeros_like(joint: Joint, model: fx.Node) -> fx.Node:
    value, (dimension, each) = model.meta["val"], joint.rows[model]
    shape: list[Any] = list(value.shape)
    shape[dimension] = Rows(each)
    keywords = {"dtype": value.dtype, "device": value.device}
    return _like(joint, model, joint.graph.call_function(aten.zeros.default, (shape,), keywords))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return seen


@dataclass
class Cut:
    """Assigns stages to the nodes of a joint graph and writes their text.

    `chain_inputs` and `chain_outputs` are those through which invocations depend on one another level by level;
    `terms` replaces outputs that are sums by their own terms; `summed_inputs` are the inputs that these sums alone
    take.
    """

    joint: Joint
    chain_inputs: frozenset[int]
    chain_outputs: frozenset[int]
    terms: dict[int, fx.Node]
    summed_inputs: frozenset[int]
    stage: dict[fx.Node, Stage] = field(default_factory=dict[fx.Node, Stage])

    def staged(
        self, differentiate: bool, chained: frozenset[tuple[str, int]], tables: Sequence[tuple[str, int]]
    ) -> Staged:
        """Return the block cut into stages; without `differentiate`, the forward ones alone.

        `chained` are the tables of all blocks, `tables` those of the outputs in `chain_outputs`, in order.
        """
        joint = self.joint
        outputs = [self.terms.get(index, node) for index, node in enumerate(joint.outputs)]
        gradients = joint.input_gradients if differentiate else [None] * len(joint.inputs)
        gradients = [None if i in self.summed_inputs else g for i, g in enumerate(gradients)]
        parameters = joint.parameter_gradients if differentiate else []
        wanted = [node for node in (*outputs, *gradients, *parameters) if node is not None]
        self._assign(outputs, gradients, wanted)
        crossings = self._crossings(wanted)
        stages = {stage: self._write(stage, crossings, wanted) for stage in Stage}
        named = {node.name: crossing for node, crossing in crossings.items()}
        return Staged(
            stages,
            [node.name for node in joint.inputs],
            [None if node is None else node.name for node in joint.tangents],
            [node.name for node in outputs],
            [None if node is None else node.name for node in gradients],
            [None if node is None else node.name for node in parameters],
            named,
            chained,
            list(zip(sorted(self.chain_outputs), tables, strict=True)),
        )

    def _assign(self, outputs: list[fx.Node], gradients: list[fx.Node | None], wanted: list[fx.Node]) -> None:
        joint = self.joint
        children = {joint.inputs[index] for index in self.chain_inputs}
        parents = {joint.tangents[index] for index in self.chain_outputs}
        tangents = {node for node in joint.tangents if node is not None}
        upward = (
            set().union(*(_ancestors(outputs[index]) for index in self.chain_outputs)) if self.chain_outputs else set()
        )
        downward_roots = [gradients[index] for index in self.chain_inputs if gradients[index] is not None]
        downward = set().union(*(_ancestors(node) for node in downward_roots if node is not None))
        forward = set().union(*(_ancestors(node) for node in outputs))
        needed = set().union(*(_ancestors(node) for node in wanted))
        from_children: set[fx.Node] = set(children)
        from_parents: set[fx.Node] = {node for node in parents if node is not None}
        backward: set[fx.Node] = set(tangents)
        for node in joint.graph.nodes:
            sources = node.all_input_nodes
            for group in (from_children, from_parents, backward):
                if any(source in group for source in sources):
                    group.add(node)
            if node not in needed or node.op in ("placeholder", "output", "get_attr"):
                continue
            if node.target is operator.getitem and not _is_view(node):
                self.stage[node] = self.stage[sources[0]]
            elif node in backward:
                back = Stage.BACK if node in downward else Stage.FINISH
                self.stage[node] = back if node in from_parents else Stage.TURN
            elif node not in forward:
                self.stage[node] = Stage.TURN
            elif node in from_children:
                self.stage[node] = Stage.LEVEL if node in upward else Stage.AFTER
            else:
                self.stage[node] = Stage.BEFORE
            self._check_rows(node, from_children)

    def _check_rows(self, node: fx.Node, from_children: set[fx.Node]) -> None:
        single = isinstance(node.meta.get("val"), Tensor) and node not in self.joint.rows
        if single and self.stage[node] is Stage.LEVEL and node in from_children:
            raise NotBatchableError(f"{node.target} relates invocations to one another")

    def _base(self, node: fx.Node, stage: Stage) -> fx.Node:
        """Return the node that a stage takes instead of a view of it that it makes itself."""
        while _is_view(node) and self.stage.get(node) is not stage:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _sources(self, node: fx.Node, stage: Stage) -> list[fx.Node]:
        return [self._base(source, stage) for source in node.all_input_nodes]

    def _crossings(self, wanted: list[fx.Node]) -> dict[fx.Node, Crossing]:
        """Return the values that leave the stage they are made in, or come from the executor."""
        found: dict[fx.Node, Crossing] = {}

        def cross(node: fx.Node) -> None:
            dimension, each = self.joint.rows.get(node, (None, 1))
            found[node] = Crossing(node.name, self.stage.get(node), dimension, each)

        for node, stage in self.stage.items():
            for source in self._sources(node, stage):
                if self.stage.get(source) is not stage and source.op != "get_attr":
                    cross(source)
        for node in wanted:
            cross(node)
        return found

    def _write(self, stage: Stage, crossings: dict[fx.Node, Crossing], wanted: list[fx.Node]) -> StageCode:
        writer = _Writer(self, stage)
        for node in self.joint.graph.nodes:
            if self.stage.get(node) is stage:
                writer.node(node)
        given = [node for node in crossings if self.stage.get(node) is stage]
        for node in given:
            writer.name(node)
        return writer.code([node.name for node in given], crossings)


@dataclass
class _Writer:
    cut: Cut
    stage: Stage
    lines: list[str] = field(default_factory=list[str])
    objects: dict[str, Any] = field(default_factory=dict[str, Any])
    made: set[fx.Node] = field(default_factory=set[fx.Node])
    taken: dict[fx.Node, None] = field(default_factory=dict[fx.Node, None])

    def name(self, node: fx.Node) -> str:
        """Return the name of a value in this stage; make the view, or take the value, that it is."""
        if node in self.made:
            return node.name
        if node.op == "get_attr":
            self.objects[node.name] = self.cut.joint.constants[node.name]
        elif self.cut.stage.get(node) is self.stage or _is_view(node):
            self.node(node)
        else:
            self.taken[node] = None
        self.made.add(node)
        return node.name

    def node(self, node: fx.Node) -> None:
        """Write one operation."""
        if node in self.made:
            return
        self.made.add(node)
        arguments = [self._text(argument) for argument in node.args]
        self.lines.append(f"    {node.name} = {self._operation(node, arguments)}")

    def _operation(self, node: fx.Node, arguments: list[str]) -> str:
        target: Any = node.target
        if target is operator.getitem:
            return f"{arguments[0]}[{arguments[1]}]"
        if target is aten.view.default:
            return f"{arguments[0]}.view({arguments[1]})"
        if target is aten.t.default:
            return f"{arguments[0]}.t()"
        keywords = [f"{name}={self._text(argument)}" for name, argument in node.kwargs.items()]
        function = _FAST.get(target, target)
        name = f"f_{str(target).replace('.', '_').replace('::', '_')}"
        self.objects[name] = function
        return f"{name}({', '.join([*arguments, *keywords])})"

    def _text(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self.name(argument)
        if isinstance(argument, Rows):
            return f"{argument.each} * n" if argument.each != 1 else "n"
        if isinstance(argument, tuple):
            return f"({''.join(self._text(item) + ', ' for item in argument)})"
        if isinstance(argument, list):
            return f"[{', '.join(self._text(item) for item in argument)}]"
        if argument is None or type(argument) in (int, bool, str):
            return repr(argument)
        name = f"c{len(self.objects)}"
        self.objects[name] = argument
        return name

    def code(self, given: list[str], crossings: dict[fx.Node, Crossing]) -> StageCode:
        """Compile the text."""
        missing = [node for node in self.taken if node not in crossings]
        if missing:
            raise NotBatchableError(f"{missing[0]} is needed in {self.stage.name} and not handed on")
        parameters = ", ".join(["n", *(node.name for node in self.taken)])
        returned = f"    return ({''.join(name + ', ' for name in given)})"
        text = "\n".join([f"def run({parameters}):", *self.lines, returned, ""])
        namespace = dict(self.objects)
        exec(compile(text, f"<twofold {self.stage.name.lower()}>", "exec"), namespace)
        return StageCode(namespace["run"], [crossings[node] for node in self.taken], given, text)


_FAST: dict[Any, Any] = {
    aten.mul.Tensor: torch.mul,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.addcmul.default: torch.addcmul,
    aten.cat.default: torch.cat,
    aten.split.Tensor: torch._VF.split,  # pyright: ignore[reportAttributeAccessIssue] torch.split is Python
    aten.unsqueeze.default: torch.unsqueeze,
    aten.neg.default: torch.neg,
}
"""PyTorch's own Python functions, which are faster to call than the overloads they stand for."""

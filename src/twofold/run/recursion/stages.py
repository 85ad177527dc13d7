"""The stages of a block: which node runs when."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .factors import Link, Table, hoist_factors, join_children, join_gradients, join_views
from .native import NativeWriter, NoNativeForm, users_of
from .parts import BY_LEVEL, Crossing, NativeCode, Stage, StageCode, Staged, is_view
from .passes import Pass, passes
from .vectorize import Joint, NotBatchableError, Rows
from .views import in_place
from .writer import Writer, writes

aten = torch.ops.aten


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

    root = joint.wanted[0][output]
    if root not in joint.rows or not take_apart(root, root.meta["val"].shape):
        return None
    if len(set(found)) != len(found) or any(len(place.users) > 1 for place in found):
        return None
    if any(place.users for place in places.difference(found)):
        return None
    graph = joint.graph
    with graph.inserting_before(joint.end):
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
    """Assigns stages to the nodes of a joint graph, which is rewritten, and writes their text.

    `operands` has the table of those operands through which invocations depend on one another level by level, `written`
    that of such outputs. `terms` replaces outputs that are sums by their own terms; `summed_inputs` are the operands
    that these sums alone take.
    """

    joint: Joint
    operands: dict[int, Table]
    written: dict[int, Table]
    terms: dict[int, fx.Node]
    summed_inputs: frozenset[int]
    stage: dict[fx.Node, Stage] = field(default_factory=dict[fx.Node, Stage])
    children: dict[fx.Node, Link] = field(default_factory=dict[fx.Node, Link])
    owed: list[tuple[Link, fx.Node]] = field(default_factory=list[tuple[Link, fx.Node]])
    gathered: set[fx.Node] = field(default_factory=set[fx.Node])
    crossings: dict[fx.Node, Crossing] = field(default_factory=dict[fx.Node, Crossing])
    moved: list[fx.Node] = field(default_factory=list[fx.Node])
    """What the levels backward do by themselves where they are native."""
    later: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """What adds native code to the stages, in order."""

    def staged(self, differentiate: bool, chained: frozenset[Table]) -> Staged:
        """Return the block cut into stages; without `differentiate`, the forward ones alone.

        `chained` are the tables of all blocks.
        """
        joint = self.joint
        links = self._rewrite(differentiate)
        outputs, gradients, parameters = joint.wanted
        self.owed = [(link, node) for link, node in zip(links, gradients, strict=False) if node is not None]
        hosts = gradients[len(links) :]
        self._assign()
        self._find_crossings([*outputs, *hosts, *parameters])
        stages = {stage: self._write(stage) for stage in Stage}
        return Staged(
            stages,
            {node.name: link for node, link in self.children.items()},
            [node.name for node in joint.inputs[len(self.operands) + len(self.summed_inputs) :]],
            [None if node is None else node.name for node in joint.tangents],
            [node.name for node in outputs],
            [None if node is None else node.name for node in hosts],
            [None if node is None else node.name for node in parameters],
            {node.name: crossing for node, crossing in self.crossings.items()},
            chained,
            self.written,
            list(joint.constants.values()),
            self.later,
        )

    def _rewrite(self, differentiate: bool) -> list[Link]:
        """Have the graph compute what is wanted, with few operations a level; return what is owed to children."""
        joint = self.joint
        outputs, gradients, parameters = joint.wanted
        outputs = [self.terms.get(index, node) for index, node in enumerate(outputs)]
        gradients = [g if differentiate and i not in self.summed_inputs else None for i, g in enumerate(gradients)]
        joint.want(outputs, gradients, parameters if differentiate else [])
        self.children = join_children(joint, self.operands)
        joint.want(self._written_once(joint.wanted[0]), *joint.wanted[1:])
        operands = self.operands | dict.fromkeys(self.summed_inputs, ("", 0))
        links = join_gradients(joint, operands)
        if links:
            hoist_factors(joint, [tangent for index in self.written if (tangent := joint.tangents[index]) is not None])
        join_views(joint)
        return links

    def _written_once(self, outputs: list[fx.Node]) -> list[fx.Node]:
        """Make each output that is written to a table a value of its own."""
        seen: set[fx.Node] = set()
        for index in self.written:
            node = outputs[index]
            if node in seen or node.op == "placeholder":
                outputs[index] = self.joint.call(self.joint.end, aten.clone.default, (node,), node.meta["val"].shape)
            seen.add(node)
        return outputs

    def _assign(self) -> None:
        joint = self.joint
        outputs, gradients, parameters = joint.wanted
        parents = {joint.tangents[index] for index in self.written}
        tangents = {node for node in joint.tangents if node is not None}
        upward = _all_ancestors(outputs[index] for index in self.written)
        downward = _all_ancestors(node for _, node in self.owed)
        forward = _all_ancestors(outputs)
        needed = _all_ancestors([*outputs, *gradients, *parameters])
        from_children: set[fx.Node] = set(self.children)
        from_parents: set[fx.Node] = {node for node in parents if node is not None}
        backward: set[fx.Node] = set(tangents)
        for node in joint.graph.nodes:
            sources = node.all_input_nodes
            for group in (from_children, from_parents, backward):
                if any(source in group for source in sources):
                    group.add(node)
            if node not in needed or node.op in ("placeholder", "output", "get_attr"):
                continue
            if node.target is operator.getitem and not is_view(node):
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

    def base(self, node: fx.Node, stage: Stage) -> fx.Node:
        """Return the node that a stage takes instead of a view of it that it makes itself."""
        while is_view(node) and self.stage.get(node) is not stage:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _find_crossings(self, wanted: list[fx.Node | None]) -> None:
        """Find the values that leave the stage they are made in, or come from the executor."""
        for node, stage in self.stage.items():
            for source in node.all_input_nodes:
                self._cross(self.base(source, stage), stage)
        for _, node in self.owed:
            self._cross(self.base(node, Stage.BACK), Stage.BACK)
        for node in wanted:
            if node is not None:
                self._cross(node, None)

    def _cross(self, node: fx.Node, taker: Stage | None) -> None:
        if node in self.children and taker is Stage.LEVEL:
            self.gathered.add(node)
            return
        own = taker is not None and self.stage.get(node) is taker
        if own or node.op == "get_attr" or node in self.crossings:
            return
        dimension, each = self.joint.rows.get(node, (None, 1))
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            described = tuple(value.shape[1:]), value.dtype, value.device
        else:
            described = (), None, None
        self.crossings[node] = Crossing(node.name, self.stage.get(node), dimension, each, *described)

    def _write(self, stage: Stage) -> StageCode:
        made = [node for node in self.crossings if self.stage.get(node) is stage]
        results = [node for index, node in enumerate(self.joint.wanted[0]) if index in self.written]
        rows = made if stage in BY_LEVEL else results if stage is Stage.BEFORE else []
        kept = [node for node in rows if self.stage.get(node) is stage and self.crossings[node].dimension == 0]
        inside: dict[fx.Node, fx.Node] = {}
        if stage in BY_LEVEL:
            inside = self._make_rooms(stage, kept)
        writer = Writer(self.joint, self.stage, stage, self.children, kept, inside)
        nodes = [n for n in self.joint.graph.nodes if self.stage.get(n) is stage and (n in kept or not is_view(n))]
        for node in nodes:
            writer.node(node)
        if stage is Stage.BACK:
            for link, node in self.owed:
                writer.give(link, node)
        returned = [node for node in made if node not in kept and node not in inside]
        for node in returned:
            writer.name(node)
        code = writer.code(returned, self.crossings)
        self.later.append(lambda: self._write_native(stage, code, nodes, kept, inside, returned))
        return code

    def _write_native(
        self,
        stage: Stage,
        code: StageCode,
        nodes: list[fx.Node],
        kept: list[fx.Node],
        inside: dict[fx.Node, fx.Node],
        returned: list[fx.Node],
    ) -> None:
        """Add native code to a stage, those before it first."""
        if stage in BY_LEVEL:
            apart = "it makes values that are joined after the levels"
            code.native = apart if returned else self._native(stage, nodes, kept, inside)
        if stage not in BY_LEVEL and (found := passes(self.joint, nodes, self.stage, stage)):
            writer = Writer(self.joint, self.stage, stage, self.children, kept, inside, found)
            for node in nodes:
                writer.node(node)
            for node in returned:
                writer.name(node)
            code.in_passes = writer.code(returned, self.crossings)
            code.passes = [each.code for each in found]
            if stage is Stage.TURN:
                self._relieve(code, found, nodes, returned)
        if stage is Stage.BACK and isinstance(code.native, NativeCode) and self.moved:
            relieving = self._native(stage, [*self.moved, *nodes], kept, inside)
            code.relieving = relieving if isinstance(relieving, NativeCode) else None

    def _relieve(self, code: StageCode, found: list[Pass], nodes: list[fx.Node], returned: list[fx.Node]) -> None:
        """Leave to the levels backward what they alone take: so it need not go through memory for all rows."""
        wanted = {node for group in self.joint.wanted for node in group}
        for each in found:
            users = [user for node in each.made for user in users_of(node)]
            if any(self.stage.get(user) is not Stage.BACK for user in users) or not wanted.isdisjoint(each.made):
                continue
            self.moved = list(each.nodes)
            writer = Writer(self.joint, self.stage, Stage.TURN, self.children, [], {})
            for node in nodes:
                if node not in each.nodes:
                    writer.node(node)
            rest = [node for node in returned if node not in each.made]
            for node in rest:
                writer.name(node)
            code.relieved = writer.code(rest, self.crossings)
            return

    def _native(
        self, stage: Stage, nodes: list[fx.Node], kept: list[fx.Node], inside: dict[fx.Node, fx.Node]
    ) -> NativeCode | str:
        """Return a stage as C++, or why it cannot be."""
        stages = {**self.stage, **dict.fromkeys(nodes, stage)}
        writer = NativeWriter(self.joint, stages, stage, self.children, kept, inside, self.crossings)
        try:
            return writer.code(nodes, self.owed if stage is Stage.BACK else [])
        except NoNativeForm as missing:
            return str(missing)

    def _make_rooms(self, stage: Stage, kept: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Have what a level views kept for all levels, so that it is viewed once.

        Returns what is written over such a value: the value for each.
        """
        own = {node: None for node in self.joint.graph.nodes if self.stage.get(node) is stage}
        joins = {node for node in kept if node.target is aten.cat.default}  # what these join is written into them
        rooms = [node for node in own if writes(node) and node not in kept and self.joint.keeps_rows_first(node)]
        rooms = [node for node in rooms if any(is_view(user) and not joins >= user.users.keys() for user in node.users)]
        if stage is Stage.LEVEL:
            rooms += [node for node in self.children if node in self.gathered and node not in kept]
        written = [node for index, node in enumerate(self.joint.wanted[0]) if index in self.written]
        free = {node: None for node in own if node not in written}
        inside = {leaf: room for room in rooms for leaf in in_place(self.joint, room, free)}
        for node in rooms:
            self._cross(node, None)
        kept[:] = [*(node for node in kept if node not in inside), *(node for node in rooms if node not in inside)]
        return inside


def _all_ancestors(nodes: Iterable[fx.Node | None]) -> set[fx.Node]:
    return set().union(*(_ancestors(node) for node in nodes if node is not None))

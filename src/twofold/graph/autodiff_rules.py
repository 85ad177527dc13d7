"""The derivative of one body: a rule for straight-line regions and one for each kind of control flow.

Both directions of a body are built together. Going forward, each rule emits the body's own nodes and remembers
how to come back; going backward, what was remembered is emitted in reverse and says which values of the forward
direction it needs. Those, and the residuals of the bodies within, are the body's residuals: one tuple for each
time it runs. A loop keeps those of its iterations as a stack of pairs, since backward begins with the last.

That an invocation keeps values for a backward invocation of its own, which may invoke itself in turn, is from
Jeong et al., "Improving the Expressivity of Deep Learning Frameworks with Recursion" (EuroSys 2018).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from twofold.errors import DifferentiationError

from .autodiff_activity import Activity
from .autodiff_calls import constant, leaf, pullback
from .build import SubGraphBuilder
from .ir import Ambient, Argument, Node, SubGraph, TensorSpec, Value, map_values
from .ops import CONTROL_FLOW
from .verify import describe

Known: TypeAlias = dict[Value, Value]
_Receivers: TypeAlias = list[tuple[Value, Argument]]
_NO_GRAD = Ambient(grad=False)


def gradient_spec(value: Value) -> TensorSpec:
    """Return the spec of a tensor's gradient."""
    assert value.spec is not None
    return TensorSpec(value.spec.shape, value.spec.dtype, value.spec.device)


def spec_of(argument: Argument) -> TensorSpec | None:
    """Return the spec of an argument; what is no tensor is an object."""
    return argument.spec if isinstance(argument, Value) else None


def enter(inputs: Iterable[Value], builder: SubGraphBuilder, known: Known) -> None:
    """Give a builder inputs like these, and say in `known` what stands for what."""
    known.update((value, builder.input(value.name, value.spec)) for value in inputs)


def copy_body(body: SubGraph, builder: SubGraphBuilder, known: Known, read: Callable[[Value], Value]) -> SubGraph:
    """Fill a builder, which has the inputs, with the nodes of a body as they are."""
    for node in body.nodes:
        copy_node(node, builder, known, read)
    return builder.finish([map_values(output, read) for output in body.outputs])


def copy_node(node: Node, builder: SubGraphBuilder, known: Known, read: Callable[[Value], Value]) -> None:
    """Append a node as it is, its operands and those of its bodies replaced by `read`."""
    bodies: list[SubGraph] = []
    for body in node.subgraphs:
        nested = builder.body(body.name)
        enter(body.inputs, nested, known)
        bodies.append(copy_body(body, nested, known, read))
    results = builder.node(
        node.op,
        node.target,
        [map_values(argument, read) for argument in node.arguments],
        {name: map_values(argument, read) for name, argument in node.keywords},
        [value.spec for value in node.results],
        bodies,
        node.origin,
        node.ambient,
        [value.name for value in node.results],
    )
    known.update(zip(node.results, results, strict=True))


class Body:
    """One body in both directions, under construction.

    `known` maps values of the graph that is differentiated to those of the forward direction; `residuals` is
    what the backward direction receives in place of `kept`.
    """

    def __init__(
        self,
        activity: Activity,
        forward: SubGraphBuilder,
        backward: SubGraphBuilder,
        residuals: Value,
        known: Known,
    ) -> None:
        self._activity = activity
        self._forward = forward
        self._backward = backward
        self._residuals = residuals
        self._known = known
        self._kept: Known = {}
        self._cotangents: Known = {}
        self._steps: list[Callable[[], None]] = []

    @property
    def kept(self) -> tuple[Value, ...]:
        """What the forward direction hands to the backward direction; complete once both are built."""
        return tuple(self._kept)

    def run(self, body: SubGraph) -> list[Argument]:
        """Append the nodes of a body, whose inputs are known, and return its outputs."""
        region: list[Node] = []
        for node in body.nodes:
            if node.op in CONTROL_FLOW and any(map(self._activity.carries, node.results)):
                self._region(region)
                region = []
                self._control_flow(node)
            else:
                region.append(node)
        self._region(region)
        return self._translate(body.outputs, f"outputs of {body.name}")

    def differentiate(
        self, outputs: Iterable[tuple[Argument, Value]], sources: Iterable[Value], sums: Known | None = None
    ) -> list[Value]:
        """Append the way back from outputs, each with its gradient, and return the gradients of the sources.

        `sums` has gradients that are there already and are added to.
        """
        self._cotangents.update(sums or {})
        for output, gradient in outputs:
            self._add(output, gradient)
        for step in reversed(self._steps):
            step()
        return [self._cotangent(source) for source in sources]

    # ---- Straight-line regions: PyTorch's own derivative.

    def _region(self, nodes: Sequence[Node]) -> None:
        leaves: Known = {}
        inside: dict[Value, None] = {}

        def read(value: Value) -> Value:
            if value in inside or not self._activity.carries(value):
                return self._known[value]
            if value not in leaves:
                leaves[value] = self._enter(value)
            return leaves[value]

        for node in nodes:
            carries = any(map(self._activity.carries, node.results))
            inside.update(dict.fromkeys(node.results))
            copy_node(node, self._forward, self._known, read if carries else self._known.__getitem__)
        entered = {value: entry for value, entry in leaves.items() if value.spec is not None}
        if entered:
            self._steps.append(partial(self._region_back, nodes, tuple(inside), entered))

    def _enter(self, value: Value) -> Value:
        known, spec = self._known[value], value.spec
        if spec is None:
            return self._forward.call(constant, known, name=value.name, result=None)
        return self._forward.call(
            leaf, known, result=TensorSpec(spec.shape, spec.dtype, spec.device, True, spec.stride)
        )

    def _region_back(self, nodes: Sequence[Node], made: Iterable[Value], leaves: Known) -> None:
        reached = [value for value in made if value in self._cotangents]
        if not reached:
            return
        gradients = self._backward.call(
            pullback,
            [self._keep(self._known[value]) for value in reached],
            [self._keep(entry) for entry in leaves.values()],
            [self._cotangents.pop(value) for value in reached],
            result=[gradient_spec(value) for value in leaves],
            origin=nodes[-1].origin,
            ambient=_NO_GRAD,
        )
        for value, gradient in zip(leaves, gradients, strict=True):
            self._add(value, gradient)

    # ---- Control flow.

    def _control_flow(self, node: Node) -> None:
        match node.op:
            case "if" | "switch":
                self._choice(node)
            case "invoke":
                self._invocation(node)
            case _:
                self._iterations(node)

    def _choice(self, node: Node) -> None:
        reads = self._activity.reads(*node.subgraphs)
        branches = [self._branch(body, node.results, reads) for body in node.subgraphs]
        arguments = self._translate(node.arguments, describe(node))
        residuals = self._emit(node, None, arguments, [forward for forward, _ in branches])
        receivers = self._receivers(node.subgraphs[0].inputs, node.arguments[1:], reads)

        def back() -> None:
            if cotangents := self._taken(node):
                given = [self._keep(arguments[0]), self._keep(residuals), *cotangents]
                self._emit_back(node, None, given, [backward for _, backward in branches], receivers)

        self._steps.append(back)

    def _branch(self, body: SubGraph, results: Iterable[Value], reads: Iterable[Value]) -> tuple[SubGraph, SubGraph]:
        """Return one branch in both directions; all branches return gradients for the same values."""
        forward, backward = self._forward.body(body.name), self._backward.body(body.name)
        inner = Body(self._activity, forward, backward, backward.input("residuals", None), self._known)
        enter(body.inputs, forward, self._known)
        outputs = inner.run(body)
        pairs = [
            (output, backward.input(f"d_{result.name}", gradient_spec(result)))
            for output, result in zip(body.outputs, results, strict=True)
            if self._activity.differentiable(result)
        ]
        gradients = inner.differentiate(pairs, [*filter(self._activity.differentiable, body.inputs), *reads])
        return forward.finish([*outputs, inner.kept]), backward.finish(gradients)

    def _invocation(self, node: Node) -> None:
        body = self._activity.graph.subgraphs[str(node.target)]
        residuals = self._emit(node, f"{node.target}.forward", self._translate(node.arguments, describe(node)), [])
        receivers = self._receivers(body.inputs, node.arguments, self._activity.reads_of(body.name))

        def back() -> None:
            if cotangents := self._taken(node):
                self._emit_back(node, f"{node.target}.backward", [self._keep(residuals), *cotangents], [], receivers)

        self._steps.append(back)

    def _iterations(self, node: Node) -> None:
        """Differentiate a `loop` or a `while`. Gradients of what the body reads are carried along and summed."""
        body = node.subgraphs[-1]
        first = 1 if node.op == "loop" else 0
        reads = self._activity.reads(body)
        conditions = [self._condition(each) for each in node.subgraphs[:-1]]
        forward, backward = self._iteration(body, first, reads)
        arguments = self._translate(node.arguments, describe(node))
        stack = self._emit(node, None, [*arguments, None], [*conditions, forward])
        receivers = self._receivers(body.inputs[first:], node.arguments[first:], reads)

        def back() -> None:
            if cotangents := self._taken(node):
                sums = [self._take(value) for value in reads]
                given = [self._keep(stack), *cotangents, *sums]
                bodies = [*([] if first else [self._is_left(given)]), backward]
                self._emit_back(
                    node, None, [*map(self._keep, arguments[:first]), *given], bodies, receivers, stack=True
                )

        self._steps.append(back)

    def _condition(self, body: SubGraph) -> SubGraph:
        builder = self._forward.body(body.name)
        enter(body.inputs, builder, self._known)
        builder.input("stack", None)
        return copy_body(body, builder, self._known, self._known.__getitem__)

    def _iteration(self, body: SubGraph, first: int, reads: Iterable[Value]) -> tuple[SubGraph, SubGraph]:
        forward, backward = self._forward.body(body.name), self._backward.body(body.name)
        if first:
            backward.input("index", None)
        stack = backward.input("stack", None)
        residuals = backward.call(operator.getitem, stack, 1, result=None, ambient=_NO_GRAD)
        inner = Body(self._activity, forward, backward, residuals, self._known)
        enter(body.inputs, forward, self._known)
        below = forward.input("stack", None)
        outputs = inner.run(body)
        carried = [*filter(self._activity.differentiable, body.inputs)]
        gradients = {value: backward.input(f"d_{value.name}", gradient_spec(value)) for value in [*carried, *reads]}
        pairs = [
            (output, gradients.pop(value))
            for value, output in zip(body.inputs[first:], body.outputs, strict=True)
            if value in gradients
        ]
        found = inner.differentiate(pairs, [*carried, *reads], gradients)
        rest = backward.call(operator.getitem, stack, 0, result=None, ambient=_NO_GRAD)
        return forward.finish([*outputs, (below, inner.kept)]), backward.finish([rest, *found])

    def _is_left(self, carried: Sequence[Argument]) -> SubGraph:
        """Return the condition of a backward `while`: an iteration is left on the stack."""
        builder = self._backward.body("condition")
        stack, *_ = [builder.input(None, value.spec) for value in carried if isinstance(value, Value)]
        return builder.finish([builder.call(operator.is_not, stack, None, result=None, ambient=_NO_GRAD)])

    # ---- Emitting.

    def _translate(self, arguments: Iterable[Argument], where: str) -> list[Argument]:
        """Return what stands for arguments that enter or leave a body."""
        translated: list[Argument] = []
        for argument in arguments:
            if not isinstance(argument, Value) and self._activity.carries(argument):
                raise DifferentiationError(
                    f"{where}: expected a differentiated tensor as a value of its own, got it within {argument!r}"
                )
            translated.append(map_values(argument, self._known.__getitem__))
        return translated

    def _emit(
        self, node: Node, target: str | None, arguments: Sequence[Argument], subgraphs: Sequence[SubGraph]
    ) -> Value:
        """Append the forward form of a control-flow node; return its last result, the residuals."""
        specs = [*(value.spec for value in node.results), None]
        names = [*(value.name for value in node.results), "residuals"]
        *results, residuals = self._forward.node(
            node.op, target, arguments, None, specs, subgraphs, node.origin, node.ambient, names
        )
        self._known.update(zip(node.results, results, strict=True))
        return residuals

    def _emit_back(
        self,
        node: Node,
        target: str | None,
        arguments: Sequence[Argument],
        subgraphs: Sequence[SubGraph],
        receivers: _Receivers,
        stack: bool = False,
    ) -> None:
        """Append the backward form of a control-flow node; give the receivers the gradients that it returns."""
        specs = [*([None] if stack else []), *(gradient_spec(like) for like, _ in receivers)]
        results = self._backward.node(node.op, target, arguments, None, specs, subgraphs, node.origin, _NO_GRAD)
        for (_, receiver), gradient in zip(receivers, results[1 if stack else 0 :], strict=True):
            self._add(receiver, gradient)

    def _receivers(self, inputs: Iterable[Value], arguments: Iterable[Argument], reads: Iterable[Value]) -> _Receivers:
        """Pair each value that a body returns a gradient for with what it stands for here."""
        pairs = zip(inputs, arguments, strict=True)
        return [*(pair for pair in pairs if self._activity.differentiable(pair[0])), *((read, read) for read in reads)]

    def _keep(self, argument: Argument) -> Any:
        """Return what stands, going backward, for an argument of the forward direction."""
        if not isinstance(argument, Value):
            return argument
        if argument not in self._kept:
            place = len(self._kept)
            self._kept[argument] = self._backward.call(
                operator.getitem, self._residuals, place, result=argument.spec, ambient=_NO_GRAD
            )
        return self._kept[argument]

    # ---- Gradients.

    def _add(self, receiver: Argument, gradient: Value) -> None:
        if not self._activity.differentiable(receiver):
            return
        if receiver in self._cotangents:
            both = (self._cotangents[receiver], gradient)
            gradient = self._backward.call(torch.add, *both, result=gradient_spec(receiver), ambient=_NO_GRAD)
        self._cotangents[receiver] = gradient

    def _cotangent(self, value: Value) -> Value:
        """Return the gradient of a value: zeros if there is none."""
        if value not in self._cotangents:
            like = self._keep(self._known[value])
            zeros = self._backward.call(torch.zeros_like, like, result=gradient_spec(value), ambient=_NO_GRAD)
            self._cotangents[value] = zeros
        return self._cotangents[value]

    def _take(self, value: Value) -> Value:
        gradient = self._cotangent(value)
        del self._cotangents[value]
        return gradient

    def _taken(self, node: Node) -> list[Value]:
        """Return the gradients of a node's differentiable results; none if none of them has any."""
        results = [*filter(self._activity.differentiable, node.results)]
        return [self._take(value) for value in results] if not self._cotangents.keys().isdisjoint(results) else []

"""From a recorded path to a `Program`: the graph of one unit, cut into segments (Terra's GraphGenerator).

The graph holds the ATen operations of the whole unit, forward, backward and optimizer, in the order in which eager
execution ran them. A segment is a straight run of nodes between two fetches: Python has to know a value before it
can say how to go on. Values are memory, so an in-place operation keeps its operand's value, and a view whose
memory and geometry are those of its operand is no node at all.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from twofold.capture.functions import NUMBER_READS
from twofold.capture.gradients import DROPS
from twofold.capture.history import Layout
from twofold.capture.recorder import parameters_of
from twofold.capture.trace import (
    Event,
    External,
    Number,
    Operation,
    Slot,
    Trace,
    hidden_writes,
    leaves,
    map_leaves,
    memory_key,
    numbers_in,
)
from twofold.capture.trace_graph import Path
from twofold.graph import Ambient, Graph, Node, Origin, TensorSpec, Value, eliminate_dead_code, verify

from .accumulation import accumulate_in_place
from .histories import BackwardPlan, HistoryPlan, residuals_of
from .optimizers import Setting, hyper_parameters, lower_step, replays_exactly
from .products import merge_products
from .segments import Segment, cut, is_read_in_order, root_of, view_nodes
from .set_numbers import number_on_device
from .split_parts import settle_split_parts

_AMBIENT = Ambient(grad=False)
_REFERENCES = (Slot, External)


class UnsupportedPath(Exception):
    """This path cannot be a graph: `code` of `errors.CODES` and the reason."""

    def __init__(self, code: str, reason: str, origin: Origin | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.origin = origin


@dataclass(frozen=True, eq=False)
class GradientPlan:
    """`.grad` of a leaf: the value that it has before the unit (None: not read), and what it is set to after."""

    leaf: torch.Tensor | int
    """Itself, or the external fed."""
    entry: Value | None
    exit: Value | None
    keeps: bool
    """Whether `.grad` stays the object it was."""
    given: torch.Tensor | int | None
    """What the program puts there after the unit, if that is a tensor of its own: this one, or the external fed."""


@dataclass(frozen=True, eq=False)
class OptimizerPlan:
    """What must hold of an optimizer for the graph to stand for its step. `outside`: it steps by itself."""

    optimizer: Optimizer
    outside: bool
    stepped: tuple[tuple[torch.Tensor, bool], ...]
    """Its parameters, and whether each had a gradient."""
    free: tuple[str, ...]
    hyper_parameters: list[dict[str, Any]]
    """Of each group, those that are not free; none where it steps by itself."""
    parameters: tuple[tuple[torch.Tensor, ...], ...]
    owners: tuple[Any, ...]
    """The first keys of its state, in order, and what it holds for them."""
    states: tuple[dict[str, Any], ...]
    tensors: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[torch.Tensor, ...]]
    """Of each tensor in these, column by column: the dictionary and the key that hold it, and the tensor."""
    stand_in: Any
    """An optimizer of the same class without parameters, for `step` to do nothing with."""

    @functools.cached_property
    def _settings(self) -> tuple[tuple[Callable[[dict[str, Any]], Any], Any], ...]:
        """Of each group, what reads `hyper_parameters` at once, in a third of the time of comparing them by key."""
        readers = [operator.itemgetter(*known) if known else _no_values for known in self.hyper_parameters]
        return tuple((read, read(known)) for read, known in zip(readers, self.hyper_parameters, strict=True))

    def still_holds(self) -> bool:
        """Whether the optimizer is as it was when the graph was built, learning rate aside where it is free."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if len(state) < len(self.owners) or len(groups) != len(self.parameters):
            return False
        for group, parameters, (values_of, values) in zip(groups, self.parameters, self._settings, strict=True):
            known = group["params"]
            if len(known) != len(parameters) or not all(map(operator.is_, known, parameters)):
                return False
            try:
                if values_of(group) != values:
                    return False
            except KeyError:
                return False
        holders, keys, tensors = self.tensors
        return (  # in order and not by key: a tensor is hashed by Python
            all(map(operator.is_, self.owners, state))
            and all(map(operator.is_, self.states, state.values()))
            and all(map(operator.is_, tensors, map(dict.get, holders, keys)))
        )


def _no_values(_group: dict[str, Any]) -> Any:
    return ()


def _tensors_of(states: Iterable[dict[str, Any]]) -> Any:
    rows = [(state, key, value) for state in states for key, value in state.items() if isinstance(value, torch.Tensor)]
    columns: tuple[Any, ...] = tuple(zip(*rows, strict=True))
    return columns or ((), (), ())


def _stand_in(optimizer: Optimizer) -> Any:
    stand_in: Any = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__, param_groups=[], state={})
    return stand_in


@dataclass(frozen=True, eq=False)
class Program:
    """All that is needed to run one path as graphs, independent of any backend."""

    graph: Graph
    segments: tuple[Segment, ...]
    statics: dict[Value, torch.Tensor]
    feeds: dict[Value, int]
    """The external index of each feed."""
    foretold: dict[int, int]
    """The feeds, by external, that were arguments of the call: their places among its tensors."""
    settings: dict[Value, Setting]
    gradients: tuple[GradientPlan, ...]
    drops_gradients_by: int
    """The last event that drops gradients; -1 if none does."""
    optimizers: dict[int, OptimizerPlan]
    """By index of the event."""
    fetches: dict[int, tuple[Value, ...]]
    """The values that Python needs at each fetch, by index of the event, in order of the call's tensors.

    An optimizer that steps outside is a fetch of its gradients, in order of the parameters that have one."""
    number_reads: frozenset[int]
    """The fetches that make Python numbers of one tensor, and so can be answered from a copy of it."""
    escapes: dict[int, Value]
    """Slots that may outlive the unit."""
    leaf_gradients: dict[int, tuple[Value, int | None]]
    """The gradients of those that are leaves and have one, each with its own slot if the unit read it."""
    views: dict[Value, Node]
    uses_random: bool
    is_inference: bool
    """Whether it computes in inference mode, whatever holds where it is launched."""
    call_count: int
    positions: dict[int, int]
    """How many segments must have run before the fetch at an event can be answered."""
    on_accelerator: bool
    history: HistoryPlan | None = None
    """For outputs that are differentiated outside the unit; their backwards are the last segments."""

    @property
    def unit_segments(self) -> int:
        """How many segments a unit itself launches."""
        return len(self.segments) - (0 if self.history is None else len(self.history.backwards))


def build_program(path: Path, exact: bool, volatile: Collection[Optimizer] = ()) -> Program:
    """Build the program of a path from its latest trace.

    `exact`: keep eager's own operations, bit for bit; else optimizers may become fused kernels. `volatile`:
    optimizers whose hyper-parameters change all the time, so that no recorded step stands for the next. Raises
    `UnsupportedPath`.
    """
    return _Builder(path, exact, volatile).build()


def _drops(event: Event) -> bool:
    return event.kind == "zero_grad" or event.function in DROPS


class _Builder:
    def __init__(self, path: Path, exact: bool, volatile: Collection[Optimizer]) -> None:
        self.volatile = volatile
        self.path = path
        self.trace: Trace = path.trace
        self.exact = exact
        self.nodes: list[Node] = []
        self.values: dict[int, Value] = {}
        self.statics: dict[Value, torch.Tensor] = {}
        self.static_values: dict[tuple[Any, ...], Value] = {}
        self.feeds: dict[Value, int] = {}
        self.settings: dict[Value, Setting] = {}
        self.optimizers: dict[int, OptimizerPlan] = {}
        self.fetches: dict[int, tuple[Value, ...]] = {}
        self.entries: dict[int, Value] = {}
        self.tangents: dict[Value, None] = {}

    def build(self) -> Program:
        trace = self.trace
        if trace.refusal is not None:
            raise UnsupportedPath(trace.refusal.code, trace.refusal.reason, trace.refusal.origin)
        if not any(event.operations for event in trace.events):
            raise UnsupportedPath("no_tensor_calls", "the unit made no tensor calls")
        self._name_inputs()
        for index, event in enumerate(trace.events):
            self._add_event(index, event)
        gradients = self._plan_gradients()
        escapes = {slot: self._value(trace.slot_numbers[slot]) for slot in sorted(self.path.histories)}
        is_inference = self._is_inference(escapes)
        finals = [plan.exit for plan in gradients if plan.exit is not None] + list(escapes.values())
        leaf_gradients = self._leaf_gradients(escapes)
        finals += [value for value, _ in leaf_gradients.values()]
        backwards = self._add_backwards(escapes)
        finals += [value for plan in backwards.values() for value in plan.gradients if value is not None]
        graph = self._finish_graph(finals)
        views = view_nodes(graph.nodes)
        on_device = self._is_on_accelerator()
        cuts = cut(graph, views, set(self._used_finals(finals)), self._late_feeds() if on_device else None)
        for layout, position in zip(list(backwards), cuts.positions[len(self.fetches) :], strict=True):
            backwards[layout] = replace(backwards[layout], segment=position)
        return Program(
            graph=graph,
            segments=cuts.segments,
            statics=self.statics,
            feeds=self.feeds,
            foretold={index: self.trace.arguments[index] for index in self.feeds.values() if self._is_foretold(index)},
            settings=self.settings,
            gradients=gradients,
            drops_gradients_by=max((i for i, event in enumerate(trace.events) if _drops(event)), default=-1),
            optimizers=self.optimizers,
            fetches=self.fetches,
            number_reads=frozenset(i for i in self.fetches if trace.events[i].function in NUMBER_READS),
            escapes=escapes,
            leaf_gradients=leaf_gradients,
            views=views,
            uses_random=trace.first_random is not None,
            is_inference=is_inference,
            call_count=len(trace.events),
            on_accelerator=on_device,
            positions=dict(zip(self.fetches, cuts.positions, strict=False)),
            history=self._plan_history(cuts.segments, backwards),
        )

    def _is_inference(self, escapes: Iterable[int]) -> bool:
        events = [event for event in self.trace.events if event.operations]
        if all(event.ambient.inference for event in events):
            return True
        if any(self.path.made_in(slot).is_inference for slot in escapes):
            what = "a tensor made in inference mode outlives a unit that is not all in it"
            raise UnsupportedPath("unsupported_call", what)
        return False

    def _leaf_gradients(self, escapes: Iterable[int]) -> dict[int, tuple[Value, int | None]]:
        """Return the gradients of leaves that the unit makes and that outlive it."""
        unseen = (self.path.made_in(slot) for slot in escapes if slot not in self.trace.escapes)
        if any(made.requires_grad and made.is_leaf for made in unseen):
            raise UnsupportedPath("new_path", "a leaf that the unit makes outlives only some units")
        return {slot: (self._value(number), its) for slot, (number, its) in self.trace.leaf_gradients.items()}

    # ---- inputs ------------------------------------------------------------------------------------------

    def _name_inputs(self) -> None:
        trace = self.trace
        entry_numbers = {g.entry for g in trace.gradients if g.entry is not None and g.entry >= 0}
        for index, number in enumerate(trace.external_numbers):
            role, _ = self.path.nodes[-1].role_of(index)
            if number in self.values:  # that they show the same memory is checked in each unit
                continue
            if role.tensor is not None:
                self._static(trace.externals[index], number)
            else:
                value = self._new(f"feed{index}", trace.specs[number])
                self.values[number] = value
                self.feeds[value] = index
        for number in sorted(entry_numbers):
            if number not in self.values:
                self.entries[number] = self.values[number] = self._new(f"grad{number}", trace.specs[number])
        for number, tensor in trace.hidden.items():
            if number not in self.values:
                self._static(tensor, number)

    def _static(self, tensor: torch.Tensor, number: int | None = None) -> Value:
        key = memory_key(tensor)
        value = self.static_values.get(key)
        if value is None:
            value = self._new(f"static{len(self.statics)}", TensorSpec.of_memory(tensor))
            self.static_values[key] = value
            self.statics[value] = tensor
        if number is not None:
            self.values[number] = value
        return value

    def _new(self, name: str, spec: TensorSpec | None) -> Value:
        return Value(name, spec)

    def _value(self, number: int) -> Value:
        value = self.values.get(number)
        if value is None:
            raise UnsupportedPath("foreign_operation", "a tensor of unknown source is used")
        return value

    # ---- nodes -------------------------------------------------------------------------------------------

    def _add_event(self, index: int, event: Event) -> None:
        if event.kind == "fetch":
            tensors = [self._reference(leaf) for leaf in leaves((event.arguments, event.keywords), _REFERENCES)]
            self._add_fetch(index, event, tensors)
        elif event.kind == "optimizer":
            self._add_optimizer(index, event)
        else:
            for operation in event.operations:
                on_device = number_on_device(event, operation, self.trace, str(len(self.nodes)))
                if on_device is not None:
                    self.nodes.append(on_device[0])
                    operation = on_device[1]
                self._add_operation(operation, event.origin)

    def _add_fetch(self, index: int, event: Event, values: list[Value]) -> None:
        self.fetches[index] = tuple(values)
        self.nodes.append(Node("fetch", None, ([*values],), (), (), origin=event.origin))

    def _reference(self, reference: Any) -> Value:
        trace = self.trace
        numbers = trace.slot_numbers if isinstance(reference, Slot) else trace.external_numbers
        return self._value(numbers[reference.index])

    def _add_operation(self, operation: Operation, origin: Origin | None) -> None:
        results = operation.results
        if results and all(number in self.values for number in results) and not operation.target._schema.is_mutable:
            return  # a view of the same memory in the same geometry, as `detach` makes
        devices = {self.trace.specs[n].device.type for n in (*operation.reads(), *results)}
        if len(devices) > 1 and "scaled_dot_product" not in operation.target.name():
            # (attention hands its backward the random seed, on the CPU, and under a capture on the device)
            raise UnsupportedPath("unsupported_call", f"{operation.target} mixes devices", origin)
        arguments, keywords = map_leaves(
            (operation.arguments, operation.keywords), Number, lambda n: self._value(n.index)
        )
        values: list[Value] = []
        for number in results:
            value = self._new(str(number), self.trace.specs[number])
            if number in self.values:  # written in place: the operand stays the name of this memory
                value = self._new(f"{number}_{len(self.nodes)}", self.trace.specs[number])
            else:
                self.values[number] = value
            values.append(value)
        self._call(operation.target, arguments, keywords, origin, tuple(values))

    def _call(
        self, target: Any, arguments: Any, keywords: Any, origin: Origin | None, results: tuple[Value, ...] = ()
    ) -> None:
        self.nodes.append(
            Node("call", target, tuple(arguments), tuple(keywords.items()), results, origin=origin, ambient=_AMBIENT)
        )

    def _add_optimizer(self, index: int, event: Event) -> None:
        optimizer: Optimizer = event.arguments[0]
        if self.trace.makes_state:
            raise UnsupportedPath("new_path", "an optimizer made its state in this step")
        calls = None if self.exact else self._lower(optimizer, event)
        free: tuple[str, ...] = ()
        outside = False
        if calls is not None:
            free = ("lr",)
            for target, arguments, keywords in calls:
                self._call(target, arguments, keywords, event.origin)
        elif replays_exactly(optimizer) and optimizer not in self.volatile:
            for operation in event.operations:
                self._add_operation(operation, event.origin)
        else:
            outside = True
            self._add_fetch(index, event, [self._value(n.index) for n in event.outcome if n is not None])
        groups, state = optimizer.param_groups, {} if outside else optimizer.state
        self.optimizers[index] = OptimizerPlan(
            optimizer,
            outside,
            tuple((p, n is not None) for p, n in zip(parameters_of(optimizer), event.outcome, strict=True)),
            free,
            [{} for _ in groups] if outside else hyper_parameters(optimizer, free),
            tuple(tuple(group["params"]) for group in groups),
            tuple(state),
            tuple(state.values()),
            _tensors_of(state.values()),
            _stand_in(optimizer),
        )

    def _lower(self, optimizer: Optimizer, event: Event) -> Any:
        gradients = {
            id(parameter): self._value(number.index)
            for parameter, number in zip(parameters_of(optimizer), event.outcome, strict=True)
            if number is not None
        }
        made: dict[Value, Setting] = {}

        def setting(wanted: Setting) -> Value:
            value = self._new(f"setting{len(self.settings) + len(made)}", None)
            made[value] = wanted
            return value

        calls = lower_step(optimizer, gradients, self._static, setting)
        if calls is not None:
            self.settings.update(made)
        return calls

    # ---- history that outlives the unit ------------------------------------------------------------------

    def _add_backwards(self, escapes: dict[int, Value]) -> dict[Layout, BackwardPlan]:
        """Add the backwards of live outputs behind the unit's own nodes, each in a segment of its own."""
        live = {slot for slot, state in self.path.histories.items() if state == "live"}
        if not live:
            return {}
        history = self.trace.history
        if history is None or not live <= set(history.outputs):
            raise UnsupportedPath("history_escapes", "a tensor leaves the unit with autograd history that is not freed")
        self._check_aliases(live, escapes)
        backwards: dict[Layout, BackwardPlan] = {}
        for layout, backward in history.backwards.items():
            self.nodes.append(Node("fetch", None, ([],), (), ()))
            tangents = tuple(None if n is None else self._tangent(n) for n in backward.tangents)
            for operation in backward.operations:
                self._add_operation(operation, None)
            gradients = tuple(None if n is None else self._value(n) for n in backward.gradients)
            backwards[layout] = BackwardPlan(-1, tangents, gradients)
        return backwards

    def _tangent(self, number: int) -> Value:
        value = self.values[number] = self._new(f"tangent{number}", self.trace.specs[number])
        self.tangents[value] = None
        return value

    def _check_aliases(self, live: set[int], escapes: dict[int, Value]) -> None:
        """Refuse live outputs that share memory with anything else the program holds."""
        views = view_nodes(self.nodes)
        roots = {slot: root_of(value, views) for slot, value in escapes.items()}
        given = {*self.statics, *self.feeds, *self.entries.values()}
        for slot in live:
            if roots[slot] in given or list(roots.values()).count(roots[slot]) > 1:
                raise UnsupportedPath("history_escapes", "an output with autograd history shares memory with a tensor")
        storages = [tensor.untyped_storage()._cdata for tensor in self.statics.values()]
        if any(storages.count(written) > 1 for written in self.trace.written_storages()):
            raise UnsupportedPath("history_escapes", "a forward writes to memory that it is given as several tensors")

    def _plan_history(self, segments: tuple[Segment, ...], backwards: dict[Layout, BackwardPlan]) -> HistoryPlan | None:
        history = self.trace.history
        if not backwards or history is None:
            return None
        operations = [operation for event in self.trace.events for operation in event.operations]
        hidden = {
            self._value(number)
            for operation in operations
            for index in hidden_writes(operation.target, operation.arguments)
            for number in numbers_in(operation.arguments[index])
        }
        residuals = residuals_of(segments, backwards.values(), hidden & self.statics.keys())
        last = self.path.nodes[-1]
        externals = tuple(last.role_of(index)[0].tensor for index in range(len(self.trace.externals)))
        return HistoryPlan(history.outputs, history.inputs, externals, residuals, backwards)

    # ---- the end -----------------------------------------------------------------------------------------

    def _plan_gradients(self) -> tuple[GradientPlan, ...]:
        plans: list[GradientPlan] = []
        read = {number for event in self.trace.events for op in event.operations for number in op.reads()}
        read |= {n.index for e in self.trace.events if e.kind == "optimizer" for n in e.outcome if n is not None}
        read |= set(self.trace.slot_numbers)
        for gradient in self.trace.gradients:
            entry = self.entries.get(gradient.entry) if gradient.entry in read else None
            exit_value = None
            if gradient.exit is not None and not gradient.keeps:
                exit_value = self._value(gradient.exit)
            given = None if gradient.given is None else self._outside(gradient.given)
            leaf = self._outside(gradient.leaf.index) if isinstance(gradient.leaf, External) else gradient.leaf
            plans.append(GradientPlan(leaf, entry, exit_value, gradient.keeps, given))
        return tuple(plans)

    def _outside(self, index: int) -> torch.Tensor | int:
        """Return an external that is static; the index of one that is fed."""
        tensor = self.path.nodes[-1].role_of(index)[0].tensor
        return index if tensor is None else tensor

    def _is_on_accelerator(self) -> bool:
        return any(spec.device.type == "cuda" for spec in self.trace.specs)

    def _late_feeds(self) -> list[set[Value]]:
        """Return, for each fetch, the feeds that Python first uses after it, and that no argument foretells."""
        uses = {n.first_external + i: n.depth for n in self.path.nodes for i in range(len(n.roles))}
        feeds = [(value, uses[index]) for value, index in self.feeds.items() if not self._is_foretold(index)]
        return [{value for value, used in feeds if used > event} for event in self.fetches]

    def _is_foretold(self, index: int) -> bool:
        return index in self.trace.arguments and is_read_in_order(self.trace.externals[index])

    def _used_finals(self, finals: Sequence[Value]) -> Sequence[Value]:
        return [
            value for value in finals if not {value} & (self.statics.keys() | self.feeds.keys() | self.tangents.keys())
        ]

    def _finish_graph(self, finals: Sequence[Value]) -> Graph:
        used = {value for node in self.nodes for value in node.operands} | set(finals)
        self.statics = {value: tensor for value, tensor in self.statics.items() if value in used}
        self.settings = {value: setting for value, setting in self.settings.items() if value in used}
        written = {
            number
            for event in self.trace.events
            if event.kind != "optimizer"
            for operation in event.operations
            for number in operation.writes()
        }
        views = view_nodes(self.nodes)
        if any(root_of(self.values[number], views) in self.feeds for number in written if number in self.values):
            raise UnsupportedPath("unsupported_call", "a tensor that is fed to the unit is changed in place")
        inputs = (*self.statics, *self.entries.values(), *self.settings)
        feeds = [Node("feed", None, (), (("name", value.name),), (value,)) for value in (*self.feeds, *self.tangents)]
        graph = Graph("unit", inputs, (*feeds, *self.nodes), tuple(dict.fromkeys(finals)))
        graph = eliminate_dead_code(graph)
        if not self.exact:
            graph = merge_products(settle_split_parts(graph))
        graph = accumulate_in_place(graph)
        verify(graph)
        return graph

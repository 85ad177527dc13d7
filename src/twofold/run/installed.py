"""`Installed`: a program with its executable, and what is prepared once for all units that run on it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from twofold.backends.executable import Environment, Executable
from twofold.capture.intercept import unheard
from twofold.convert.from_traces import Program
from twofold.convert.optimizers import Setting
from twofold.convert.segments import (
    MAX_UNDONE_BYTES,
    Segment,
    before_last_updates,
    bytes_of,
    unnoticed_roots,
    written_roots,
)
from twofold.graph import Node, Value, run_node

from .gradient_exits import GradientExits
from .lent_gradients import HeldGradient, LentGradients
from .placement import Placement


class SharedGradient(Exception):
    """A gradient from before the unit shows memory that the unit is given otherwise too, or is that of two leaves."""


@dataclass(eq=False)
class Installed:
    """A program with its executable and what is prepared once for all its units."""

    program: Program
    executable: Executable
    statics: Environment = field(init=False)
    placement: Placement = field(init=False)
    """Where the statics live."""
    entries: list[tuple[Value, torch.Tensor | int]] = field(init=False)
    """The gradients that a unit reads, each with its leaf, or with the external fed."""
    static_storages: frozenset[int] = field(init=False)
    fed_leaves: tuple[int, ...] = field(init=False)
    """The leaves, by external, that differ from unit to unit."""
    exits: GradientExits = field(init=False)
    written: list[list[Value]] = field(init=False)
    last: int = field(init=False)
    """The last segment of a unit itself."""
    written_early: list[Value] = field(init=False)
    """What the last segment writes before its last updates, which cannot fail."""
    unnoticed: list[list[torch.Tensor]] = field(init=False)
    """What each segment changes with no version counter noticing, but for the state of optimizers."""
    handed_on: frozenset[Value] = field(init=False)
    """What segments make that may outlive the unit as it is: its memory is the unit's own, and not used again."""
    go_ahead: frozenset[int] = field(init=False)
    """Segments of an accelerator program that may be launched before Python has walked them."""
    host_copies: dict[int, tuple[Value, torch.Tensor]] = field(init=False)
    """Numbers read from an accelerator by position, each value with the memory on the host it is copied to."""
    settings: list[list[tuple[Value, Setting]]] = field(init=False)
    """What each segment reads of the hyper-parameters."""
    lent: LentGradients | None = None
    """The gradients that the program was given in memory of the executable, once there are any."""

    def __post_init__(self) -> None:
        program = self.program
        self.statics = {value: tensor.detach() for value, tensor in program.statics.items()}
        self.placement = Placement(program.statics.values())
        self.entries = [(plan.entry, plan.leaf) for plan in program.gradients if plan.entry is not None]
        self.static_storages = frozenset(map(_storage, self.statics.values())) if self.entries else frozenset()
        self.fed_leaves = tuple(plan.leaf for plan in program.gradients if isinstance(plan.leaf, int))
        self._static_leaves = {id(plan.leaf) for plan in program.gradients if not isinstance(plan.leaf, int)}
        lasting = {*program.statics, *(entry for entry, _ in self.entries)}
        self.exits = GradientExits.of(program, {*lasting, *program.feeds}, self.executable.reuses_outputs)
        self.settings = [
            [(value, program.settings[value]) for value in segment.inputs if value in program.settings]
            for segment in program.segments
        ]
        self.written = [
            [value for value in written_roots(segment, program.views) if value in lasting]
            for segment in program.segments
        ]
        state = {id(tensor) for plan in program.optimizers.values() for tensor in plan.tensors[2]}
        self.unnoticed = [
            [
                self.statics[value]
                for value in unnoticed_roots(segment, program.views, self.executable.reuses_outputs)
                if value in self.statics and id(program.statics[value]) not in state
            ]
            for segment in program.segments
        ]
        self.last = program.unit_segments - 1
        last = program.segments[self.last]
        nodes = before_last_updates(last.graph.nodes)
        early = written_roots(Segment(replace(last.graph, nodes=nodes)), program.views)
        self.host_copies = {
            program.positions[event]: (value, _host_memory(value))
            for event in program.number_reads
            for value in program.fetches[event]
            if _is_small_and_remote(value)
        }
        self.handed_on = frozenset() if self.executable.reuses_outputs else frozenset(self._made_by_segments())
        self.go_ahead = self._find_go_ahead()
        # A CUDA graph that was captured does not fail at launch.
        self.written_early = [] if self.executable.reuses_outputs else [v for v in early if v in lasting]

    def _made_by_segments(self) -> set[Value]:
        made = {value for segment in self.program.segments for value in segment.outputs}
        return made - self.program.views.keys()

    def _find_go_ahead(self) -> frozenset[int]:
        if not self.program.on_accelerator:
            return frozenset()
        # Where a fetch reads the memory itself, what comes after may write to that memory and has to wait.
        read_in_place = set(self.program.positions.values()) - self.host_copies.keys()
        given_late = {entry for entry, leaf in self.entries if isinstance(leaf, int)}
        return frozenset(
            index
            for index, written in enumerate(self.written[: self.program.unit_segments - 1])
            if index > 0
            and index not in read_in_place
            and given_late.isdisjoint(self.program.segments[index].inputs)
            and all(bytes_of(value) <= MAX_UNDONE_BYTES for value in written)
        )

    def value(self, value: Value, environment: Environment) -> torch.Tensor:
        """Return a value that is in an environment, or is a view of one that is."""
        if value not in environment:
            node: Node = self.program.views[value]
            self.value(node.operands[0], environment)
            run_node(node, environment)
        return environment[value]

    def lasting_gradients(self, made: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of `exits.copied`, which a unit made, as the program may have them."""
        if self.lent is None and self._can_lend(made):
            leaves = self.exits.leaves_given({})
            self.lent = LentGradients([leaves[index] for index in self.exits.copied], made)
        if self.lent is not None:
            return self.lent.lend()
        copies = [torch.empty_like(gradient) for gradient in made]
        torch._foreach_copy_(copies, made)  # one kernel for all; torch 2.11 has no _foreach_clone
        return copies

    def _can_lend(self, made: list[torch.Tensor]) -> bool:
        """Whether each of `made` fills a storage of its own, and no unit reads gradients from before it.

        Those of what is fed are copied: they are not asked for when the next unit begins.
        """
        if not self.executable.lends_outputs or self.entries or self.exits.has_fed:
            return False
        storages = [tensor.untyped_storage() for tensor in made]
        fills = all(s.nbytes() == t.numel() * t.element_size() for s, t in zip(storages, made, strict=True))
        return fills and len({storage._cdata for storage in storages}) == len(made)

    def keep_gradients(self) -> None:
        """Have the gradients that were lent lie in memory of their own, if there is any, and the program holds none."""
        # A gradient that fits its parameter no more stays where it is: once taken off, it could not be set again.
        if self.lent is not None and self.placement.has_kept_layouts():
            with suppress(HeldGradient, torch.OutOfMemoryError), unheard(), torch.no_grad():
                self.lent.take_back(are_dropped=False)

    def check_gradients(self, environment: Environment, feeds: Iterable[torch.Tensor]) -> None:
        """Raise `SharedGradient` if a graph that took them for tensors of their own would be wrong about gradients.

        Recorded apart, they are: an executable with memory of its own copies each in and back, and a compiler takes
        inputs to be apart. Gradients may be parts of one tensor that do not overlap.
        """
        gradients = [environment[entry] for entry, _ in self.entries if entry in environment]
        storages = list(map(_storage, gradients))
        others = self.static_storages | set(map(_storage, feeds))
        if not others.isdisjoint(storages) or (len(set(storages)) < len(storages) and _overlap(gradients)):
            raise SharedGradient("a gradient shares memory with another tensor of the unit")

    def check_leaves(self, given: Collection[torch.Tensor]) -> None:
        """Raise `SharedGradient` if leaves that are fed are not apart, as those were that the graph was made for."""
        found = {*map(id, given)}
        if len(found) < len(given) or not self._static_leaves.isdisjoint(found):
            raise SharedGradient("a leaf is given to the unit as several")

    def save_written(self) -> Callable[[], None]:
        """Copy all that a unit writes to and that outlives it; return how to put it back."""
        written = [self.statics[v] for written in self.written for v in written if v in self.statics]
        copies = [(tensor, tensor.clone()) for tensor in written]

        def restore() -> None:
            for tensor, copy in copies:
                tensor.copy_(copy)

        return restore


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _overlap(tensors: list[torch.Tensor]) -> bool:
    """Whether any two show the same bytes, gaps between their elements counted as theirs."""
    last_end = 0
    for begin, tensor in sorted(((tensor.data_ptr(), tensor) for tensor in tensors), key=operator.itemgetter(0)):
        if begin < last_end:
            return True
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        last_end = begin + (elements * tensor.element_size() if tensor.numel() else 0)
    return False


def _is_small_and_remote(value: Value) -> bool:
    return value.spec is not None and value.spec.device.type == "cuda" and bytes_of(value) <= MAX_UNDONE_BYTES


def _host_memory(value: Value) -> torch.Tensor:
    spec = value.spec
    assert spec is not None
    shape = [size for size in spec.shape if size is not None]
    return torch.empty(shape, dtype=spec.dtype, device="cpu", pin_memory=True)


def example_environment(program: Program) -> dict[Value, Any]:
    """Return what a capture reads: statics, and zeros of the right spec for all else that a unit is given."""
    given: dict[Value, Any] = {value: tensor.detach() for value, tensor in program.statics.items()}
    for value in program.feeds:
        assert value.spec is not None
        given[value] = value.spec.empty().zero_()
    given.update((value, setting.read()) for value, setting in program.settings.items())
    for plan in program.gradients:
        if plan.entry is not None:
            spec = plan.entry.spec
            assert spec is not None
            given[plan.entry] = spec.empty().zero_()
    return given

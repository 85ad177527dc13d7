"""`SpeculatedUnit`: the tensor work of one call that runs without its Python."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from twofold.capture.functions import NUMBER_READS
from twofold.capture.gradients import has_hooks
from twofold.capture.number_feeds import number_tensor
from twofold.capture.recorder import has_step_hooks
from twofold.capture.trace import External, Slot, leaves, memory_key
from twofold.capture.trace_graph import Path, PathNode, Role
from twofold.convert.from_traces import Program
from twofold.convert.speculation.speculation import (
    Generator,
    commit,
    draw_by,
    launch,
    restoring,
    rewinding,
    step,
    tensor,
)
from twofold.graph import Graph, values_in
from twofold.run.graph_runner import GraphRunner
from twofold.run.outputs import LearnLayout, give_gradients, outputs_of
from twofold.run.placeholders import with_freed_history
from twofold.run.placement import guards_of

FAILED: Final = object()
"""What a host function returns when an assumption does not hold."""

_TENSOR = torch.Tensor
_requires_as_it_did = Role.requires_as_it_did
_BLIND: Final = NUMBER_READS | {_TENSOR.detach}
"""What returns the same for tensors with and without a history."""


class CannotSpeculate(Exception):
    """The call does not fit the graph in a way that no assumption names. Raised before `commit`; the reason."""


class _Feed:
    """What is fed in one place."""

    __slots__ = ("_guards", "_present", "role")

    def __init__(self, role: Role, present: bool | None) -> None:
        """`present`: whether it has to have a gradient; None where that is nothing to the unit."""
        self.role = role
        self._present = present
        self._guards: Any = None
        """Those of what was accepted last: PyTorch compares types, shapes and so on at once."""

    def accepts(self, given: Any) -> bool:
        """Whether the role does."""
        role, guards = self.role, self._guards
        if self._present is not None and (given.grad is not None) is not self._present:
            return False
        if guards is not None and guards.check(given):
            return id(given) not in role.placeholders and given.untyped_storage()._cdata not in role.written
        if not role.accepts(given):
            return False
        if not role.is_number and not given.requires_grad:  # so that it is a leaf too
            self._guards = guards_of((given,))
        return True


class TensorWork:
    """What all units of one speculated graph share: a path, and which of its tensors Python is handed."""

    def __init__(self, path: Path, scheduled: Graph, learn: LearnLayout) -> None:
        self.path = path
        self.program: Program = path.program
        self.learn = learn
        self._optimizers = tuple(self.program.optimizers.values())
        self._roles = [role for node in path.nodes for role in node.roles]
        """Of the tensors that the unit is given, in order."""
        self._others = [role for role in self._roles if role.tensor is not None and role.may_require_gradient]
        """The statics that the signature says nothing of."""
        self._aliases = [(i, role.alias_of) for i, role in enumerate(self._roles) if role.alias_of is not None]
        self._setters: list[Any] = [node.event for node in path.nodes if node.kind == "requires_grad"]
        fed = [(index, role) for index, role in enumerate(self._roles) if role.tensor is None]
        self.feeds = {index: _Feed(role, path.fed_presence.get(index)) for index, role in fed}
        kept: list[Any] = [node.arguments[1] for node in scheduled.nodes if node.target is tensor]
        self.slots: tuple[int, ...] = tuple(dict.fromkeys(kept))
        self.bare: frozenset[int] = frozenset(kept) - _seen_with_history(scheduled)
        """Those of which Python is given nothing that shows a history, so that they need none."""
        self.final_step = _final_step(scheduled)
        """The optimizer's step, outside the graph, after which nothing can be found to be otherwise."""

    def is_up_to_date(self) -> bool:
        """Whether the path can still be launched with the program that the graph was made for."""
        return self.path.program is self.program and not self.path.stale and self.path.executable is not None

    def runner(self, feeds: dict[int, Any], given: dict[int, Any], is_laid_out: bool) -> GraphRunner:
        """Return what runs one unit. `is_laid_out`: parameters and buffers are known to be laid out as they were.

        Raises `CannotSpeculate` if the state is not that for which it was made.
        """
        if not self.is_up_to_date():
            raise CannotSpeculate("the graph of the path is being built again")
        installed = self.path.executable
        placement = installed.placement
        if not placement.has_kept_memory() or not (is_laid_out or placement.has_kept_layouts()):
            raise CannotSpeculate("a parameter or buffer was replaced")
        if not all(map(_requires_as_it_did, self._others)):
            raise CannotSpeculate("a tensor requires a gradient that did not, or has hooks, or the other way round")
        if any(has_hooks(self._outside(event.arguments[0].index, given)) for event in self._setters):
            raise CannotSpeculate("a tensor that is made to require a gradient has hooks")
        for index, earlier in self._aliases:
            if memory_key(self._outside(index, given)) != memory_key(self._outside(earlier, given)):
                raise CannotSpeculate("two tensors that showed the same memory are apart")
        if torch.is_inference_mode_enabled() != self.program.is_inference:
            raise CannotSpeculate("the call enters or leaves inference mode")
        for plan in self._optimizers:
            if not plan.still_holds() or has_step_hooks(plan.optimizer):
                raise CannotSpeculate(f"{type(plan.optimizer).__name__} is set otherwise")
        return GraphRunner(installed, feeds, given, {})

    def set_requires_grad(self, given: dict[int, Any]) -> None:
        """Do what the unit does of which tensors from outside require a gradient."""
        for event in self._setters:
            event.function(self._outside(event.arguments[0].index, given), *event.arguments[1:], **event.keywords)

    def _outside(self, index: int, given: dict[int, Any]) -> torch.Tensor:
        tensor = self._roles[index].tensor
        return given[index] if tensor is None else tensor


def _seen_with_history(scheduled: Graph) -> set[Any]:
    seen = {value for node in scheduled.nodes if node.target not in _BLIND for value in node.operands}
    seen.update(values_in(tuple(scheduled.outputs)))
    kept: list[Any] = [n.arguments[1] for n in scheduled.nodes if n.target is tensor and n.results[0] in seen]
    return set(kept)


def _final_step(scheduled: Graph) -> Any:
    for node in reversed(scheduled.nodes[: [node.target for node in scheduled.nodes].index(commit)]):
        if node.target is step:
            return node.arguments[1]
        if node.target not in (launch, tensor):
            return None
    return None


class SpeculatedUnit:
    """One call's tensor work; see `convert.speculation.speculation.Unit`. Used once."""

    __slots__ = (
        "_drawn",
        "_feeds",
        "_fetched",
        "_given",
        "_is_laid_out",
        "_outputs",
        "_run",
        "_undo",
        "_work",
        "failed_at",
        "is_committed",
    )

    def __init__(self, work: TensorWork, is_laid_out: bool = False) -> None:
        """`is_laid_out`: see `TensorWork.runner`."""
        self._work = work
        self._is_laid_out = is_laid_out
        self._given: dict[int, Any] = {}
        self._feeds: dict[int, Any] = {}
        self._run: GraphRunner | None = None
        self._outputs: dict[int, torch.Tensor] | None = None
        self._fetched: dict[int, Any] = {}
        self._drawn: list[Generator] = []
        self._undo: list[Callable[[], object]] = []
        """How to put back generators that were drawn from, arrays that were changed and optimizers that were set."""
        self.failed_at: int | None = None
        """The assumption that did not hold."""
        self.is_committed = False
        """Whether the call can no longer be given back to Python."""

    @property
    def has_launched(self) -> bool:
        """Whether there is anything to undo."""
        return self._run is not None and self._run.launched > 0

    def failed(self, index: int) -> object:
        """Note which assumption does not hold."""
        self.failed_at = index
        return FAILED

    def give(self, index: int, given: Any) -> None:
        """See `Unit.give`. Raises `CannotSpeculate` for what the path does not take there."""
        feed = self._work.feeds[index]
        if not feed.accepts(given):
            raise CannotSpeculate("a tensor of another kind was given")
        self._given[index] = given
        # No copy, as the skeleton needs: until all is launched, nothing here writes to the memory of a feed.
        role = feed.role
        self._feeds[index] = number_tensor(given, role.spec.dtype, role.spec.device) if role.is_number else given

    def read(self, event: int, function: Callable[..., Any], *rest: Any) -> Any:
        """See `Unit.read`."""
        run, program = self._started(), self._work.program
        position = program.positions[event]
        with torch.no_grad():
            run.launch_through(position)
            run.launch_ahead()
            if function in NUMBER_READS and (copied := run.host_value(position)) is not None:
                self._fetched[event] = number = function(copied, *rest)
                return number
            values = [run.value(value).detach() for value in program.fetches[event]]  # a feed may have a history
        recorded: Any = self._work.path.nodes[event].event
        references = leaves((recorded.arguments, recorded.keywords), (Slot, External))
        shows_history = function in (_TENSOR.__repr__, _TENSOR.__format__)
        given = [self._real(event, r, v, shows_history) for r, v in zip(references, values, strict=True)]
        self._fetched[event] = fetched = function(*given, *rest)
        return fetched

    def fetched(self) -> dict[PathNode, Any]:
        """Return what was read of the unit, by the events."""
        return {self._work.path.nodes[event]: value for event, value in self._fetched.items()}

    def _real(self, event: int, reference: Slot | External, value: torch.Tensor, shows_history: bool) -> torch.Tensor:
        path = self._work.path
        if isinstance(reference, External):
            role, _ = path.nodes[-1].role_of(reference.index)
            return self._given[reference.index] if role.tensor is None else role.tensor
        made = path.made_in(reference.index, event)
        if shows_history and made.grad_function:
            return with_freed_history(value, made.grad_function)
        return value.requires_grad_() if made.requires_grad and made.is_leaf else value

    def step(self, event: int) -> None:
        """See `Unit.step`."""
        run, program = self._started(), self._work.program
        plan = program.optimizers[event]
        with torch.no_grad():
            run.launch_through(program.positions[event])
            run.prepare_step(plan, event, is_last=event == self._work.final_step)
        self.is_committed = event == self._work.final_step
        plan.optimizer.step()

    def draw(self, number: int, generator: Generator, name: str, *arguments: Any, **keywords: Any) -> Any:
        """See `Unit.draw`."""
        del number
        if not any(drawn is generator for drawn in self._drawn):
            self._drawn.append(generator)
            self._undo.append(rewinding(generator))
        return draw_by(generator, name, *arguments, **keywords)

    def change(self, function: Callable[..., Any], array: np.ndarray, *arguments: Any, **keywords: Any) -> None:
        """See `Unit.change`."""
        if not self.is_committed:
            self._undo.append(restoring(function, array, arguments))
        function(array, *arguments, **keywords)

    def put(self, holder: dict[str, Any], key: str, value: Any) -> None:
        """See `Unit.put`."""
        self._undo.append(functools.partial(operator.setitem, holder, key, holder[key]))
        holder[key] = value

    def launch(self, undoable: bool) -> None:
        """See `Unit.launch`."""
        run = self._run or self._started()
        run.saves_last = undoable
        if not undoable:  # all assumptions hold
            run.walked = len(self._work.path.nodes)
        run.launch_through(run.installed.last + 1)

    def tensor(self, slot: int) -> torch.Tensor:
        """See `Unit.tensor`."""
        if self._outputs is None:
            work = self._work
            self._outputs = outputs_of(work.path, self._run or self._started(), work.slots, work.learn, work.bare)
            give_gradients(work.path, self._run or self._started(), self._outputs)
        return self._outputs[slot]

    def commit(self) -> None:
        """See `Unit.commit`."""
        (self._run or self._started()).commit_gradients()
        self._work.set_requires_grad(self._given)
        self.is_committed = True

    def discard(self) -> None:
        """Put back all that was written, and the generators that were drawn from."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self._run is not None:
            with torch.no_grad():
                self._run.discard()

    def _started(self) -> GraphRunner:
        if self._run is None:
            self._run = self._work.runner(self._feeds, self._given, self._is_laid_out)
        return self._run

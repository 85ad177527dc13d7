"""`GraphRunner`: run the segments of one unit, and undo what they wrote if the unit turns out otherwise.

A unit with no fetch is launched when Python has walked it, and never has anything to undo. Before a segment that is
not the last, whatever it writes that outlives the unit is copied; `discard` puts that back, and the random generators
too. On CUDA a launch returns at once: Python walks the next unit while the device works. Where a unit has fetches, the
device does not wait for Python either: segments are launched ahead of it, on the prediction that it takes the same
path again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from twofold.backends.executable import Environment
from twofold.convert.from_traces import OptimizerPlan
from twofold.convert.segments import is_read_in_order, root_of
from twofold.graph import Node, Value, run_node

from .installed import Installed
from .versions import keep_versions

_set_gradient: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.grad.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RandomState:
    """The state of the generator that a unit draws from: PyTorch's default one, of the CPU or of the accelerator.

    A unit of an accelerator never draws from the CPU's, which Python may have drawn from meanwhile.
    """

    cpu: torch.Tensor | None
    cuda_offset: int | None

    @classmethod
    def take(cls, on_accelerator: bool) -> RandomState:
        """Read the state of now."""
        if on_accelerator and torch.cuda.is_initialized():
            return cls(None, _generator().get_offset())
        return cls(torch.default_generator.get_state(), None)

    def restore(self) -> None:
        """Go back to this state."""
        if self.cpu is not None:
            torch.default_generator.set_state(self.cpu)
        if self.cuda_offset is not None:
            _generator().set_offset(self.cuda_offset)


def _generator() -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device()]


class GraphRunner:
    """One unit of one path. Mutable; not used after `commit_gradients` or `discard`."""

    def __init__(
        self,
        installed: Installed,
        feeds: dict[int, torch.Tensor],
        given: dict[int, torch.Tensor],
        foretold: dict[int, torch.Tensor],
    ) -> None:
        """Start with nothing launched.

        `feeds` grows while Python walks; `given` are the program's own objects; `foretold` is what is expected there.
        """
        self.installed = installed
        self.program = installed.program
        self.environment: Environment = dict(installed.statics)
        self.launched = 0
        self.saves_last = False
        """Whether the last segment shall be undone too, if `discard` comes after it."""
        self.walked = -1
        """The last event that is known to be one of the unit's, so that what it drops is dropped."""
        self._feeds = feeds
        self._given = given
        self._foretold = foretold
        self._relied_on: dict[int, torch.Tensor] = {}
        """What was read as a feed before Python gave it."""
        self._copies: Environment = {}
        """Of memory that the next launch uses again: what the program is handed."""
        self._saved: dict[Value, torch.Tensor] = {}
        self._restore_versions: list[Callable[[], None]] = []
        self._random: RandomState | None = None
        self._is_ahead = False
        self._undo: list[Callable[[], None]] = []
        self._ready: dict[int, torch.cuda.Event] = {}
        for entry, leaf in installed.entries:
            if isinstance(leaf, torch.Tensor):
                self.environment[entry] = leaf.grad

    def launch_through(self, count: int) -> None:
        """Launch the segments up to number `count`, those launched before left out."""
        is_grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a sixth of what `torch.no_grad` takes, once a unit
        try:
            while self.launched < count:
                self._launch_next()
        finally:
            torch._C._set_grad_enabled(is_grad_enabled)

    def _launch_next(self) -> None:
        installed, environment, feeds, index = self.installed, self.environment, self._feeds, self.launched
        if installed.fed_leaves:
            self._take_fed_leaves()
        if installed.entries:
            installed.check_gradients(environment, (*feeds.values(), *self._foretold.values()))
        if index == 0 and installed.lent is not None:
            installed.lent.take_back(self.walked >= self.program.drops_gradients_by)
        is_kept = index == installed.last and not self.saves_last
        written = installed.written_early if is_kept else installed.written[index]
        if written or self.program.uses_random:
            self._save(written)
        for value, number in self.program.feeds.items():
            if number in feeds:
                environment[value] = feeds[number]
            elif number in self._foretold:
                environment[value] = self._relied_on[number] = self._foretold[number]
        for value, setting in installed.settings[index]:
            environment[value] = setting.read()  # now: the program may set them by what it fetched
        self.launched += 1
        installed.executable.launch(index, environment)
        if installed.unnoticed[index]:
            torch.autograd.graph.increment_version(installed.unnoticed[index])
        if self.launched in installed.host_copies:
            self._copy_to_host(self.launched)

    def _take_fed_leaves(self) -> None:
        """Look at the leaves that Python has given by now, and at their gradients from before the unit."""
        leaves = self.installed.fed_leaves
        bound = {leaf: self._given[leaf] for leaf in leaves if leaf in self._feeds}
        foretold = {leaf: self._foretold[leaf] for leaf in leaves if leaf in self._foretold}
        self.installed.check_leaves((foretold | bound).values())
        for entry, leaf in self.installed.entries:
            if isinstance(leaf, int) and leaf in bound:
                self.environment[entry] = bound[leaf].grad

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped outside of the graph, and more of the unit was to come."""
        return bool(self._undo)

    def launch_ahead(self) -> None:
        """Launch the segments that need nothing more from Python and write little that outlives the unit."""
        while self.launched in self.installed.go_ahead and self._has_inputs(self.launched):
            self._is_ahead = True
            self.launch_through(self.launched + 1)

    def lets_python_draw(self) -> bool:
        """Have `discard` keep what Python draws from now on; False if the unit may have drawn ahead of it.

        Call it before the unit's first draw that Python has walked.
        """
        if self._is_ahead and self.program.uses_random:
            return False
        self._random = None
        return True

    def _has_inputs(self, index: int) -> bool:
        feeds = self.program.feeds
        known = self._feeds.keys() | self._foretold.keys()
        return all(v not in feeds or feeds[v] in known for v in self.program.segments[index].inputs)

    @property
    def is_misled(self) -> bool:
        """Whether Python has given another tensor than the one that was read in its place."""
        return any(self._given.get(index, tensor) is not tensor for index, tensor in self._relied_on.items())

    def _copy_to_host(self, position: int) -> None:
        value, host = self.installed.host_copies[position]
        host.copy_(self.value(value), non_blocking=True)
        self._ready[position] = torch.cuda.Event()
        self._ready[position].record()

    def host_value(self, position: int) -> torch.Tensor | None:
        """Wait for the number read after `position` segments alone, not for what was launched since.

        Returns the tensor on the CPU, in memory that the next unit uses again; None if it is not copied.
        """
        ready = self._ready.get(position)
        if ready is None:
            return None
        ready.synchronize()
        return self.installed.host_copies[position][1]

    def _save(self, written: list[Value]) -> None:
        if self._random is None and self.program.uses_random:
            self._random = RandomState.take(self.program.on_accelerator)
        fresh = [value for value in written if value not in self._saved]
        if fresh:
            self._saved.update((value, self.environment[value].clone()) for value in fresh)
            self._restore_versions.append(keep_versions(self.environment[value] for value in fresh))

    def value(self, value: Value) -> torch.Tensor:
        """Return a computed value. It aliases memory that the next launch of the path may overwrite."""
        return self.installed.value(value, self.environment)

    def owned_value(self, value: Value) -> torch.Tensor:
        """Return a computed value that stays as it is and shares memory with whatever eager's shares it with.

        Where the executable uses its memory again, that memory is copied, once: call it when all is launched.
        """
        if value in self.installed.handed_on:
            return self.environment[value].detach()
        root = root_of(value, self.program.views)
        index = self.program.feeds.get(root)
        if index is not None:  # what the program gets is a view of its own tensor, not of our copy
            return self._view_of(value, root, self._given[index].detach())
        is_lasting = root in self.program.statics or any(entry is root for entry, _ in self.installed.entries)
        if not self.installed.executable.reuses_outputs or is_lasting:
            return self.value(value).detach()
        if root not in self._copies:
            self._copies[root] = self.value(root).clone()
        return self._view_of(value, root, self._copies[root].detach())

    def _view_of(self, value: Value, root: Value, tensor: torch.Tensor) -> torch.Tensor:
        environment: Environment = {root: tensor}
        chain: list[Node] = []
        shown = value
        while shown not in environment:
            chain.append(self.program.views[shown])
            shown = chain[-1].operands[0]
        for node in reversed(chain):
            run_node(node, environment)
        return environment[value]

    def residual(self, value: Value) -> torch.Tensor:
        """Return what a later backward reads: the program's own object, where it is one, or a computed value."""
        static, feed = self.program.statics.get(value), self.program.feeds.get(value)
        if static is not None:
            return static
        given = None if feed is None else self._given[feed]
        return given if isinstance(given, torch.Tensor) else self.value(value)

    def given_externals(self) -> dict[int, Any]:
        """Return the feeds of this unit as the program gave them: tensors and numbers."""
        return dict(self._given)

    def state_before(self) -> tuple[dict[Value, torch.Tensor], RandomState | None]:
        """Return copies of the statics that the unit wrote to, and the random generators, as both were before it."""
        return self._saved, self._random

    def commit_gradients(self) -> None:
        """Set `.grad` of all leaves to what eager execution leaves there, in memory of their own, or lent."""
        exits, environment = self.installed.exits, self.environment
        if exits.views:
            with torch.no_grad():
                for view in exits.views:
                    self.value(view)
        gradients = list(map(environment.__getitem__, exits.values))
        if exits.copied:
            lasting = self.installed.lasting_gradients([gradients[index] for index in exits.copied])
            for index, gradient in zip(exits.copied, lasting, strict=True):
                gradients[index] = gradient
        for index in exits.shared:
            gradients[index] = self.owned_value(exits.values[index])
        for index, given in exits.given:
            gradients[index] = self._given[given] if isinstance(given, int) else given
        # A loop of C's, once for each parameter.
        deque(map(_set_gradient, exits.leaves_given(self._given), gradients), maxlen=0)
        for leaf in exits.cleared:
            cleared = leaf if isinstance(leaf, torch.Tensor) else self._given[leaf]
            cleared.grad = None

    def prepare_step(self, plan: OptimizerPlan, index: int, is_last: bool) -> None:
        """Hand an optimizer that steps outside its gradients. `is_last`: nothing can be discarded any more."""
        gradients = iter([self.value(value) for value in self.program.fetches[index]])
        if not is_last:
            self._undo.append(_saved_step(plan))
        for parameter, has_gradient in plan.stepped:
            parameter.grad = next(gradients) if has_gradient else None

    def discard(self) -> None:
        """Put back all that launched segments and outside steps wrote, random states included."""
        for undo in reversed(self._undo):
            undo()
        for value, saved in self._saved.items():
            self.environment[value].copy_(saved)
        for restore in self._restore_versions:
            restore()
        if self._random is not None:
            self._random.restore()
        self._saved.clear()


def _saved_step(plan: OptimizerPlan) -> Callable[[], None]:
    """Copy what a step of an optimizer writes to; return how to put it back."""
    stepped = [parameter for parameter, has_gradient in plan.stepped if has_gradient]
    gradients = [(parameter, parameter.grad) for parameter, _ in plan.stepped]
    states = [plan.optimizer.state.get(parameter, {}) for parameter in stepped]
    written = [*stepped, *(t for state in states for t in state.values() if isinstance(t, torch.Tensor))]
    copies = [(tensor, tensor.detach().clone()) for tensor in written]
    numbers = [dict(state) for state in states]
    restore_versions = keep_versions(written)

    def undo() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for state, known in zip(states, numbers, strict=True):
            state.clear()
            state.update(known)
        for tensor, copy in copies:
            tensor.copy_(copy)
        restore_versions()

    return undo


ALIGNMENT = 64
"""Where PyTorch's memory on the CPU begins, in bytes. Kernels take what begins elsewhere in another order."""


def feed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a feed holds now, laid out and aligned as it is, safe from later changes by Python.

    On the CPU, NumPy may write to the same memory unseen.
    """
    if is_read_in_order(tensor):
        return tensor
    given = tensor.detach()
    stride, beyond = given.stride(), given.data_ptr() % ALIGNMENT
    if not beyond:
        copy = given.clone()
        if copy.stride() == stride:
            return copy
    # A copy of some columns of a matrix is dense, and kernels that were compiled for the columns do not take it.
    span = 1 + sum((size - 1) * step for size, step in zip(given.shape, stride, strict=True) if size)
    start = beyond // given.element_size()
    memory = torch.empty(start + span, dtype=given.dtype, device=given.device)
    copy = memory.as_strided(given.shape, stride, start)
    if _may_overlap(given):
        memory[start:].copy_(given.as_strided((span,), (1,)))
    else:
        copy.copy_(given)
    return copy


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in one place: a stride does not reach beyond what the smaller ones span."""
    end = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < end:
            return True
        end += (size - 1) * step
    return False

"""`PythonRunner`: the user's own Python, walked as a skeleton that computes nothing (Terra, section 4.2).

While it follows the TraceGraph, each tensor call is checked against the expected event; `FollowedUnit` answers it.
Where the program leaves the known paths, `leave` turns the unit back into an eager one: the calls made so far are run
for real, and the rest of the unit runs eagerly under the recorder.

At any time the runner is in one of four states: following (`_node` is set), recording (`_recorder` is set), hearing
no more of a unit that it heard the beginning of (`_unheard` is set), or idle, when calls pass through untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer

from twofold.capture import landmarks
from twofold.capture.functions import FROM_HOST_DATA, HISTORY, METADATA, display_name
from twofold.capture.history import Watch
from twofold.capture.intercept import NOT_ANSWERED, hearing_operations, unheard, user_origin
from twofold.capture.recorder import Recorder, has_step_hooks
from twofold.capture.trace import Trace, leaves
from twofold.capture.trace_graph import Path, PathNode, Signature, TraceGraph
from twofold.errors import InternalError

from .account import Account
from .followed_unit import CannotFollow, FollowedUnit

_TENSOR = torch.Tensor


class UnitEnd(Protocol):
    """Told how each unit ended."""

    def __call__(self, path: Path | None, trace: Trace | None, signature: Signature) -> None:
        """`path`: it ran as a graph. `trace`: it ran eagerly and was recorded. Neither: it ran unseen."""


class PythonRunner:
    """Listens to the program, one unit after the other. Used by one thread."""

    def __init__(self, graph: TraceGraph, account: Account, on_end: UnitEnd) -> None:
        self.graph = graph
        self.account = account
        self._on_end = on_end
        self._placeholders = graph.placeholders
        self._node: PathNode | None = None
        self._recorder: Recorder | None = None
        self._unheard: Trace | None = None
        self._signature: Signature = ()
        self._unit = FollowedUnit(graph, account)
        self._stepping: Optimizer | None = None
        self._watch: Watch | None = None
        self.meets_recursion: Callable[[], str | None] | None = None
        """Asked at each call of a unit that is recorded; see `Recorder`."""

    # ---- units -------------------------------------------------------------------------------------------

    def begin(self, mode: str, signature: Signature) -> None:
        """Start a unit: `follow` the graph, `record`, or `idle`."""
        self._signature = signature
        if self._watch is not None:
            self.graph.learn_backward(self._watch)
            self._watch = None
        if mode == "follow":
            self._unit.clear()
            self._node = self.graph.root(signature)
        elif mode == "record":
            self._recorder = self._make_recorder()

    def is_given(self, arguments: Any) -> None:
        """Take note of what the call was given in which the next units run: their feeds are looked for there first."""
        self._unit.arguments = arguments

    def _make_recorder(self) -> Recorder:
        graph = self.graph
        for path in graph.paths:
            if path.executable is not None:  # a trace holds the gradients that it read, and may outlive many launches
                path.executable.keep_gradients()
        return Recorder(graph.has_accelerator, graph.host_sites, graph.number_sites, self.meets_recursion)

    @property
    def in_unit(self) -> bool:
        """Whether the unit has seen a call, or hears no more of what it does."""
        if self._unheard is not None:
            return True
        if self._node is not None:
            return self._node.parent is not None
        return self._recorder is not None and bool(self._recorder.trace.events or self._recorder.trace.refusal)

    def end(self) -> None:
        """Finish the unit: launch what is left and commit, or close the trace."""
        with torch._C.DisableTorchFunction():  # the program's modes are on here; operations must be heard still
            if self._node is not None and self._finish_graph(self._node):
                return  # the next unit has begun perhaps
            if self._recorder is not None:
                self._finish_trace()
                return
        if self._unheard is not None:
            trace, self._unheard = self._unheard, None
            self._on_end(None, trace, self._signature)

    @property
    def is_refused(self) -> bool:
        """Whether the unit is one that will not be a graph, so that its history is not known."""
        return self._recorder is not None and self._recorder.trace.refusal is not None

    def end_round(self) -> bool:
        """Finish the unit where its loop has come round. False if autograd history crosses that line."""
        if self._recorder is not None:
            if not self.in_unit:
                return True
            if not self._recorder.can_end():
                return False
            self.end()
        elif self._node is None:
            self._end_idle()
        elif self._node.end is not None:
            self.end()
        return True

    def _end_idle(self) -> None:
        """End an idle unit that is heard all the same: a mode of the program's own was on when it began."""
        self._on_end(None, None, ())

    def drop(self) -> None:
        """End a unit that is no unit, without a trace: all that it did was done eagerly."""
        if self._node is not None and self._node.parent is not None:
            with torch._C.DisableTorchFunction():
                self.leave("new_path", "calls after the last optimizer step of a call")
        self._node = None
        if self._recorder is not None:
            with unheard():
                self._recorder.finish()
            self._recorder = None
        self._unit.clear()

    def abandon(self) -> None:
        """End a unit that an exception leaves: state becomes what eager execution has at that line."""
        raised = "the program raised an exception inside the unit"
        if self._node is not None and self._node.parent is not None:
            with torch._C.DisableTorchFunction():
                self.leave("unit_raised", raised)
        elif self._recorder is not None or self._unheard is not None:
            self.account.fallback("unit_raised", raised)
        self._node = None
        if self._recorder is not None:
            with unheard():
                trace = self._recorder.finish()
            self._recorder = None
            self.account.eager_calls += len(trace.events)
            self._on_end(None, None, self._signature)
        if self._unheard is not None:
            self._unheard = None
            self._on_end(None, None, self._signature)

    def _finish_graph(self, node: PathNode) -> bool:
        """Commit the unit, or leave it; it is being recorded then. Returns whether it has ended."""
        if node.parent is None:
            self._node = None
            return True
        try:
            path = self._unit.commit(node)
        except CannotFollow as why:
            code, reason = why.args
        else:
            self._node = None
            self._on_end(path, None, self._signature)
            return True
        self.leave(code, reason)
        return False

    def _finish_trace(self) -> None:
        assert self._recorder is not None
        if self.graph.differentiated_twice:
            self._recorder.refuse_history()
        else:
            self._recorder.record_history(self.graph.layouts)
        recorder, self._recorder = self._recorder, None
        self._watch = recorder.watch
        with unheard():
            trace = recorder.finish()
        places = {id(tensor): place for place, tensor in enumerate(leaves(self._unit.arguments, _TENSOR))}
        trace.arguments = {i: places[id(tensor)] for i, tensor in enumerate(trace.externals) if id(tensor) in places}
        self.account.eager_calls += len(trace.events)
        self._on_end(None, trace, self._signature)

    # ---- what the program does ---------------------------------------------------------------------------

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer a torch function; see `Listener`."""
        node = self._node
        if node is None or self._stepping is not None:
            if self._recorder is not None:
                return self._recorder.call(function, arguments, keywords)
            return function(*arguments, **keywords)
        unit = self._unit
        slots = unit.slots
        for child in node.children:
            if child.match(function, arguments, keywords, slots, unit.feeds):
                self._node = child
                if child.answers_at_once and (placeholder := child.placeholders[0]) is not None:
                    slots.append(placeholder)
                    return placeholder
                if child.kind == "fetch":
                    return self._fetch(child, function, arguments, keywords)
                return unit.answer(child)
        return self._unexpected(function, arguments, keywords)

    def leaf_module(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer the call of a leaf module that is expected; see `Listener`."""
        node = self._node
        if node is not None and self._stepping is None:
            unit = self._unit
            slots = unit.slots
            for child in node.children:
                if child.module_match(module, arguments, keywords, slots, unit.feeds):
                    self._node = child
                    if child.answers_at_once and (placeholder := child.placeholders[0]) is not None:
                        slots.append(placeholder)
                        return placeholder
                    return unit.answer(child)
        return NOT_ANSWERED

    def _fetch(self, node: PathNode, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        try:
            return self._unit.fetch(node, function, arguments, keywords)
        except CannotFollow as why:
            code, reason = why.args
        self._node = node.parent
        self.leave(code, reason)
        return self.call(function, arguments, keywords)

    def _unexpected(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if function in METADATA:
            return function(*arguments, **keywords)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if function in HISTORY and given:
            made = self._unit.made_of(given[0])
            name = HISTORY[function]
            if made is None:
                return function(*arguments, **keywords)
            if name in ("requires_grad", "is_leaf"):
                return getattr(made, name)
        if not self._has_placeholder(given) and self._is_pythons_own(function, given):
            if self.graph.drawing_sites and (function, user_origin()) in self.graph.drawing_sites:
                self.host_work()
                if self._recorder is not None:
                    return self.call(function, arguments, keywords)
            return function(*arguments, **keywords)
        self.leave("new_path", f"unexpected call of {display_name(function)}")
        return self.call(function, arguments, keywords)

    def _is_pythons_own(self, function: Any, given: list[torch.Tensor]) -> bool:
        """Whether a call on real tensors can be left to Python without the unit noticing."""
        if any(self.graph.writes_to(tensor) for tensor in given):
            return False
        if function in FROM_HOST_DATA:
            return True
        if self.graph.host_sites and (function, user_origin()) in self.graph.host_sites:
            return True
        return self.graph.has_accelerator and bool(given) and all(tensor.device.type == "cpu" for tensor in given)

    def _has_placeholder(self, tensors: list[torch.Tensor]) -> bool:
        known = self._placeholders
        return any(id(tensor) in known for tensor in tensors)

    def operation(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer an ATen operation that reached the dispatcher; see `Listener`.

        On a placeholder it comes from code that no patch point announces. It is too late then to give that
        operation a history, so it fails rather than go wrong.
        """
        if self._recorder is not None:
            return self._recorder.operation(target, arguments, keywords)
        following = self._node is not None and self._stepping is None
        if following and self._has_placeholder(leaves((arguments, keywords), _TENSOR)):
            raise InternalError(f"{target} reached PyTorch's dispatcher unannounced, on a tensor of a graph.")
        return target(*arguments, **keywords)

    def foreign_call(self, code: str, what: str) -> None:
        """Code is about to run that cannot be followed; see `Listener`."""
        if self._node is not None:
            self.leave(code, what)
        if self._recorder is not None:
            self._recorder.refuse(code, what, user_origin())

    def unwatch(self, code: str, what: str) -> None:
        """Nothing more of the unit will be heard, which refuses it; see `Listener`."""
        self.foreign_call(code, what)
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            with unheard():
                self._unheard = recorder.finish()
            self.account.eager_calls += len(self._unheard.events)

    def host_work(self) -> None:
        """Library code runs unheard: random numbers must be drawn in eager's order; see `Listener`."""
        if self._node is not None and self._node.parent is not None:
            path = self._node.latest
            first = None if path is None else path.trace.first_random
            has_drawn = first is not None and first <= self._node.depth
            if path is None or has_drawn or not self._unit.lets_python_draw():
                self.leave("new_path", "the random state was read, set or drawn from in the middle of a unit")
        if self._recorder is not None:
            self._recorder.random_state_changes()

    def zero_grad(self, owner: Any, original: Callable[..., None], arguments: tuple[Any, ...], keywords: Any) -> None:
        """Answer `zero_grad`; see `Listener`."""
        if self._node is not None:
            unit = self._unit
            for child in self._node.children:
                event = child.event
                if (
                    event is not None
                    and event.kind == "zero_grad"
                    and child.match(original, (owner, *arguments), keywords, unit.slots, unit.feeds)
                ):
                    self._node = child
                    return
            self.leave("new_path", "unexpected zero_grad")
        if self._recorder is not None:
            self._recorder.zero_grad(owner, original, arguments, keywords)
        else:
            original(owner, *arguments, **keywords)

    def before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Any) -> Any:
        """Answer the start of `optimizer.step()`; see `Listener`."""
        if self._node is not None:
            code, reason = "new_path", f"{type(optimizer).__name__}.step on a path with no graph yet, or set otherwise"
            node = next((c for c in self._node.children if c.fits_optimizer(optimizer)), None)
            if node is not None and len(arguments) == 1 and not keywords and self._step_is_known(node):
                try:
                    return self._follow_step(node, optimizer)
                except CannotFollow as why:
                    code, reason = why.args
            self.leave(code, reason)
        if self._recorder is not None:
            self._recorder.before_step(optimizer, arguments, keywords)
        return None

    def _step_is_known(self, node: PathNode) -> bool:
        path = self._unit.path_ahead(node)
        if path is None or path.executable is None:
            return False
        plan = path.program.optimizers.get(node.depth)
        holds = plan is not None and plan.still_holds() and not has_step_hooks(plan.optimizer)
        if not holds:
            path.stale = True
            path.volatile.add(node.event.arguments[0])  # type: ignore[union-attr]
        return holds

    def _follow_step(self, node: PathNode, optimizer: Optimizer) -> Any:
        path = self._unit.path_ahead(node)
        assert path is not None
        plan = path.program.optimizers[node.depth]
        if plan.outside:
            self._unit.prepare_step(node, plan)
        self._node = node
        self._stepping = optimizer
        return None if plan.outside else ((plan.stand_in,), {})

    def after_step(self, optimizer: Optimizer) -> None:
        """Answer the end of `optimizer.step()`, where a unit ends; see `Listener`."""
        if self._stepping is optimizer:
            self._stepping = None
            if self._node is not None and self._node.end is not None:
                self.end()
            return
        if self._recorder is not None:
            self._recorder.after_step(optimizer)
            if not self._recorder.goes_on_after_step():
                self.end()
        elif self._node is None:
            self._end_idle()

    # ---- leaving the known paths -------------------------------------------------------------------------

    def leave(self, code: str, reason: str) -> None:
        """Make the unit an eager one from its beginning to this line, and go on recording it."""
        node = self._node
        assert node is not None
        self._node = None
        self._stepping = None
        self.account.fallback(code, reason, str(origin) if (origin := user_origin()) else None)
        self._unit.discard()
        recorder = self._recorder = self._make_recorder()
        try:
            # Landmarks were passed before. What made the unit leave may be beneath an operation, as in `from_numpy`.
            with landmarks.within(), hearing_operations():
                self._unit.repeat(node, recorder)
        except BaseException as error:  # the program's own, from a call made earlier
            recorder.refuse("unit_raised", f"{type(error).__name__} from a call made earlier in the unit", None)
            raise

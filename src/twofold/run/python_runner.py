"""`PythonRunner`: the user's own Python, walked as a skeleton that computes nothing (Terra, section 4.2).

While it follows the TraceGraph, each tensor call is checked against the expected event and answered with a
placeholder. It waits only where Python needs a value. Where the program leaves the known paths, `leave` turns the
unit back into an eager one: state is restored, the calls made so far are run for real, every placeholder in the
user's hands becomes the tensor it stood for, and the rest of the unit runs eagerly under the recorder.

At any time the runner is in one of four states: following (`_node` is set), recording (`_recorder` is set), hearing
no more of a unit that it heard the beginning of (`_unheard` is set), or idle, when calls pass through untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer

from twofold.capture.functions import FROM_HOST_DATA, HISTORY, METADATA, NUMBER_READS, display_name
from twofold.capture.history import Layout, Watch
from twofold.capture.intercept import unheard, user_origin
from twofold.capture.number_feeds import number_tensor
from twofold.capture.recorder import Recorder, has_step_hooks
from twofold.capture.trace import External, Slot, Trace, leaves, map_leaves
from twofold.capture.trace_graph import MAX_LAYOUTS, Path, PathNode, Signature, TraceGraph
from twofold.errors import InternalError
from twofold.graph import ambient_context

from .account import Account
from .graph_runner import GraphRunner, Installed, feed_copy
from .history import History, with_history
from .placeholders import escaped, fill_placeholder, make_placeholder, recycle, with_freed_history

_TENSOR = torch.Tensor

TRUSTED_AFTER = 3
"""Units in a row that went the same way after a fetch, before the device goes that way ahead of Python."""


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
        self._slots: list[torch.Tensor] = []
        self._feeds: dict[int, Any] = {}  # tensors, and numbers that are fed as tensors
        self._copied: dict[int, torch.Tensor] = {}
        self._fetched: list[PathNode] = []
        self._run: GraphRunner | None = None
        self._run_path: Path | None = None
        self._stepping: Optimizer | None = None
        self._watch: Watch | None = None

    # ---- units -------------------------------------------------------------------------------------------

    def begin(self, mode: str, signature: Signature) -> None:
        """Start a unit: `follow` the graph, `record`, or `idle`."""
        self._signature = signature
        if self._watch is not None:
            self.graph.learn_backward(self._watch)
            self._watch = None
        if mode == "follow":
            self._node = self.graph.root(signature)
        elif mode == "record":
            self._recorder = Recorder(self.graph.has_accelerator, self.graph.host_sites, self.graph.number_sites)

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
            if self._node is not None:
                self._finish_graph(self._node)
            if self._recorder is not None:
                self._finish_trace()
        if self._unheard is not None:
            trace, self._unheard = self._unheard, None
            self._on_end(None, trace, self._signature)

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
        self._reset()

    def abandon(self) -> None:
        """End a unit that an exception leaves: state becomes what eager execution has at that line."""
        if self._node is not None and self._node.parent is not None:
            with torch._C.DisableTorchFunction():
                self.leave("unit_raised", "the program raised an exception inside the unit")
        self._node = None
        if self._recorder is not None:
            with unheard():
                trace = self._recorder.finish()
            self._recorder = None
            self._reset()
            self.account.eager_calls += len(trace.events)
            self._on_end(None, None, self._signature)
        if self._unheard is not None:
            self._unheard = None
            self._on_end(None, None, self._signature)

    def _reset(self) -> None:
        self._slots.clear()
        self._feeds.clear()
        self._copied.clear()
        self._fetched.clear()
        self._run = None
        self._run_path = None

    # ---- what the program does ---------------------------------------------------------------------------

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer a torch function; see `Listener`."""
        node = self._node
        if node is None or self._stepping is not None:
            if self._recorder is not None:
                return self._recorder.call(function, arguments, keywords)
            return function(*arguments, **keywords)
        slots = self._slots
        for child in node.children:
            if child.match(function, arguments, keywords, slots, self._feeds):
                self._node = child
                if child.answers_at_once and (placeholder := child.placeholders[0]) is not None:
                    slots.append(placeholder)
                    return placeholder
                return self._advance(child, function, arguments, keywords)
        return self._unexpected(function, arguments, keywords)

    def _advance(self, node: PathNode, function: Any, arguments: Any, keywords: Any) -> Any:
        event: Any = node.event
        if node.fed:
            self._copy_feeds(node)
        if node.kind == "fetch":
            return self._fetch(node, function, arguments, keywords)
        slots = self._slots
        for index, placeholder in enumerate(node.placeholders):
            if placeholder is None:
                placeholder = node.placeholders[index] = make_placeholder(event.made[index], self._placeholders)
            slots.append(placeholder)
        outcome = event.outcome
        if type(outcome) is Slot:
            return slots[outcome.index]
        if outcome is None:
            return None
        return map_leaves(outcome, (Slot, External), self._resolve)

    def _copy_feeds(self, node: PathNode) -> None:
        with unheard():
            for index in node.fed:
                given, role = self._feeds[index], node.roles[index - node.first_external]
                if role.is_number:
                    self._copied[index] = number_tensor(given, role.spec.dtype, role.spec.device)
                else:
                    self._copied[index] = feed_copy(given)

    def _resolve(self, reference: Slot | External) -> torch.Tensor:
        if type(reference) is Slot:
            return self._slots[reference.index]
        assert self._node is not None
        role, _ = self._node.role_of(reference.index)
        # Invariant: a feed is bound anew where a node that matched first uses it; a node that did not match may
        # have left a binding too, for an index that is static here.
        return self._feeds[reference.index] if role.tensor is None else role.tensor

    def _unexpected(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if function in METADATA:
            return function(*arguments, **keywords)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if function in HISTORY and given:
            known = self._placeholders.get(id(given[0]))
            name = HISTORY[function]
            if known is None:
                return function(*arguments, **keywords)
            if name in ("requires_grad", "is_leaf"):
                return getattr(known[1], name)
        if not self._has_placeholder(given) and self._is_pythons_own(function, given):
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
            self._reset()
            self.account.eager_calls += len(self._unheard.events)

    def host_work(self) -> None:
        """Library code runs unheard: random numbers must be drawn in eager's order; see `Listener`."""
        if self._node is not None and self._node.parent is not None:
            path = self._node.latest
            first = None if path is None else path.trace.first_random
            if path is None or (first is not None and first <= self._node.depth):
                self.leave("new_path", "the random state was read, set or drawn from in the middle of a unit")
        if self._recorder is not None:
            self._recorder.random_state_changes()

    def zero_grad(self, owner: Any, original: Callable[..., None], arguments: tuple[Any, ...], keywords: Any) -> None:
        """Answer `zero_grad`; see `Listener`."""
        if self._node is not None:
            for child in self._node.children:
                event = child.event
                if (
                    event is not None
                    and event.kind == "zero_grad"
                    and child.match(original, (owner, *arguments), keywords, self._slots, self._feeds)
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
            node = next((c for c in self._node.children if _steps(c, optimizer)), None)
            if node is not None and len(arguments) == 1 and not keywords and self._step_is_known(node):
                return self._follow_step(node, optimizer)
            self.leave("new_path", f"{type(optimizer).__name__}.step on a path with no graph yet, or set otherwise")
        if self._recorder is not None:
            self._recorder.before_step(optimizer, arguments, keywords)
        return None

    def _step_is_known(self, node: PathNode) -> bool:
        path = node.latest
        if path is None or path.executable is None:
            return False
        plan = path.program.optimizers.get(node.depth)
        holds = plan is not None and plan.still_holds() and not has_step_hooks(plan.optimizer)
        if not holds:
            path.stale = True
            path.volatile.add(node.event.arguments[0])  # type: ignore[union-attr]
        return holds

    def _follow_step(self, node: PathNode, optimizer: Optimizer) -> Any:
        path = node.latest
        assert path is not None
        plan = path.program.optimizers[node.depth]
        if plan.outside:
            is_last = node.end is path and path.histories.keys() >= set(escaped(self._slots))
            if not self._ensure_run(path):
                self.leave("new_path", "an optimizer steps on a path with no graph yet")
                return self.before_step(optimizer, (optimizer,), {})
            assert self._run is not None
            with unheard(), torch.no_grad():
                self._run.launch_through(path.program.positions[node.depth])
                self._run.prepare_step(plan, node.depth, is_last)
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

    # ---- values ------------------------------------------------------------------------------------------

    def _fetch(self, node: PathNode, function: Any, arguments: Any, keywords: Any) -> Any:
        path = node.latest
        if path is None or not self._ensure_run(path):
            self._node = node.parent
            self.leave("new_path", "a value is needed on a path with no graph yet")
            return self.call(function, arguments, keywords)
        assert self._run is not None
        position = path.program.positions[node.depth]
        if not self._launch(self._run, path, position):
            return self.call(function, arguments, keywords)
        self._fetched.append(node)
        if node.streak >= TRUSTED_AFTER and not self._launch_ahead(self._run, path):
            return self.call(function, arguments, keywords)
        with unheard(), torch.no_grad():
            if function in NUMBER_READS and (copied := self._run.host_value(position)) is not None:
                return function(copied)
            values = iter([self._run.value(v) for v in path.program.fetches[node.depth]])
        shows_history = function in (_TENSOR.__repr__, _TENSOR.__format__)

        def real(tensor: torch.Tensor) -> torch.Tensor:
            value = next(values)
            known = self._placeholders.get(id(tensor))
            if known is None:
                return tensor
            if shows_history and known[1].grad_function:
                return with_freed_history(value, known[1].grad_function)
            return value.requires_grad_() if known[1].requires_grad and known[1].is_leaf else value

        arguments, keywords = map_leaves((arguments, keywords), _TENSOR, real)
        with unheard():
            return function(*arguments, **keywords)

    def _ensure_run(self, path: Path) -> bool:
        """Have the segments that Python has walked launched on `path`; False if it has no graph that fits."""
        if self._run_path is path:
            return True
        if self._run is not None:
            with unheard(), torch.no_grad():
                self._run.discard()
            self.account.discards += 1
            self._run = None
            self._mispredicted(path)
        installed: Installed | None = path.executable
        if installed is None or path.stale or not installed.is_current():
            path.stale = True
            return False
        self._run = GraphRunner(installed, self._copied, self._feeds)
        self._run_path = path
        return True

    def _mispredicted(self, path: Path | None) -> None:
        """Python went another way than a fetch foretold: wait for it there, until it is steady again."""
        for node in self._fetched:
            node.streak = 0
            node.latest = path or node.latest

    # ---- the end of a unit -------------------------------------------------------------------------------

    def _finish_graph(self, node: PathNode) -> bool:
        """Launch, commit, hand out what escaped. False if the unit had to be left; it is being recorded then."""
        if node.parent is None:
            self._node = None
            return False
        path = node.end
        if path is None or not self._ensure_run(path):
            self.leave("new_path", "the unit ended on a path with no graph yet")
            return False
        alive = escaped(self._slots)
        if not path.histories.keys() >= set(alive):
            path.stale = True
            self.leave("new_path", "a tensor of the unit is kept that was not kept before")
            return False
        run = self._run
        assert run is not None
        if not self._launch(run, path, path.program.unit_segments):
            return False
        with unheard():
            with torch.no_grad():
                run.commit_gradients()
            self._hand_out(path, run, alive)
            self._check_borrowed(path)
        for fetch in self._fetched:
            fetch.streak += 1
        self._node = None
        self._reset()
        self._on_end(path, None, self._signature)
        return True

    def _launch(self, run: GraphRunner, path: Path, count: int) -> bool:
        """Launch segments. If one fails, the unit becomes an eager one, which raises what eager execution would."""
        return self._guarded(path, lambda: run.launch_through(count))

    def _launch_ahead(self, run: GraphRunner, path: Path) -> bool:
        return self._guarded(path, run.launch_ahead)

    def _guarded(self, path: Path, launch: Callable[[], None]) -> bool:
        try:
            with unheard(), torch.no_grad():
                launch()
        except Exception as error:  # noqa: BLE001 - whatever it is, eager execution decides what the program sees
            path.failures += 1
            path.stale = path.stale or path.failures > 1
            self.leave("capture_failed", f"{type(error).__name__} while a graph ran: {str(error)[:200]}")
            return False
        return True

    def _check_borrowed(self, path: Path) -> None:
        for index, copied in self._copied.items():
            tensor = self._feeds[index]
            if not isinstance(tensor, _TENSOR):
                continue
            if copied is not tensor and not tensor.untyped_storage().resizable() and not torch.equal(tensor, copied):
                path.blocked = "mutated_outside"
                self.account.fallback("mutated_outside", "the NumPy array behind a tensor changed within a unit")

    def _hand_out(self, path: Path, run: GraphRunner, alive: list[int]) -> None:
        """Give the placeholders that Python holds their values; the objects used up become placeholders in turn."""
        differentiable = self._with_history(path, run, alive)
        for index in alive:
            placeholder = self._slots[index]
            made = self._placeholders[id(placeholder)][1]
            with torch.no_grad():
                value = run.owned_value(path.program.escapes[index])
            if index in differentiable:
                value = differentiable[index]
            elif made.requires_grad:
                if made.grad_function:
                    value = with_freed_history(value, made.grad_function)
                else:
                    value.requires_grad_()
            fill_placeholder(placeholder, value, self._placeholders)
            node = path.maker_of(index)
            again = recycle(value, made, self._placeholders)
            node.placeholders[index - node.event.first_slot] = again  # type: ignore[union-attr]

    def _with_history(self, path: Path, run: GraphRunner, alive: list[int]) -> dict[int, torch.Tensor]:
        """Return the values of outputs that a backward outside the unit may differentiate, all of them at once."""
        plan = path.program.history
        if plan is None or not set(plan.outputs) & set(alive):
            return {}
        made = [self._placeholders[id(self._slots[index])][1] for index in plan.outputs]
        with torch.no_grad():
            outputs = [run.owned_value(path.program.escapes[index]) for index in plan.outputs]
        names = [str(one.grad_function) for one in made]
        history = History(path, run, self._learn_layout)
        return dict(zip(plan.outputs, with_history(history, run, outputs, names), strict=True))

    def _learn_layout(self, path: Path, layout: Layout | None) -> None:
        """A backward came in a way that the graph of its unit does not know: learn it, or give up."""
        if layout is None:
            self.graph.differentiated_twice = True
            path.blocked, path.executable = "double_backward", None
            self.account.fallback("double_backward", "gradients of gradients, or sparse ones, are taken of an output")
        elif len(self.graph.layouts) >= MAX_LAYOUTS:
            path.blocked, path.executable = "history_escapes", None
            self.account.fallback("history_escapes", f"backward came in more than {MAX_LAYOUTS} ways")
        else:
            path.stale = True
            self.graph.layouts[layout] = None
            self.account.fallback("new_path", "backward reached the outputs of a unit in a way not seen before")

    def _finish_trace(self) -> None:
        assert self._recorder is not None
        if self.graph.differentiated_twice:
            self._recorder.refuse_history()
        else:
            self._recorder.record_history(self.graph.layouts)
        recorder, self._recorder = self._recorder, None
        self._watch = recorder.watch
        self._reset()
        with unheard():
            trace = recorder.finish()
        self.account.eager_calls += len(trace.events)
        self._on_end(None, trace, self._signature)

    # ---- leaving the known paths -------------------------------------------------------------------------

    def leave(self, code: str, reason: str) -> None:
        """Make the unit an eager one from its beginning to this line, and go on recording it."""
        node = self._node
        assert node is not None
        self._node = None
        self._stepping = None
        self.account.fallback(code, reason, str(origin) if (origin := user_origin()) else None)
        self._mispredicted(None)
        if self._run is not None:
            self.account.discards += 1
            with unheard(), torch.no_grad():
                self._run.discard()
            self._run = None
        recorder = self._recorder = Recorder(self.graph.has_accelerator, self.graph.host_sites, self.graph.number_sites)
        try:
            for step in reversed(list(node.walk_back())):
                self._repeat(recorder, step)
        except BaseException as error:  # the program's own, from a call made earlier
            recorder.refuse("unit_raised", f"{type(error).__name__} from a call made earlier in the unit", None)
            raise
        finally:
            self._reset()

    def _repeat(self, recorder: Recorder, node: PathNode) -> None:
        event = node.event
        assert event is not None
        self_node, self._node = self._node, node
        arguments, keywords = map_leaves((event.arguments, event.keywords), (Slot, External), self._resolve)
        self._node = self_node
        if event.kind == "fetch":
            recorder.append_fetch(event, arguments, keywords)
            return
        with ambient_context(event.ambient):
            result = recorder.repeat(event, arguments, keywords)
        made: list[Any] = leaves(result, _TENSOR)
        expected: list[Any] = leaves(event.outcome, (Slot, External)) if event.kind == "call" else []
        for reference, tensor in zip(expected, made, strict=False):
            if type(reference) is Slot:
                placeholder = self._slots[reference.index]
                if placeholder is not tensor and id(placeholder) in self._placeholders:
                    fill_placeholder(placeholder, tensor, self._placeholders)
                    recorder.rename(tensor, placeholder)
        node.placeholders = [None] * len(node.placeholders)


def _steps(node: PathNode, optimizer: Optimizer) -> bool:
    event = node.event
    return event is not None and event.kind == "optimizer" and event.arguments[0] is optimizer

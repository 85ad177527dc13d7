"""`FollowedUnit`: what the tensors of a unit stand for while Python follows the TraceGraph.

The skeleton says which event comes next and gets its answer here: placeholders, and a value where Python needs one.
Segments are launched for that, and at the end, when the unit is committed. Where the program turns out to do
something else, `discard` puts back what was written, and `repeat` runs the calls made so far for real, so that every
placeholder in the user's hands becomes the tensor it stood for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from twofold.capture.functions import NUMBER_READS, READ_GRADIENT
from twofold.capture.intercept import unheard
from twofold.capture.number_feeds import number_tensor
from twofold.capture.recorder import Recorder
from twofold.capture.trace import Event, External, Made, Slot, leaves, map_leaves
from twofold.capture.trace_graph import Path, PathNode, TraceGraph
from twofold.convert.from_traces import OptimizerPlan
from twofold.graph import ambient_context, inference_mode

from .account import Account
from .graph_runner import GraphRunner, feed_copy
from .installed import Installed, SharedGradient
from .lent_gradients import HeldGradient
from .outputs import give_gradients, learn_layout, outputs_of
from .placeholders import escaped, fill_placeholder, make_placeholder, recycle, with_freed_history

_TENSOR = torch.Tensor

TRUSTED_AFTER = 3
"""Units in a row that went the same way after a fetch, before the device goes that way ahead of Python."""


class CannotFollow(Exception):
    """No graph goes on with the unit. Arguments: a fallback's code and reason. It never reaches the program."""


class FollowedUnit:
    """The unit that is followed now. Mutable; `commit` and `repeat` end it and leave this empty for the next."""

    def __init__(self, graph: TraceGraph, account: Account) -> None:
        self.slots: list[torch.Tensor] = []
        """The placeholders of the calls walked so far."""
        self.feeds: dict[int, Any] = {}
        """Tensors bound by the checks of calls, and numbers that are fed as tensors, by external."""
        self.arguments: Any = ()
        """What the call was given in which the unit runs, if one call is all that is heard."""
        self._remade: dict[int, Made] = {}
        """What autograd sees otherwise than when it was made, by `id` of the placeholder."""
        self._graph = graph
        self._account = account
        self._placeholders = graph.placeholders
        self._required: list[tuple[torch.Tensor, bool]] = []
        """Whether tensors from outside required a gradient before the unit said otherwise, in order."""
        self._copied: dict[int, torch.Tensor] = {}
        self._fetched: list[PathNode] = []
        self._run: GraphRunner | None = None
        self._path: Path | None = None

    def clear(self) -> None:
        """Forget the unit."""
        self.slots.clear()
        self.feeds.clear()
        self._remade.clear()
        self._required.clear()
        self._copied.clear()
        self._fetched.clear()
        self._run = self._path = None

    # ---- answers -----------------------------------------------------------------------------------------

    def answer(self, node: PathNode) -> Any:
        """Take the feeds of a call that was checked; return placeholders as it would return tensors."""
        event: Any = node.event
        self._copy_feeds(node)
        if node.kind == "requires_grad":
            self._set_requires_grad(node)
        for index, placeholder in enumerate(node.placeholders):
            if placeholder is None:
                placeholder = node.placeholders[index] = make_placeholder(event.made[index], self._placeholders)
            self.slots.append(placeholder)
        for index, made in event.remade:
            self._remade[id(self.slots[index])] = made
        if type(event.outcome) is Slot:
            return self.slots[event.outcome.index]
        return self._resolved(node, event.outcome)

    def _set_requires_grad(self, node: PathNode) -> None:
        """Do what a call does at once: the program may ask, or give the tensor to what is not followed."""
        event: Any = node.event
        arguments, keywords = self._resolved(node, (event.arguments, event.keywords))
        self._required.append((arguments[0], arguments[0].requires_grad))
        with unheard():
            event.function(*arguments, **keywords)

    def _copy_feeds(self, node: PathNode) -> None:
        if not node.fed:
            return
        with unheard():
            for index in node.fed:
                given, role = self.feeds[index], node.roles[index - node.first_external]
                if role.is_number:
                    self._copied[index] = number_tensor(given, role.spec.dtype, role.spec.device)
                else:
                    self._copied[index] = feed_copy(given)

    def _resolved(self, node: PathNode, template: Any) -> Any:
        """Return a template of `node` with the tensors of this unit in it."""

        def resolve(reference: Slot | External) -> Any:
            if type(reference) is Slot:
                return self.slots[reference.index]
            role, _ = node.role_of(reference.index)
            # Invariant: a feed is bound anew where a node that matched first uses it; a node that did not match
            # may have left a binding too, for an index that is static here.
            return self.feeds[reference.index] if role.tensor is None else role.tensor

        return None if template is None else map_leaves(template, (Slot, External), resolve)

    def fetch(self, node: PathNode, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run a call that needs values, with true tensors. Raises `CannotFollow`, before `function` has run."""
        self._copy_feeds(node)
        path = self.path_ahead(node)
        run = self._run_on(path, node, "a value is needed on a path with no graph yet")
        assert path is not None
        position = path.program.positions[node.depth]
        self._launch(path, lambda: run.launch_through(position))
        self._fetched.append(node)
        if node.streak >= TRUSTED_AFTER:
            self._launch(path, run.launch_ahead)
        with unheard(), torch.no_grad():
            if function in NUMBER_READS and (copied := run.host_value(position)) is not None:
                return function(copied)
            # A feed is the program's own tensor, with its history, where it is not copied.
            values = iter([run.value(v).detach() for v in path.program.fetches[node.depth]])
        shows_history = function in (_TENSOR.__repr__, _TENSOR.__format__)

        def real(tensor: torch.Tensor) -> torch.Tensor:
            value = next(values)
            made = self.made_of(tensor)
            if made is None:
                return tensor
            if shows_history and made.grad_function:
                return with_freed_history(value, made.grad_function)
            return value.requires_grad_() if made.requires_grad and made.is_leaf else value

        arguments, keywords = map_leaves((arguments, keywords), _TENSOR, real)
        with unheard():
            return function(*arguments, **keywords)

    def made_of(self, tensor: torch.Tensor) -> Made | None:
        """Return what is known of what a placeholder stands for now; None of all other tensors."""
        known = self._placeholders.get(id(tensor))
        return None if known is None else self._remade.get(id(tensor), known[1])

    def path_ahead(self, node: PathNode) -> Path | None:
        """Return the path that the unit most likely takes from a node on.

        That on which it runs, as long as it can be: an optimizer that stepped outside may have set gradients since, so
        that they do not tell any more how the unit began.
        """
        running = self._path
        return running if running is not None and running.passes(node) else self._graph.likely(node)

    def lets_python_draw(self) -> bool:
        """Have random numbers that Python draws now stay drawn; False if the unit may have drawn some ahead of it."""
        return self._run is None or self._run.lets_python_draw()

    def prepare_step(self, node: PathNode, plan: OptimizerPlan) -> None:
        """Hand the optimizer that steps at `node`, outside the graph, its gradients. Raises `CannotFollow`."""
        path = self.path_ahead(node)
        assert path is not None
        is_last = node.end is path and _keeps_as_before(path, escaped(self.slots))
        run = self._run_on(path, node, "an optimizer steps on a path with no graph yet")

        def prepare() -> None:
            run.launch_through(path.program.positions[node.depth])
            run.prepare_step(plan, node.depth, is_last)

        self._launch(path, prepare)

    # ---- launches ----------------------------------------------------------------------------------------

    def _run_on(self, path: Path | None, node: PathNode, lack: str) -> GraphRunner:
        """Return what runs the segments of `path`, of which Python has walked up to `node`.

        Raises `CannotFollow`, for `lack`, if it has no graph that fits.
        """
        if self._run is None or self._path is not path or self._run.is_misled:
            self._begin_run(path, lack)
        assert self._run is not None
        self._run.walked = node.depth
        return self._run

    def _begin_run(self, path: Path | None, lack: str) -> None:
        if path is None:
            raise CannotFollow("new_path", lack)
        if self._run is not None:
            if self._run.has_stepped:  # nobody would make the step again that undoing takes back
                raise CannotFollow(
                    "new_path", "the unit goes another way than foretold, behind an optimizer's own step"
                )
            self._undo()
            self._mispredicted(path)
        installed: Installed | None = path.executable
        if installed is None or path.stale or not installed.placement.is_kept():
            path.stale = True
            raise CannotFollow("new_path", lack)
        self._run, self._path = GraphRunner(installed, self._copied, self.feeds, self._foretold(path)), path

    def _foretold(self, path: Path) -> dict[int, torch.Tensor]:
        """Return the arguments of the call that the path was given as feeds, and may be given again."""
        if not path.program.foretold:
            return {}
        arguments: list[torch.Tensor] = leaves(self.arguments, _TENSOR)
        places = {index: place for index, place in path.program.foretold.items() if place < len(arguments)}
        roles = {index: path.nodes[-1].role_of(index)[0] for index in places}
        return {index: arguments[p] for index, p in places.items() if roles[index].accepts(arguments[p])}

    def _launch(self, path: Path, launch: Callable[[], None]) -> None:
        """Launch segments. If one fails, the unit becomes an eager one, which raises what eager execution would."""
        try:
            with inference_mode(path.program.is_inference), unheard(), torch.no_grad():
                launch()
        except HeldGradient as why:
            path.stale = True
            raise CannotFollow("gradient_kept", str(why)) from why
        except SharedGradient as why:
            raise CannotFollow("mutated_outside", str(why)) from why
        except Exception as error:
            path.failures += 1
            path.stale = path.stale or path.failures > 1
            reason = f"{type(error).__name__} while a graph ran: {str(error)[:200]}"
            raise CannotFollow("capture_failed", reason) from error

    def _undo(self) -> None:
        assert self._run is not None
        with unheard(), torch.no_grad():
            self._run.discard()
        self._account.discards += 1
        self._run = self._path = None

    def _mispredicted(self, path: Path | None) -> None:
        """Python went another way than a fetch foretold: wait for it there, until it is steady again."""
        for node in self._fetched:
            node.streak = 0
            node.latest = path or node.latest

    # ---- the end: commit ---------------------------------------------------------------------------------

    def commit(self, node: PathNode) -> Path:
        """Launch what is left of the unit that ends at `node`, set gradients, hand out what Python holds.

        Returns the path. Raises `CannotFollow`, before anything that `discard` cannot put back.
        """
        path = node.end
        run = self._run_on(path, node, "the unit ended on a path with no graph yet")
        assert path is not None
        alive = escaped(self.slots)
        if not _keeps_as_before(path, alive):
            path.stale = True
            raise CannotFollow("new_path", "a tensor of the unit is kept that was not kept before")
        self._launch(path, lambda: run.launch_through(path.program.unit_segments))
        with inference_mode(path.program.is_inference), unheard():
            with torch.no_grad():
                run.commit_gradients()
            self._hand_out(path, run, alive)
            self._check_borrowed(path)
        for fetched in self._fetched:
            fetched.streak += 1
        self.clear()
        return path

    def _check_borrowed(self, path: Path) -> None:
        for index, copied in self._copied.items():
            tensor = self.feeds[index]
            if not isinstance(tensor, _TENSOR):
                continue
            if copied is not tensor and not tensor.untyped_storage().resizable() and not torch.equal(tensor, copied):
                path.blocked = "mutated_outside"
                self._account.fallback("mutated_outside", "the NumPy array behind a tensor changed within a unit")

    def _hand_out(self, path: Path, run: GraphRunner, alive: list[int]) -> None:
        """Give the placeholders that Python holds their values; the objects used up become placeholders in turn."""
        learn = functools.partial(learn_layout, self._graph, self._account)
        for index, value in outputs_of(path, run, alive, learn).items():
            placeholder = self.slots[index]
            made = self._placeholders[id(placeholder)][1]
            fill_placeholder(placeholder, value, self._placeholders)
            node = path.maker_of(index)
            again = recycle(value, made, self._placeholders)
            node.placeholders[index - node.event.first_slot] = again  # type: ignore[union-attr]
        if path.program.leaf_gradients:
            give_gradients(path, run, {index: self.slots[index] for index in alive})

    # ---- the end: eagerly --------------------------------------------------------------------------------

    def discard(self) -> None:
        """Put back what launched segments wrote. The calls can be repeated then."""
        self._mispredicted(None)
        if self._run is not None:
            self._undo()
        with unheard():
            for tensor, required in reversed(self._required):
                if tensor.requires_grad is not required:
                    tensor.requires_grad_(required)

    def repeat(self, last: PathNode, recorder: Recorder) -> None:
        """Run the calls up to `last` for real, recorded; placeholders become tensors. Raises what the calls raise."""
        try:
            for node in reversed(list(last.walk_back())):
                self._repeat(node, recorder)
        finally:
            self.clear()

    def _repeat(self, node: PathNode, recorder: Recorder) -> None:
        event = node.event
        assert event is not None
        arguments, keywords = self._resolved(node, (event.arguments, event.keywords))
        if event.kind == "fetch":
            recorder.append_fetch(event, arguments, keywords)
            return
        with ambient_context(event.ambient):
            result = recorder.repeat(event, arguments, keywords)
        made: list[Any] = leaves(result, _TENSOR)
        expected: list[Any] = leaves(event.outcome, (Slot, External)) if event.kind == "call" else []
        for reference, tensor in zip(expected, made, strict=False):
            if type(reference) is Slot:
                placeholder = self.slots[reference.index]
                if placeholder is not tensor and id(placeholder) in self._placeholders:
                    fill_placeholder(placeholder, _to_use_up(event, tensor), self._placeholders)
                    recorder.rename(tensor, placeholder)
        node.placeholders = [None] * len(node.placeholders)


def _to_use_up(event: Event, result: torch.Tensor) -> torch.Tensor:
    """Return a tensor that a placeholder may become: the result of a call, but for `.grad`, which the leaf keeps."""
    if event.function != READ_GRADIENT:
        return result
    with unheard():
        return result.detach()


def _keeps_as_before(path: Path, alive: list[int]) -> bool:
    """Whether Python holds no tensor but those that units of this path were seen to keep."""
    return path.histories.keys() >= set(alive)

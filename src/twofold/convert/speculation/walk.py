"""The dry run: a listener that answers tensor calls from the TraceGraph and computes nothing."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import Optimizer

from twofold.capture.functions import FROM_HOST_DATA, HISTORY, METADATA, display_name
from twofold.capture.intercept import NO_KEYWORDS, NOT_ANSWERED, unheard, user_origin
from twofold.capture.placeholders import make_placeholder
from twofold.capture.recorder import has_step_hooks
from twofold.capture.trace import External, Made, Slot, leaves, map_leaves
from twofold.capture.trace_graph import Path, PathNode, Signature, TraceGraph
from twofold.convert.refusals import Refusal, Refused

_TENSOR = torch.Tensor


class Fetch(NamedTuple):
    """A value that Python was given: which event gave it, how, and what it was."""

    event: int
    function: Callable[..., Any]
    rest: tuple[Any, ...]
    given: Any


def refuse(code: str, construct: str) -> Refused:
    """Return a refusal at the line of the program that runs; the interpreter puts its own line there."""
    origin = user_origin()
    return Refused(Refusal(code, construct, origin, linecache.getline(origin.file, origin.line) if origin else ""))


class Walk:
    """One way through a TraceGraph, as far as the interpreter has come. Implements `Listener`."""

    def __init__(self, graph: TraceGraph, signature: Signature, fetched: Mapping[PathNode, Any]) -> None:
        self.graph = graph
        self.node = graph.root(signature)
        self.slots: list[torch.Tensor] = []
        self.slot_of: dict[int, int] = {}
        """Slots by the `id` of their placeholders."""
        self._remade: dict[int, Made] = {}
        """What autograd sees otherwise than when it was made, likewise."""
        self.feeds: dict[int, Any] = {}
        self._set: set[int] = set()
        """The `id` of tensors from outside of which the unit says whether they require a gradient: at its end."""
        self.path: Path | None = None
        """Set once the unit has ended."""
        self.passed: list[PathNode] = []
        """Nodes walked since the interpreter last looked."""
        self.fetches: list[Fetch] = []
        self.steps: list[int] = []
        """Optimizers that step outside of the graph, likewise."""
        self.made_by_python: list[Any] = []
        """Tensors that Python made from its own data, likewise."""
        self._stepping: Optimizer | None = None
        self._fetched = fetched

    # ---- what the library does ---------------------------------------------------------------------------

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer a torch function; see `Listener`."""
        if self._stepping is not None:
            return function(*arguments, **keywords)
        for child in self.node.children:
            if child.match(function, arguments, keywords, self.slots, self.feeds):
                return self._advance(child, function, arguments, keywords)
        return self._unexpected(function, arguments, keywords)

    def leaf_module(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Expect nothing; see `Listener`."""
        return NOT_ANSWERED

    def _advance(self, node: PathNode, function: Any, arguments: Any, keywords: Any) -> Any:
        event: Any = node.event
        self._pass(node)
        if node.kind == "fetch":
            return self._fetch(node, function, arguments, keywords)
        if node.kind == "requires_grad":
            self._set.add(id(arguments[0]))
        for index, placeholder in enumerate(node.placeholders):
            if placeholder is None:
                with unheard():
                    placeholder = make_placeholder(event.made[index], self.graph.placeholders)
                node.placeholders[index] = placeholder
            self.slot_of[id(placeholder)] = len(self.slots)
            self.slots.append(placeholder)
        for index, made in event.remade:
            self._remade[id(self.slots[index])] = made
        return map_leaves(event.outcome, (Slot, External), self._resolve)

    def _pass(self, node: PathNode) -> None:
        self.node = node
        self.passed.append(node)

    def _resolve(self, reference: Slot | External) -> torch.Tensor:
        if type(reference) is Slot:
            return self.slots[reference.index]
        role, _ = self.node.role_of(reference.index)
        return self.feeds[reference.index] if role.tensor is None else role.tensor

    def _fetch(self, node: PathNode, function: Any, arguments: Any, keywords: Any) -> Any:
        given: list[Any] = leaves(arguments, _TENSOR)
        rest = arguments[len(given) :]
        plain = all(isinstance(a, _TENSOR) for a in arguments[: len(given)])
        plain = plain and all(given is None for given in keywords.values())  # as `repr` passes on what it was not given
        if node.sample is None or not plain:
            raise refuse("tensor_fetch", f"what {display_name(function)} gives is not known before it is run")
        sample = self._fetched.get(node, node.sample)
        self.fetches.append(Fetch(node.depth, function, rest, sample))
        return sample

    def _unexpected(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if function in METADATA:
            return function(*arguments, **keywords)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if function in HISTORY and given:
            known = self.graph.placeholders.get(id(given[0]))
            if known is None and id(given[0]) not in self.slot_of and id(given[0]) not in self._set:
                return function(*arguments, **keywords)
            if known is not None and HISTORY[function] in ("requires_grad", "is_leaf"):
                return getattr(self._remade.get(id(given[0]), known[1]), HISTORY[function])
        elif function in FROM_HOST_DATA and not any(id(tensor) in self.slot_of for tensor in given):
            made = function(*arguments, **keywords)
            self.made_by_python.append(made)
            return made
        raise refuse("no_graph", f"no known path goes on with {display_name(function)}")

    def sets_requires_grad(self, tensor: torch.Tensor) -> bool:
        """Whether the unit says of a tensor from outside whether it requires a gradient."""
        return id(tensor) in self._set

    def operation(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer an ATen operation; see `Listener`. None may reach a placeholder."""
        for tensor in leaves((arguments, keywords), _TENSOR):
            if id(tensor) in self.slot_of or id(tensor) in self.graph.placeholders:
                raise refuse("foreign_function", f"{target} reached PyTorch's dispatcher unannounced")
        return target(*arguments, **keywords)

    def lift(self, made: torch.Tensor) -> None:
        """Take note of a tensor of Python's data. That `from_numpy` makes one is heard by an operation alone."""
        lift_fresh = torch.ops.aten.lift_fresh.default
        for child in self.node.children:
            if child.match(lift_fresh, (made,), NO_KEYWORDS, self.slots, self.feeds):
                self._advance(child, lift_fresh, (made,), NO_KEYWORDS)
                return

    def zero_grad(self, owner: Any, original: Callable[..., None], arguments: tuple[Any, ...], keywords: Any) -> None:
        """Answer `zero_grad`; see `Listener`."""
        for child in self.node.children:
            is_known = child.event is not None and child.event.kind == "zero_grad"
            if is_known and child.match(original, (owner, *arguments), keywords, self.slots, self.feeds):
                self._pass(child)
                return
        raise refuse("no_graph", "no known path goes on with zero_grad")

    def before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Any) -> Any:
        """Answer the start of `optimizer.step()`; see `Listener`."""
        node = next((c for c in self.node.children if c.fits_optimizer(optimizer)), None)
        path = None if node is None else self.graph.likely(node)
        plan = (
            None
            if path is None or path.program is None
            else path.program.optimizers.get(-1 if node is None else node.depth)
        )
        if node is None or plan is None or len(arguments) != 1 or keywords:
            raise refuse("no_graph", f"no known path goes on with {type(optimizer).__name__}.step")
        if has_step_hooks(optimizer):
            raise refuse("foreign_function", "the optimizer has hooks on its step")
        self._pass(node)
        if plan.outside:
            self.steps.append(node.depth)
        self._stepping = optimizer
        return (plan.stand_in,), {}

    def after_step(self, optimizer: Optimizer) -> None:
        """Answer the end of `optimizer.step()`, where a unit ends; see `Listener`."""
        self._stepping = None
        if self.node.end is not None:
            self.path = self.node.end

    def host_work(self) -> None:
        """Random state is read or set, or library code runs unheard; see `Listener`."""
        raise refuse("foreign_function", "the random state is read or set, or data is loaded")

    def foreign_call(self, code: str, what: str) -> None:
        """Code is about to run that cannot be followed; see `Listener`."""
        raise refuse("foreign_function", what)

    def unwatch(self, code: str, what: str) -> None:
        """Calls are about to run that nobody would hear; see `Listener`."""
        raise refuse("foreign_function", what)

    # ---- what the interpreter asks -----------------------------------------------------------------------

    def finish(self) -> Path:
        """Return the path that was walked. Raises `Refused` if it has no graph."""
        path = self.path or self.node.end
        if path is None or path.program is None or path.stale:
            raise refuse("no_graph", "the unit ends on a path with no graph yet")
        return path

    def forget(self) -> None:
        """Drop every reference to a placeholder, for the skeleton counts them."""
        self.slots.clear()
        self.slot_of.clear()
        self.feeds.clear()
        self.passed.clear()
        self.fetches.clear()
        self.made_by_python.clear()

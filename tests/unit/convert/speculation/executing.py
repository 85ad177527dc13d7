"""Running host graphs with the reference interpreter: what a speculation means, without the executor."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import setitem
from typing import Any

import torch

import twofold
from benchmarks.programs import Program
from twofold.backends.replay import ReplayExecutable
from twofold.capture.intercept import unheard
from twofold.capture.number_feeds import number_tensor
from twofold.capture.trace import Slot
from twofold.convert.refusals import Refused
from twofold.convert.speculation.convert import speculate
from twofold.convert.speculation.speculation import (
    Assumption,
    Speculation,
    change,
    draw,
    draw_by,
    give,
    put,
    read,
    restoring,
    rewinding,
    settled,
    step,
    tensor,
)
from twofold.graph import AssertionFailed, interpret
from twofold.run.graph_runner import GraphRunner, feed_copy
from twofold.run.installed import Installed
from twofold.run.placeholders import with_freed_history

EXACT = {"engine": "coexecution", "backend": "replay", "numerics": "exact", "background": False}


class Miss(Exception):
    """An assumption does not hold."""

    def __init__(self, assumption: Assumption | None) -> None:
        super().__init__(str(assumption))
        self.assumption = assumption


class Run:
    """A `Unit` that computes when it is asked, and remembers what it said."""

    def __init__(self, speculation: Speculation) -> None:
        self.path = speculation.path
        self.program = self.path.program
        self.feeds: dict[int, Any] = {}
        self.copied: dict[int, torch.Tensor] = {}
        installed = Installed(self.program, ReplayExecutable(self.program))
        assert installed.placement.is_kept()
        self.run = GraphRunner(installed, self.copied, self.feeds, {})
        self.answers: dict[int, Any] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.stepped: set[int] = set()
        self.drawn: dict[int, Any] = {}
        self.put_already: set[tuple[int, str]] = set()
        self.rewinds: list[Callable[[], object]] = []
        self.restores: list[Callable[[], object]] = []

    def give(self, index: int, given: Any) -> None:
        if index in self.feeds:
            return
        role, _ = self.path.nodes[-1].role_of(index)
        assert role.tensor is None
        if not role.accepts(given):
            raise Miss(None)
        self.feeds[index] = given
        number = role.is_number
        self.copied[index] = number_tensor(given, role.spec.dtype, role.spec.device) if number else feed_copy(given)

    def read(self, event: int, function: Callable[..., Any], *rest: Any) -> Any:
        if event not in self.answers:
            with torch.no_grad():
                self.run.launch_through(self.program.positions[event])
                values = [self.run.value(value) for value in self.program.fetches[event]]
                shown = self.path.nodes[event].event.arguments[0]
                if function in (torch.Tensor.__repr__, torch.Tensor.__format__) and isinstance(shown, Slot):
                    values = [with_freed_history(values[0].detach(), self.made(shown.index).grad_function)]
                with unheard():
                    self.answers[event] = function(*values, *rest)
        return self.answers[event]

    def step(self, event: int) -> None:
        if event in self.stepped:
            return
        self.stepped.add(event)
        plan = self.program.optimizers[event]
        with torch.no_grad():
            self.run.launch_through(self.program.positions[event])
            self.run.prepare_step(plan, event, True)
        type(plan.optimizer).step(plan.optimizer)

    def draw(self, number: int, generator: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
        if number not in self.drawn:
            assert number == len(self.drawn), "draws out of order"
            self.rewinds.append(rewinding(generator))
            self.drawn[number] = draw_by(generator, name, *arguments, **keywords)
        return self.drawn[number]

    def change(self, function: Callable[..., Any], array: Any, *arguments: Any, **keywords: Any) -> None:
        self.restores.append(restoring(function, array, arguments))
        function(array, *arguments, **keywords)

    def restore(self) -> None:
        """Put changed arrays back."""
        while self.restores:
            self.restores.pop()()

    def put(self, holder: dict[str, Any], key: str, value: Any) -> None:
        if (id(holder), key) not in self.put_already:
            self.put_already.add((id(holder), key))
            self.rewinds.append(partial(setitem, holder, key, holder[key]))
            holder[key] = value

    def discard(self) -> None:
        self.run.discard()
        self.restore()
        for rewind in reversed(self.rewinds):
            rewind()

    def finish(self) -> None:
        with torch.no_grad():
            self.run.launch_through(self.program.unit_segments)
            self.run.commit_gradients()

    def made(self, slot: int) -> Any:
        event = self.path.maker_of(slot).event
        return event.made[slot - event.first_slot]

    def tensor(self, slot: int) -> torch.Tensor:
        if slot not in self.tensors:
            made = self.made(slot)
            with torch.no_grad():
                value = self.run.owned_value(self.program.escapes[slot])
            if made.requires_grad and made.grad_function:
                value = with_freed_history(value, made.grad_function)
            self.tensors[slot] = value
        return self.tensors[slot]


def execute(speculation: Speculation, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> Any:
    """Run a call: first all that decides, with no effect on the heap; then all, in the order of the program.

    Raises `Miss`, with nothing changed.
    """
    run = Run(speculation)
    host = speculation.host
    inputs = [run, arguments, keywords or {}, *speculation.roots.values()]
    assert host.inputs[3:] == tuple(speculation.roots)
    deciding = replace(host, nodes=decisions(speculation), outputs=())
    try:
        interpret(deciding, inputs)
    except AssertionFailed as failed:
        run.discard()
        raise Miss(speculation.assumptions[int(failed.message)]) from None
    except (AttributeError, KeyError, IndexError, TypeError):
        run.discard()
        raise Miss(None) from None
    run.restore()  # to be changed once more, in the order of the program
    run.finish()
    (result,) = interpret(host, inputs).outputs
    return result


def decisions(speculation: Speculation) -> tuple[Any, ...]:
    """Return the nodes that assertions, feeds and steps need, those that wait for the end of the unit left out."""
    late: set[Any] = set()
    for node in speculation.host.nodes:
        if node.target in (tensor, settled) or not late.isdisjoint(node.operands):
            late.update(node.results)
    needed: set[Any] = set()
    kept: list[Any] = []
    for node in reversed(speculation.host.nodes):
        decides = node.op == "assert" or node.target in (change, draw, give, put, read, step)
        waits = not late.isdisjoint(node.operands) or not late.isdisjoint(node.results)
        if not waits and (decides or not needed.isdisjoint(node.results)):
            needed.update(node.operands)
            kept.append(node)
    return tuple(reversed(kept))


@dataclass
class Speculating:
    """Runs a program's steps by speculation, each as far as it converts; a `Runner` of `tests.differential`."""

    warm_up: int = 4
    cached: bool = True
    """Whether host graphs serve for later calls, as far as their assumptions hold."""
    refusals: list[str] = field(default_factory=list[str])
    speculated: int = 0
    conversions: int = 0
    misses: list[str] = field(default_factory=list[str])

    @contextmanager
    def __call__(self, program: Program) -> Generator[Callable[..., Any], None, None]:
        function = twofold.function(program.step, **EXACT)
        graph = function._driver.graph
        known: list[Speculation] = []
        relaxed: set[Any] = set()
        calls = 0

        def step_once(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls <= self.warm_up:
                return function(*arguments)
            for speculation in known:
                if speculation.path.program is None or speculation.path.stale:
                    continue
                try:
                    result = execute(speculation, arguments)
                except (Miss, AssertionError) as miss:
                    self.misses.append(str(miss))
                    assumption = getattr(miss, "assumption", None)
                    if assumption is not None and assumption.kind in ("value", "identity", "length"):
                        relaxed.add(assumption.location)
                    continue
                self.speculated += 1
                return result
            try:
                made = speculate(program.step, arguments, {}, graph, graph.signature(), frozenset(relaxed))
            except Refused as refused:
                self.refusals.append(str(refused))
                return function(*arguments)
            self.conversions += 1
            if self.cached:
                known.insert(0, made)
            result = execute(made, arguments)
            self.speculated += 1
            return result

        yield step_once

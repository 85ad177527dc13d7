"""A converted function ready to run: planners for its host slice, blocks for its tensor slice.

A call walks the structure at once, so that Python's side effects and exceptions happen where plain Python has them,
and adds its invocations to the batch that waits. The tensors follow when a value is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from types import GeneratorType
from typing import Any

import torch

from twofold.backends.host import keep_freed_memory
from twofold.convert.from_source import (
    Block,
    Converted,
    Slices,
    constructed,
    make_block,
    make_entry,
    planner_source,
    tensor_parameters,
    tensor_results,
)
from twofold.graph import Constant, Value

from .batch import Batch, Pile
from .blocks import RunnableBlock
from .captures import Captures
from .deferred import PENDING, defer
from .pieces import Pieces
from .prepare import Tables
from .waves import Frame, Late, run_waves

WALKED = 100
"""Levels that are walked by ordinary recursion, which is faster, before a stack of our own is used."""
FIRST_DEPTH_CHECK = 20_000
DEEPEST = 1_000_000


class Program:
    """The functions of one graph, as planners and blocks, and the batch of calls that waits."""

    def __init__(self, converted: Converted, slices: Slices) -> None:
        self.name = converted.entry
        self.converted = converted
        self.slices = slices
        self.blocks: dict[tuple[str, tuple[Any, ...]], RunnableBlock] = {}
        self.tables = Tables()
        self.refusals: dict[str, int] = {}
        """Why blocks ran one invocation at a time, and how often."""
        self.computed: Counter[str] = Counter()
        """How many invocations were computed `together` and `singly`."""
        held = [tensor for fixed in slices.fixed.values() for tensor in _tensors(fixed)]
        self._tensors = list({id(tensor): tensor for tensor in held}.values())
        if all(tensor.device.type == "cpu" for tensor in self._tensors):
            keep_freed_memory()  # a forward batch of 256 trees took 2,000 page faults
        self.given: dict[Any, RunnableBlock] = {}
        """Blocks of invocations whose results are known."""
        self.captures = Captures()
        self.pieces: dict[Any, RunnableBlock] = {}
        self.batch = Batch(self)
        self._planners = self._make_planners()
        entry = converted.functions[converted.entry]
        body = converted.graph.subgraphs[entry.name]
        self.results = tensor_results(body, slices)
        self._form, self._count = entry.form, len(body.outputs)
        self._is_flat = type(entry.form) is tuple and all(part is None for part in entry.form)
        self._given = tensor_parameters(body, slices)
        self._entry = self.batch.pile(self.piece(make_entry(entry.name, body, slices)))

    def _make_planners(self) -> dict[str, Callable[..., Any]]:
        """Compile the planners of all functions; each finds the others by name."""
        namespace: dict[str, Any] = {}
        for name in self.converted.functions:

            def block_of(decisions: tuple[Any, ...], name: str = name) -> Pile:
                return self.batch.pile(self.block(name, decisions))

            pieces = Pieces(self, name)
            cut, fetch, finish = pieces.waiting if self.slices.fetches else pieces.at_once
            runtime: dict[str, Any] = {"emit": self.batch.emit, "heights": self.batch.levels, "keep": defer}
            runtime.update(drive=drive, Late=Late, cut=cut, fetch=fetch, finish=finish)
            source = planner_source(self.converted, self.slices, name, block_of, runtime)
            scope = {**source.objects}
            function = self.converted.functions[name].source
            exec(source.compiled(function), scope)
            for form in ("wave",) if self.slices.fetches else ("walk", "plan"):
                planner = namespace[f"{form}_{name}"] = scope[f"{form}_{name}"]
                named = function.function.__code__
                planner.__code__ = planner.__code__.replace(co_name=named.co_name, co_qualname=named.co_qualname)
        for planner in namespace.values():
            planner.__globals__.update(namespace)
        return namespace

    def block(self, function: str, decisions: tuple[Any, ...]) -> RunnableBlock:
        """Return the block of a function for a sequence of decisions."""
        known = self.blocks.get((function, decisions))
        if known is None:
            block = RunnableBlock(make_block(self.converted, self.slices, function, decisions))
            known = self.blocks[function, decisions] = block
        return known

    def piece(self, block: Block) -> RunnableBlock:
        """Return a piece, or arguments of a call, to be run; arguments that come from the same tables are one."""
        key = block.body.name if block.body.nodes else (block.function, block.operands, _form(block))
        known = self.pieces.get(key)
        if known is None:
            known = self.pieces[key] = RunnableBlock(block)
        return known

    def all_blocks(self) -> list[RunnableBlock]:
        """Return all blocks met so far, variants included."""
        blocks = [*self.blocks.values(), *self.pieces.values()]
        return [*blocks, *(variant for block in blocks for variant in block.variants.values())]

    def described(self) -> list[dict[str, Any]]:
        """Return of each block whether it ran for all invocations together, and what its levels ran as."""
        return [block.described() for block in self.all_blocks() if block.staged or block.refusal]

    def versions(self) -> list[int]:
        """Return the version counters of the tensors from outside."""
        return [tensor._version for tensor in self._tensors]

    def call(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """Plan calls from ordinary Python, given their arguments; return the results of each, tensors deferred.

        Raises what the planners raise, and `AbandonedError` where calls that are planned side by side raise anything:
        none of them has had an effect then.
        """
        self.batch.begin()
        mark = self.batch.mark()
        try:
            if self.slices.fetches:
                planned = self._plan_in_waves(calls)
            else:
                walk = self._planners[f"walk_{self.name}"]
                planned = [_split(walk(*self._given_to(arguments), WALKED)) for arguments in calls]
        except BaseException as error:
            if self.slices.fetches or not self.slices.exports:
                self.batch.rewind(mark)  # else the host may hold tensors of invocations that are complete
            if self.slices.fetches and not self.slices.effects and not isinstance(error, RecursionError):
                reason = f"calls ran as plain Python after {type(error).__name__}: {error}"
                self.refusals[reason] = self.refusals.get(reason, 0) + 1
                raise AbandonedError from error
            raise
        finally:
            self.batch.end()
            PENDING.add(self.batch)
        return [self._results(number, hosts) for number, hosts in planned]

    def _given_to(self, arguments: Sequence[Any]) -> list[Any]:
        """Return what a planner is given for the arguments of an outermost call."""
        if not self._given:
            return list(arguments)
        tensors = [arguments[index] for index in self._given]
        others = [argument for index, argument in enumerate(arguments) if index not in self._given]
        return [*others, self.batch.emit(self._entry, (), tensors, ())]

    def _plan_in_waves(self, calls: Sequence[Sequence[Any]]) -> list[tuple[int, Sequence[Any]]]:
        plan = self._planners[f"wave_{self.name}"]
        planners = [plan(*self._given_to(arguments)) for arguments in calls]
        frames = run_waves(planners, self.batch.fetch, not self.slices.effects, _check_frame)
        return [(frame.number, frame.hosts) for frame in frames]

    def _results(self, number: int, hosts: Sequence[Any]) -> Any:
        """Return the results of a call: tensors deferred, the others as they are."""
        tensors: list[Any] = self.batch.results(number)
        if hosts or self._count > len(tensors):
            rest, others = iter(tensors), iter(hosts)
            tensors = [next(rest if index in self.results else others) for index in range(self._count)]
        return tuple(tensors) if self._is_flat else constructed(self._form, iter(tensors))


class AbandonedError(Exception):
    """Planning was given up, without effects: the calls are to be made in plain Python."""


def _split(held: Any) -> tuple[int, Sequence[Any]]:
    """Return an invocation's number and its results that are no tensors."""
    return (held, ()) if type(held) is int else (held[0], held[1:])


def _form(block: Block) -> Any:
    """Return what arguments of a call are, up to the names of values."""
    names = {value: index for index, value in enumerate(block.body.inputs)}

    def form(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(form, argument))
        if isinstance(argument, Constant):
            return "object", id(argument.object)
        return ("input", names[argument]) if isinstance(argument, Value) else (type(argument), argument)

    return tuple(map(form, block.body.outputs))


def _tensors(held: object) -> list[torch.Tensor]:
    if isinstance(held, torch.nn.Module):
        return [*held.parameters(), *held.buffers()]
    return [held] if isinstance(held, torch.Tensor) else []


def drive(planner: Generator[Any, Any, None]) -> Any:
    """Run a planner and those it asks for; return its result. Raises RecursionError for a structure without an end."""
    waiting: list[Generator[Any, Any, None]] = []
    push, pop = waiting.append, waiting.pop
    check = FIRST_DEPTH_CHECK
    value: Any = None
    while True:
        asked = planner.send(value)
        if type(asked) is GeneratorType:
            push(planner)
            planner, value = asked, None
            if len(waiting) >= check:
                _check_depth(waiting, planner)
                check *= 2
        elif waiting:
            planner, value = pop(), asked
        else:
            return asked


def _arguments(planner: Any) -> tuple[int, ...]:
    code, held = planner.gi_code, planner.gi_frame.f_locals
    return (id(code), *(id(held[name]) for name in code.co_varnames[: code.co_argcount]))


def _check_frame(frame: Frame) -> None:
    """Raise RecursionError as `_check_depth` does; each time that the depth has doubled."""
    if frame.depth % FIRST_DEPTH_CHECK == 0 and frame.depth:
        waiting: list[Any] = []
        above = frame.caller
        while above is not None:
            waiting.append(above.planner)
            above = above.caller
        _check_depth(waiting[::-1], frame.planner)


def _check_depth(waiting: Sequence[Any], planner: Any) -> None:
    """Raise RecursionError if a call waits for one with the same arguments, or the depth is beyond all reason."""
    own, name = _arguments(planner), planner.gi_code.co_name
    for distance, other in enumerate(reversed(waiting), 1):
        if _arguments(other) == own:
            raise RecursionError(
                f"{name}: the structure is cyclic: at depth {len(waiting)} a call has the same arguments as the call"
                f" {distance} levels above it"
            )
    if len(waiting) > DEEPEST:
        raise RecursionError(f"{name}: no base case was reached at depth {len(waiting)}")

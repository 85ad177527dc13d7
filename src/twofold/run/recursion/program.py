"""A converted function ready to run: planners for its host slice, blocks for its tensor slice.

A call walks the structure at once, so that Python's side effects and exceptions happen where plain Python has them,
and adds its invocations to the batch that waits. The tensors follow when a value is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import GeneratorType
from typing import Any

import torch

from twofold.convert.from_source import Converted, Slices, make_block, planner_source, tensor_results

from .batch import Batch, Pile
from .blocks import RunnableBlock
from .deferred import PENDING, defer
from .prepare import Tables

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
        held = [tensor for fixed in slices.fixed.values() for tensor in _tensors(fixed)]
        self._tensors = list({id(tensor): tensor for tensor in held}.values())
        self.batch = Batch(self)
        self._walk = self._make_planners()[f"walk_{converted.entry}"]
        entry = converted.functions[converted.entry]
        self.results = tensor_results(converted.graph.subgraphs[entry.name], slices)
        self._count = entry.results

    def _make_planners(self) -> dict[str, Callable[..., Any]]:
        """Compile the planners of all functions; each finds the others by name."""
        namespace: dict[str, Any] = {}
        for name in self.converted.functions:

            def block_of(decisions: tuple[Any, ...], name: str = name) -> Pile:
                return self.batch.pile(self.block(name, decisions))

            runtime = {"emit": self.batch.emit, "keep": defer, "drive": drive}
            source = planner_source(self.converted, self.slices, name, block_of, runtime)
            scope = {**source.objects}
            code = compile(source.text, f"<twofold planner of {name}>", "exec")
            exec(code, scope)
            namespace.update((f"{kind}_{name}", scope[f"{kind}_{name}"]) for kind in ("walk", "plan"))
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

    def all_blocks(self) -> list[RunnableBlock]:
        """Return all blocks met so far, variants included."""
        blocks = list(self.blocks.values())
        return [*blocks, *(variant for block in blocks for variant in block.variants.values())]

    def versions(self) -> list[int]:
        """Return the version counters of the tensors from outside."""
        return [tensor._version for tensor in self._tensors]

    def call(self, arguments: Sequence[Any]) -> Any:
        """Plan one call from ordinary Python; return its results, tensors deferred."""
        self.batch.begin()
        try:
            held = self._walk(*arguments, WALKED)
        finally:
            self.batch.end()
            PENDING.add(self.batch)
        number, hosts = (held, ()) if type(held) is int else (held[0], held[1:])
        others = iter(hosts)
        results: list[Any] = []
        for index in range(self._count or 1):
            if index in self.results:
                results.append(deferred := defer())
                self.batch.want_result(number, self.results.index(index), deferred)
            else:
                results.append(next(others))
        return results[0] if self._count is None else tuple(results)


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


def _check_depth(waiting: Sequence[Any], planner: Any) -> None:
    """Raise RecursionError if a call waits for one with the same arguments, or the depth is beyond all reason."""
    own, name = _arguments(planner), planner.gi_code.co_name.removeprefix("plan_")
    for distance, other in enumerate(reversed(waiting), 1):
        if _arguments(other) == own:
            raise RecursionError(
                f"{name}: the structure is cyclic: at depth {len(waiting)} a call has the same arguments as the call"
                f" {distance} levels above it"
            )
    if len(waiting) > DEEPEST:
        raise RecursionError(f"{name}: no base case was reached at depth {len(waiting)}")

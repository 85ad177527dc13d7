"""Results of invocations that were computed before the others of their batch.

Where planners read values of tensors, a batch is computed in parts. For a later part, what an earlier one computed are
invocations too, *given* ones: their block hands on what it is given, as columns that carry autograd history.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twofold.convert.from_source import Block
from twofold.errors import TwofoldError
from twofold.graph import SubGraph, Value

from .blocks import RunnableBlock
from .schedule import Index, Pile, upload
from .vectorize import NotBatchableError


class Known(NamedTuple):
    """What an invocation computed: for each of `results`, a tensor with its row in it, or without a row the value."""

    results: tuple[int, ...]
    values: Sequence[Any]
    row: int | None

    def source(self, result: int) -> Any:
        """Return the tensor that a result is a row of, or the result itself."""
        return self.values[self.results.index(result)]

    def value(self, result: int) -> Any:
        """Return a result."""
        held = self.source(result)
        return held if self.row is None else held[self.row]

    def own(self, output: int) -> Tensor:
        """Return a result, by its position, as a tensor that nobody else holds."""
        held = self.value(self.results[output])
        return own(held) if self.row is None else held.clone()


def own(value: Any) -> Tensor:
    """Return a result as a tensor object that nobody else holds. Raises `TwofoldError` for what is no tensor."""
    if isinstance(value, Tensor):
        return value.view_as(value)
    if not isinstance(value, bool | int | float | complex):
        raise TwofoldError(
            f"a recursive function returned a {type(value).__name__} where a tensor was expected, in a way that"
            " twofold.subgraph cannot see; return the items of a tuple one by one, and no None in a tensor's place"
        )
    return torch.tensor(value)


@dataclass(eq=False)
class GivenPile(Pile):
    """Invocations whose results are known. These stand for their host values."""

    known: Sequence[Known] = ()

    def column(self, index: int, order: Index, device: torch.device) -> Tensor:
        """Return one of their results, a row each. Raises `NotBatchableError`."""
        result = self.block.block.results[index]
        sources: dict[int, Tensor] = {}
        starts: dict[int, int] = {}
        rows: list[int] = []
        count = 0
        for known in (self.known[number] for number in order.tolist()):
            held = known.source(result)
            if not isinstance(held, Tensor):
                raise NotBatchableError(f"a {type(held).__name__} is handed on within {self.block.function}")
            if id(held) not in starts:
                sources[id(held)] = held if known.row is not None else held.unsqueeze(0)
                starts[id(held)] = count
                count += len(sources[id(held)])
            rows.append(starts[id(held)] + (known.row or 0))
        parts = list(sources.values())
        if any(part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype for part in parts):
            raise NotBatchableError("tensors of several shapes or dtypes")
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.index_select(0, upload(np.array(rows, dtype=np.int64), device))


@dataclass
class Part:
    """Invocations that are computed together, numbered anew; `local` has their numbers here."""

    piles: list[Pile]
    levels: list[int]
    local: dict[int, int]


def needed_for(piles: Iterable[Pile], wanted: Iterable[int], known: dict[int, Known]) -> set[int]:
    """Return the invocations that have to be computed for those that are wanted."""
    made = {number: made for pile in piles for number, made, _ in pile.rows()}
    waiting, found = list(wanted), set[int]()
    while waiting:
        number = waiting.pop()
        if number not in found and number not in known:
            found.add(number)
            waiting.extend(made[number])
    return found


def split_off(piles: Iterable[Pile], chosen: set[int]) -> list[Pile]:
    """Take invocations out of piles; return them in piles of their own."""
    taken: list[Pile] = []
    for pile in piles:
        parts = Pile.of(pile.block), Pile.of(pile.block)
        for row in pile.rows():
            parts[row[0] in chosen].add(*row)
        for column, kept in zip(pile.columns, parts[0].columns, strict=True):
            column[:] = kept
        if parts[1].tasks:
            taken.append(parts[1])
    return taken


def make_part(piles: Sequence[Pile], known: dict[int, Known], given_blocks: dict[Any, RunnableBlock]) -> Part:
    """Number invocations anew, those first whose results are known and taken by others."""
    children = {number: made for pile in piles for number, made, _ in pile.rows()}
    given = _given(piles, known, given_blocks)
    order = [*(number for pile in given for number in pile.tasks), *sorted(children)]
    local = {number: index for index, number in enumerate(order)}
    levels: list[int] = []
    for number in order:
        levels.append(
            1 + max((levels[local[child]] for child in children.get(number, ()) if child in local), default=-1)
        )
    renumbered: list[Pile] = [
        GivenPile(pile.block, [local[n] for n in pile.tasks], (), (), pile.known) for pile in given
    ]
    for pile in piles:
        made = [[local.get(child, 0) for child in column] for column in pile.invocations]
        renumbered.append(Pile(pile.block, [local[n] for n in pile.tasks], made, pile.hosts))
    return Part(renumbered, levels, local)


def _given(piles: Sequence[Pile], known: dict[int, Known], given_blocks: dict[Any, RunnableBlock]) -> list[GivenPile]:
    """Return the invocations whose known results are taken."""
    taken: dict[str, dict[int, None]] = {}
    results: dict[str, set[int]] = {}
    for pile in piles:
        for operand in pile.block.operands:
            for number in pile.invocations[operand.invocation]:
                if number in known:
                    taken.setdefault(operand.callee, {})[number] = None
                    results.setdefault(operand.callee, set()).add(operand.result)
    made_piles: list[GivenPile] = []
    for function, numbers in taken.items():
        key = function, tuple(sorted(results[function]))
        block = given_blocks.setdefault(key, RunnableBlock(_given_block(*key)))
        tasks = list(numbers)
        made_piles.append(GivenPile(block, tasks, (), (), [known[number] for number in tasks]))
    return made_piles


def _given_block(function: str, results: tuple[int, ...]) -> Block:
    values = tuple(Value(str(index), None) for index in range(len(results)))
    body = SubGraph(f"{function}.given", values, (), values)
    return Block(function, ("given",), body, (), len(values), results, (), (), tuple(range(len(values))))

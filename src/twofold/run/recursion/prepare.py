"""Making blocks ready to run together: their samples, joint graphs, and stages, kept for the next batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from .blocks import RunnableBlock
from .factors import Table
from .parts import Staged
from .schedule import Index, integers
from .stages import Cut, own_term
from .vectorize import Joint, NotBatchableError, Sample, trace_joint


class SumBroken(Exception):
    """A result that was taken for a sum of children's is none."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.table = table


@dataclass
class Tables:
    """What is known of the results of functions.

    `samples`: what each is like. `summed`: which are taken for sums of children's, until a block says otherwise.
    `chained`: which others are taken by invocations.
    """

    samples: dict[Table, Sample] = field(default_factory=dict[Table, Sample])
    summed: frozenset[Table] = frozenset()
    chained: frozenset[Table] = frozenset()
    not_summed: set[Table] = field(default_factory=set[Table])
    _state: tuple[int, ...] = ()

    def update(self, blocks: Sequence[RunnableBlock]) -> None:
        """Take note of who takes what from whom. Blocks never become fewer."""
        state = len(blocks), len(self.samples), len(self.not_summed)
        if state == self._state:
            return
        self._state = state
        taken = {(o.callee, o.result) for block in blocks for o in block.operands} & self.samples.keys()
        foreign = {(o.callee, o.result) for block in blocks for o in block.operands if o.callee != block.function}
        sums = taken - foreign - self.not_summed
        self.summed = frozenset(table for table in sums if self.samples[table].dtype.is_floating_point)
        self.chained = frozenset(taken - self.summed)


Column = Tensor | NDArray[Any]
"""The host values of all invocations, a row each: numbers as an array on the host, tensors where they are."""


def column(values: Sequence[Any], order: Index) -> Column:
    """Make one column of host values, in an order. Raises `NotBatchableError`."""
    kinds = set(map(type, values))
    if any(issubclass(kind, Tensor) for kind in kinds):
        return _stacked([values[position] for position in order.tolist()])
    if len(kinds) > 1 or not kinds <= {int, float, bool, list, tuple}:
        raise NotBatchableError(f"host values of types {', '.join(sorted(kind.__name__ for kind in kinds))}")
    try:
        held = integers(values) if kinds == {int} else np.array(values)
    except (ValueError, OverflowError) as error:
        raise NotBatchableError(f"host values of several shapes, or too large: {error}") from None
    if held.dtype.kind not in "bif":
        raise NotBatchableError(f"host values of dtype {held.dtype}")
    return held[order]


def sample(held: Column, device: torch.device, differentiate: bool) -> Sample:
    """Describe a row of a column that is to be on a device."""
    if isinstance(held, Tensor):
        return Sample(tuple(held.shape[1:]), held.dtype, held.device, held.requires_grad and differentiate)
    return Sample(tuple(held.shape[1:]), torch.from_numpy(held[:0]).dtype, device, False)


def _stacked(values: list[Any]) -> Tensor:
    if not all(isinstance(value, Tensor) for value in values):
        raise NotBatchableError("some host values are tensors and some are not")
    first = values[0]
    if any(value.shape != first.shape or value.dtype != first.dtype for value in values):
        raise NotBatchableError("tensors of several shapes or dtypes")
    return torch.stack(values)


def stage_group(block: RunnableBlock, hosts: Sequence[Sample], tables: Tables, differentiate: bool) -> Staged:
    """Return the stages of a block for host values like these. Raises `NotBatchableError`."""
    if block.refusal is not None:
        raise NotBatchableError(block.refusal)
    operands = [tables.samples[o.callee, o.result].given(differentiate) for o in block.operands]
    flags = tuple(tensor.requires_grad for tensor in block.tensors)
    key = (*operands, *hosts, differentiate, flags)
    try:
        joint = block.joints.get(key)
        if joint is None:
            joint = block.joints[key] = _trace(block, [*operands, *hosts], tables, differentiate)
        form = (key, tables.summed, tables.chained)
        staged = block.staged.get(form)
        if staged is None:
            staged = block.staged[form] = _cut(block, joint, tables, differentiate)
    except NotBatchableError as error:
        block.refusal = str(error)
        raise
    return staged


def _trace(block: RunnableBlock, samples: list[Sample], tables: Tables, differentiate: bool) -> Joint:
    expected = [tables.samples.get((block.function, result)) for result in block.block.results]
    joint = trace_joint(block.block.body, samples, expected, block.parameters if differentiate else [])
    for sample, output in zip(expected, joint.wanted[0], strict=True):
        value = output.meta["val"]
        if sample is not None and (tuple(value.shape[1:]), value.dtype, value.device) != sample[:3]:
            raise NotBatchableError(f"results of several shapes or dtypes: {sample.shape} and {tuple(value.shape[1:])}")
    return joint


def _cut(block: RunnableBlock, joint: Joint, tables: Tables, differentiate: bool) -> Staged:
    """Cut a joint graph into stages. Raises `SumBroken` where a result turns out to be no sum."""
    places = [(operand.callee, operand.result) for operand in block.operands]
    results = [(block.function, result) for result in block.block.results]
    for table in places:
        if table in tables.summed and table not in results:
            raise SumBroken(table)
    joint = joint.copy()
    terms: dict[int, fx.Node] = {}
    for output, table in enumerate(results):
        if table in tables.summed:
            term = own_term(joint, output, [index for index, place in enumerate(places) if place == table])
            if term is None:
                raise SumBroken(table)
            terms[output] = term
    cut = Cut(
        joint,
        {index: place for index, place in enumerate(places) if place in tables.chained},
        {output: table for output, table in enumerate(results) if table in tables.chained},
        terms,
        frozenset(index for index, place in enumerate(places) if place in tables.summed),
    )
    return cut.staged(differentiate, tables.chained)

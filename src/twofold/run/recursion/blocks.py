"""Blocks as they are run: one invocation at a time by PyTorch's own operations, or all at once in stages."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twofold.convert.from_source import Block, Operand
from twofold.errors import TwofoldError
from twofold.graph import Constant, SubGraph, Value, map_values, values_in

from .bodies import Steps, tensors_of
from .parts import BY_LEVEL, Stage, Staged
from .vectorize import Joint

_ARITHMETIC = frozenset(
    {
        getattr(operator, name)
        for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "eq", "ne", "lt", "le", "gt", "ge"]
    }
)


_CONTAINERS = (tuple, list, dict, reversed)


@dataclass(eq=False)
class RunnableBlock:
    """A block with what running it has taught."""

    block: Block
    variants: dict[tuple[Any, ...], RunnableBlock] = field(default_factory=dict[tuple[Any, ...], "RunnableBlock"])
    joints: dict[Any, Joint] = field(default_factory=dict[Any, Joint])
    staged: dict[Any, Staged] = field(default_factory=dict[Any, Staged])
    refusal: str | None = None
    """Why it cannot run for several invocations at once."""

    @property
    def function(self) -> str:
        """The function whose results it computes."""
        return self.block.function

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors that it takes from other invocations."""
        return self.block.operands

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """The function of each invocation that it makes."""
        return self.block.callees

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors from outside that it computes with."""
        return tensors_of(self.block.body)

    @property
    def parameters(self) -> list[Tensor]:
        """Those of them that gradients flow to at present."""
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    @cached_property
    def constant_hosts(self) -> tuple[int, ...]:
        """Which host values steer operations (sizes, names) and are no numbers that tensors are computed from."""
        body = self.block.body
        hosts = body.inputs[len(self.operands) :]
        numbers = _numbers(body)
        return tuple(index for index, value in enumerate(hosts) if value not in numbers)

    def variant(self, hosts: Sequence[Any]) -> RunnableBlock:
        """Return the block for given values of the host values that steer operations."""
        key = tuple((type(hosts[index]), hosts[index]) for index in self.constant_hosts)
        try:
            known = self.variants.get(key)
        except TypeError:  # lists, which may be changed later
            hosts = [_frozen(host) if index in self.constant_hosts else host for index, host in enumerate(hosts)]
            key = tuple(_key(hosts[index]) for index in self.constant_hosts)
            known = self.variants.get(key)
        if known is None:
            known = self.variants[key] = RunnableBlock(_specialised(self.block, self.constant_hosts, hosts))
        return known

    def linked(self, places: Sequence[tuple[int, str, int]]) -> RunnableBlock:
        """Return the block with host values that are results of waiting invocations as operands.

        `places` has, for each, which host value it is, the function and the number of the result.
        """
        key = ("linked", *places)
        known = self.variants.get(key)
        if known is None:
            known = self.variants[key] = RunnableBlock(_linked(self.block, places))
        return known

    def described(self) -> dict[str, Any]:
        """Return whether it ran for all invocations together, or why not; in how many batches levels ran as what."""
        ran: dict[Stage, Counter[str]] = {stage: Counter() for stage in BY_LEVEL}
        for staged in self.staged.values():
            for stage in BY_LEVEL:
                ran[stage].update(staged.stages[stage].ran)
        return {
            "name": self.block.body.name,
            "together": bool(self.staged),
            "reason": self.refusal,
            "levels_forward": dict(ran[Stage.LEVEL]),
            "levels_backward": dict(ran[Stage.BACK]),
        }

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.block.body, {})

    def run(self, operands: Sequence[Tensor], hosts: Sequence[Any]) -> list[Any]:
        """Run one invocation with PyTorch's own operations."""
        return self._steps([*operands, *hosts])


def _numbers(body: SubGraph) -> set[Value]:
    """Return the values that are numbers to compute with wherever they are used: indices, operands, new tensors."""
    numbers: set[Value] = set()
    others: set[Value] = set()
    made = {value for node in body.nodes if node.target in _CONTAINERS for value in node.results}
    for node in body.nodes:
        if node.op == "get_item":
            holder, key = node.arguments
            steering = list(values_in(key)) if type(key) is slice or holder in made else []
            numbers.update(set(node.operands) - set(steering))
            others.update(steering)
        elif node.op == "call" and (node.target in _ARITHMETIC or node.target in (torch.tensor, torch.as_tensor)):
            numbers.update(values_in(node.arguments))
            others.update(value for _, argument in node.keywords for value in values_in(argument))
        else:
            others.update(node.operands)
    numbers.update(value for output in body.outputs for value in values_in(output))
    return numbers - others


def _specialised(block: Block, steering: Sequence[int], hosts: Sequence[Any]) -> Block:
    body, first = block.body, len(block.operands)
    fixed = {body.inputs[first + index]: _constant(hosts[index]) for index in steering}

    def rename(argument: Any) -> Any:
        return map_values(argument, lambda value: fixed.get(value, value))

    nodes = tuple(
        replace(
            node,
            arguments=tuple(rename(argument) for argument in node.arguments),
            keywords=tuple((name, rename(argument)) for name, argument in node.keywords),
        )
        for node in body.nodes
    )
    inputs = tuple(value for value in body.inputs if value not in fixed)
    linear = SubGraph(body.name, inputs, nodes, tuple(rename(output) for output in body.outputs))
    return replace(block, body=linear, hosts=block.hosts - len(fixed))


def _linked(block: Block, places: Sequence[tuple[int, str, int]]) -> Block:
    body, first = block.body, len(block.operands)
    taken = [body.inputs[first + index] for index, _, _ in places]
    hosts = [value for value in body.inputs[first:] if value not in taken]
    invocations = len(block.callees)
    operands = [Operand(invocations + n, callee, result) for n, (_, callee, result) in enumerate(places)]
    return replace(
        block,
        body=replace(body, inputs=(*body.inputs[:first], *taken, *hosts)),
        operands=(*block.operands, *operands),
        hosts=len(hosts),
        callees=(*block.callees, *(callee for _, callee, _ in places)),
    )


_SCALARS = (int, float, bool, str, type(None))


def _frozen(held: Any) -> Any:
    """Return a copy of lists of scalars, such as shapes. Raises `TwofoldError` for what cannot be told by value."""
    if type(held) in (list, tuple):
        return type(held)(map(_frozen, held))
    if held.__hash__ is None or isinstance(held, torch.Tensor):
        raise TwofoldError(
            f"twofold.subgraph: an operation is given a {type(held).__name__} that Python code made. Give it tensors "
            "and numbers by themselves, or in a list that is written in the call"
        )
    return held


def _key(held: Any) -> Any:
    return (type(held), tuple(map(_key, held)) if type(held) in (list, tuple) else held)


def _constant(held: Any) -> Any:
    return held if type(held) in _SCALARS else Constant(held)

"""Elementwise operations in stages that run once, as compiled passes over the rows.

Each operation from Python reads what it takes from memory and writes what it makes there; a pass does so for all of
its operations together, a row at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .native import NativeWriter, NoNativeForm, Place, unfit, users_of
from .native_text import EXPRESSIONS, JOINING
from .parts import NativeCode, Role, Stage, is_view
from .vectorize import SIZES, Joint


@dataclass
class PassWriter(NativeWriter):
    """Writes elementwise operations that follow one another in a stage that runs once, as one pass over the rows."""

    made: Sequence[fx.Node] = ()
    """Those that others take."""
    nodes: Sequence[fx.Node] = ()

    def _found(self, node: fx.Node) -> Any:
        if is_view(node):
            return self._viewed(node)
        if node.op == "get_attr":
            return self._constant(node, [])
        if node in self.nodes and node not in self.made:
            return replace(self._scratch(node), passing=True)
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype is not torch.float32 or value.device.type != "cpu":
            raise unfit(node)
        name = self._argument(Role.PART, node.name, "float", None)
        dimension, each = self.joint.rows.get(node, (0, 0))
        if dimension != 0:
            raise unfit(node)
        step = value.numel() // SIZES[0] if each else 0
        apart = f"flags[{list(self.arguments).index((Role.PART, node.name))}]"
        return Place(name, torch.empty(value.shape), each, step, apart=apart)


@dataclass(frozen=True)
class Pass:
    """Operations that are done in one pass: what they are, what they take, what others take of them, and the code."""

    nodes: Sequence[fx.Node]
    taken: Sequence[fx.Node]
    made: Sequence[fx.Node]
    code: NativeCode


FEWEST = 3
"""Operations from which on a pass is compiled: each saves a call and that what it makes goes through memory."""


def passes(joint: Joint, nodes: Sequence[fx.Node], own: Mapping[fx.Node, Stage], stage: Stage) -> list[Pass]:
    """Return the passes among the operations of a stage, given in order."""
    found: list[Pass] = []
    for elementwise, run in itertools.groupby(nodes, lambda node: _is_elementwise(joint, node)):
        together = list(run)
        if elementwise and len(together) >= FEWEST:
            made = [node for node in together if not _taken_within(node, together)]
            writer = PassWriter(joint, own, stage, {}, [], {}, {}, made=made, nodes=together)
            with contextlib.suppress(NoNativeForm):
                code = writer.code(together, [])
                names = [what for role, what in code.arguments if role is Role.PART]
                taken = [node for node in joint.graph.nodes if node.name in names and node not in together]
                found.append(Pass(together, taken, made, code))
    return found


def _is_elementwise(joint: Joint, node: fx.Node) -> bool:
    held = [node, *node.all_input_nodes]
    known = node.target in EXPRESSIONS or node.target in JOINING
    return known and not node.kwargs and joint.keeps_rows_first(node) and all(map(_is_float, held))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or (value.dtype is torch.float32 and value.device.type == "cpu")


def _taken_within(node: fx.Node, together: Sequence[fx.Node]) -> bool:
    """Say whether operations of a pass alone take a value."""
    users = users_of(node)
    return bool(users) and all(user in together for user in users)

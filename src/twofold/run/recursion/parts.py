"""What a block cut into stages is made of: what the writer of stages and the executor have in common."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from twofold.backends import cpu_code

from .factors import Link, Table

aten = torch.ops.aten


PATIENCE = 4
"""Batches that a stage runs from Python before native code is written, some 0.1 s, and compiled, 1 s of a core."""


NATIVE = "native code"


class Stage(IntEnum):
    """When a node runs. `LEVEL` and `BACK` run once for each level, the others once for all invocations."""

    BEFORE = 0
    LEVEL = 1
    AFTER = 2
    TURN = 3
    BACK = 4
    FINISH = 5


BY_LEVEL = (Stage.LEVEL, Stage.BACK)

_VIEWS = frozenset(
    {
        aten.t.default,
        aten.view.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.unsqueeze.default,
        aten.squeeze.dims,
        aten.squeeze.dim,
        aten.expand.default,
        aten.select.int,
        aten.permute.default,
        aten.transpose.int,
    }
)


def is_view(node: fx.Node) -> bool:
    """Say whether a node is so cheap that each stage makes its own."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in _VIEWS
    return node.target in _VIEWS


@dataclass(frozen=True)
class Crossing:
    """A value that one stage takes from another: rows are along `dimension`, `each` for an invocation; or it has none.

    `shape` is what follows the rows. Without rows, what `BACK` makes is a sum over them (a parameter's gradient), and
    anything else the same for all.
    """

    name: str
    source: Stage | None
    dimension: int | None
    each: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device | None


class Role(Enum):
    """What a parameter of a stage's function stands for. What it says of is in the second place of an argument."""

    PART = "rows of a value: Crossing"
    VIEW = "rows of a view of a value: View"
    CONSTANT = "a view of a tensor from outside: Fixed"
    TABLE = "a table of results: Link"
    CHILDREN = "which rows of it: Link"
    OWED = "which rows of a table of gradients: Link"
    GRADIENTS = "a table of gradients: Link"
    GIVE = "how gradients are added to it: Link"
    SAME = "a value without rows: Crossing"
    SCRATCH = "memory for the rows of one level: a name, and the elements of a row"


@dataclass(frozen=True)
class View:
    """A view of a value that keeps its rows apart, `each` for an invocation: `make(n, rows)` for `n` invocations."""

    crossing: Crossing
    each: int
    make: Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Same:
    """A view of a tensor from outside for native code; `key` names the view."""

    tensor: Tensor = field(compare=False)
    make: Callable[[Tensor], Any] = field(compare=False)
    key: tuple[str, ...]


@dataclass(eq=False)
class NativeCode:
    """A stage as C++ that runs several levels; `arguments` are the memory that it is given."""

    text: str
    arguments: list[tuple[Role, Any]]
    widest: int
    """Elements that an operation makes of an invocation, at most."""

    def ready(self) -> Callable[..., None] | str:
        """Return the compiled function, or why it is not there. It is ordered when it is asked for."""
        return cpu_code.ordered(self.text)


@dataclass(frozen=True)
class Fixed:
    """A view of a tensor from outside, the same for all rows."""

    tensor: Tensor
    make: Callable[[int, Tensor], Tensor]


@dataclass
class StageCode:
    """One stage as a function `run(n, *arguments)` of `n` invocations.

    `kept` are the values that it writes to where they stay, `inside` those that lie in the memory of one of them;
    `given` names what it returns.
    """

    run: Callable[..., tuple[Any, ...]]
    arguments: list[tuple[Role, Any]]
    kept: list[Crossing]
    inside: dict[str, View]
    given: list[str]
    text: str
    native: NativeCode | str = f"no {PATIENCE} batches had run"
    """The same as C++, or why there is none."""
    in_passes: StageCode | None = None
    """The same with elementwise operations done in compiled passes."""
    passes: Sequence[NativeCode] = ()
    """The code that this needs."""
    relieved: StageCode | None = None
    """The same without what native code of `BACK` does by itself, a level at a time."""
    relieving: NativeCode | None = None
    """Native code of `BACK` that does so."""
    ran: Counter[str] = field(default_factory=Counter[str])
    """In how many batches it ran as what, for a stage that runs level by level: `NATIVE`, or why as ATen's calls."""


@dataclass
class Staged:
    """A block cut into stages. Names are of values; those of hosts and in `tangents` come from the executor."""

    stages: dict[Stage, StageCode]
    children: dict[str, Link]
    """The names of rows taken from tables."""
    hosts: list[str]
    tangents: list[str | None]
    outputs: list[str]
    host_gradients: list[str | None]
    parameter_gradients: list[str | None]
    crossings: dict[str, Crossing]
    chained: frozenset[Table]
    """The tables through which invocations depend on one another level by level."""
    written: dict[int, Table]
    """Which outputs are written to which table."""
    constants: list[Tensor]
    """The tensors that it holds from outside."""
    later: list[Callable[[], None]]
    """What adds native code to the stages."""
    batches: int = 0
    """How many batches of the block ran so."""

    def note_batch(self) -> None:
        """Take note of a batch on a CPU. When they have come often enough, native code is written."""
        self.batches += 1
        if self.batches > PATIENCE:
            for write in self.later:
                write()
            self.later.clear()

    @cached_property
    def backward(self) -> frozenset[str]:
        """The names of values that only backward makes."""
        codes = [self.stages[stage] for stage in (Stage.TURN, Stage.BACK, Stage.FINISH)]
        made = [*(name for code in codes for name in (*code.given, *code.inside, *(kept.name for kept in code.kept)))]
        return frozenset([*made, *(name for name in self.tangents if name is not None)])

"""What a unit leaves in `.grad` of the leaves, as it is known when the graph of its path is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twofold.convert.from_traces import Program
from twofold.convert.segments import root_of
from twofold.graph import Value


@dataclass(frozen=True, eq=False)
class GradientExits:
    """What a unit leaves in `.grad`, column by column: it is set once a unit, for each parameter."""

    leaves: tuple[torch.Tensor | int, ...]
    """Each itself, or the external fed."""
    values: tuple[Value, ...]
    """Their gradients."""
    cleared: tuple[torch.Tensor | int, ...]
    """The leaves that have no gradient after a unit."""
    views: tuple[Value, ...]
    """Those of `values` that no segment hands out by themselves."""
    copied: tuple[int, ...]
    """The indices of those that lie in memory that the next launch writes to."""
    shared: tuple[int, ...]
    """The indices of those that do, in memory that a tensor which the program is handed shows too."""

    given: tuple[tuple[int, torch.Tensor | int], ...]
    """The indices of those that are tensors of the program's own, each with that tensor or the external fed."""

    has_fed: bool
    """Whether some leaf is fed."""

    def leaves_given(self, given: Mapping[int, torch.Tensor]) -> Sequence[Any]:
        """Return the leaves of a unit that is given these externals."""
        return [given[leaf] if type(leaf) is int else leaf for leaf in self.leaves] if self.has_fed else self.leaves

    @classmethod
    def of(cls, program: Program, given: Collection[Value], is_reused: bool) -> GradientExits:
        """Plan for a program; `given` are the values that a unit is given, `is_reused` is what it makes memory of."""
        plans = [plan for plan in program.gradients if not plan.keeps]
        pairs = [(plan, plan.exit) for plan in plans if plan.exit is not None]
        values = tuple(value for _, value in pairs)
        roots = [root_of(value, program.views) for value in values]
        handed_out = {root_of(value, program.views) for value in program.escapes.values()}
        reused = [index for index, root in enumerate(roots) if is_reused and root not in given]
        return cls(
            tuple(plan.leaf for plan, _ in pairs),
            values,
            tuple(plan.leaf for plan in plans if plan.exit is None),
            tuple(value for value in values if value in program.views),
            tuple(index for index in reused if roots[index] not in handed_out),
            tuple(index for index in reused if roots[index] in handed_out),
            tuple((index, plan.given) for index, (plan, _) in enumerate(pairs) if plan.given is not None),
            any(type(plan.leaf) is int for plan, _ in pairs),
        )

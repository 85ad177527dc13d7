"""What leaves a batch: which results, and how the tensors that leave are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """A tensor that leaves the batch: an output of the block of one invocation, by its position."""

    task: int
    output: int


Leaving = tuple[Any, int]
"""Where results that leave are rows: in a `Table`, or among a group's values, by its number and the output's."""


@dataclass(frozen=True)
class Bundles:
    """What leaves a batch, and as how many tensors: of `sizes[i]` requests, one with a row each; for None, of one."""

    requests: Sequence[Request]
    sizes: Sequence[int | None]

    @classmethod
    def of(cls, singly: Sequence[Request], bundled: Sequence[Sequence[Request]]) -> Bundles:
        """Have requests be tensors of their own, and others be rows, behind these."""
        requests = [*singly, *itertools.chain.from_iterable(bundled)]
        return cls(requests, [None] * len(singly) + [len(bundle) for bundle in bundled])

    def tied(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that leave from those of the requests."""
        rest = iter(tensors)
        return [next(rest) if size is None else torch.stack(list(itertools.islice(rest, size))) for size in self.sizes]

    def tied_flags(self, flags: Sequence[bool]) -> list[bool]:
        """Say of each tensor that leaves whether a flag of any of its requests is set."""
        rest = iter(flags)
        return [True in tuple(itertools.islice(rest, 1 if size is None else size)) for size in self.sizes]

    def untied(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the requested tensors from those of the tensors that left."""
        found: list[Tensor | None] = []
        for size, gradient in zip(self.sizes, gradients, strict=True):
            if size is None:
                found.append(gradient)
            else:
                found.extend([None] * size if gradient is None else gradient.unbind())
        return found


@dataclass(frozen=True)
class Exits:
    """Bundles, and where their results are: `numbers` has, for each `Leaving` of a schedule, which requests it is.

    `differentiable` says of each tensor that leaves whether gradients flow through it: not to one that is detached.
    """

    bundles: Bundles
    numbers: Sequence[Sequence[int]]
    differentiable: Sequence[bool]

    @cached_property
    def _is_as_computed(self) -> bool:
        """Whether what leaves are the rows of each `Leaving`, as they are computed."""
        starts = itertools.accumulate([len(numbers) for numbers in self.numbers], initial=0)
        same = [
            list(numbers) == list(range(s, s + len(numbers))) for s, numbers in zip(starts, self.numbers, strict=False)
        ]
        return all(same) and [len(numbers) for numbers in self.numbers] == list(self.bundles.sizes)

    def outputs(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that leave, each with memory of its own, from the rows of each `Leaving`."""
        if self._is_as_computed:
            return list(results)
        found = [_NOTHING] * len(self.bundles.requests)
        for numbers, rows in zip(self.numbers, results, strict=True):
            each: Sequence[Tensor] = torch.unbind_copy(rows)  # type: ignore[assignment]
            for number, row in zip(numbers, each, strict=True):
                found[number] = row
        return self.bundles.tied(found)

    def gradients(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the rows of each `Leaving`, None where there are none, from those of the tensors."""
        if self._is_as_computed:
            return list(given)
        found = self.bundles.untied(given)
        return [_stacked([found[number] for number in numbers]) for numbers in self.numbers]


_NOTHING = torch.empty(0)


def _stacked(gradients: Sequence[Tensor | None]) -> Tensor | None:
    held = [gradient for gradient in gradients if gradient is not None]
    if not held:
        return None
    if len(held) < len(gradients):
        nothing = torch.zeros_like(held[0])
        held = [nothing if gradient is None else gradient for gradient in gradients]
    return torch.stack(held)

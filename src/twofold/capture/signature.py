"""The state in which a unit begins, as far as each of its paths depends on it: what its root is found by."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .trace import Trace

Signature = tuple[Any, ...]


def switches() -> tuple[Any, ...]:
    """Return the switches of PyTorch that choose kernels."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch._C._get_cublas_allow_tf32(),
        torch._C._get_cudnn_allow_tf32(),
        torch._C._get_cudnn_benchmark(),
    )


_requires_grad: Callable[[torch.Tensor], bool] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_hooks, _late_hooks = map(operator.attrgetter, ("_backward_hooks", "_post_accumulate_grad_hooks"))


class KnownLeaves:
    """The parameters, and what else optimizers own, that the units of one program were seen to use."""

    def __init__(self) -> None:
        self._leaves: dict[int, torch.Tensor] = {}
        self._unhooked_at: tuple[int, int] | None = None
        """The number of the next handle, and of leaves, when no leaf was seen to run hooks."""
        self._unhooked: tuple[tuple[bool, ...], ...] = ()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._leaves.values())

    def signature(self) -> Signature:
        """Return the switches of PyTorch and then, for each leaf, what each path depends on.

        Whether it requires a gradient, runs no hooks, and none after accumulation. Whether it has a gradient is left to
        the events that look at that: most units drop it before, and what the coins of the unit before have left would
        make 4 paths of 2.
        """
        leaves = self._leaves.values()  # all loops here are C's: this is done before each unit
        return (switches(), tuple(map(_requires_grad, leaves)), *self._unhooked_states())

    def _unhooked_states(self) -> tuple[tuple[bool, ...], ...]:
        """Return which leaves run no hooks, and none after accumulation.

        Every hook is registered with a handle of its own, and handles are numbered: without a new one there is none.
        """
        now = RemovableHandle.next_id, len(self._leaves)
        if now == self._unhooked_at:
            return self._unhooked
        leaves = self._leaves.values()
        states = tuple(map(operator.not_, map(_hooks, leaves))), tuple(map(operator.not_, map(_late_hooks, leaves)))
        if all(map(all, states)):
            self._unhooked_at, self._unhooked = now, states
        return states

    def complete(self, signature: Signature, trace: Trace) -> Signature | None:
        """Return a signature extended by the leaves that its own unit was the first to show; None if there are none."""
        added = [known for identity, known in trace.lasting.items() if identity not in self._leaves]
        if not added:
            return None
        self._leaves.update((id(leaf), leaf) for leaf, _ in added)
        plain = (True,) * len(added)
        requiring = tuple(required for _, required in added)
        chosen, *states = signature or (switches(), (), (), ())
        return (chosen, *map(operator.add, states, (requiring, plain, plain)))

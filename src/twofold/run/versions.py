"""Version counters, by which autograd knows of writes: put back where a write is undone, or was none.

The program can read them (`tensor._version`), and an error about a tensor changed in place states them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

_set_versions = torch._C._autograd._unsafe_set_version_counter  # type: ignore[attr-defined]


def keep_versions(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Return what sets the counters of these tensors to what they are now; those made in inference mode have none."""
    counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return functools.partial(_set_versions, counted, tuple(tensor._version for tensor in counted))

"""The dispatcher's own note of whether a dispatch mode is on, set right where PyTorch puts back an old one.

Guards that put the dispatcher's state back, those of `inference_mode` and of compiled functions, put back that of
before, also where our modes have come or gone meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


def ask_where_modes_are() -> None:
    """Have the dispatcher ask Python if, and only if, a dispatch mode is on."""
    modes = torch._C._len_torch_dispatch_stack()
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.Python) == (modes > 0):
        return
    taken: list[Any] = [_pop_mode() for _ in range(modes)] or [TorchDispatchMode()]
    for mode in reversed(taken):
        _push_mode(mode)
    if not modes:
        _pop_mode()


def keep_asking_after_inference_mode() -> None:
    """Do so whenever `torch.inference_mode` is left. To be called once."""
    original = torch.inference_mode.__exit__

    @functools.wraps(original)
    def __exit__(self: Any, *error: Any) -> None:
        original(self, *error)
        ask_where_modes_are()

    torch.inference_mode.__exit__ = __exit__  # type: ignore[method-assign, assignment]

"""Tensor objects that stand for results Python does not have yet: what answers a call that nobody computes."""

from __future__ import annotations

import torch

from .match import Placeholders
from .trace import Made

_UNREAD = "Twofold: this tensor was read where its value cannot be supplied, by code that PyTorch does not announce"

# Only CUDA builds of PyTorch have it: code that reads memory unasked gets an error and not a null pointer.
_forbid_reads = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)


def make_placeholder(made: Made, known: Placeholders) -> torch.Tensor:
    """Return a new placeholder for a result described by `made`, entered into `known`."""
    tensor = made.spec.empty()
    storage = tensor.untyped_storage()
    storage.resize_(0)
    if _forbid_reads is not None:
        _forbid_reads(storage._cdata, _UNREAD)
    known[id(tensor)] = tensor, made
    return tensor

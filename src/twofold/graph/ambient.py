"""The modes that a node is recorded under, and running Python under them again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from .ir import Ambient

_AUTOCAST_DEVICES = ("cpu", "cuda")


def current_ambient() -> Ambient:
    """Describe the modes of this thread under which an operation would run."""
    return Ambient(
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        autocast=tuple((d, torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES if torch.is_autocast_enabled(d)),
        autocast_cache=torch.is_autocast_cache_enabled(),
    )


def ambient_context(ambient: Ambient) -> AbstractContextManager[None]:
    """Return a context in which exactly these modes hold, whatever holds outside; cheap if they hold already.

    Leaving the outermost autocast context drops the casts that it cached. To share them, as eager code
    does, keep one context open over all nodes with the same ambient.
    """
    return _NOTHING if _holds(ambient) else _entered(ambient)


_NOTHING = nullcontext()


def inference_mode(wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which inference mode holds or not, as wanted; it sets the grad mode, too."""
    return _NOTHING if torch.is_inference_mode_enabled() == wanted else torch.inference_mode(wanted)


def _holds(ambient: Ambient) -> bool:
    return (
        torch.is_grad_enabled() == ambient.grad
        and torch.is_inference_mode_enabled() == ambient.inference
        and not ((ambient.autocast or torch._C._is_any_autocast_enabled()) and _autocast_changes(ambient))  # type: ignore[attr-defined]
    )


def _autocast_changes(ambient: Ambient) -> list[tuple[str, torch.dtype | None]]:
    """Return the device types whose autocast must change, with the dtype to cast to or None for off."""
    wanted = dict(ambient.autocast)
    changes: list[tuple[str, torch.dtype | None]] = []
    for device in {**dict.fromkeys(_AUTOCAST_DEVICES), **wanted}:
        dtype = wanted.get(device)
        if not torch.is_autocast_enabled(device):
            if dtype is not None:
                changes.append((device, dtype))
        elif dtype is None or _autocast_differs(device, dtype, ambient.autocast_cache):
            changes.append((device, dtype))
    return changes


def _autocast_differs(device: str, dtype: torch.dtype, cache: bool) -> bool:
    return torch.get_autocast_dtype(device) != dtype or torch.is_autocast_cache_enabled() != cache


@contextmanager
def _entered(ambient: Ambient) -> Generator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled() != ambient.inference:
            stack.enter_context(torch.inference_mode(ambient.inference))
        # After inference mode, which sets the grad mode too.
        stack.enter_context(torch.set_grad_enabled(ambient.grad))
        for device, dtype in _autocast_changes(ambient):
            enabled = dtype is not None
            stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=ambient.autocast_cache))
        yield


class AmbientSwitch:
    """Holds one ambient open from node to node, changing it only when the next node's differs.

    Mutable, and of the thread that uses it. `close` restores the modes that held at the first `to`.
    """

    def __init__(self) -> None:
        self._current: Ambient | None = None
        self._open = ExitStack()

    def to(self, ambient: Ambient) -> None:
        """Make the ambient hold until the next call."""
        if ambient != self._current:
            self.close()
            self._open.enter_context(ambient_context(ambient))
            self._current = ambient

    def close(self) -> None:
        """Restore the modes that held before."""
        self._current = None
        self._open.close()

    def __enter__(self) -> AmbientSwitch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

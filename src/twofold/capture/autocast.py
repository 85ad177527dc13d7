"""Regions of autocast that units begin in. PyTorch keeps what it cast of a leaf until the region is left.

A unit recorded with casts from before it would have them as constants, and its graph would use old weights in the next
region. So what is recorded or followed begins with none, and casts by itself: to the same values, unless a leaf has
changed since. Where leaves change within a region, eager execution goes on with the old casts, which a graph would not
have left: units that train stay eager there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable

import torch

_forget_casts = torch.clear_autocast_cache
_regions_left = 0


@functools.wraps(_forget_casts)
def _leave_region() -> None:
    global _regions_left
    _regions_left += 1
    _forget_casts()


torch.clear_autocast_cache = _leave_region  # which `torch.autocast` calls where the outermost region ends


def _is_within_region() -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_cache_enabled()  # type: ignore[attr-defined]


class Region:
    """What one program knows of the region of autocast that its units begin in."""

    def __init__(self) -> None:
        self.trains = False
        """Whether leaves were seen to change within one."""
        self._number = -1
        self._versions: list[int] = []
        """Of the leaves: when they were first looked at in this region."""
        self.is_around_unit = False
        """Whether the unit that was last asked for begins within one."""

    def allows_unit(self, leaves: Callable[[], Iterable[torch.Tensor]]) -> bool:
        """Whether a unit that begins now casts to what it would find, and leaves casts as eager execution does.

        It does if no leaf changes: not before in this region, and not in the unit. False too where that is not known
        yet, for the second unit in the first region, whose leaves are new. Casts are kept of leaves that require a
        gradient alone.
        """
        self.is_around_unit = _is_within_region()
        if not self.is_around_unit:
            return True
        versions = [leaf._version for leaf in leaves() if leaf.requires_grad]
        if self._number != _regions_left:
            self._number, self._versions = _regions_left, versions
            return not self.trains
        if len(self._versions) != len(versions):
            self._versions = versions
            return False
        self.trains |= versions != self._versions
        return not self.trains

    def end_unit(self, leaves: Iterable[torch.Tensor], written: Collection[int]) -> None:
        """Take note of the end of a unit that was recorded, with the storages that it wrote to."""
        if self.is_around_unit:
            self.trains |= any(leaf.untyped_storage()._cdata in written for leaf in leaves if leaf.requires_grad)


def begin_without_casts() -> None:
    """Have the unit that begins now make its own casts."""
    if _is_within_region():
        _forget_casts()

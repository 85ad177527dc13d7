"""Which batches run as captured graphs, and when another room is captured.

Batches of the same blocks that no captured room holds are counted, by the power of two above their size. After
`PATIENCE` of them, and twice as many each further time, the room of all of them together, and some more, is captured.
On the Stanford Sentiment Treebank two or three captures hold 98 of 100 batches, of 1, 25 or 256 trees.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twofold.backends.cuda_graph import CaptureFailed, recording
from twofold.capture.signature import switches

from .captured import Captured, Lease, Recording, Work
from .known import GivenPile
from .rooms import Room

PATIENCE = 4
MOST = 8
"""Captured rooms that are kept."""
SHARE = 8
"""Captured rooms may take one part in so many of the device's memory."""

Key = tuple[Any, ...]


def recording_on(device: torch.device) -> Recording | None:
    """Return how work is captured on a device; None if it is not."""
    return recording if device.type == "cuda" and device.index == torch.cuda.current_device() else None


@dataclass
class _Waiting:
    """Batches that no room held: how many there were since the last capture, how many there have to be, their room."""

    batches: int = 0
    patience: int = field(default_factory=lambda: PATIENCE)
    room: Room | None = None


class Captures:
    """The captured rooms of one program, least recently used first. `counts` says what became of batches, and why."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._held: list[tuple[Key, Captured, int]] = []
        self._waiting: dict[Key, _Waiting] = {}
        self._refused: set[Key] = set()

    def lease(self, work: Work) -> Lease | None:
        """Return a batch in captured memory; None if it has to be launched operation by operation."""
        record = recording_on(work.schedule.device)
        if record is None:
            return None
        reason = _unfit(work)
        if reason is None:
            key, taken = _key(work), Room.of(work.schedule)
            found = self._fitting(key, taken) or self._capture(key, taken, work, record)
            if isinstance(found, Captured):
                self.counts["replayed"] += 1
                return found.take(work, taken)
            reason = found
        self.counts[reason] += 1
        return None

    def _fitting(self, key: Key, taken: Room) -> Captured | None:
        fitting = [entry for entry in self._held if entry[0] == key and entry[1].free and entry[1].room.fits(taken)]
        if not fitting:
            return None
        best = min(fitting, key=lambda entry: entry[1].room.size)
        self._held.remove(best)
        self._held.append(best)
        return best[1]

    def _capture(self, key: Key, taken: Room, work: Work, record: Recording) -> Captured | str:
        """Capture a room if it is time to; else say why not."""
        if key in self._refused:
            return "launched: these blocks cannot be captured"
        waiting = self._waiting.setdefault((*key, taken.size.bit_length()), _Waiting())
        waiting.batches += 1
        waiting.room = taken if waiting.room is None else waiting.room.joined(taken)
        if waiting.batches < waiting.patience:
            return "launched: no captured room that is free holds the batch"
        waiting.batches, waiting.patience = 0, 2 * waiting.patience
        try:
            with torch.no_grad():
                before = _reserved(work.schedule.device)
                captured = Captured(waiting.room.widened(), taken, work, record)
        except (CaptureFailed, torch.OutOfMemoryError) as error:
            self._refused.add(key)
            self.counts[f"not captured: {type(error).__name__}: {error}"] += 1
            return "launched: these blocks cannot be captured"
        self.counts["captured"] += 1
        self._held.append((key, captured, _reserved(work.schedule.device) - before))
        self._make_place(work.schedule.device)
        return captured

    def _make_place(self, device: torch.device) -> None:
        """Let go of rooms that are free, but for the last, until there are few enough."""
        for entry in self._held[:-1]:
            if len(self._held) <= MOST and sum(size for *_, size in self._held) <= _allowed(device):
                break
            if entry[1].free:
                self._held.remove(entry)


def _unfit(work: Work) -> str | None:
    """Say why a batch cannot be captured; None if it can."""
    schedule = work.schedule
    if any(isinstance(group.pile, GivenPile) for group in schedule.groups):
        return "launched: takes results of an earlier wave"
    if any(isinstance(c, Tensor) and c.requires_grad for columns in work.columns for c in columns):
        return "launched: tensors in the structure require gradients"
    if any(tensor.device != schedule.device for tensor in _tensors(work)):
        return "launched: tensors from outside on another device are read"
    if any(leaving in work.summed and schedule.roots(leaving) is None for leaving in schedule.leaving):
        return "launched: results that are sums are used by several"
    return None


def _tensors(work: Work) -> list[Tensor]:
    """Return what graphs read that is not copied for them."""
    blocks = [group.block.tensors for group in work.schedule.groups]
    return [tensor for held in (*blocks, *(staged.constants for staged in work.staged)) for tensor in held]


def _key(work: Work) -> Key:
    """Return all that graphs take for granted."""
    device = work.schedule.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    places = tuple((tensor.data_ptr(), tensor.stride()) for tensor in _tensors(work))
    once = tuple(map(work.schedule.taken_once, work.schedule.sizes))
    return tuple(map(id, work.staged)), tuple(work.schedule.leaving), once, places, switches(), stream


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _allowed(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // SHARE if device.type == "cuda" else 0

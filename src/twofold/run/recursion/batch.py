"""The invocations that wait to be computed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from twofold.errors import StaleError

from .blocks import RunnableBlock
from .compute import Owner, compute, compute_all
from .deferred import PENDING, Deferred, Sum, defer, fill, held_once
from .known import Known, make_part, needed_for, split_off
from .requests import Bundles, Request
from .schedule import Pile
from .waves import Want

_T = TypeVar("_T")


class Batch:
    """Invocations in the order in which Python finished them, each after those it took results from."""

    def __init__(self, program: Owner) -> None:
        self._program = program
        self._grad = True
        self.levels: list[int] = []
        """Of each invocation. Planners add to it as `emit` does."""
        self._piles: dict[RunnableBlock, Pile] = {}
        self._wanted: list[_Wanted] = []
        self._keepers: dict[int, RunnableBlock] = {}
        """The blocks of invocations of which the host keeps tensors."""
        self._versions: Sequence[int] = ()
        self._shared = False
        self._planning = 0
        self._known: dict[int, Known] = {}
        self._last: list[_Given] = []
        """What the last call from ordinary Python returned: given out again where nobody has held it."""
        self._held: list[tuple[Tensor, int]] = []
        """Tensors that host values are, with their versions then."""

    # While planners run.

    def begin(self) -> None:
        """Take up a call made from ordinary Python."""
        if not self._planning and self.levels and self._grad != torch.is_grad_enabled():
            PENDING.flush()
        if not self.levels:
            self._grad, self._versions = torch.is_grad_enabled(), self._program.versions()
        self._planning += 1
        PENDING.planning += 1

    def end(self) -> None:
        """Take note that a call has been planned."""
        self._planning -= 1
        PENDING.planning -= 1

    def mark(self) -> int:
        """Return a mark to `rewind` to."""
        return len(self.levels)

    def rewind(self, mark: int) -> None:
        """Drop the invocations emitted since the mark: their call has failed."""
        self._last = []
        for pile in self._piles.values():
            pile.drop(mark)
        del self.levels[mark:]
        self._known = {number: known for number, known in self._known.items() if number < mark}
        self._wanted = [wanted for wanted in self._wanted if wanted[0] < mark]
        self._keepers = {number: block for number, block in self._keepers.items() if number < mark}

    def pile(self, block: RunnableBlock) -> Pile:
        """Return where the invocations of a block wait."""
        known = self._piles.get(block)
        if known is None:
            known = self._piles[block] = Pile.of(block)
        return known

    def emit(self, pile: Pile, invocations: Sequence[int], hosts: Sequence[Any], kept: Sequence[Deferred]) -> int:
        """Add an invocation; return its number. Levels count from the leaves."""
        for host in hosts:
            kind = type(host)
            if kind is Deferred:
                pile, invocations, hosts = self._link(pile, invocations, hosts)
                break
            if kind is Tensor or kind is torch.nn.Parameter:
                self._held.append((host, host._version))
            elif kind in _CHANGEABLE:
                hosts = list(map(_as_it_is, hosts))
        if steering := pile.steering:
            pile = self.pile(pile.block.variant(hosts))
            hosts = [host for index, host in enumerate(hosts) if index not in steering]
        levels = self.levels
        number = len(levels)
        levels.append(1 + max([levels[child] for child in invocations], default=-1))
        pile.add(number, invocations, hosts)
        if kept:
            self._keepers[number] = pile.block
            first = len(pile.block.block.results) - len(kept)
            for index, deferred in enumerate(kept):
                self.want(pile.block, number, first + index, deferred)
        return number

    def _link(self, pile: Pile, invocations: Sequence[int], hosts: Sequence[Any]) -> Any:
        """Make host values that wait in this batch results of invocations; others are computed now."""
        places: list[tuple[int, str, int]] = []
        others: list[Any] = []
        numbers = list(invocations)
        for index, host in enumerate(hosts):
            if type(host) is not Deferred:
                others.append(host)
                continue
            place = host.__dict__.get("place")
            if place is None or place[0] is not self:
                PENDING.flush()
                return pile, invocations, hosts
            places.append((index, *place[2:]))
            numbers.append(place[1])
        self._shared = True
        return self.pile(pile.block.linked(places)), numbers, others

    def want(self, block: RunnableBlock, number: int, output: int, deferred: Deferred) -> None:
        """Have a deferred tensor filled in with an output of an invocation."""
        deferred.place = self, number, block.function, block.block.results[output]
        self._wanted.append((number, output, weakref.ref(deferred)))

    def results(self, number: int) -> list[Deferred]:
        """Return what an invocation of the program's function returns; what the host keeps of it is the same object."""
        if self._keepers:
            return self._results_kept(number)
        name, before, self._last = self._program.name, self._last, []
        for output, result in enumerate(self._program.results):
            if before and _is_dropped(before[output]):  # a new one takes 2 µs, a call 30
                given = before[output]
                self._wanted[given.place] = number, output, given.reference
            else:
                deferred = defer()
                given = _Given(deferred, weakref.ref(deferred), len(self._wanted))
                self._wanted.append((number, output, given.reference))
            given.deferred.place = self, number, name, result
            self._last.append(given)
        return [given.deferred for given in self._last]

    def _results_kept(self, number: int) -> list[Deferred]:
        found: list[Deferred] = []
        self._last = []
        for output, result in enumerate(self._program.results):
            kept = self._kept(number, output)
            if kept is None:
                kept = defer()
                kept.place = self, number, self._program.name, result
                self._wanted.append((number, output, weakref.ref(kept)))
            found.append(kept)
        return found

    def _kept(self, number: int, output: int) -> Deferred | None:
        block = self._keepers.get(number)
        if block is None:
            return None
        outputs = block.block.body.outputs
        for task, other, reference in reversed(self._wanted):
            if task == number and outputs[other] is outputs[output]:
                return reference()
        return None

    def fetch(self, wants: Sequence[Want]) -> list[Any]:
        """Compute what planners wait for, and all that it depends on; return the values, without history."""
        self._check_versions(self._versions, self._held)
        chosen = needed_for(self._piles.values(), (want.number for want in wants), self._known)
        if chosen:
            piles = split_off(self._piles.values(), chosen)
            part = make_part(piles, self._known, self._program.given)
            with torch.set_grad_enabled(self._grad):
                computed = compute_all(self._program, part.piles, part.levels)
            self._known.update((number, computed[part.local[number]]) for number in chosen)
        copied: dict[int, Any] = {}
        return [_read(self._known[want.number], want.table[1], copied) for want in wants]

    # At the flush.

    def flush(self, sums: Sequence[Sum] = ()) -> None:
        """Compute all invocations and fill in the tensors that are still held; the terms of sums as one tensor each.

        While a call is being planned (its own Python asks for a value) the invocations stay, since others will take
        results from them, and are computed again with those.
        """
        self._last = []
        levels, wanted, known, versions = self.levels[:], self._wanted, self._known, self._versions
        piles = [pile.copy() for pile in self._piles.values() if pile.tasks]
        self._wanted = []
        shared, tensors = self._shared, self._held
        if not self._planning:
            self._clear()
        joined = [] if known or self._planning else [total for total in sums if self._computes(total)]
        others = {id(term) for total in joined for term in _tensors(total)}
        held = [(Request(task, output), kept) for task, output, ref in wanted if (kept := ref()) is not None]
        held = [(request, kept) for request, kept in held if id(kept) not in others] if others else held
        requests = list(dict.fromkeys(request for request, _ in held if request.task not in known))
        terms = [[self._request(term) for term in _tensors(total)] for total in joined]
        leaving = Bundles.of(requests, terms)
        if piles:
            self._check_versions(versions, tensors)
        found: dict[Request, Any] = {}
        if piles:
            local: Any = range(len(levels))
            if known:
                part = make_part(piles, known, self._program.given)
                piles, levels, local, shared = part.piles, part.levels, part.local, True
            with torch.set_grad_enabled(self._grad):
                asked = [Request(local[request.task], request.output) for request in leaving.requests]
                computed = compute(self._program, piles, levels, replace(leaving, requests=asked), shared)
                found = dict(zip(requests, computed, strict=False))
                for total, together in zip(joined, computed[len(requests) :], strict=True):
                    total.together = together
        for request, deferred in held:
            if request not in found:
                found[request] = known[request.task].own(request.output)
            fill(deferred, found[request])

    def _request(self, term: Deferred) -> Request:
        _, number, _, result = term.place
        return Request(number, self._program.results.index(result))

    def _computes(self, total: Sum) -> bool:
        """Say whether the terms of a sum are one result of outermost calls, each once, that nobody else holds."""
        terms = _tensors(total)
        if not all(type(term) is Deferred for term in terms):
            return False
        places = {term.__dict__.get("place") for term in terms}
        tables = {(place[0], *place[2:]) for place in places if place is not None}
        if None in places or len(places) < len(terms) or len(tables) != 1:
            return False
        batch, *table = tables.pop()
        sample = self._program.tables.samples.get(tuple(table))  # type: ignore[arg-type]
        own = batch is self and table[0] == self._program.name and table[1] in self._program.results
        return own and sample is not None and sample.dtype.is_floating_point and held_once(terms)

    def _check_versions(self, versions: Sequence[int], held: Sequence[tuple[Tensor, int]]) -> None:
        if list(versions) != self._program.versions() or any(t._version != version for t, version in held):
            raise StaleError(
                "a parameter or another tensor from outside was written to between a call of"
                f" {self._program.name} and the use of its result; use the result first"
            )

    def _clear(self) -> None:
        self.levels.clear()
        self._shared = False
        self._known, self._held, self._keepers = {}, [], {}
        for pile in self._piles.values():
            pile.drop(0)


def _tensors(total: Sum) -> list[Any]:
    return [term for term in total.terms if isinstance(term, Tensor)]


_Wanted = tuple[int, int, weakref.ref[Deferred]]
"""A tensor to be filled in, if it is still held: the invocation, and which of its outputs."""


class _Given(NamedTuple):
    """A tensor that a call returned, and its place among those to be filled in."""

    deferred: Deferred
    reference: weakref.ref[Deferred]
    place: int


def _is_dropped(given: _Given) -> bool:
    """Say whether only the batch holds a deferred tensor that it gave out, and nobody has left a mark on it."""
    deferred, reference, _ = given
    # What was given, for the reference what is wanted too, the name here, and the question itself.
    alone = sys.getrefcount(deferred) == 3 and sys.getrefcount(reference) == 4
    return alone and len(deferred.__dict__) == 1


_CHANGEABLE = (list, tuple, np.ndarray)


def _as_it_is(host: Any) -> Any:
    """Return a copy of numbers that Python may change before they are computed with."""
    if type(host) in (list, tuple):
        return type(host)(map(_as_it_is, host))
    return host.copy() if type(host) is np.ndarray else host


def _read(known: Known, result: int, copied: dict[int, Any]) -> Any:
    """Return a result for Python to read: on the host, without history. What comes in rows is copied at once."""
    held = known.source(result)
    if known.row is None:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), held)
    if id(held) not in copied:
        copied[id(held)] = held.detach().cpu().unbind()
    return copied[id(held)][known.row]

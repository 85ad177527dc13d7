"""What planners emit where an invocation is cut: pieces of it, and the arguments that a call is given.

Planners keep four lists for an invocation: decisions, the numbers of its sources (or frames, of calls that may not have
returned), host values, and what the host keeps. A block takes some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from twofold.convert.from_source import CUT, Block, Converted, Operand, Slices, make_cut

from .batch import Batch
from .blocks import RunnableBlock
from .schedule import Pile
from .waves import Frame, Late, Want

Taken = tuple[Pile, list[int], list[Any]]


class Owner(Protocol):
    """What pieces need of the program whose planners emit them."""

    converted: Converted
    slices: Slices
    batch: Batch

    def block(self, function: str, decisions: tuple[Any, ...]) -> RunnableBlock:
        """Return the block of a function for a sequence of decisions."""
        ...

    def piece(self, block: Block) -> RunnableBlock:
        """Return a piece, or arguments of a call, to be run."""
        ...


class _Emission(NamedTuple):
    """A block that is emitted, and which of an invocation's sources and host values it takes."""

    pile: Pile
    sources: Sequence[int]
    places: Sequence[int]


@dataclass
class _Cut:
    emissions: list[_Emission]
    wanted: Sequence[Operand]


class Pieces:
    """The cuts of one function."""

    def __init__(self, program: Owner, function: str) -> None:
        self._program = program
        self._function = function
        self._cuts: dict[tuple[Any, ...], _Cut] = {}
        self._ends: dict[tuple[Any, ...], _Emission] = {}

    @property
    def at_once(self) -> tuple[Callable[..., Any], ...]:
        """`cut`, `fetch` and `finish` for planners whose calls have returned."""
        return self._cut, None, self._finish  # type: ignore[return-value]

    @property
    def waiting(self) -> tuple[Callable[..., Any], ...]:
        """The same as generator functions, for planners whose calls may not have returned."""
        return self._cut_waiting, self._fetch_waiting, self._finish_waiting

    def _known_cut(self, decisions: list[Any]) -> _Cut:
        key = tuple(decisions)
        known = self._cuts.get(key)
        if known is None:
            program = self._program
            cut = make_cut(program.converted, program.slices, self._function, key)
            emissions = [self._emission(program.piece(block), block) for block in cut.blocks]
            known = self._cuts[key] = _Cut(emissions, cut.wanted)
        decisions.append(CUT)
        return known

    def _emission(self, runnable: RunnableBlock, block: Block) -> _Emission:
        return _Emission(self._program.batch.pile(runnable), block.sources, block.places)

    def _end(self, decisions: list[Any]) -> _Emission:
        key = tuple(decisions)
        known = self._ends.get(key)
        if known is None:
            block = self._program.block(self._function, key)
            known = self._ends[key] = self._emission(block, block.block)
        return known

    # Planners whose calls have returned.

    def _cut(self, decisions: list[Any], invocations: list[int], hosts: list[Any]) -> int:
        """Emit what a call is given; return the number of its arguments."""
        for emission in self._known_cut(decisions).emissions:
            invocations.append(self._program.batch.emit(*_taken(emission, invocations, hosts), ()))
        return invocations[-1]

    def _finish(self, decisions: list[Any], invocations: list[int], hosts: list[Any]) -> Taken:
        """Return what `emit` is told of the last block."""
        return _taken(self._end(decisions), invocations, hosts)

    # Planners whose calls may not have returned.

    def _emit_pieces(self, cut: _Cut, invocations: list[Any], hosts: list[Any]) -> Generator[Frame, None, None]:
        for emission in cut.emissions:
            taken = yield from _awaited(emission, invocations, hosts)
            invocations.append(self._program.batch.emit(*taken, ()))

    def _cut_waiting(
        self, decisions: list[Any], invocations: list[Any], hosts: list[Any]
    ) -> Generator[Frame, None, int]:
        yield from self._emit_pieces(self._known_cut(decisions), invocations, hosts)
        return invocations[-1]

    def _fetch_waiting(
        self, decisions: list[Any], invocations: list[Any], hosts: list[Any]
    ) -> Generator[Any, Any, list[Any]]:
        """Return the values of the tensors that the host reads."""
        cut = self._known_cut(decisions)
        yield from self._emit_pieces(cut, invocations, hosts)
        wants: list[Want] = []
        for operand in cut.wanted:
            number = yield from _number(invocations[operand.invocation])
            wants.append(Want(number, (operand.callee, operand.result)))
        return (yield wants)

    def _finish_waiting(
        self, decisions: list[Any], invocations: list[Any], hosts: list[Any]
    ) -> Generator[Frame, None, Taken]:
        return (yield from _awaited(self._end(decisions), invocations, hosts))


def _taken(emission: _Emission, invocations: list[int], hosts: list[Any]) -> Taken:
    pile, sources, places = emission
    return pile, [invocations[source] for source in sources], [hosts[place] for place in places]


def _number(source: Any) -> Generator[Frame, None, int]:
    if type(source) is Frame:
        if not source.done:
            yield source
        return source.number
    return source


def _awaited(emission: _Emission, invocations: list[Any], hosts: list[Any]) -> Generator[Frame, None, Taken]:
    numbers: list[int] = []
    for source in emission.sources:
        numbers.append((yield from _number(invocations[source])))
    values: list[Any] = []
    for place in emission.places:
        value = hosts[place]
        if type(value) is Late:
            yield from _number(value.frame)
            value = value.frame.hosts[value.result]
        values.append(value)
    return emission.pile, numbers, values

"""What speculation makes of a function: its host graph, the path of tensor work beneath it, and what both rely on."""

from __future__ import annotations

import operator
import random
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from twofold.capture.trace_graph import Path
from twofold.graph import Graph, Origin, Value

Generator = random.Random | np.random.RandomState | np.random.Generator

AssumptionKind = Literal["type", "value", "identity", "tensor", "length", "branch"]


@dataclass(frozen=True, slots=True)
class Assumption:
    """One thing that a host graph relies on and checks (Janus, section 4).

    `subject` is written as the program would write it (`self.layers[3].training`), `expected` is what it was.
    """

    kind: AssumptionKind
    subject: str
    expected: str
    origin: Origin | None
    location: Hashable
    """Where the value is read. A `value` that fails is read anew each time from then on: its location is relaxed."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.kind} {self.expected} ({self.origin or 'no origin'})"


@dataclass(frozen=True, eq=False)
class Speculation:
    """One way through a function, with all its Python but what must be done anew in each call taken out.

    `host` takes the unit, the positional arguments (a tuple), the keywords (a dict) and then the `roots`; it returns
    what the function returns. Its nodes are in program order, effects and the functions below included. The message
    of each `assert` is the index of its assumption.
    """

    host: Graph
    roots: Mapping[Value, Any]
    """What functions reach without being given it: globals, cells, receivers, by the inputs of `host`."""
    path: Path
    assumptions: tuple[Assumption, ...]
    data: frozenset[Value]
    """Values that are arrays, or may hold such: what looks into them sees what the call has changed before."""


class Unit(Protocol):
    """The tensor work of one call, as the host graph sees it."""

    def give(self, index: int, given: Any) -> None:
        """Supply a feed: a tensor, or a number that is fed as one."""

    def read(self, event: int, function: Callable[..., Any], *rest: Any) -> Any:
        """Return what a fetch at an event gives Python, once its segment has run."""

    def step(self, event: int) -> None:
        """Let an optimizer step that steps outside of the graph."""

    def draw(self, number: int, generator: Generator, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Return what a method of a generator draws: draw `number` of the call. Undone with the unit.

        What `shuffle` returns is the list that it was given.
        """

    def change(self, function: Callable[..., Any], array: np.ndarray, *arguments: Any, **keywords: Any) -> None:
        """Change an array in place by a function that returns nothing else. Undone with the unit."""

    def put(self, holder: dict[str, Any], key: str, value: Any) -> None:
        """Set an optimizer before the unit is launched. Undone with the unit."""

    def tensor(self, slot: int) -> torch.Tensor:
        """Return the tensor that a call of the unit made, for Python to keep: one object for each slot."""
        ...

    def launch(self, undoable: bool) -> None:
        """Launch what is left of the unit. `undoable`: a check that follows may still undo all of it."""

    def commit(self) -> None:
        """Make the unit's state the program's. Nothing can be undone any more."""


def give(unit: Unit, index: int, given: Any) -> None:
    """See `Unit.give`. These seven are the targets of the host graph's calls on the unit."""
    unit.give(index, given)


def read(unit: Unit, event: int, function: Callable[..., Any], *rest: Any) -> Any:
    """See `Unit.read`."""
    return unit.read(event, function, *rest)


def step(unit: Unit, event: int) -> None:
    """See `Unit.step`."""
    unit.step(event)


def draw(unit: Unit, number: int, generator: Generator, name: str, *arguments: Any, **keywords: Any) -> Any:
    """See `Unit.draw`."""
    return unit.draw(number, generator, name, *arguments, **keywords)


def change(unit: Unit, function: Callable[..., Any], array: np.ndarray, *arguments: Any, **keywords: Any) -> None:
    """See `Unit.change`."""
    unit.change(function, array, *arguments, **keywords)


def put(unit: Unit, holder: dict[str, Any], key: str, value: Any) -> None:
    """See `Unit.put`."""
    unit.put(holder, key, value)


def tensor(unit: Unit, slot: int) -> torch.Tensor:
    """See `Unit.tensor`."""
    return unit.tensor(slot)


def settled(unit: Unit, given: torch.Tensor) -> torch.Tensor:
    """Return a tensor from outside as the unit leaves it: the schedule reads it when all is launched."""
    del unit
    return given


def equal(found: Any, expected: Any) -> bool:
    """Whether a value is the one assumed: same type, same contents, signs of zero and nan told apart.

    The target of the calls that predicates of `value` assumptions are made of; for numbers, strings, tuples of them
    and the other immutable types of arguments.
    """
    if type(found) is not type(expected):
        return False
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(expected, float | complex):
        return repr(found) == repr(expected)
    return found is expected or bool(found == expected)


def chosen(condition: Any, one: Any, other: Any) -> Any:
    """Return one of two values, by a condition."""
    return one if condition else other


def instance(kind: type, attributes: dict[str, Any]) -> Any:
    """Make an instance of a plain class as the call left it, without running its `__init__`."""
    made = object.__new__(kind)
    made.__dict__.update(attributes)
    return made


def launch(unit: Unit, undoable: bool) -> None:
    """See `Unit.launch`. This and `commit` are put in by the schedule."""
    unit.launch(undoable)


def commit(unit: Unit) -> None:
    """See `Unit.commit`."""
    unit.commit()


def metadata(found: torch.Tensor) -> tuple[Any, ...]:
    """Describe all of a tensor but its contents: what Python may have asked it for."""
    return tuple(found.shape), found.dtype, found.device, found.requires_grad, found.is_leaf, found.stride()


def draw_by(generator: Generator, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Draw for real; see `Unit.draw`."""
    drawn = getattr(generator, name)(*arguments, **keywords)
    return arguments[0] if name == "shuffle" else drawn


def rewinding(generator: Generator) -> Callable[[], None]:
    """Return how to put a generator back to its state of now."""
    match generator:
        case random.Random():
            of_python = generator.getstate()
            return lambda: generator.setstate(of_python)
        case np.random.RandomState():
            of_numpy = generator.get_state()
            return lambda: generator.set_state(of_numpy)
        case np.random.Generator():
            bits = generator.bit_generator
            state = bits.state
            return lambda: setattr(bits, "state", state)


def restoring(function: Callable[..., Any], array: np.ndarray, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """Return how to put back what a function is about to change of an array: one item, or all."""
    place: Any = arguments[0] if function is operator.setitem else ...
    kept = np.array(array[place])
    return lambda: array.__setitem__(place, kept)


def apart(array: np.ndarray, given: torch.Tensor) -> bool:
    """Whether an array and a tensor lie in different memory."""
    storage = given.untyped_storage()
    low, high = np.lib.array_utils.byte_bounds(array)
    return high <= storage.data_ptr() or storage.data_ptr() + storage.nbytes() <= low


def defined(owner: type, name: str) -> Any:
    """Return what a class itself defines under a name, and not what an access to it gives."""
    return vars(owner).get(name)


def inherits(held: Any, name: str) -> bool:
    """Whether an object has what its class defines under a name, and nothing of its own."""
    return name not in held.__dict__


def referent(reference: weakref.ref[Any]) -> Any:
    """Return what a weak reference refers to."""
    return reference()


_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks = operator.itemgetter(*_HOOK_TABLES)

READ_BY_UNHOOKED = (*_HOOK_TABLES, "forward", "_compiled_call_impl", "__dict__", "__class__")
"""The attributes of a module that `unhooked` depends on."""


def unhooked(module: torch.nn.Module) -> bool:
    """Whether calling a module calls its class's `forward` and nothing else."""
    state = module.__dict__
    return not any(_hooks(state)) and "forward" not in state and state.get("_compiled_call_impl") is None

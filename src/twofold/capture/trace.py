"""A `Trace`: one unit as it happened, in two layers that name the same memory.

- `Event`s are what the user's Python asked for (torch functions, one `backward()`, one `optimizer.step()`). The
  skeleton checks itself against them.
- `Operation`s are the ATen operations that ran beneath, those of the autograd engine included. Graphs are built
  from them, so a graph needs neither the engine nor a second run of the program.

Tensors appear in events as `Slot` (made in this unit) or `External` (brought in), and in operations as value
numbers. A value number stands for a piece of memory: storage, offset, shape and stride. Two tensors that alias the
same memory in the same way are one value, and an in-place operation makes no new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from twofold.graph import Ambient, Origin, TensorSpec

from .functions import display_name
from .history import Layout

Template = Any
"""Arguments or results with each tensor replaced by a `Slot` or an `External`."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The `index`-th tensor made by the calls of a unit."""

    index: int


@dataclass(frozen=True, slots=True)
class External:
    """The `index`-th tensor that a unit was given: a parameter, a buffer, a batch."""

    index: int


@dataclass(frozen=True, slots=True)
class Number:
    """A value number inside the arguments of an operation."""

    index: int


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Identify the memory a tensor shows: equal keys of live storages alias each other exactly."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


@dataclass(frozen=True, slots=True)
class Made:
    """What Python can see of a tensor made by a call, besides its contents."""

    spec: TensorSpec
    is_leaf: bool
    grad_function: str | None
    is_inference: bool = False

    @property
    def requires_grad(self) -> bool:
        return self.spec.requires_grad


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One ATen operation: arguments with `Number`s for tensors, and the value numbers of its tensor results."""

    target: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[int, ...]

    def reads(self) -> Iterator[int]:
        """Yield the value numbers among the arguments."""
        yield from numbers_in(self.arguments)
        yield from numbers_in(self.keywords)

    def writes(self) -> Iterator[int]:
        """Yield the value numbers that the operation changes in place, running statistics included."""
        for index in hidden_writes(self.target, self.arguments):
            yield from numbers_in(self.arguments[index])
        for index, argument in enumerate(self.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.arguments[index] if index < len(self.arguments) else self.keywords.get(argument.name)
                yield from numbers_in(given)


MAX_SAMPLE = 4096
"""Items of a list or array that a fetch gave and that is kept as a sample."""


def sample_of(fetched: Any) -> Any:
    """Return a copy of what a fetch gave Python that shares nothing with it; None for what is large or unknown."""
    if isinstance(fetched, bool | int | float | complex | str):
        return fetched
    if isinstance(fetched, list) and len(fetched) <= MAX_SAMPLE:
        return [sample_of(item) for item in fetched]
    if isinstance(fetched, np.ndarray) and fetched.size <= MAX_SAMPLE:
        return fetched.copy()
    return None


EventKind = Literal["call", "fetch", "optimizer", "zero_grad", "requires_grad"]

Leaf = torch.Tensor | External
"""A leaf: a parameter by itself, what else the unit was given by its place, where another may come."""

Presence = tuple[tuple[Leaf, bool], ...]
"""Leaves, each with whether it has a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One call by the user's Python, with the operations that ran beneath it.

    `outcome` is the template of what it returned; for an optimizer's step, the value numbers of the gradients of
    its parameters, in order. Empty for a fetch, whose value differs each time. One of kind `requires_grad` says of a
    tensor from outside whether it requires a gradient from now on, which is done at once when it is followed, too.
    """

    kind: EventKind
    function: Callable[..., Any]
    arguments: Template
    keywords: Template
    outcome: Template
    made: tuple[Made, ...]
    first_slot: int
    ambient: Ambient
    origin: Origin | None
    operations: tuple[Operation, ...]
    sample: Any = None
    """What a fetch gave Python, where that is small; see `sample_of`."""
    presence: Presence = ()
    """The gradients from before the unit that no event before this one has looked at, and this one does."""
    remade: tuple[tuple[int, Made], ...] = ()
    """Slots made before that autograd sees otherwise since: `y[0] = layer(x)` gives `y` a history."""

    @property
    def name(self) -> str:
        """The name of the called function, for people."""
        return display_name(self.function)


@dataclass(frozen=True, slots=True)
class Gradient:
    """`.grad` of a leaf before and after the unit, as value numbers; None where there is no gradient.

    `entry` is None too where nothing in the unit depends on it.
    """

    leaf: Leaf
    entry: int | None
    exit: int | None
    keeps: bool
    """Whether `.grad` stays what it was, in memory that may hold other numbers."""
    given: int | None = None
    """The external that `.grad` is after the unit, if the program put one there."""


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """The derivative of a unit's live outputs, as one backward outside the unit would compute it.

    Value numbers: of the tangent of each output (None where none arrives) and of the gradient for each input.
    """

    tangents: tuple[int | None, ...]
    gradients: tuple[int | None, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """The autograd history that outlives a unit: from its live outputs (slots) to inputs (externals).

    An external is an input as often as it is used, in the order in which gradients for it are made.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    backwards: dict[Layout, Backward]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a unit cannot run as a graph: a code of `errors.CODES`, one sentence, and the line."""

    code: str
    reason: str
    origin: Origin | None


@dataclass(slots=True)
class Trace:
    """A recorded unit. Written by a `TraceWriter`, read-only afterwards."""

    events: list[Event] = field(default_factory=list)
    externals: list[torch.Tensor] = field(default_factory=list)
    external_numbers: list[int] = field(default_factory=list)
    external_specs: list[TensorSpec] = field(default_factory=list)
    """Each as it was when it was first used: what requires a gradient may change."""
    external_firsts: list[int] = field(default_factory=list)
    """The first external that shows the same memory in the same way: most often itself."""
    fed_numbers: set[int] = field(default_factory=set[int])
    """Externals that stand for Python numbers; see `number_feeds`."""
    arguments: dict[int, int] = field(default_factory=dict[int, int])
    """Externals that are tensors which the call was given, each with its place among these."""
    slot_numbers: list[int] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    """The spec of each value number."""
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """Values that came in beneath the calls: optimizer state, constants made by PyTorch itself."""
    lasting: dict[int, tuple[torch.Tensor, bool]] = field(default_factory=dict)
    """Parameters and what optimizers own, by `id`: each with whether it requires a gradient when it is first used."""
    gradients: list[Gradient] = field(default_factory=list)
    escapes: dict[int, str] = field(default_factory=dict)
    """Slots that outlived the unit, with the state of their autograd history: none, freed or live."""
    leaf_gradients: dict[int, tuple[int, int | None]] = field(default_factory=dict[int, "tuple[int, int | None]"])
    """Of each of them that is a leaf and has a gradient: its value number, and its slot if it was read."""
    samples: dict[int, Any] = field(default_factory=dict[int, Any])
    """What those of one element held."""
    history: History | None = None
    """The history of live escapes, if it was recorded."""
    host_sites: set[tuple[Any, Origin | None]] = field(default_factory=set[tuple[Any, Origin | None]])
    """Calls on no tensors that made one on the CPU, in a program of an accelerator: Python keeps doing them."""
    first_random: int | None = None
    """The index of the first event that draws random numbers from PyTorch's generators."""
    makes_state: bool = False
    """Whether an optimizer made its state in this unit, so that the next step will do something else."""
    refusal: Refusal | None = None

    def written_storages(self) -> dict[int, StorageWeakRef]:
        """Return the storages that were given to the unit and that it wrote to, by identity.

        As long as one is referred to, weakly too, no other has its identity.
        """
        given = dict(zip(self.external_numbers, self.externals, strict=True)) | self.hidden
        written = {n for event in self.events for operation in event.operations for n in operation.writes()}
        storages = [given[number].untyped_storage() for number in written & given.keys()]
        return {storage._cdata: StorageWeakRef(storage) for storage in storages}


_HIDDEN_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
}


def hidden_writes(target: Any, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the positions of arguments that an operation changes although its schema does not say so."""
    positions = _HIDDEN_WRITES.get(target._schema.name)
    return positions if positions is not None and arguments[5] else ()


def numbers_in(argument: Any) -> Iterator[int]:
    """Yield the value numbers inside nested arguments."""
    kind = type(argument)
    if kind is Number:
        yield argument.index
    elif kind is tuple or kind is list:
        for item in argument:
            yield from numbers_in(item)
    elif kind is dict:
        for item in argument.values():
            yield from numbers_in(item)


_NO_CONTAINERS: Final = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
"""Types, exact, of most arguments of operations. None of them is ever a leaf."""


def map_leaves(argument: Any, leaf: type | tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """Return a copy of nested arguments with each instance of `leaf` replaced; containers keep their type."""
    kind = type(argument)
    if kind in _NO_CONTAINERS:
        return argument
    if isinstance(argument, leaf):
        return function(argument)
    if kind is tuple:
        return tuple([map_leaves(item, leaf, function) for item in argument])
    if kind is list:
        return [map_leaves(item, leaf, function) for item in argument]
    if kind is dict:
        return {key: map_leaves(item, leaf, function) for key, item in argument.items()}
    if kind is slice:
        return slice(*(map_leaves(item, leaf, function) for item in (argument.start, argument.stop, argument.step)))
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):  # named tuples, torch.return_types
        items = [map_leaves(item, leaf, function) for item in argument]
        return kind(items) if kind.__module__ == "torch.return_types" else _rebuild_tuple(kind, items)
    return argument


def _rebuild_tuple(kind: type, items: list[Any]) -> Any:
    return kind(*items) if hasattr(kind, "_fields") else tuple.__new__(kind, items)


def leaves(argument: Any, leaf: type | tuple[type, ...]) -> list[Any]:
    """Return the instances of `leaf` inside nested arguments, in order."""
    found: list[Any] = []
    _collect(argument, leaf, found)
    return found


def _collect(argument: Any, leaf: type | tuple[type, ...], found: list[Any]) -> None:
    kind = type(argument)
    if kind in _NO_CONTAINERS:
        return
    if isinstance(argument, leaf):
        found.append(argument)
    elif kind is dict:
        for item in argument.values():
            _collect(item, leaf, found)
    elif kind is slice:
        for item in (argument.start, argument.stop, argument.step):
            _collect(item, leaf, found)
    elif kind is list or (isinstance(argument, tuple) and kind is not torch.Size):
        for item in argument:
            _collect(item, leaf, found)

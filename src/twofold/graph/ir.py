"""The intermediate representation: immutable graphs of tensor operations.

A `Graph` is a list of nodes in single-assignment form. Control flow and recursion are one mechanism: a node
that holds, or names, a `SubGraph`. Every front end produces this form, and every backend consumes it.

Guaranteed of a graph that `verify` accepts: each `Value` is defined once, before its uses; nested bodies
read the values of the bodies around them (outer references); the SubGraphs in a graph's table read their
own inputs and the inputs of the graph. Names of values are unique among those in scope.

Values, nodes and graphs compare by identity; `text.equivalent` compares them by structure. The containers
inside arguments (lists, dicts) are never changed once a node holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import EllipsisType
from typing import Any, Final, TypeAlias

import torch

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex128: "c128",
    torch.complex64: "c64",
    torch.complex32: "c32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint64: "u64",
    torch.uint32: "u32",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
}


CPU = torch.device("cpu")


class MalformedGraphError(Exception):
    """A graph breaks a rule of the representation: a bug in what built it, never in the user's program."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype (`f32`), or PyTorch's own name where there is no short one."""
    return DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def _row_major_stride(shape: tuple[int | None, ...]) -> tuple[int, ...] | None:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        if size is None:
            return None
        step *= max(size, 1)
    return tuple(reversed(stride))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it exists: `f32[8,?]{1,8}@cuda:0!`.

    A dimension of `None` is unknown. `stride` is None for a row-major tensor, whichever way the spec was
    made.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device = CPU
    requires_grad: bool = False
    stride: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride == _row_major_stride(self.shape):
            object.__setattr__(self, "stride", None)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe a tensor exactly."""
        stride = tuple(tensor.stride()) if tensor.layout is torch.strided else None
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, stride)

    @classmethod
    def of_memory(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe the memory of a strided tensor, which requires no gradient."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, False, tensor.stride())

    def empty(self) -> torch.Tensor:
        """Return a tensor laid out so, without contents or history; a fake one under `FakeTensorMode`.

        Its sizes must be known.
        """
        shape = [size for size in self.shape if size is not None]
        if self.stride is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(shape, self.stride, dtype=self.dtype, device=self.device)

    def agrees_with(self, other: TensorSpec) -> bool:
        """Say whether one value may have both specs: same dtype, device and rank, no sizes that differ.

        `requires_grad` and `stride` may differ, as they do between the branches of an ordinary `if`.
        """
        return (
            self.dtype == other.dtype
            and self.device == other.device
            and len(self.shape) == len(other.shape)
            and all(a == b or a is None or b is None for a, b in zip(self.shape, other.shape, strict=True))
        )

    def __str__(self) -> str:
        shape = ",".join("?" if size is None else str(size) for size in self.shape)
        stride = "" if self.stride is None else "{" + ",".join(map(str, self.stride)) + "}"
        device = "" if self.device == CPU else f"@{self.device}"
        return f"{dtype_name(self.dtype)}[{shape}]{stride}{device}{'!' if self.requires_grad else ''}"


@dataclass(frozen=True, slots=True)
class Origin:
    """The place in the user's program that a node comes from."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Ambient:
    """The thread-wide modes under which a node runs.

    `autocast` gives, for each device type with autocast on, the dtype that it casts to; it is off for the
    others.
    """

    grad: bool = True
    inference: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    autocast_cache: bool = True


class Value:
    """What a node computes. Equal only to itself. A spec of None marks an object that is not a tensor."""

    __slots__ = ("__weakref__", "name", "spec")

    def __init__(self, name: str, spec: TensorSpec | None) -> None:
        self.name: Final = name
        self.spec: Final = spec

    def __repr__(self) -> str:
        return f"%{self.name}: {self.spec or 'object'}"


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A Python object that a node uses by reference and that no argument type covers. It has no text form."""

    object: object

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Constant) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


Argument: TypeAlias = (
    Value
    | Constant
    | bool
    | int
    | float
    | complex
    | str
    | torch.dtype
    | torch.device
    | torch.memory_format
    | torch.layout
    | slice
    | EllipsisType
    | range
    | torch.Size
    | tuple["Argument", ...]
    | list["Argument"]
    | dict[Any, "Argument"]
    | None
)

SCALAR_TYPES: frozenset[type] = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        torch.dtype,
        torch.device,
        torch.memory_format,
        torch.layout,
        EllipsisType,
        range,
        torch.Size,
        Constant,
    }
)
"""The types, exact and not by inheritance, of arguments that hold no others."""


def values_in(argument: Any) -> Iterator[Value]:
    """Yield the values inside an argument from left to right, duplicates kept."""
    kind = type(argument)
    if kind is Value:
        yield argument
    elif kind is tuple or kind is list:
        for item in argument:
            yield from values_in(item)
    elif kind is dict:
        for item in argument.values():
            yield from values_in(item)
    elif kind is slice:
        for item in (argument.start, argument.stop, argument.step):
            yield from values_in(item)


def map_values(argument: Any, function: Callable[[Value], Any]) -> Any:
    """Return a copy of an argument with `function(value)` for each value; containers keep their type."""
    kind = type(argument)
    if kind is Value:
        return function(argument)
    if kind is tuple:
        return tuple([map_values(item, function) for item in argument])
    if kind is list:
        return [map_values(item, function) for item in argument]
    if kind is dict:
        return {key: map_values(item, function) for key, item in argument.items()}
    if kind is slice:
        return slice(*(map_values(item, function) for item in (argument.start, argument.stop, argument.step)))
    return argument


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation. `ops.OPS` says, for each `op`, what the other fields hold."""

    op: str
    target: Callable[..., Any] | str | None
    arguments: tuple[Argument, ...]
    keywords: tuple[tuple[str, Argument], ...]
    results: tuple[Value, ...]
    subgraphs: tuple[SubGraph, ...] = ()
    origin: Origin | None = None
    ambient: Ambient = Ambient()
    _operands: tuple[Value, ...] | None = field(default=None, init=False, repr=False)

    @property
    def operands(self) -> tuple[Value, ...]:
        """The values in the arguments and then in the keywords, in order, duplicates kept.

        Outer references of nested bodies are not among them: see `outer_references`.
        """
        known = self._operands
        if known is None:  # asked for some 20 times while the graph of a path is built, a tenth of its time
            positional = [value for argument in self.arguments for value in values_in(argument)]
            known = (*positional, *(value for _, argument in self.keywords for value in values_in(argument)))
            object.__setattr__(self, "_operands", known)
        return known


@dataclass(frozen=True, eq=False)
class SubGraph:
    """A body: what it is given, what it does in order, and what it yields."""

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Argument, ...]


@dataclass(frozen=True, eq=False)
class Graph(SubGraph):
    """A body with the table of the SubGraphs that its `invoke` nodes, and theirs, name."""

    subgraphs: Mapping[str, SubGraph] = field(default_factory=dict[str, SubGraph])


def all_nodes(body: SubGraph) -> Iterator[Node]:
    """Yield the nodes of a body and of the bodies nested in it, each node before those it holds.

    SubGraphs that are named by `invoke` are not entered.
    """
    for node in body.nodes:
        yield node
        for nested in node.subgraphs:
            yield from all_nodes(nested)


def count_reads(body: SubGraph) -> Counter[Value]:
    """Return how often the nodes and outputs of a straight-line body read each value."""
    reads = Counter(value for node in body.nodes for value in node.operands)
    reads.update(value for output in body.outputs for value in values_in(output))
    return reads


def outer_references(*bodies: SubGraph) -> tuple[Value, ...]:
    """Return the values that the bodies read and do not define, each once, in order of first use."""
    defined = {value for body in bodies for value in body.inputs}
    used: dict[Value, None] = {}
    for body in bodies:
        for node in all_nodes(body):
            used.update(dict.fromkeys(node.operands))
            defined.update(node.results)
            for nested in node.subgraphs:
                defined.update(nested.inputs)
                used.update((value, None) for output in nested.outputs for value in values_in(output))
        used.update((value, None) for output in body.outputs for value in values_in(output))
    return tuple(value for value in used if value not in defined)

"""Tensors without values: running a Python function on them writes down what it does as the body of a SubGraph.

While a body is built, a torch-function mode sees each tensor operation, works out what its results look like and
appends a node. The shapes come from FakeTensor. An unknown dimension is tried with several sizes: what differs
between them is unknown in the result too, and a Python number that differs (`len`, `size`) cannot be known.

Real tensors that the function uses become inputs of the graph: outer references, as in Jeong et al., "Improving
the Expressivity of Deep Learning Frameworks with Recursion" (EuroSys 2018).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from twofold.capture.intercept import user_origin
from twofold.errors import DeclarationError
from twofold.graph import Constant, GraphBuilder, SubGraphBuilder, TensorSpec, Value, current_ambient
from twofold.graph.effects import target_has_effect
from twofold.graph.ir import SCALAR_TYPES

_SIZES: Final = (8191, 10007, 0, 1, 2, 3)
"""What unknown dimensions are tried with: primes that no model has, which every operation must take, and small
sizes, at which `x[:3]` and `squeeze` differ. A small one that an operation does not take is left out from there on.
"""

_MUST_WORK: Final = 2

_INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})

_active: ContextVar[Tracer | None] = ContextVar("active tracer", default=None)


class SymbolicTensor(torch.Tensor):
    """A tensor without a value, which stands for a `Value` while the body it belongs to is built."""

    value: Value
    owner: SubGraphBuilder
    probes: tuple[torch.Tensor | None, ...]

    @staticmethod
    def of(value: Value, owner: SubGraphBuilder, probes: tuple[torch.Tensor | None, ...]) -> SymbolicTensor:
        """Stand for a value of the body that `owner` builds.

        `probes` have its shape: one, or one for each size that unknown dimensions are tried with.
        """
        first = probes[0]
        assert first is not None
        # It requires gradients so that what goes past the tracer, a custom autograd.Function, leaves its mark.
        made: SymbolicTensor = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            SymbolicTensor,
            first.shape,
            dtype=first.dtype,
            device=first.device,
            requires_grad=first.dtype.is_floating_point or first.dtype.is_complex,
        )
        made.value, made.owner, made.probes = value, owner, probes
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse: while a body is built, its tracer comes first."""
        raise DeclarationError(
            "a symbolic tensor has no value: it can be used only by the function that defines its body,"
            " while that runs. Return the results, and call the SubGraph with tensors to get their values"
        )

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SymbolicTensor({self.value!r})"


class Tracer(TorchFunctionMode):
    """Builds the bodies of one graph. The innermost body under construction takes the nodes."""

    def __init__(self, root: GraphBuilder) -> None:
        super().__init__()
        self.root = root
        self.captured: dict[int, tuple[torch.Tensor, Value]] = {}
        self._bodies: list[SubGraphBuilder] = []
        self._fake = FakeTensorMode()

    @staticmethod
    def active() -> Tracer | None:
        """Return the tracer of the body that is being built in this thread."""
        return _active.get()

    @property
    def body(self) -> SubGraphBuilder:
        """The innermost body under construction."""
        return self._bodies[-1]

    @contextmanager
    def building(self, body: SubGraphBuilder) -> Generator[None]:
        """Send what happens meanwhile to a body."""
        token = _active.set(self)
        self._bodies.append(body)
        try:
            if len(self._bodies) > 1:
                yield
            else:
                with self:
                    yield
        finally:
            self._bodies.pop()
            _active.reset(token)

    def symbol(self, value: Value) -> SymbolicTensor:
        """Return a symbolic tensor for a value of the innermost body."""
        spec = value.spec
        assert spec is not None
        sizes = _SIZES if None in spec.shape else _SIZES[:1]
        with torch._C.DisableTorchFunction():
            with self._fake:
                probes = tuple(_empty(spec, size) for size in sizes)
            return SymbolicTensor.of(value, self.body, probes)

    def value_of(self, tensor: torch.Tensor) -> Value:
        """Return the value that a symbolic tensor, or an outer reference, stands for here."""
        with torch._C.DisableTorchFunction():
            return self._own(tensor) if isinstance(tensor, SymbolicTensor) else self._capture(tensor)

    def _own(self, tensor: SymbolicTensor) -> Value:
        if tensor.grad_fn is not None:
            raise DeclarationError(
                f"{user_origin()}: the derivative of a custom autograd.Function, {tensor.grad_fn.name()}, cannot be"
                " part of a graph; write it with torch functions alone"
            )
        if not any(tensor.owner is body for body in self._bodies):
            raise DeclarationError(
                f"%{tensor.value.name} belongs to the body {tensor.owner.name}, which is not being built here:"
                " return it from there, or pass it as an argument"
            )
        return tensor.value

    def _capture(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self.captured:
            if tensor.grad_fn is not None:
                raise DeclarationError(
                    f"a tensor of shape {list(tensor.shape)} with autograd history is used in the body"
                    f" {self.body.name}, which would keep its present value: compute it within the body, or pass"
                    " it as an argument"
                )
            value = self.root.input(f"outer_{len(self.captured)}", TensorSpec.of(tensor))
            self.captured[id(tensor)] = (tensor, value)
        return self.captured[id(tensor)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Append a node for an operation; answer from the shapes where no tensor results."""
        leaves, tree = pytree.tree_flatten((args, kwargs or {}))
        results = self._results(func, leaves, tree)
        (found, structure), *others = [each for each in results if each is not None]
        if any(other != structure for _, other in others):
            raise self._unknown(func)
        columns = list(zip(*(each[0] if each else [None] * len(found) for each in results), strict=True))
        if not all(map(_consistent, columns)):
            raise self._unknown(func)
        specs = [_spec(column) for column in columns if isinstance(column[0], torch.Tensor)]
        on_tensors = any(isinstance(leaf, torch.Tensor) for leaf in leaves)
        if not specs and not (on_tensors and target_has_effect(func)):
            return pytree.tree_unflatten(found, structure)
        values = iter(self._append(func, leaves, tree, specs))
        return pytree.tree_unflatten([self._made(column, values) for column in columns], structure)

    def _append(self, func: Any, leaves: Sequence[Any], tree: Any, specs: Sequence[TensorSpec]) -> tuple[Value, ...]:
        arguments, keywords = pytree.tree_unflatten([self._argument(leaf) for leaf in leaves], tree)
        return self.body.node("call", func, arguments, keywords, specs, origin=user_origin(), ambient=current_ambient())

    def _results(self, func: Any, leaves: Sequence[Any], tree: Any) -> list[tuple[list[Any], Any] | None]:
        """Run an operation on shapes alone, once for each size that unknown dimensions are tried with.

        Each result comes flattened; None stands for sizes that the operation does not take.
        """
        tries = max((len(leaf.probes) for leaf in leaves if isinstance(leaf, SymbolicTensor)), default=1)
        results: list[tuple[list[Any], Any] | None] = []
        for number in range(tries):
            fakes = [self._probe(leaf, number) for leaf in leaves]
            if any(fake is None and leaf is not None for fake, leaf in zip(fakes, leaves, strict=True)):
                results.append(None)
                continue
            if func is torch.Tensor.__getitem__:
                fakes = [fakes[0], *map(_as_index, fakes[1:])]
            args, kwargs = pytree.tree_unflatten(fakes, tree)
            try:
                with self._fake:
                    results.append(pytree.tree_flatten(func(*args, **kwargs)))
            except (DataDependentOutputException, DynamicOutputShapeException):
                raise self._unknown(func) from None
            except (RuntimeError, IndexError, ValueError, TypeError):
                if number < _MUST_WORK:
                    raise
                results.append(None)
        return results

    def _probe(self, leaf: Any, number: int) -> Any:
        """Return what stands for an argument at one size; None where an earlier operation did not take the size."""
        if isinstance(leaf, SymbolicTensor):
            self.value_of(leaf)  # that it may be used here
            return leaf.probes[number % len(leaf.probes)]  # one for all, or one for each
        if isinstance(leaf, torch.Tensor):
            return self._fake.from_tensor(leaf, static_shapes=True)
        return leaf

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self.value_of(leaf)
        plain = type(leaf) in SCALAR_TYPES or type(leaf) is slice
        return leaf if plain else Constant(leaf)

    def _made(self, column: Sequence[Any], values: Iterator[Value]) -> Any:
        if not isinstance(column[0], torch.Tensor):
            return column[0]
        known = all(probe is None or probe.shape == column[0].shape for probe in column)
        return SymbolicTensor.of(next(values), self.body, tuple(column[:1] if known else column))

    def _unknown(self, func: Any) -> DeclarationError:
        name = getattr(func, "__name__", str(func))
        return DeclarationError(
            f"{user_origin()}: {name} asks for a value or size that is known only when the SubGraph runs; choose"
            " with twofold.if_, repeat with twofold.while_, or compute with tensors"
        )


def tensors(things: Sequence[Any], where: str) -> Sequence[torch.Tensor]:
    """Return the things if all are tensors. Raises `DeclarationError`."""
    for place, thing in enumerate(things):
        if not isinstance(thing, torch.Tensor):
            raise DeclarationError(
                f"SubGraph {where} {place}: expected a tensor, got {type(thing).__qualname__}; torch.tensor makes one"
            )
    return things


def _as_index(leaf: Any) -> Any:
    """Return what indexes alike as far as shapes go: a scalar selects one place, whichever it is."""
    scalar = isinstance(leaf, torch.Tensor) and leaf.dim() == 0 and leaf.dtype in _INTEGERS
    return 0 if scalar else leaf


def _empty(spec: TensorSpec, unknown: int) -> torch.Tensor:
    shape = [unknown if size is None else size for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device=spec.device)


def _consistent(column: Sequence[Any]) -> bool:
    """Say whether what resulted at each size can be one result: tensors of one rank, or equal objects."""
    first, others = column[0], [each for each in column if each is not None]
    if isinstance(first, torch.Tensor):
        return all(isinstance(other, torch.Tensor) and other.dim() == first.dim() for other in others)
    return all(other == first for other in others)


def _spec(column: Sequence[Any]) -> TensorSpec:
    """Return what is known of a result, from what it is for each size tried."""
    first, *others = [each for each in column if each is not None]
    shape = tuple(
        size if all(size == other.shape[axis] for other in others) else None for axis, size in enumerate(first.shape)
    )
    stride = None if None in shape else tuple(first.stride())
    return TensorSpec(shape, first.dtype, first.device, False, stride)

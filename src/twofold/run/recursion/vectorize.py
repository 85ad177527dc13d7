"""A block over all its invocations at once: traced, differentiated, and cut into stages.

The block is mapped over a batch of invocations by `torch.vmap`, and its joint graph of forward and backward is traced
(`make_fx`). Each node of it then gets the latest, or earliest, stage in which it can run:

    before     forward, independent of children: once, for all invocations
    level      forward, on the way from children to parents: once a level
    after      forward, what no parent waits for: once, for all invocations
    turn       backward, independent of parents' gradients: once, for all invocations
    back       backward, on the way from parents to children: once a level
    finish     backward, what no child waits for (gradients of parameters): once, for all invocations

So a parameter's gradient is one matmul over all invocations, and only the recursion's own chain runs level by level.
A result that is a sum of children's results and a term of its own (losses) is no part of the chain either.

Nothing in the batch dimension mixes invocations except the sums of parameter gradients, so that a node may run for
any subset of them, and its rows be joined along that dimension.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from twofold.capture.functions import SHOWN_ANEW

from .bodies import Steps, without_writes
from .decompositions import DECOMPOSITIONS
from .rewrite import fuse_products, join_gates, merge_equal

aten = torch.ops.aten
SIZES = (5, 7)
"""Numbers of invocations for the two traces; what differs between them is proportional to that number."""


@dataclass(frozen=True)
class Rows:
    """A number of rows in the text of a stage: so many for each invocation."""

    each: int


class NotBatchableError(Exception):
    """The block cannot run for several invocations at once; the message says why."""


class Sample(NamedTuple):
    """One input of a block: shape of one invocation's part, dtype, device; whether gradients flow to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    differentiable: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        """Describe the part of one invocation."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)

    def given(self, differentiate: bool) -> Sample:
        """Return it as an operand, to which gradients flow if asked for and its dtype can carry them.

        Whether the sampled tensor required a gradient does not count: it may have come from a call under `no_grad`,
        from another block, or from a time when parameters were frozen.
        """
        carries = self.dtype.is_floating_point or self.dtype.is_complex
        return self._replace(differentiable=differentiate and carries)

    def rows(self, count: int) -> Tensor:
        """Make values for `count` invocations."""
        shape = (count, *self.shape)
        if self.dtype.is_floating_point:
            generator = _generator(self.device)
            return torch.rand(shape, dtype=self.dtype, device=self.device, generator=generator)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    """Return what examples are drawn from, so that the program's own random stream stays as it is."""
    return torch.Generator(device)


@dataclass
class Joint:
    """The joint graph of a block, with the role of each placeholder. What it returns are three lists; see `wanted`."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: list[fx.Node]
    tangents: list[fx.Node | None]
    rows: dict[fx.Node, tuple[int, int]]
    """For nodes with a batch dimension: which one it is, and how many rows in it belong to an invocation."""

    @property
    def wanted(self) -> tuple[list[fx.Node], list[fx.Node | None], list[fx.Node | None]]:
        """The outputs, the gradients of inputs, and those of the tensors from outside that they are asked for."""
        return tuple(list(nodes) for nodes in self.end.args[0])  # type: ignore[return-value, union-attr]

    def want(
        self, outputs: list[fx.Node], input_gradients: list[fx.Node | None], parameter_gradients: list[fx.Node | None]
    ) -> None:
        """Have the graph return these, and compute nothing else."""
        self.end.args = ([outputs, input_gradients, parameter_gradients],)  # type: ignore[assignment]
        self.graph.eliminate_dead_code()

    @property
    def end(self) -> fx.Node:
        """The last node, which returns what is wanted."""
        return next(iter(reversed(self.graph.nodes)))

    def copy(self) -> Joint:
        """Return one with a graph of its own, which may be rewritten."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, new))
        inputs = [new[node] for node in self.inputs]
        tangents = [None if node is None else new[node] for node in self.tangents]
        rows = {new[node]: place for node, place in self.rows.items() if node in new}
        return Joint(graph, self.constants, inputs, tangents, rows)

    def keeps_rows_first(self, node: fx.Node) -> bool:
        """Say whether the first dimension of a value has the rows of invocations."""
        return self.rows.get(node, (None, 1))[0] == 0

    def call(self, before: fx.Node, target: Any, arguments: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        """Add a call with rows in its first dimension before a node. `shape` is that for the number of rows traced."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, arguments)
        return self._noted(node, node.all_input_nodes[0], shape)

    def placeholder(self, name: str, like: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Add an input with rows in its first dimension, of the dtype and device of another."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        return self._noted(node, like, shape)

    def _noted(self, node: fx.Node, like: fx.Node, shape: Sequence[int]) -> fx.Node:
        node.meta["val"] = like.meta["val"].new_empty(shape)
        self.rows[node] = 0, shape[0] // SIZES[0]
        return node


def construct(data: Any, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Do what `torch.tensor` does where the numbers in `data` are tensors without dimensions."""

    def build(item: Any) -> Tensor:
        if isinstance(item, list | tuple):
            return torch.stack([build(part) for part in item])
        return item if isinstance(item, Tensor) else torch.tensor(item)

    held = build(data)
    if dtype is None and held.dtype is torch.float64:
        dtype = torch.get_default_dtype()
    if requires_grad:
        raise NotBatchableError("torch.tensor(requires_grad=True) makes a leaf")
    return held.to(device=device, dtype=dtype)


def trace_joint(
    body: Any, samples: Sequence[Sample], results: Sequence[Sample | None], parameters: Sequence[Tensor]
) -> Joint:
    """Trace a body over a batch, forward and backward. Raises `NotBatchableError`.

    `results` gives, where it is known, what an output that may be a plain number must be.
    """
    body = without_writes(body)
    traced = [_trace(body, samples, results, parameters, size) for size in SIZES]
    return _unify(*traced)


@dataclass
class _Traced:
    module: fx.GraphModule
    inputs: int
    outputs: int
    differentiable: list[int]
    input_gradients: list[bool]
    parameter_gradients: list[bool]


def _trace(
    body: Any, samples: Sequence[Sample], results: Sequence[Sample | None], parameters: Sequence[Tensor], size: int
) -> _Traced:
    inputs = [sample.rows(size) for sample in samples]
    wanted = [index for index, sample in enumerate(samples) if sample.differentiable]
    steps = Steps(body, {**DECOMPOSITIONS, torch.tensor: construct, torch.as_tensor: construct})

    def single(index: Tensor, *values: Any) -> tuple[Tensor, ...]:
        return tuple(_as_tensor(item, result) for item, result in zip(steps(values), results, strict=True))

    def mapped(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.func.vmap(single)(torch.arange(size), *inputs)

    record: dict[str, Any] = {}

    def joint(inputs: list[Tensor], tangents: list[Tensor]) -> Any:
        leaves = [t.detach().requires_grad_() if i in wanted else t for i, t in enumerate(inputs)]
        with torch.enable_grad():
            outputs = mapped(leaves)
            record["differentiable"] = [i for i, output in enumerate(outputs) if output.requires_grad]
            sources = [leaves[i] for i in wanted] + list(parameters)
            gradients: Sequence[Tensor | None] = [None] * len(sources)
            if sources and record["differentiable"] and tangents:
                gradients = torch.autograd.grad(
                    [outputs[i] for i in record["differentiable"]],
                    sources,
                    [tangents[i] for i in record["differentiable"]],
                    allow_unused=True,
                )
        record["given"] = [gradient is not None for gradient in gradients]
        return [*outputs, *(gradient for gradient in gradients if gradient is not None)]

    try:
        with torch.enable_grad(), warnings.catch_warnings(), _without_hooks(parameters):
            warnings.simplefilter("ignore")  # of operations that vmap runs one by one
            examples = mapped(inputs)
            # Without one for all, a mode of fake tensors is made for each node: half of the time that tracing takes.
            with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
                module = make_fx(joint)(inputs, [torch.zeros_like(example) for example in examples])
    except NotBatchableError:
        raise
    except Exception as error:
        raise NotBatchableError(f"{type(error).__name__}: {error}") from error
    given = record["given"]
    by_input = iter(given[: len(wanted)])
    return _Traced(
        module,
        len(inputs),
        len(examples),
        record["differentiable"],
        [next(by_input) if index in wanted else False for index in range(len(inputs))],
        given[len(wanted) :],
    )


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Generator[None]:
    """Take off the hooks on gradients of tensors: they are called with the gradients of a batch, not with a trace's."""
    held = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)


def _as_tensor(held: Any, result: Sample | None) -> Tensor:
    if isinstance(held, Tensor):
        return held
    if result is None or not isinstance(held, int | float | bool):
        raise NotBatchableError(f"a result is a {type(held).__name__} and no tensor")
    return torch.full(result.shape, held, dtype=result.dtype, device=result.device)


def _unify(small: _Traced, large: _Traced) -> Joint:
    """Make one graph of two traces: sizes that differ become `Rows`."""
    _simplify(small.module.graph)
    _simplify(large.module.graph)
    left, right = list(small.module.graph.nodes), list(large.module.graph.nodes)
    if len(left) != len(right) or any(a.target != b.target for a, b in zip(left, right, strict=True)):
        raise NotBatchableError("the operations depend on the number of invocations")
    rows: dict[fx.Node, tuple[int, int]] = {}
    constants: dict[str, Tensor] = {}
    for a, b in zip(left, right, strict=True):
        if a.op == "get_attr":
            constants[str(a.target)] = getattr(small.module, str(a.target))
        elif a.op == "call_function":
            a.args = _scaled(a.args, b.args)
            a.kwargs = _scaled(a.kwargs, b.kwargs)
        place = _batch_dimension(a, b)
        if place is not None:
            rows[a] = place
    merge_equal(small.module.graph)
    return _roles(small, list(small.module.graph.nodes), rows, constants)


def _roles(traced: _Traced, nodes: list[fx.Node], rows: Any, constants: dict[str, Tensor]) -> Joint:
    placeholders = [node for node in nodes if node.op == "placeholder"]
    held = list(nodes[-1].args[0])  # type: ignore[arg-type]
    gradients = iter(held[traced.outputs :])
    tangents = placeholders[traced.inputs :]
    joint = Joint(
        traced.module.graph,
        constants,
        placeholders[: traced.inputs],
        [node if index in traced.differentiable else None for index, node in enumerate(tangents)],
        rows,
    )
    joint.want(
        held[: traced.outputs],  # type: ignore[arg-type]
        [next(gradients) if given else None for given in traced.input_gradients],  # type: ignore[misc]
        [next(gradients) if given else None for given in traced.parameter_gradients],  # type: ignore[misc]
    )
    return joint


def _scaled(a: Any, b: Any) -> Any:
    """Join the arguments of one node in two traces."""
    if isinstance(a, tuple | list):
        return type(a)(_scaled(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return {key: _scaled(a[key], b[key]) for key in a}
    if isinstance(a, fx.Node) or a == b:
        return a
    small, large = SIZES
    if type(a) is int and type(b) is int and a % small == 0 and a // small * large == b:
        return Rows(a // small)
    raise NotBatchableError(f"an argument depends on the number of invocations: {a} and {b}")


def _batch_dimension(a: fx.Node, b: fx.Node) -> tuple[int, int] | None:
    left, right = a.meta.get("val"), b.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    differing = [index for index, (x, y) in enumerate(zip(left.shape, right.shape, strict=True)) if x != y]
    if not differing:
        return None
    if len(differing) > 1:
        raise NotBatchableError("a tensor relates invocations to one another")
    return differing[0], left.shape[differing[0]] // SIZES[0]


_ALIASES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default})


def _sole_use(node: fx.Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1


def _out_of_place(target: Any) -> Any:
    """Return the operation that makes anew what this one writes to its first argument; itself if there is none."""
    name = target._opname if isinstance(target, torch._ops.OpOverload) else ""
    if not name.endswith("_") or name.startswith("_"):
        return target
    return getattr(getattr(aten, name[:-1], None), target._overloadname, target)


def _sole_use_of_new(node: fx.Node) -> bool:
    """Say whether a node alone uses its first argument, which shares memory with nothing else, at its own dtype."""
    made: Any = node.args[0].target if _sole_use(node) else None  # type: ignore[union-attr]
    new = isinstance(made, torch._ops.OpOverload) and not any(r.alias_info for r in made._schema.returns)
    dtypes = {source.meta["val"].dtype for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)}
    return new and made is not aten.contiguous.default and len(dtypes - {torch.bool}) <= 1


def _simplify(graph: fx.Graph) -> None:
    """Remove what tracing leaves behind: aliases, views that change nothing, transposes of transposes."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        node.target = SHOWN_ANEW.get(node.target, node.target) if _sole_use(node) else node.target
        node.target = _out_of_place(node.target) if _sole_use_of_new(node) else node.target
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotBatchableError(f"{node.target} writes in place")
        if node.target is aten.as_strided.default:
            raise NotBatchableError("as_strided depends on how a tensor lies in memory")
        if node.target is aten.embedding_dense_backward.default and node.args[4]:
            raise NotBatchableError("scale_grad_by_freq counts how often an invocation, and not a batch, has a word")
        if node.target is aten._unsafe_view.default:
            node.target = aten.view.default
        source = _same_as(node) or _with_bias(graph, node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    join_gates(graph)
    fuse_products(graph)


def _with_bias(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return `addmm` for the sum of a bias and a matmul, which `vmap` takes apart."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for bias, product in (node.args, node.args[::-1]):
        if not isinstance(bias, fx.Node) or not isinstance(product, fx.Node) or bias.meta["val"].dim() != 1:
            continue
        viewed = product.target is aten.view.default
        matmul = product.args[0] if viewed else product
        if not isinstance(matmul, fx.Node) or matmul.target is not aten.mm.default:
            continue
        shape = node.meta["val"].shape
        if len(matmul.users) > 1 or len(product.users) > 1 or shape[-1] != matmul.meta["val"].shape[1]:
            continue
        with graph.inserting_before(node):
            summed = graph.call_function(aten.addmm.default, (bias, *matmul.args))
            summed.meta["val"] = matmul.meta["val"]
            result = graph.call_function(aten.view.default, (summed, list(shape))) if viewed else summed
            result.meta["val"] = node.meta["val"]
        return result
    return None


def _same_as(node: fx.Node) -> fx.Node | None:
    """Return the node that computes the same tensor, if this one only renames it."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _ALIASES or (node.target is aten.mul.Scalar and node.args[1] == 1):
        return first
    if node.target is aten.view.default:
        base = first.args[0] if first.target is aten.view.default else first
        assert isinstance(base, fx.Node)
        if base.meta["val"].shape == node.meta["val"].shape:
            return base
    if node.target is aten.t.default and first.target is aten.t.default:
        assert isinstance(first.args[0], fx.Node)
        return first.args[0]
    return None

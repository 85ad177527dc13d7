"""What can be observed of a run: outputs, and effects in the order in which they happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .ir import Constant, Node, Value


class Effect(NamedTuple):
    """One effect; the values are copies made when it happened.

    ================  =====================================================
    kind              values
    ================  =====================================================
    fetch             name or None, what was fetched
    assert            the predicate, which held
    set_attr          path of the object, attribute, what was written
    set_item          path of the object, key, what was written
    mutation          path of the tensor, its contents after the run
    gradient          path of the tensor, its `.grad` after the run or None
    random_state      device, state of its generator after the run
    ================  =====================================================

    The last three kinds come at the end, for what differs from before the run, of the tensors that came from
    outside, with those that an outside module or optimizer trains. A path leads from an input
    or a feed over attributes and items: `%model.layer.weight`.
    """

    kind: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything observable of one run."""

    outputs: tuple[Any, ...]
    effects: tuple[Effect, ...]

    def same_as(self, other: Outcome) -> bool:
        """Say whether nobody could tell the two runs apart: equal bit for bit, NaN to NaN."""
        return same(self.outputs, other.outputs) and same(self.effects, other.effects)


def snapshot(thing: Any) -> Any:
    """Copy the tensors in a structure; everything else is shared."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), thing)


def same(a: Any, b: Any) -> bool:
    """Say whether two structures agree in shape, in type and, bit for bit, in their tensors."""
    leaves_a, tree_a = pytree.tree_flatten(a)
    leaves_b, tree_b = pytree.tree_flatten(b)
    return tree_a == tree_b and all(_same_leaf(x, y) for x, y in zip(leaves_a, leaves_b, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return _same_tensor(a, b)
    if hasattr(a, "__array__"):
        return _same_tensor(torch.tensor(a), torch.tensor(b))
    return a is b or a == b or repr(a) == repr(b) == "nan"


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    return a.requires_grad == b.requires_grad and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    # A tensor of one element counts as contiguous whatever its stride, which a view as bytes refuses: copy.
    flat = plain.resolve_conj().resolve_neg().reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Seen:
    path: str
    tensor: torch.Tensor
    contents: torch.Tensor
    gradient: torch.Tensor | None


class Observer:
    """Collects the effects of one run. Remembers each outside tensor as it was when first seen."""

    def __init__(self, inputs: Mapping[Value, Any]) -> None:
        self._effects: list[Effect] = []
        self._paths: dict[Value, str] = {}
        self._seen: dict[int, _Seen] = {}
        self._random = _random_states()
        for value, thing in inputs.items():
            self._enter(value, f"%{value.name}", thing)

    def before(self, node: Node) -> None:
        """Note a node that is about to run: its constants may be tensors that it writes to."""
        for argument in (*node.arguments, *(argument for _, argument in node.keywords)):
            for leaf in pytree.tree_leaves(argument):
                if isinstance(leaf, Constant):
                    self._see("constant", leaf.object)

    def after(self, node: Node, arguments: Sequence[Any], environment: Mapping[Value, Any]) -> None:
        """Note a node that has run with these arguments."""
        keywords = dict(node.keywords)
        match node.op:
            case "fetch":
                self._record("fetch", keywords.get("name"), arguments[0])
            case "assert":
                self._record("assert", arguments[0])
            case "set_attr" | "set_item":
                self._record(node.op, self._path(node.arguments[0]), *arguments[1:])
            case "feed":
                result = node.results[0]
                self._enter(result, f"feed {keywords['name']}", environment[result])
            case "get_attr" | "get_item":
                result = node.results[0]
                step = f".{arguments[1]}" if node.op == "get_attr" else f"[{arguments[1]!r}]"
                self._enter(result, f"{self._path(node.arguments[0])}{step}", environment[result])
            case _:
                pass

    def effects(self) -> tuple[Effect, ...]:
        """Return the effects so far, with what differs now from before the run."""
        late: list[Effect] = []
        for seen in self._seen.values():
            contents, gradient = snapshot(seen.tensor), snapshot(_gradient(seen.tensor))
            if not same(contents, seen.contents):
                late.append(Effect("mutation", (seen.path, contents)))
            if not same(gradient, seen.gradient):
                late.append(Effect("gradient", (seen.path, gradient)))
        for device, state in _random_states().items():
            if not same(state, self._random.get(device)):
                late.append(Effect("random_state", (device, state)))
        return (*self._effects, *late)

    def _record(self, kind: str, *values: Any) -> None:
        self._effects.append(Effect(kind, snapshot(values)))

    def _path(self, argument: Any) -> str:
        if isinstance(argument, Value):
            return self._paths.get(argument, f"%{argument.name}")
        return "constant"

    def _enter(self, value: Value, path: str, thing: Any) -> None:
        self._paths[value] = path
        self._see(path, thing)

    def _see(self, path: str, thing: Any) -> None:
        for steps, leaf in pytree.tree_leaves_with_path(thing):
            for where, tensor in _tensors_of(path + pytree.keystr(steps), leaf):
                if id(tensor) not in self._seen:
                    # Holding the tensor keeps its id from being given to another.
                    self._seen[id(tensor)] = _Seen(where, tensor, snapshot(tensor), snapshot(_gradient(tensor)))


def _tensors_of(path: str, thing: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a leaf is or, for a module or an optimizer, trains."""
    match thing:
        case torch.Tensor():
            yield path, thing
        case torch.nn.Module():
            named = (*thing.named_parameters(), *thing.named_buffers())
            yield from ((f"{path}.{name}", tensor) for name, tensor in named)
        case torch.optim.Optimizer():
            for number, group in enumerate(thing.param_groups):
                named = enumerate(group["params"])
                yield from ((f"{path}.param_groups[{number}][{place}]", tensor) for place, tensor in named)
        case _:
            pass


def _gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states

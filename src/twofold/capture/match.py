"""The check of a call against an event, compiled to one Python expression.

The skeleton runs it for each call of the program, so it has to cost less than the call. Function and tensors are
compared by identity, all else by value; a tensor that a unit is given anew each time is bound where it fits. A leaf
module is checked as it is, hooks and attributes included, and never becomes a function with arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from twofold.graph import TensorSpec, current_ambient

from .functions import is_plain
from .gradients import has_hooks, presence_holds
from .leaf_modules import GLOBAL_HOOKS, MODULE_HOOKS, LeafCall
from .number_feeds import fits
from .trace import Event, External, Made, Slot, leaves, memory_key

Bound = dict[int, Any]
Match = Callable[[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor], Bound], bool]
"""Of a function or leaf module, positional and keyword arguments, the placeholders of the unit by slot, and the feeds
bound so far."""

Placeholders = dict[int, tuple[torch.Tensor, Made]]
"""Tensors that stand for results Python does not have yet, by `id`, each with what it stands for."""


@dataclass(slots=True)
class Role:
    """How a unit gets one of its external tensors. `tensor` is None for a feed, `is_number` for one from a number."""

    tensor: torch.Tensor | None
    spec: TensorSpec
    is_leaf: bool
    is_inference: bool
    is_lasting: bool
    """Whether it is a parameter, or an optimizer owns it: never fed."""
    alias_of: int | None
    """An earlier external that shows the same memory in the same way: one value of the graph."""
    is_number: bool
    written: Collection[int]
    """Storages that units write to, shared by all roles of a TraceGraph: a feed must not alias one."""
    placeholders: Placeholders

    @property
    def may_require_gradient(self) -> bool:
        """Whether it has to be checked if a static does: parameters are part of the signature."""
        dtype = self.spec.dtype
        return type(self.tensor) is not torch.nn.Parameter and (dtype.is_floating_point or dtype.is_complex)

    def requires_as_it_did(self) -> bool:
        """Whether a static requires a gradient if it did, and nothing runs where one is made."""
        assert self.tensor is not None
        required = self.spec.requires_grad
        return self.tensor.requires_grad is required and not (required and self.is_leaf and has_hooks(self.tensor))

    def accepts(self, tensor: Any) -> bool:
        """Whether a tensor, or a number, may be fed here."""
        spec = self.spec
        if self.is_number:
            return fits(tensor, spec.dtype)
        return (
            is_plain(tensor)
            and id(tensor) not in self.placeholders
            and tensor.dtype == spec.dtype
            and tensor.shape == spec.shape
            and tensor.device == spec.device
            and tensor.requires_grad == spec.requires_grad
            and tensor.is_leaf == self.is_leaf
            and tensor.is_inference() == self.is_inference
            and (tensor.is_contiguous() if spec.stride is None else tensor.stride() == spec.stride)
            and tensor.untyped_storage()._cdata not in self.written
            and not (spec.requires_grad and self.is_leaf and has_hooks(tensor))
        )


def equal_templates(left: Any, right: Any) -> bool:
    """Whether two templates agree in structure, references and constants (types and signs of zero included)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(equal_templates, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_templates(left[key], right[key]) for key in left)
    if isinstance(left, slice):
        return equal_templates((left.start, left.stop, left.step), (right.start, right.stop, right.step))
    if isinstance(left, float | complex):
        return str(left) == str(right)  # tells 0.0 from -0.0, and nan is nan
    if left is right:
        return True
    return _is_plain(left) and bool(left == right)


_PLAIN = (
    bool, int, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, Slot, External, type(Ellipsis), range,
)  # fmt: skip


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)


class _Emitter:
    """Writes the condition under which arguments match a template, as Python source with named constants."""

    def __init__(self, role_of: Callable[[int], tuple[Role, bool]]) -> None:
        self.terms: list[str] = []
        self.constants: list[Any] = []
        self.role_of = role_of
        self._seen: set[int] = set()

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def emit(self, template: Any, place: str) -> None:
        kind = type(template)
        if kind is Slot:
            self.terms.append(f"{place} is S[{template.index}]")
        elif kind is External:
            self._emit_external(template.index, place)
        elif kind is tuple or kind is list:
            self.terms.append(f"type({place}) is {kind.__name__} and len({place}) == {len(template)}")
            for index, item in enumerate(template):
                self.emit(item, f"{place}[{index}]")
        elif kind is dict:
            self.terms.append(f"type({place}) is dict and len({place}) == {len(template)}")
            for key, item in template.items():
                name = self.constant(key)
                self.terms.append(f"{name} in {place}")
                self.emit(item, f"{place}[{name}]")
        elif kind is slice:
            self.terms.append(f"type({place}) is slice")
            for part in ("start", "stop", "step"):
                self.emit(getattr(template, part), f"{place}.{part}")
        elif template is None or template is True or template is False:
            self.terms.append(f"{place} is {template}")
        elif kind is int or kind is str:
            self.terms.append(f"type({place}) is {kind.__name__} and {place} == {self.constant(template)}")
        else:
            self.terms.append(f"E({place}, {self.constant(template)})")

    def emit_call(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Emit the check of all arguments of a call."""
        self.terms.append(f"len(A) == {len(arguments)}")
        self.terms.append(f"len(K) == {len(keywords)}" if keywords else "not K")
        for index, item in enumerate(arguments):
            self.emit(item, f"A[{index}]")
        for key, item in keywords.items():
            self.terms.append(f"{key!r} in K")
            self.emit(item, f"K[{key!r}]")

    def _emit_external(self, index: int, place: str) -> None:
        role, is_first = self.role_of(index)
        is_first = is_first and index not in self._seen
        self._seen.add(index)
        if role.tensor is not None:
            name = self.constant(role.tensor)
            self.terms.append(f"{place} is {name}")
            if is_first and role.may_require_gradient:
                is_plain = not role.spec.requires_grad
                self.terms.append(
                    f"not {name}.requires_grad" if is_plain else f"{self.constant(role)}.requires_as_it_did()"
                )
        elif is_first:
            self.terms.append(f"B(X, {index}, {place}, {self.constant(role)})")
        else:
            self.terms.append(f"{place} is X[{index}]")
        if is_first and role.alias_of is not None:
            earlier = self.role_of(role.alias_of)[0].tensor
            shown = f"X[{role.alias_of}]" if earlier is None else self.constant(earlier)
            self.terms.append(f"N({place}) == N({shown})")


def _bind(bound: Bound, index: int, tensor: Any, role: Role) -> bool:
    if not role.accepts(tensor):
        return False
    bound[index] = tensor
    return True


@functools.lru_cache(maxsize=4096)
def _compile_match(condition: str, names: int) -> Callable[..., Match]:
    parameters = ", ".join(f"c{index}" for index in range(names))
    source = f"def make({parameters}):\n def match(F, A, K, S, X):\n  return {condition}\n return match\n"
    scope: dict[str, Any] = {
        "E": equal_templates, "B": _bind, "L": leaves, "V": torch.Tensor,
        "G": torch.is_grad_enabled, "C": torch._C._is_any_autocast_enabled, "M": current_ambient,  # type: ignore[attr-defined]
        "P": presence_holds, "H": has_hooks, "N": memory_key,
    }  # fmt: skip
    exec(source, scope)
    return scope["make"]


def presence_of(
    event: Event, role_of: Callable[[int], tuple[Role, bool]]
) -> tuple[list[tuple[torch.Tensor, bool]], dict[int, bool]]:
    """Return whose gradients an event is the first to look at: known leaves, and those that are fed, by index."""
    statics: list[tuple[torch.Tensor, bool]] = []
    fed: dict[int, bool] = {}
    for leaf, present in event.presence:
        tensor = role_of(leaf.index)[0].tensor if isinstance(leaf, External) else leaf
        if tensor is not None:
            statics.append((tensor, present))
        elif isinstance(leaf, External):
            fed[leaf.index] = present
    return statics, fed


def columns(presence: Iterable[tuple[torch.Tensor, bool]]) -> tuple[tuple[torch.Tensor, ...], tuple[bool, ...]]:
    """Return leaves, and whether each has a gradient."""
    rows = tuple(presence)
    return tuple(leaf for leaf, _ in rows), tuple(present for _, present in rows)


def build_match(event: Event, role_of: Callable[[int], tuple[Role, bool]]) -> Match:
    """Compile the check of a call against an event.

    It binds the feeds that are first used here. A fetch is run for real, so only its tensors are checked. Gradients
    from before the unit are looked at where the event is the first to depend on them. Events of equal structure share
    code.
    """
    if event.kind == "optimizer":
        return lambda _function, _arguments, _keywords, _slots, _bound: False
    emitter = _Emitter(role_of)
    known = emitter.constant(event.function)
    emitter.terms.append(f"(F is {known} or F == {known})")
    if event.kind == "fetch":
        emitter.terms.append(f"len(T := L((A, K), V)) == {len(event.arguments)}")
        for index, reference in enumerate(event.arguments):
            emitter.emit(reference, f"T[{index}]")
    else:
        emitter.emit_call(event.arguments, event.keywords)
    return _match(emitter, event)


def build_module_match(event: Event, role_of: Callable[[int], tuple[Role, bool]]) -> Match:
    """Compile the check of a leaf module, given in place of a function, against an event.

    Of 2.5 µs that a leaf took the skeleton on an H200's host, finding its function, attributes and tensors and putting
    them together took 0.8.
    """
    call = event.function
    if event.kind != "call" or not isinstance(call, LeafCall):
        return _no_match
    emitter, leaf = _Emitter(role_of), call.leaf
    kind, terms = emitter.constant(leaf.kind), emitter.terms
    terms.append(f"type(F) is {kind} and {kind}.forward is {emitter.constant(leaf.forward)}")
    terms.append("not ((D := F.__dict__)[" + "] or D[".join(map(repr, MODULE_HOOKS)) + "])")
    terms.append("not (" + " or ".join(map(emitter.constant, GLOBAL_HOOKS)) + ")")
    terms.extend(f"{name!r} not in D" for name in sorted(leaf.shadowing))
    for name, value in call.state.items():
        known = emitter.constant(value)  # cannot change in place: it has a hash
        terms.append(f"((W := D.get({name!r}, D)) is {known} or E(W, {known}))")
    tensors = [f"D['_parameters'].get({name!r}, D)" for name in leaf.parameters]
    tensors += [f"D['_buffers'].get({name!r}, D)" for name in leaf.buffers]
    for place, template in zip(tensors, event.arguments, strict=False):
        emitter.emit(template, place)
    emitter.emit_call(event.arguments[len(tensors) :], event.keywords)
    return _match(emitter, event)


def _no_match(*_: Any) -> bool:
    return False


def _match(emitter: _Emitter, event: Event) -> Match:
    """Compile the terms emitted, and those on what is in force besides arguments."""
    ambient = event.ambient
    emitter.terms.append(f"G() is {ambient.grad}")
    emitter.terms.append(f"C() and M() == {emitter.constant(ambient)}" if ambient.autocast else "not C()")
    if event.kind == "requires_grad":
        emitter.terms.append("not H(A[0])")
    statics, fed = presence_of(event, emitter.role_of)
    if statics:
        emitter.terms.append(f"P({', '.join(map(emitter.constant, columns(statics)))})")
    emitter.terms += [f"(X[{index}].grad is not None) is {present}" for index, present in fed.items()]
    condition = " and ".join(emitter.terms)
    return _compile_match(condition, len(emitter.constants))(*emitter.constants)

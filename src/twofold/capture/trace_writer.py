"""`TraceWriter`: writes one `Trace`, in which each tensor of the unit has a name.

A tensor is a `Slot` or an `External` in events, found by its identity while it lives, and a value number in operations,
found by the memory it shows. Only weak references are kept, so that memory is freed when eager execution frees it.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from twofold.graph import Ambient, Origin, TensorSpec

from .functions import display_name, is_mutable, is_plain, is_random
from .gradients import EntryGradients
from .history import following_nodes, held_by_python, saves_tensors
from .intercept import unheard, user_origin
from .trace import (
    Event,
    EventKind,
    External,
    Made,
    Number,
    Operation,
    Refusal,
    Slot,
    Trace,
    map_leaves,
    memory_key,
    sample_of,
)

_TENSOR = torch.Tensor


def _refuse(trace: Trace, code: str, reason: str, origin: Origin | None = None) -> None:
    """Say why a unit cannot run as a graph; the first reason stays."""
    if trace.refusal is None:
        trace.refusal = Refusal(code, reason, origin or user_origin())


def _made(tensor: torch.Tensor) -> Made:
    return Made(TensorSpec.of(tensor), tensor.is_leaf, _end_of_history(tensor)[1], tensor.is_inference())


def _end_of_history(tensor: torch.Tensor) -> tuple[bool, str | None]:
    """Return whether a tensor requires a gradient, and the name of the node that its history ends in."""
    try:
        function = tensor.grad_fn
    except RuntimeError:  # a view whose base was changed in a way that autograd refuses
        return True, None
    return tensor.requires_grad, None if function is None else type(function).__name__


def _known(
    references: dict[int, Slot | External], alive: dict[int, weakref.ref[torch.Tensor]], tensor: torch.Tensor
) -> Slot | External | None:
    reference = references.get(id(tensor))
    return reference if reference is not None and alive[id(tensor)]() is tensor else None


def _external(
    references: dict[int, Slot | External], alive: dict[int, weakref.ref[torch.Tensor]], tensor: torch.Tensor
) -> int | None:
    """Return the index of a tensor that the unit was given."""
    reference = _known(references, alive, tensor)
    return reference.index if isinstance(reference, External) else None


class TraceWriter:
    """One trace being written. Mutable; `close` hands out the trace and ends its life."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._references: dict[int, Slot | External] = {}
        self._alive: dict[int, weakref.ref[torch.Tensor]] = {}
        self._operations: list[Operation] = []
        self._written: set[int] = set()
        self._touched: set[int] = set()
        """Storages written to by the event that is under way."""
        self._shown: dict[int, list[int]] = {}
        """The tensors, by `id`, that show each storage."""
        self._histories: dict[int, tuple[bool, str | None]] = {}
        """Whether each of them requires a gradient, and what its history ends in."""
        self._borrowed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.refuse = functools.partial(_refuse, self.trace)  # no method: what has it must not hold this in a cycle
        self.gradients = EntryGradients(
            self.refuse, self.trace.lasting, functools.partial(_external, self._references, self._alive)
        )  # as above
        self._freed: dict[Any, None] = {}

    # ---- which tensor is which ---------------------------------------------------------------------------

    def is_made_here(self, tensor: Any) -> bool:
        """Whether a call of the unit returned this object."""
        return isinstance(self._references.get(id(tensor)), Slot) and self._alive[id(tensor)]() is tensor

    def is_referred_to(self, tensor: torch.Tensor) -> bool:
        """Whether a call of the unit returned or was given this object."""
        return self._known_reference(tensor) is not None

    def has_gradient_of_unit(self, tensor: torch.Tensor) -> bool:
        """Whether it is a leaf that the unit made, and has a gradient."""
        return self.is_made_here(tensor) and is_plain(tensor) and tensor.is_leaf and tensor.grad is not None

    def is_known_memory(self, tensor: torch.Tensor) -> bool:
        """Whether the unit has seen memory of this storage."""
        try:
            cdata = tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
            return False
        return cdata in self._storages

    def parameter_in(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a parameter of this dtype that the unit was given and that lies in a storage.

        What else lies in it is where it is as long as the parameter is; of a tensor given anew nobody could say that.
        """
        for tensor in self.trace.externals:
            is_parameter = isinstance(tensor, torch.nn.Parameter) and tensor.dtype is dtype
            if is_parameter and tensor.untyped_storage()._cdata == storage._cdata:
                return tensor
        return None

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether the unit has written to this storage."""
        return tensor.untyped_storage()._cdata in self._written

    def templates(self, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        """Return arguments with a reference in the place of each tensor; new ones become externals."""
        return map_leaves((tuple(arguments), dict(keywords)), _TENSOR, self._reference)

    def _reference(self, tensor: torch.Tensor) -> Slot | External:
        reference = self._known_reference(tensor)
        if reference is not None:
            return reference
        reference = External(len(self.trace.externals))
        try:
            number = self.number(tensor)
        except (RuntimeError, NotImplementedError):
            self.refuse("unsupported_call", f"a {tensor.layout} tensor")
            number = -1
        self.trace.externals.append(tensor)
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            with unheard():
                self._borrowed.append((tensor, tensor.detach().clone()))
        self.trace.external_numbers.append(number)
        self.trace.external_specs.append(TensorSpec.of(tensor))
        self.trace.external_firsts.append(self.trace.external_numbers.index(number))
        self.trace.hidden.pop(number, None)
        self._remember(tensor, reference)
        return reference

    def _known_reference(self, tensor: torch.Tensor) -> Slot | External | None:
        return _known(self._references, self._alive, tensor)

    def _remember(self, tensor: torch.Tensor, reference: Slot | External) -> None:
        self._references[id(tensor)] = reference
        self._alive[id(tensor)] = weakref.ref(tensor)
        if tensor.layout is torch.strided:
            self._shown.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))
            self._histories[id(tensor)] = _end_of_history(tensor)

    def forget_externals(self, count: int) -> None:
        """Take back the externals past the first `count`: what used them was no event of the unit."""
        for tensor in self.trace.externals[count:]:
            del self._references[id(tensor)], self._alive[id(tensor)]
        del self.trace.externals[count:], self.trace.external_numbers[count:]
        del self.trace.external_specs[count:], self.trace.external_firsts[count:]
        self.trace.fed_numbers = {index for index in self.trace.fed_numbers if index < count}

    def rename(self, tensor: torch.Tensor, placeholder: torch.Tensor) -> None:
        """Take note that `placeholder` is now what `tensor` was, or shows the same."""
        reference = self._known_reference(tensor)
        if reference is not None:
            self._remember(placeholder, reference)

    def number(self, tensor: torch.Tensor) -> int:
        """Return the value number of a tensor, a new one for memory not seen before."""
        key = memory_key(tensor)
        number = self._numbers.get(key)
        if number is not None:
            return number
        number = len(self.trace.specs)
        self._numbers[key] = number
        self.trace.specs.append(TensorSpec.of_memory(tensor))
        storage = tensor.untyped_storage()
        # Invariant: a weak reference keeps the address of a freed storage from being used again, so a key
        # never names two pieces of memory within one trace.
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return number

    def number_if_known(self, tensor: torch.Tensor | None) -> int | None:
        """Return the value number of a tensor, -1 for memory not seen before."""
        if tensor is None:
            return None
        if tensor.layout is not torch.strided:
            self.refuse("unsupported_call", "a sparse tensor or gradient")
            return -1
        return self._numbers.get(memory_key(tensor), -1)

    # ---- operations and events ---------------------------------------------------------------------------

    def operand(self, tensor: torch.Tensor) -> Number | None:
        """Return what stands for a tensor in an operation; memory not seen before came in beneath the calls."""
        known = len(self.trace.specs)
        try:
            number = self.number(tensor)
        except (RuntimeError, NotImplementedError):
            self.refuse("unsupported_call", f"a {tensor.layout} tensor")
            return None
        if number == known:
            self.trace.hidden[number] = tensor.detach()
        return Number(number)

    def add_operation(
        self,
        target: Any,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        given: list[torch.Tensor],
        made: list[torch.Tensor],
    ) -> None:
        """Add an operation that has run beneath the event that is under way, on tensors `given`."""
        positional = tuple([map_leaves(argument, _TENSOR, self.operand) for argument in arguments])
        named = {key: map_leaves(argument, _TENSOR, self.operand) for key, argument in keywords.items()}
        results = tuple(map(self.number, made))
        self._operations.append(Operation(target, positional, named, results))
        if is_random(target) and self.trace.first_random is None:
            self.trace.first_random = len(self.trace.events)
        if is_mutable(target):
            storages = [tensor.untyped_storage()._cdata for tensor in given]
            self._written.update(storages)
            self._touched.update(storages)

    def touch(self, tensor: torch.Tensor) -> None:
        """Take note that the event that is under way may change how autograd sees a tensor."""
        self._touched.add(tensor.untyped_storage()._cdata)

    def note_requires_grad(self, tensor: torch.Tensor) -> None:
        """Take note that the event that is under way may have changed whether a tensor from outside requires one."""
        self._histories[id(tensor)] = _end_of_history(tensor)

    def _remade(self) -> tuple[tuple[int, Made], ...]:
        """Return the slots that autograd sees otherwise since the last event."""
        remade: list[tuple[int, Made]] = []
        shown = [identity for storage in self._touched for identity in self._shown.get(storage, ())]
        for identity in filter(self._alive.__contains__, shown):  # the others were forgotten
            tensor = self._alive[identity]()
            if tensor is None or (now := _end_of_history(tensor)) == self._histories[identity]:
                continue
            self._histories[identity] = now
            reference = self._references[identity]
            if isinstance(reference, External):
                self.refuse("unsupported_call", "a tensor from outside is given autograd history in place")
            elif not is_plain(tensor):
                self.refuse("unsupported_call", "a part of a split tensor is kept while that is changed in place")
            else:
                remade.append((reference.index, _made(tensor)))
        self._touched.clear()
        return tuple(sorted(remade, key=operator.itemgetter(0)))

    def take_operations(self) -> tuple[Operation, ...]:
        """Return the operations heard since this was asked last."""
        operations, self._operations = tuple(self._operations), []
        return operations

    def append(
        self,
        kind: EventKind,
        function: Any,
        templates: tuple[Any, Any],
        result: Any,
        ambient: Ambient,
        origin: Origin | None,
        operations: tuple[Operation, ...],
    ) -> None:
        """Append an event; the tensors in `result` that are new become slots."""
        if self.trace.refusal is not None:
            return
        made: list[Made] = []
        first = len(self.trace.slot_numbers)

        def outcome(tensor: torch.Tensor) -> Any:
            known = self._known_reference(tensor)
            if known is not None:
                return known
            number = self.number_if_known(tensor)
            if number == -1 or number is None:
                if self.gradients.object_of(tensor) is None:
                    self.refuse("unsupported_call", f"{display_name(function)} returned an unknown tensor", origin)
                    return None
                number = self.number(tensor)
            slot = Slot(len(self.trace.slot_numbers))
            self.trace.slot_numbers.append(number)
            made.append(_made(tensor))
            self._remember(tensor, slot)
            return slot

        remade = self._remade()
        template = None if kind == "fetch" else map_leaves(result, _TENSOR, outcome)
        known = sample_of(result) if kind == "fetch" else None, self.gradients.take_first_looks(), remade
        self.trace.events.append(
            Event(kind, function, *templates, template, tuple(made), first, ambient, origin, operations, *known)
        )

    # ---- history -----------------------------------------------------------------------------------------

    def note_freed(self, nodes: Iterable[Any]) -> None:
        """Take note of autograd nodes that a backward has freed."""
        self._freed.update(dict.fromkeys(nodes))

    def has_live_history(self) -> bool:
        """Whether a tensor made in this unit carries autograd history that no backward has freed."""
        return any(self._history(tensor) == "live" for _, slot in self._slots() if (tensor := slot()) is not None)

    def live_outputs(self) -> dict[int, torch.Tensor]:
        """Return the tensors with such history that the program holds, by slot."""
        held = [(slot, tensor) for slot, alive in self._slots() if (tensor := held_by_python(alive)) is not None]
        return {slot: tensor for slot, tensor in held if self._history(tensor) == "live"}

    def _slots(self) -> list[tuple[int, weakref.ref[torch.Tensor]]]:
        """Return the tensors made in this unit, in order, dead ones too."""
        slots = [(r.index, self._alive[identity]) for identity, r in self._references.items() if isinstance(r, Slot)]
        return sorted(slots, key=operator.itemgetter(0))

    def _history(self, tensor: torch.Tensor) -> str:
        try:
            function = tensor.grad_fn
        except RuntimeError:  # a view whose base was changed in a way that autograd refuses
            return "live"
        if function is None:
            return "none"
        return "freed" if self._is_freed(function) else "live"

    def _is_freed(self, function: Any) -> bool:
        """Whether a backward from a node would raise, for nodes that a backward has freed, and reach no leaf else."""
        return (function in self._freed or self._leads_to_freed(function)) and self._has_let_go(function)

    def _leads_to_freed(self, function: Any) -> bool:
        """Whether all ways from a node meet a freed one before a leaf.

        As from what was made beside a loss, of the same values: the probabilities of a policy, an encoder's last state.
        """
        beside: dict[Any, None] = {}
        pending = [function]
        while pending:
            node = pending.pop()
            if getattr(node, "variable", None) is not None:
                return False
            if node not in self._freed and node not in beside:
                beside[node] = None
                pending.extend(following_nodes(node))
        return True

    def _has_let_go(self, function: Any) -> bool:
        """Whether some freed node from here on had saved a tensor: without, a backward runs as often as one likes."""
        seen: dict[Any, None] = {}
        pending = [function]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            if node in self._freed and saves_tensors(type(node)):
                return True
            seen[node] = None
            pending.extend(following_nodes(node))
        return False

    # ---- the end -----------------------------------------------------------------------------------------

    def _note_leaf_gradient(self, slot: int, gradient: Any) -> None:
        number, reference = self.number_if_known(gradient), self._known_reference(gradient)
        if number == -1 or number is None or isinstance(reference, External):
            self.refuse("unsupported_call", "a leaf that the unit made outlives it, with a gradient from outside")
        else:
            self.trace.leaf_gradients[slot] = number, None if reference is None else reference.index

    def close(self) -> Trace:
        """Return the trace, with what escaped and which gradients are left."""
        trace = self.trace
        if not all(map(torch.equal, *zip(*self._borrowed, strict=True)) if self._borrowed else ()):
            self.refuse("mutated_outside", "the NumPy array behind a tensor changed within the unit")
        for slot, reference in self._slots():
            tensor = reference()
            if tensor is not None:
                trace.escapes[slot] = self._history(tensor)
                if self.has_gradient_of_unit(tensor):
                    self._note_leaf_gradient(slot, tensor.grad)
                if tensor.numel() == 1:
                    trace.samples[slot] = tensor.detach().item()
        if trace.history is not None:  # what autograd alone still holds is live too, and no output
            others = [slot for slot, state in trace.escapes.items() if state == "live"]
            for slot in set(others) - set(trace.history.outputs):
                del trace.escapes[slot]
        if trace.refusal is None:
            trace.gradients = self.gradients.plans(self.number_if_known)
            # What is one value here is two tensors elsewhere: that a gradient is the tensor it was is not checked.
            entries = [g.entry for g in trace.gradients if g.entry is not None and g.entry >= 0]
            if len({*entries}) < len(entries) or not {*entries}.isdisjoint(trace.external_numbers):
                self.refuse("unsupported_call", "a gradient from before the unit is also given to it otherwise")
        self._alive.clear()
        self._freed.clear()
        return trace

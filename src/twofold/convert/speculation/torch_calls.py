"""Torch functions: asked of PyTorch under the listener, or done by the host graph when the unit is over."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from twofold.capture.functions import METADATA, display_name
from twofold.capture.intercept import Interception, unheard
from twofold.capture.leaf_modules import LeafCall
from twofold.capture.trace import External, leaves
from twofold.capture.trace_graph import PathNode
from twofold.convert.refusals import Refused
from twofold.graph import Argument, TensorSpec, current_ambient
from twofold.graph.effects import target_has_effect

from .draws import Draws
from .heap import Heap
from .host import Host, constant
from .items import NONE, Dynamic, Item, Known, Mapping, Outside, Scope, Sequence, Stream, Tensor, rebuild
from .library import is_change, is_pure
from .objects import LISTS
from .speculation import metadata
from .walk import Walk


class TorchCalls(Draws):
    """Calls of PyTorch's own functions."""

    def __init__(self, host: Host, heap: Heap, scope: Scope, walk: Walk) -> None:
        super().__init__(host, heap, scope)
        self.walk = walk
        self._interception = Interception(walk)
        self._measured: dict[int, Tensor] = {}
        """Tensors from outside of which Python has asked more than the unit checks."""
        self._guarded: set[int] = set()
        """Tensors of library modules, by `id`, that are assumed to be where they are."""
        self._settings: dict[tuple[int, str], Item] = {}
        """What optimizers were set to by this call, by group and key."""
        self.slot_items: dict[int, Tensor] = {}
        self._events = 0
        self._tensors_changed = False
        """Whether the call has written to tensors after its unit."""

    def native(self, function: Any, arguments: list[Item], keywords: dict[str, Item], owner: Any = None) -> Item:
        """Call a torch function under the listener, with placeholders for what the unit makes."""
        if self.walk.path is not None:
            return self._call_late(function, arguments, keywords, owner)
        given = [self._for_torch(item) if owner is None or index else owner for index, item in enumerate(arguments)]
        named = {name: self._for_torch(item) for name, item in keywords.items()}
        numbers: list[Dynamic] = []
        self._collect_numbers([*arguments, *keywords.values()], numbers)
        if isinstance(function, LeafCall):
            result = self._listen(lambda: self._interception.ask(function, tuple(given), named))
        else:
            result = self._listen(lambda: function(*given, **named))
        fed = self._settle(numbers)
        for number in numbers:
            if number not in fed:
                self.known(number)
        if not self._events and self.walk.made_by_python:
            raise self.refuse("foreign_function", f"{function} makes tensors from data of Python")
        self._note_measured(arguments)
        return self._returned(result)

    def _listen(self, action: Callable[[], Any]) -> Any:
        self._interception.start()
        try:
            return action()
        except Refused as error:
            code, construct = error.refusal.code, error.refusal.construct
        except Exception as error:  # noqa: BLE001 - what PyTorch says to the program
            code, construct = "raises", f"{type(error).__name__}: {str(error)[:160]}"
        finally:
            self._interception.stop()
        raise self.refuse(code, construct)

    def _for_torch(self, item: Item) -> Any:
        match item:
            case Outside() if isinstance(item.object, LISTS):
                return self._for_torch(self.spread(item))
            case Outside() if isinstance(item.object, nn.Module):
                return item.object
            case Sequence():
                items = [self._for_torch(inner) for inner in item.items]
                return rebuild(item.kind, items)
            case Mapping() if item.kind is not set:
                return item.kind({key: self._for_torch(inner) for key, inner in item.entries.items()})
            case Stream():
                held = list(item.upcoming)
                item.upcoming = iter(held)
                return [self._for_torch(inner) for inner in held]
            case _:
                return self.sample(item)

    def _collect_numbers(self, items: list[Item], found: list[Dynamic]) -> None:
        for item in items:
            match item:
                case Dynamic():
                    found.append(item)
                case Sequence():
                    self._collect_numbers(item.items, found)
                case Mapping():
                    self._collect_numbers(list(item.entries.values()), found)
                case _:
                    pass

    def _settle(self, numbers: list[Dynamic]) -> list[Dynamic]:
        """Write down what the unit was given on the nodes walked since; return the numbers that it takes as feeds."""
        fed: list[Dynamic] = []
        passed, self.walk.passed = self.walk.passed, []
        self._events = len(passed)
        for node in passed:
            if node.event is None or node.kind in ("optimizer", "zero_grad"):
                self._set_optimizer(node)
                continue
            self._assume_statics(node)
            for index in node.fed:
                self._give(index, self.walk.feeds[index], numbers, fed)
        for event in self.walk.steps:
            self.host.step(event)
        self.walk.steps.clear()
        return fed

    def _set_optimizer(self, node: PathNode) -> None:
        """Set an optimizer as this call has set it: its step reads what is on the heap when it is launched."""
        optimizer: Any = None if node.event is None or node.kind == "zero_grad" else node.event.arguments[0]
        if optimizer is None:
            return
        if any(self.heap.is_changed(held) for held in (optimizer.param_groups, *optimizer.param_groups)):
            raise self.refuse("unsupported_object", "groups of an optimizer are changed in the call that it steps in")
        for group in optimizer.param_groups:
            holder = self.heap.written(group)
            for key, item in self.heap.items_set(group).items():
                if holder is None or not isinstance(item, Known | Dynamic) or key == "params" or key not in group:
                    raise self.refuse("unsupported_object", f"{key} of an optimizer is set where it steps")
                if self._settings.get((id(group), key)) is not item:
                    self._settings[id(group), key] = item
                    self.host.put(holder.value, key, self.host.argument(item))

    def _assume_statics(self, node: PathNode) -> None:
        event: Any = node.event
        for reference in leaves((event.arguments, event.keywords), External):
            tensor = node.role_of(reference.index)[0].tensor
            if tensor is None or id(tensor) in self._guarded:
                continue
            item = self.heap.tensor_item(tensor)
            if item is None or item.value is None:
                raise self.refuse("unsupported_object", "library code uses a tensor that the program has not read")
            self._guarded.add(id(tensor))
            self.host.assume_identity(item.value, tensor, item.place or self.here(), "tensor")

    def _give(self, index: int, given: Any, numbers: list[Dynamic], fed: list[Dynamic]) -> None:
        if isinstance(given, torch.Tensor):
            item = self.heap.tensor_item(given)
            if item is None or item.value is None:
                raise self.refuse("unsupported_object", "library code uses a tensor that the program has not read")
            self.host.give(index, item.value)
            self._measured.pop(id(given), None)
            self._guarded.add(id(given))
            return
        candidates = [number for number in numbers if number.sample is given]
        if not candidates:
            self.host.give(index, constant(given))
            return
        if len(candidates) == 1:
            fed.append(candidates[0])
        self.host.give(index, candidates[0].value)

    def _note_measured(self, items: list[Item]) -> None:
        for item in items:
            if isinstance(item, Tensor) and item.slot is None and id(item.sample) not in self._guarded:
                self._measured[id(item.sample)] = item

    def assume_measured(self) -> None:
        """Assume what was asked of tensors that the unit itself does not check."""
        for item in self._measured.values():
            if item.value is not None and item.value not in self.host.late and item.place is not None:
                expected = metadata(item.sample)
                value = self.host.call(metadata, item.value)
                self.host.assume_tensor(value, expected, item.place)
        self._measured.clear()

    def _returned(self, result: Any) -> Item:
        """Return the item for what a torch function returned."""
        fetches, self.walk.fetches = self.walk.fetches, []
        if fetches:
            fetch = fetches[0]
            if len(fetches) > 1 or type(fetch.given) is not type(result) or _differ(fetch.given, result):
                raise self.refuse("tensor_fetch", "library code reads the values of tensors")
            return Dynamic(result, self.host.read(fetch.event, fetch.function, fetch.rest))
        return self._wrap(result)

    def _wrap(self, result: Any) -> Item:
        if isinstance(result, torch.Tensor):
            slot = self.walk.slot_of.get(id(result))
            if slot is not None:
                return self._slot_item(result, slot)
            known = self.heap.tensor_item(result)
            if known is None:
                raise self.refuse("unsupported_object", "library code returns a tensor that the program has not read")
            return known
        if isinstance(result, torch.Size):
            return Known(result)
        if isinstance(result, tuple | list):
            return Sequence(type(result), [self._wrap(inner) for inner in result])
        if isinstance(result, dict):
            return Mapping(dict, {key: self._wrap(inner) for key, inner in result.items()})
        if isinstance(result, types.GeneratorType | map | zip) or type(result).__name__.endswith("_iterator"):
            return Stream(iter([self._wrap(inner) for inner in result]))
        return Known(result)

    def _slot_item(self, placeholder: torch.Tensor, slot: int) -> Tensor:
        return self.slot_items.setdefault(slot, Tensor(placeholder, slot))

    def _from_host_data(self, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Make a tensor from Python's data: the host graph does that in each call."""
        given = [*arguments, *keywords.values()]
        if any(isinstance(item, Tensor) for item in given) and self.walk.path is None:
            return self.native(function, arguments, keywords)
        named = {name: self.sample(item) for name, item in keywords.items()}
        with unheard():
            made = self.dry_run(function, [self.sample(item) for item in arguments], named)
        nested = {name: self.host.nested(item) for name, item in keywords.items()}
        value = self.host.call(function, *map(self.host.nested, arguments), ambient=current_ambient(), keywords=nested)
        item = self.heap.add_tensor(made, value, self.here().name)
        if self.walk.path is None:
            self.walk.lift(made)
            self._settle([])
        return item

    # ---- after the unit ----------------------------------------------------------------------------------

    def _call_late(self, function: Any, arguments: list[Item], keywords: dict[str, Item], owner: Any) -> Item:
        """Call a torch function when the unit is over: eagerly, by the host graph."""
        items = [*arguments, *keywords.values()]
        if owner is not None:  # zero_grad: no gradient is read from here on
            named = {name: self.known(item) for name, item in keywords.items()}
            rest = [constant(self.known(item)) for item in arguments[1:]]
            self.host.effect(function, self.host.argument(arguments[0]), *rest, keywords=named)
            return NONE
        if function in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            raise self.refuse("several_units", "the call goes on with another step")
        if function is not getattr and target_has_effect(function) and not (is_pure(function) or is_change(function)):
            raise self.refuse("foreign_function", f"calls {display_name(function)} after the last optimizer step")
        given = [self._late_sample(item, function in METADATA) for item in arguments]
        named = {name: self._late_sample(item) for name, item in keywords.items()}
        with unheard():
            result = self.dry_run(function, given, named)
        if function in METADATA and not isinstance(result, torch.Tensor):
            self._note_measured(items)
            return Known(result)
        if function is getattr:
            return self._attribute_late(arguments[0], self.known(arguments[1]), result)
        if is_change(function):
            self._tensors_changed = True
            ambient = current_ambient()
            given = map(self.host.nested, arguments)
            self.host.effect(function, *given, keywords=self._nested_all(keywords), ambient=ambient)
            return arguments[0]
        given = [self.host.nested(self._settled(item)) for item in arguments]
        named = self._nested_all({name: self._settled(item) for name, item in keywords.items()})
        value = self.host.call(function, *given, ambient=current_ambient(), late=self._tensors_changed, keywords=named)
        return self._wrap_late(result, value)

    def _nested_all(self, keywords: dict[str, Item]) -> dict[str, Argument]:
        return {name: self.host.nested(item) for name, item in keywords.items()}

    def _settled(self, item: Item) -> Item:
        """Return an item with what the unit may still write to taken as the unit leaves it."""
        match item:
            case Tensor() if item.slot is None and item.value is not None and item.value not in self.host.from_unit:
                return Tensor(item.sample, None, self.host.settled(item.value), item.place)
            case Sequence() if item.kind in (list, tuple) and item.value is None:
                return Sequence(item.kind, list(map(self._settled, item.items)))
            case _:
                return item

    def _attribute_late(self, item: Item, name: str, result: Any) -> Item:
        if isinstance(result, torch.Tensor) and name in ("T", "mT", "H", "mH", "data", "real", "imag"):
            settled = self.host.nested(self._settled(item))
            return self._wrap_late(result, self.host.fetch("get_attr", settled, name, late=self._tensors_changed))
        if name not in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "itemsize", "nbytes"):
            raise self.refuse("unsupported_call", f"reads .{name} of a tensor after the last optimizer step")
        if name == "requires_grad" and (self._tensors_changed or self.walk.sets_requires_grad(self.sample(item))):
            raise self.refuse("unsupported_call", "asks whether a tensor requires a gradient after it was changed")
        self._note_measured([item])
        return Known(result)

    def _late_sample(self, item: Item, is_look: bool = False) -> Any:
        if isinstance(item, Sequence) and item.kind in (list, tuple):
            return item.kind(self._late_sample(inner, is_look) for inner in item.items)
        if not isinstance(item, Tensor):
            return self.sample(item)
        self.note_data(item)
        with unheard(), torch.no_grad():
            if item.slot is None and item.value in self.host.from_unit:
                # Made by a dry run. A copy has other strides.
                return item.sample.detach() if is_look else item.sample.clone()
            known = self.walk.graph.placeholders.get(id(item.sample))
            spec = TensorSpec.of(item.sample) if known is None else known[1].spec
            path, slot = self.walk.path, item.slot
            if path is not None and slot is not None:
                spec = path.made_in(slot).spec
            seen = None if path is None or slot is None else path.trace.samples.get(slot)
            sample = spec.empty().fill_(0 if seen is None else seen)
            return sample.requires_grad_(spec.requires_grad)

    def _wrap_late(self, result: Any, value: Any) -> Item:
        if isinstance(result, torch.Tensor):
            return Tensor(result, None, value, self.here())
        if isinstance(result, tuple | list) and not isinstance(result, torch.Size):
            items = [
                self._wrap_late(inner, self.host.fetch("get_item", value, index)) for index, inner in enumerate(result)
            ]
            return Sequence(type(result), items, value if isinstance(result, list) else None)
        return Dynamic(result, value)

    def forget(self) -> None:
        """Drop the placeholders: closures and their scopes hold each other, and may live on for a while."""
        gone = torch.empty(0)
        for item in self.slot_items.values():
            item.sample = gone


def _differ(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left is not right
    return left is not right and repr(left) != repr(right)

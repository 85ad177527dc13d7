"""What the program reads and writes outside the call: guarded reads, an overlay of writes (Janus, section 4.2.3).

A place is read once; later reads get the same item, or what was written there since. Objects reached through
globals, cells and attributes of such are assumed by identity. What hangs on an argument may be another object in
each call, so it is assumed by type and read where it lies.
"""

from __future__ import annotations

import copy
import enum
import operator
import types
from collections import deque
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import Optimizer

from twofold.convert.refusals import Refusal, Refused
from twofold.graph import Value

from .host import Host, constant
from .items import Dynamic, Item, Known, Mapping, Outside, Place, Sequence, Tensor
from .speculation import Generator, apart, equal

VALUES = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, range, enum.Enum,
)  # fmt: skip
"""Types of immutable values, which are assumed to be equal and not identical."""

FIXED = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType, types.GetSetDescriptorType, types.MemberDescriptorType,
    np.ufunc, types.GenericAlias, property, staticmethod, classmethod,
)  # fmt: skip
"""Types of objects that are what they are: assumed by identity, wherever they come from."""

LASTING = (torch.nn.Module, Optimizer)
"""Types of objects that are the same in each call even where they are arguments."""


class Relax(Exception):
    """Raised to walk again: these places turned out to change."""

    def __init__(self, *locations: Hashable) -> None:
        super().__init__(str(locations))
        self.locations = locations


def is_value(held: Any) -> bool:
    """Whether an object is a plain immutable value, tuples of them included."""
    if type(held) is tuple:
        return all(map(is_value, held))
    return type(held) in VALUES or isinstance(held, enum.Enum) or (isinstance(held, np.dtype) and held.isbuiltin == 1)


def is_lasting(held: Any) -> bool:
    """Whether a name of a library is taken to stand for the same thing for ever: code, and what it is made of."""
    return isinstance(held, (*FIXED, torch.dtype)) or (callable(held) and not isinstance(held, LASTING))


class Heap:
    """The objects outside the call, as the call sees them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[tuple[int, str, Hashable], Item] = {}
        self._assumed: dict[tuple[int, str, Hashable], tuple[Hashable, Any]] = {}
        """Values assumed so far, with their locations: writing another value there relaxes them."""
        self._seen: dict[int, Outside | Tensor] = {}
        """Objects and tensors reached so far, by `id`."""
        self._written: dict[int, Outside] = {}
        self.copies: dict[int, Any] = {}
        """What the dry run works on instead of foreign mutable objects, by their `id`; see `copy_of`."""
        self._copied: list[Any] = []
        """What there are copies of."""
        self.changed: set[int] = set()
        """Foreign containers, by `id`, that effects of this call have changed."""
        self._items_set: dict[int, dict[Any, Item]] = {}
        self._emptied: dict[int, Sequence | Mapping] = {}
        """Foreign lists and dictionaries, by `id`, that this call has emptied: what it has put into them since."""
        self.arrays_changed: list[Dynamic] = []
        """The arrays that this call has changed in place, in order."""
        self._made_behind: dict[int, int] = {}
        """Behind how many of these changes Python has made a tensor in this call, by its `id`."""
        self._lengths: dict[int, Hashable] = {}
        """Where the lengths assumed so far are read, by the `id` of their containers."""
        self._grown: dict[int, int] = {}
        """How many new keys this call has put into foreign dictionaries."""

    # ---- reading -----------------------------------------------------------------------------------------

    def read(self, holder: Outside, op: str, key: Any) -> Item:
        """Return an attribute or item of an object; it must be there."""
        address = (id(holder.object), op, key)
        known = self._known.get(address)
        if known is None:
            held = getattr(holder.object, key) if op == "get_attr" else holder.object[key]
            place = (
                holder.place.attribute(holder.object, key)
                if op == "get_attr"
                else holder.place.item(holder.object, key)
            )
            value = self._host.fetch(op, holder.value, constant(key), late=id(holder.object) in self.changed)
            known = self.item(held, value, place)
            self._known[address] = known
            if isinstance(known, Known):
                self._assumed[address] = place.location, held
        return known

    def read_object(self, holder: Outside, name: str) -> Item:
        """Return an attribute that is taken for an object whatever it holds, so that its items are read one by one."""
        address = (id(holder.object), "get_attr", name)
        known = self._known.get(address)
        if known is None:
            place = holder.place.attribute(holder.object, name)
            value = self._host.fetch("get_attr", holder.value, name)
            known = self._known[address] = self._outside(getattr(holder.object, name), value, place, False)
        return known

    def item(self, held: Any, value: Value, place: Place) -> Item:
        """Return the item for an object that was read from outside, under the assumption that its type asks for."""
        host = self._host
        if isinstance(held, torch.Tensor):
            return self._tensor(held, value, place)
        if value in host.late:
            return Dynamic(held, value)
        if isinstance(held, np.ndarray | np.generic):
            host.assume_type(value, type(held), place)
            return Dynamic(self.copy_of(held), value)
        if is_value(held) and (type(held) is not tuple or not place.is_given):
            # Numbers that a call is given, an index or a rate, are others in the next.
            changes = place.location in host.relaxed or (place.is_given and type(held) in (int, float))
            if not changes:
                host.assume_value(value, held, place)
                return Known(held)
            host.assume_type(value, type(held), place)
            return Dynamic(held, value) if type(held) is not tuple else self._outside(held, value, place, True)
        if isinstance(held, FIXED):
            host.assume_identity(value, held, place)
            return Known(held)
        is_given = (place.is_given or place.location in host.relaxed) and not isinstance(held, LASTING)
        return self._outside(held, value, place, is_given)

    def fixed(self, held: Any, root: Value, place: Place) -> Item:
        """Return the item of an object that is the same in each call."""
        found = self._seen.setdefault(id(held), Outside(held, root, place))
        assert isinstance(found, Outside)
        return found

    def _outside(self, held: Any, value: Value, place: Place, is_given: bool) -> Item:
        host = self._host
        if is_given:
            host.assume_type(value, type(held), place)
        else:
            host.assume_identity(value, held, place)
        found = Outside(held, value, Place(place.name, place.location, is_given))
        known = self._seen.setdefault(id(held), found)
        if known is not found and (is_given or known.place is None or known.place.is_given):
            assert known.value is not None
            host.assume_same(value, known.value, True, place)
        assert isinstance(known, Outside)
        return known

    def _tensor(self, held: torch.Tensor, value: Value, place: Place) -> Item:
        known = self._seen.get(id(held))
        if known is None:
            known = self._seen[id(held)] = Tensor(held, None, value, place)
        else:
            assert known.value is not None
            self._host.assume_same(value, known.value, True, place)
        return known

    def tensor_item(self, tensor: torch.Tensor) -> Tensor | None:
        """Return the item of a tensor from outside, if the program has read it."""
        found = self._seen.get(id(tensor))
        return found if isinstance(found, Tensor) else None

    def add_tensor(self, tensor: torch.Tensor, value: Value, name: str) -> Tensor:
        """Enter a tensor that Python made in this call."""
        made = Tensor(tensor, None, value, Place(name, (name, self._host.origin), True))
        self._seen[id(tensor)] = made
        self._made_behind[id(tensor)] = len(self.arrays_changed)
        return made

    def assume_apart(self, tensor: torch.Tensor) -> bool:
        """Assume that no array shows memory of a tensor that this call changes behind its making. Whether none does."""
        item = self._seen[id(tensor)]
        assert isinstance(item, Tensor)
        changed = self.arrays_changed[self._made_behind.get(id(tensor), 0) :]
        for array in changed:
            assert item.value is not None
            assert item.place is not None
            self._host.assume_apart(array.value, item.value, item.place)
        samples = [array.sample for array in changed]
        outside = [held for held in self._copied if any(self.copies[id(held)] is sample for sample in samples)]
        return all(apart(array, tensor) for array in (*samples, *outside))

    def copy_of(self, held: Any) -> Any:
        """Return what stands for a foreign mutable object in the dry run."""
        is_generator = isinstance(held, Generator)
        if not (is_generator or isinstance(held, np.ndarray | list | dict | set | deque)):
            return held
        known = self.copies.get(id(held))
        if known is None:
            known = self.copies[id(held)] = copy.deepcopy(held) if is_generator else held.copy()
            self._copied.append(held)
        return known

    def length(self, holder: Outside) -> Item:
        """Return how many items a container from outside has."""
        held = holder.object
        place = Place(f"len({holder.place.name})", (self._key(holder), "length"), holder.place.is_given)
        changed = id(held) in self.changed or id(held) in self._grown
        if changed or place.location in self._host.relaxed:
            sample = len(self.copy_of(held)) + self._grown.get(id(held), 0)
            return Dynamic(sample, self._host.call(len, holder.value, late=changed))
        self._host.assume_length(holder.value, len(held), place)
        self._lengths[id(held)] = place.location
        return Known(len(held))

    def keys(self, holder: Outside) -> list[Any]:
        """Return the keys of a dictionary from outside, in order."""
        held = holder.object
        if id(held) in self.changed or id(held) in self._grown or not all(map(is_value, held)):
            raise foreign("iterates over a dictionary that the call changes, or whose keys are objects", self._host)
        place = Place(f"list({holder.place.name})", (self._key(holder), "keys"), holder.place.is_given)
        value = self._host.call(tuple, holder.value)
        self._host.assume_value(value, tuple(held), place)
        self._lengths[id(held)] = place.location
        return list(held)

    def assume_contains(self, holder: Outside, key: Any, is_in: bool) -> None:
        """Assume that a container from outside has a key, or has not."""
        value = self._host.call(operator.contains, holder.value, constant(key))
        name = f"{key!r} in {holder.place.name}"
        self._host.assume_branch(value, is_in, Place(name, (self._key(holder), "in", key), False))

    def _key(self, holder: Outside) -> Hashable:
        return holder.place.location if holder.place.is_given else id(holder.object)

    # ---- writing -----------------------------------------------------------------------------------------

    def write(self, holder: Outside, op: str, key: Any, item: Item) -> None:
        """Write an attribute or item of an object from outside, once the call is over."""
        address = (id(holder.object), "get_" + op.removeprefix("set_"), key)
        assumed = self._assumed.get(address)
        if assumed is not None and not (isinstance(item, Known) and equal(item.object, assumed[1])):
            raise Relax(assumed[0])
        before = self._known.get(address)
        if isinstance(before, Outside) and item is not before and not before.place.is_given:
            raise Relax(before.place.location)
        if before is item:
            return
        self._written.setdefault(id(holder.object), holder)
        if op == "set_item" and isinstance(holder.object, dict) and before is None and key not in holder.object:
            self._grow(holder)
        held = vars(holder.object) if op == "set_attr" and hasattr(holder.object, "__dict__") else holder.object
        replaces = isinstance(held, list) or (isinstance(held, dict) and key in held)
        self._host.store(op, holder.value, constant(key), self._host.argument(item), replaces)
        self._known[address] = item
        if op == "set_item":
            self._items_set.setdefault(id(holder.object), {})[key] = item

    def items_set(self, holder: Any) -> dict[Any, Item]:
        """Return the items of an object from outside that this call has set, by their keys."""
        return self._items_set.get(id(holder), {})

    def written(self, held: Any) -> Outside | None:
        """Return an object from outside if this call has written to it, or changed it as a whole."""
        return self._written.get(id(held))

    def is_changed(self, held: Any) -> bool:
        """Whether this call has changed a container as a whole, or set items of a list."""
        return id(held) in self.changed or (isinstance(held, list) and id(held) in self._written)

    def is_written(self, held: Any) -> bool:
        """Whether this call has written to an object, or changed it as a whole."""
        return id(held) in self._written

    def overwritten(self, holder: Outside, op: str, key: Any) -> Item | None:
        """Return what this call has read or written at a place, if anything."""
        return self._known.get((id(holder.object), op, key))

    def forget(self, holder: Outside, op: str, key: Any) -> None:
        """Take note that an attribute or item is no more."""
        self._known.pop((id(holder.object), op, key), None)

    def _grow(self, holder: Outside) -> None:
        if id(holder.object) in self._lengths:
            raise Relax(self._lengths[id(holder.object)])
        self._grown[id(holder.object)] = self._grown.get(id(holder.object), 0) + 1

    def change(self, holder: Outside) -> Any:
        """Take note that an effect changes a foreign container; return the copy to change in the dry run.

        What was read from it before is read again: another item may lie there.
        """
        if id(holder.object) in self._lengths and self._lengths[id(holder.object)] not in self._host.relaxed:
            raise Relax(self._lengths[id(holder.object)])
        self._written.setdefault(id(holder.object), holder)
        for address in [address for address in self._known if address[:2] == (id(holder.object), "get_item")]:
            del self._known[address]
        self.changed.add(id(holder.object))
        return self.copy_of(holder.object)

    def empty(self, holder: Outside) -> None:
        """Take note that an effect empties a list or dictionary: from now on the call knows what is in it."""
        if type(holder.object) is list:
            self._emptied[id(holder.object)] = Sequence(list, [], holder.value)
        elif type(holder.object) is dict:
            self._emptied[id(holder.object)] = Mapping(dict, {}, holder.value)

    def current(self, item: Item) -> Item:
        """Return what stands for an item now: another one for a container that this call has emptied."""
        return self._emptied.get(id(item.object), item) if isinstance(item, Outside) else item

    def close(self) -> None:
        """Assume that objects which were written are none of the others: two names for one object see one state."""
        others = [one for one in self._seen.values() if isinstance(one, Outside)]
        for written in self._written.values():
            for other in others:
                if (
                    other.object is not written.object
                    and type(other.object) is type(written.object)
                    and (other.place.is_given or written.place.is_given)
                ):
                    self._host.assume_same(written.value, other.value, False, written.place)


def foreign(text: str, host: Host) -> Refused:
    """Return a refusal of an object that is not plain."""
    return Refused(Refusal("unsupported_object", text, host.origin))

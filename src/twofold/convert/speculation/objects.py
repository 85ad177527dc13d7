"""What objects do when the interpreter asks: attributes, items, truth, length, iteration."""

from __future__ import annotations

import ast
import operator
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from twofold.convert.refusals import Refused

from .heap import Heap, is_value
from .host import Host, constant
from .items import (
    Closure,
    Dynamic,
    Instance,
    Item,
    Known,
    Mapping,
    Method,
    Outside,
    Place,
    Scope,
    Sequence,
    Stream,
    Tensor,
    View,
    rebuild,
)
from .library import find_in_class

LISTS = (list, tuple, deque)
DICTS = (dict, OrderedDict, defaultdict)


class Namespace(dict[str, Any]):
    """The kind of a mapping that is an object's `__dict__`: it may be looked at, and not be kept."""


class Raised(Exception):
    """The program raised an exception, and the same values would raise it again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(repr(error))
        self.error = error


class Objects:
    """Reading, and the questions that syntax asks of objects. Subclasses know how to call."""

    def __init__(self, host: Host, heap: Heap, scope: Scope) -> None:
        self.host = host
        self.heap = heap
        self.scope = scope
        self.node: ast.AST = scope.code.definition

    # ---- to be supplied ----------------------------------------------------------------------------------

    def call(self, callee: Item, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call an item."""
        raise NotImplementedError

    def native(self, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call a torch function."""
        raise NotImplementedError

    def attribute(self, item: Item, name: str) -> Item:
        """Return `item.name`."""
        raise NotImplementedError

    def change_array(self, item: Dynamic, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Change an array in place; return it, or None, as the function does."""
        raise NotImplementedError

    # ---- where we are ------------------------------------------------------------------------------------

    def refuse(self, code: str, construct: str) -> Refused:
        """Return the exception that refuses the syntax that is being evaluated."""
        return self.scope.code.refuse(code, construct, self.node)

    def here(self) -> Place:
        """Return the place of what the syntax that is being evaluated computes."""
        origin = self.scope.code.origin(self.node)
        text = ast.unparse(self.node) if isinstance(self.node, ast.expr) else type(self.node).__name__
        return Place(text[:80], (origin, text), False)

    # ---- concrete objects --------------------------------------------------------------------------------

    def known(self, item: Item) -> Any:
        """Return the object that an item is; a value that changes is assumed to be the one seen."""
        match item:
            case Known():
                return item.object
            case Dynamic() if is_value(item.sample):
                self.host.assume_value(item.value, item.sample, self.here())
                return item.sample
            case Sequence():
                items = [self.known(inner) for inner in item.items]
                return rebuild(item.kind, items)
            case Mapping() if item.kind is not set:
                return item.kind({key: self.known(inner) for key, inner in item.entries.items()})
            case Mapping():
                return set(item.entries)
            case Outside() if isinstance(item.object, LISTS):
                return self.known(self.spread(item))
            case Stream():
                return [self.known(inner) for inner in item.upcoming]
            case _:
                raise self.refuse("unsupported_object", f"{self.describe(item)} where a constant is needed")

    def key(self, item: Item) -> Any:
        """Return an item as a key of a dictionary or set: objects and tensors are their own."""
        if isinstance(item, Tensor):
            return item.sample
        if isinstance(item, Outside) and not item.place.is_given and type(item.object).__hash__ is object.__hash__:
            return item.object
        if isinstance(item, Outside) and isinstance(item.object, torch.nn.Module):
            return item.object
        if isinstance(item, Instance | Closure):
            return item
        return self.known(item)

    def describe(self, item: Item) -> str:
        """Return a short text for messages."""
        held = getattr(item, "object", getattr(item, "sample", None))
        return f"a {type(held).__qualname__}" if held is not None else f"a {type(item).__name__.lower()}"

    def is_known(self, item: Item) -> bool:
        """Whether an item is made of constants alone."""
        match item:
            case Known():
                return True
            case Sequence():
                return all(map(self.is_known, item.items))
            case Mapping():
                return all(map(self.is_known, item.entries.values()))
            case _:
                return False

    def plain(self, held: Any) -> Item:
        """Return the item for an object that library code made of constants."""
        if type(held) in (list, tuple):
            return Sequence(type(held), [self.plain(inner) for inner in held])
        if type(held) in (dict, OrderedDict):
            return Mapping(type(held), {key: self.plain(inner) for key, inner in held.items()})
        if type(held) is set:
            return Mapping(set, {key: Known(key) for key in held})
        return Known(held)

    # ---- computing ---------------------------------------------------------------------------------------

    def compute(self, function: Callable[..., Any], *items: Item, **keywords: Item) -> Item:
        """Apply a pure function of Python values."""
        given = [*items, *keywords.values()]
        if any(isinstance(item, Tensor) for item in given):
            return self.native(function, list(items), keywords)
        try:
            if all(map(self.is_known, given)):
                named = {name: self.known(item) for name, item in keywords.items()}
                return self.plain(function(*map(self.known, items), **named))
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001 - the program's own
            raise Raised(error) from None
        named = {name: self.sample(item) for name, item in keywords.items()}
        sample = self.dry_run(function, [self.sample(item) for item in items], named)
        arguments = [self.host.nested(item) for item in items]
        named = {name: self.host.nested(item) for name, item in keywords.items()}
        late = self._is_changed(given)
        return Dynamic(sample, self.host.call(function, *arguments, late=late, keywords=named))

    def _is_changed(self, items: list[Item]) -> bool:
        return any(isinstance(item, Outside) and id(item.object) in self.heap.changed for item in items)

    def dry_run(self, function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Run a function of Python values on samples."""
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return function(*arguments, **keywords)
        except Exception as error:  # noqa: BLE001 - the program's own, or that of a sample
            raise self.refuse("raises", f"{type(error).__name__}: {str(error)[:120]}") from None

    def sample(self, item: Item) -> Any:
        """Return an object like the one that an item is, for a dry run of what looks into it."""
        self.note_data(item)
        match item:
            case Known():
                return item.object
            case Dynamic() | Tensor():
                return item.sample
            case Outside() if is_data(item.object):
                return self.heap.copy_of(item.object)
            case Sequence():
                items = [self.sample(inner) for inner in item.items]
                return rebuild(item.kind, items)
            case Mapping():
                if item.kind is set:
                    return set(item.entries)
                return item.kind({key: self.sample(inner) for key, inner in item.entries.items()})
            case _:
                raise self.refuse("unsupported_object", f"{self.describe(item)} given to library code")

    def note_data(self, item: Item) -> None:
        """Note that something may be looked into, if arrays may be in it or show its memory."""
        match item:
            case Dynamic() if is_value(item.sample) or isinstance(item.sample, np.generic):
                pass
            case Tensor() if (
                item.value is None or item.sample.untyped_storage().resizable()
            ):  # no array shows its memory
                pass
            case Dynamic() | Tensor() | Outside() | Sequence() | Mapping() if item.value is not None:
                self.host.data.add(item.value)
            case _:
                pass

    # ---- questions ---------------------------------------------------------------------------------------

    def truth(self, item: Item) -> bool:
        """Decide a condition: by what is known, or by assuming the way it went."""
        match item:
            case Known():
                return bool(item.object)
            case Dynamic():
                taken = self.dry_run(bool, [self.sample(item)], {})
                self.host.assume_branch(item.value, taken, self.here())
                return taken
            case Tensor():
                return self.truth(self.native(bool, [item], {}))
            case Sequence():
                return bool(item.items)
            case Mapping():
                return bool(item.entries)
            case View():
                return bool(self.known(self.length(item)))
            case Outside() if isinstance(item.object, (*LISTS, *DICTS, set)):
                copied = self.heap.copy_of(item.object)
                late = id(item.object) in self.heap.changed
                length = self.host.call(len, item.value, late=late)
                self.host.assume_branch(length, bool(copied), self.here())
                return bool(copied)
            case Outside() | Instance():
                for name in ("__bool__", "__len__"):
                    found = find_in_class(self.type_of(item), name)
                    if found is not None:
                        return self.truth(self.call(Method(Known(found[1]), item), [], {}))
                return True
            case _:
                return True

    def type_of(self, item: Item) -> type:
        """Return the class of an item; that of a value that changes is assumed to stay."""
        match item:
            case Known():
                return type(item.object)
            case Outside():
                return type(item.object)
            case Sequence() | Mapping() | Instance() | View():
                return item.kind
            case Tensor():
                return type(item.sample)
            case Dynamic():
                self.host.assume_type(item.value, type(item.sample), self.here())
                return type(item.sample)
            case Method():
                return types.MethodType
            case _:
                return types.FunctionType if isinstance(item, Closure) else types.GeneratorType

    def length(self, item: Item) -> Item:
        """Return how many items an item has."""
        match item:
            case Sequence():
                return Known(len(item.items))
            case Mapping():
                return Known(len(item.entries))
            case View():
                return self.length(self.heap.current(item.mapping))
            case Outside() if isinstance(item.object, (*LISTS, *DICTS, set)):
                return self.heap.length(item)
            case Outside() | Instance():
                return self.call(self.attribute(item, "__len__"), [], {})
            case Tensor():
                return self.native(len, [item], {})
            case _:
                return self.compute(len, item)

    def iterate(self, item: Item) -> Iterator[Item]:
        """Yield the items of an item, as `for` does."""
        match item:
            case Known():
                yield from map(self.plain, item.object)
            case Sequence():
                index = 0
                while index < len(item.items):
                    yield item.items[index]
                    index += 1
            case Mapping() if item.kind is set and len(item.entries) > 1:
                raise self.refuse("unsupported_object", "iterates over a set, whose order is its own")
            case Mapping():
                for key in list(item.entries):
                    yield Known(key)
            case View():
                yield from self._iterate_view(item)
            case Stream():
                yield from item.upcoming
            case Tensor():
                yield from self.iterate(self.native(torch.Tensor.unbind, [item, Known(0)], {}))
            case Dynamic():
                count = len(item.sample)
                self.host.assume_length(item.value, count, self.here())
                for index in range(count):
                    yield self.subscript(item, Known(index))
            case Outside() if isinstance(item.object, LISTS):
                for index in range(self.known(self.length(item))):
                    yield self.subscript(item, Known(index))
            case Outside() if isinstance(item.object, DICTS):
                yield from map(Known, self.heap.keys(item))
            case Outside() | Instance():
                yield from self.iterate(self.call(self.attribute(item, "__iter__"), [], {}))
            case _:
                raise self.refuse("unsupported_syntax", f"iterates over {self.describe(item)}")

    def _iterate_view(self, view: View) -> Iterator[Item]:
        """Yield what a view of a dictionary shows, each item as it is when its turn has come."""
        mapping = self.heap.current(view.mapping)
        for key in list(self.iterate(mapping)):
            if view.name == "keys":
                yield key
            else:
                value = self.subscript(mapping, key)
                yield value if view.name == "values" else Sequence(tuple, [key, value])

    def spread(self, item: Item) -> Sequence:
        """Return the items of an item as a new list of the call."""
        kind = type(item.object) if isinstance(item, Outside) and isinstance(item.object, tuple) else list
        return Sequence(kind, list(self.iterate(item)))

    # ---- items -------------------------------------------------------------------------------------------

    def subscript(self, item: Item, key: Item) -> Item:
        """Return `item[key]`."""
        match item:
            case Tensor():
                return self.native(torch.Tensor.__getitem__, [item, key], {})
            case Sequence():
                return self._item_of_sequence(item, key)
            case Mapping():
                wanted = self.key(key)
                if wanted not in item.entries:
                    raise Raised(KeyError(wanted))
                return item.entries[wanted]
            case Dynamic():
                return self._item_of_value(item, key)
            case Outside() if isinstance(item.object, (*LISTS, *DICTS)):
                return self._item_of_container(item, self.known(key))
            case Outside() | Instance():
                return self.call(self.attribute(item, "__getitem__"), [key], {})
            case _:
                return self.compute(operator.getitem, item, key)

    def _item_of_sequence(self, item: Sequence, key: Item) -> Item:
        wanted = self.known(key)
        if isinstance(wanted, slice):
            return Sequence(item.kind if item.kind in (list, tuple) else tuple, item.items[wanted])
        items = tuple(item.items) if item.kind is tuple else item.items  # whose errors say what they are of
        try:
            return items[wanted]
        except (IndexError, TypeError) as error:
            raise Raised(error) from None

    def _item_of_value(self, item: Dynamic, key: Item) -> Item:
        sample = self.dry_run(operator.getitem, [self.sample(item), self.sample(key)], {})
        return Dynamic(sample, self.host.fetch("get_item", item.value, self.host.nested(key)))

    def _item_of_container(self, item: Outside, key: Any) -> Item:
        held = item.object
        if isinstance(key, slice):
            items = self.spread(item).items[key]
            return Sequence(type(held) if type(held) in (list, tuple) else list, items)
        is_set = self.heap.is_written(held) and id(held) not in self.heap.changed
        if is_set and isinstance(held, list) and isinstance(key, int) and key < 0:
            key += self.known(self.length(item))
        known = self.heap.overwritten(item, "get_item", key)
        if known is not None:
            return known
        if id(held) in self.heap.changed:
            copied = self.heap.copy_of(held)
            sample = self.dry_run(operator.getitem, [copied, key], {})
            return Dynamic(sample, self.host.fetch("get_item", item.value, constant(key), late=True))
        if isinstance(held, DICTS) and key not in held:
            self.heap.assume_contains(item, key, False)
            raise Raised(KeyError(key))
        if isinstance(held, LISTS) and not -len(held) <= key < len(held):
            raise self.refuse("raises", f"IndexError: index {key} of {len(held)} items")
        return self.heap.read(item, "get_item", key)

    # ---- writing items ------------------------------------------------------------------------------------

    def set_item(self, item: Item, key: Item, value: Item) -> None:
        """Do `item[key] = value`."""
        match item:
            case Tensor():
                self.native(torch.Tensor.__setitem__, [item, key, value], {})
            case Sequence() if item.kind is list:
                self._set_item_of_list(item, self.known(key), value)
            case Mapping() if item.kind not in (set, Namespace):
                item.entries[self.key(key)] = value
                if item.value is not None:
                    self.host.store("set_item", item.value, self.host.argument(key), self.host.argument(value))
            case Dynamic() if is_array(item.sample):
                self.change_array(item, operator.setitem, [key, value], {})
            case Outside() if isinstance(item.object, (list, *DICTS)):
                self._set_item_of_container(item, self.known(key), value)
            case Outside() | Instance():
                self.call(self.attribute(item, "__setitem__"), [key, value], {})
            case _:
                raise self.refuse("unsupported_object", f"writes an item of {self.describe(item)}")

    def _set_item_of_list(self, item: Sequence, key: Any, value: Item) -> None:
        try:
            if isinstance(key, slice):
                item.items[key] = list(self.iterate(value))
            else:
                item.items[key] = value
        except (IndexError, TypeError) as error:
            raise Raised(error) from None
        if item.value is not None:
            place = key % len(item.items) if isinstance(key, int) else key
            self.host.store("set_item", item.value, constant(place), self.host.argument(value), replaces=True)

    def _set_item_of_container(self, item: Outside, key: Any, value: Item) -> None:
        held = item.object
        if id(held) in self.heap.changed or isinstance(key, slice):
            raise self.refuse("unsupported_object", "writes items of a container that is changed otherwise too")
        if isinstance(held, list):
            count = self.known(self.length(item))
            if not -count <= key < count:
                raise self.refuse("raises", "IndexError: assignment index out of range")
            key %= count
            for other in range(-count, 0):
                self.heap.forget(item, "get_item", other)
        elif key not in held and self.heap.overwritten(item, "get_item", key) is None:
            self.heap.assume_contains(item, key, False)
        self.heap.write(item, "set_item", key, value)


def is_data(held: Any) -> bool:
    """Whether an object is made of plain values and arrays alone, so that nothing of the program runs in it."""
    if isinstance(held, (*LISTS, set)):
        return all(map(is_data, held))
    if type(held) in DICTS:
        return all(is_value(key) and is_data(item) for key, item in held.items())
    return is_value(held) or isinstance(held, np.ndarray | np.generic)


def is_array(held: Any) -> bool:
    """Whether an object is an array of NumPy, which can be changed in place."""
    return isinstance(held, np.ndarray)

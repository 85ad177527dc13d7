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
from torch import nn

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
    Super,
    Tensor,
)
from .library import find_in_class, is_data_descriptor, is_library

LISTS = (list, tuple, deque)
DICTS = (dict, OrderedDict, defaultdict)


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
                return item.kind(items) if item.kind in (list, tuple, torch.Size) else item.kind(*items)
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
        late = self.heap.arrays_changed and any(_is_array(self.sample(item)) for item in given)
        arguments = [self.host.nested(item) for item in items]
        named = {name: self.host.nested(item) for name, item in keywords.items()}
        return Dynamic(sample, self.host.call(function, *arguments, late=late or self._is_changed(given), **named))

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
        """Return an object like the one that an item is, for a dry run."""
        match item:
            case Known():
                return item.object
            case Dynamic() | Tensor():
                return item.sample
            case Outside() if is_data(item.object):
                return self.heap.copy_of(item.object)
            case Sequence():
                items = [self.sample(inner) for inner in item.items]
                return item.kind(items) if item.kind in (list, tuple, torch.Size) else item.kind(*items)
            case Mapping():
                if item.kind is set:
                    return set(item.entries)
                return item.kind({key: self.sample(inner) for key, inner in item.entries.items()})
            case _:
                raise self.refuse("unsupported_object", f"{self.describe(item)} given to library code")

    # ---- questions ---------------------------------------------------------------------------------------

    def truth(self, item: Item) -> bool:
        """Decide a condition: by what is known, or by assuming the way it went."""
        match item:
            case Known():
                return bool(item.object)
            case Dynamic():
                taken = self.dry_run(bool, [item.sample], {})
                self.host.assume_branch(item.value, taken, self.here())
                return taken
            case Tensor():
                return self.truth(self.native(bool, [item], {}))
            case Sequence():
                return bool(item.items)
            case Mapping():
                return bool(item.entries)
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
            case Sequence() | Mapping() | Instance():
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
            case Mapping():
                yield from map(Known, list(item.entries))
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
        try:
            return item.items[wanted]
        except (IndexError, TypeError) as error:
            raise Raised(error) from None

    def _item_of_value(self, item: Dynamic, key: Item) -> Item:
        sample = self.dry_run(operator.getitem, [item.sample, self.sample(key)], {})
        late = self.heap.arrays_changed and _is_array(item.sample)
        return Dynamic(sample, self.host.fetch("get_item", item.value, self.host.nested(key), late))

    def _item_of_container(self, item: Outside, key: Any) -> Item:
        held = item.object
        if isinstance(key, slice):
            items = self.spread(item).items[key]
            return Sequence(type(held) if type(held) in (list, tuple) else list, items)
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

    # ---- attributes --------------------------------------------------------------------------------------

    def attribute(self, item: Item, name: str) -> Item:
        """Return `item.name`. Raises `Raised` where the program gets an AttributeError."""
        match item:
            case Tensor():
                return self._attribute_of_tensor(item, name)
            case Known() if isinstance(item.object, types.ModuleType):
                return self._attribute_of_module(item.object, name)
            case Known() if isinstance(item.object, type):
                return self._attribute_of_class(item.object, name)
            case Known() | Dynamic() | Sequence() | Mapping():
                return self._attribute_of_value(item, name)
            case Super():
                return self._attribute_of_super(item, name)
            case Outside() | Instance():
                return self._attribute_of_object(item, name)
            case Method() if name in ("__self__", "__func__"):
                return item.receiver if name == "__self__" else item.function
            case _:
                raise self.refuse("unsupported_object", f"reads .{name} of {self.describe(item)}")

    def _attribute_of_tensor(self, item: Tensor, name: str) -> Item:
        found = getattr(torch.Tensor, name, None)
        if name in item.sample.__dict__ or found is None:
            raise self.refuse("unsupported_object", f"reads .{name} of a tensor")
        if callable(found) and not isinstance(found, property | types.GetSetDescriptorType):
            return Method(Known(found), item)
        return self.native(getattr, [item, Known(name)], {})

    def _attribute_of_module(self, module: types.ModuleType, name: str) -> Item:
        try:
            held = getattr(module, name)
        except AttributeError as error:
            raise Raised(error) from None
        if is_library(module.__name__) or isinstance(held, types.ModuleType):
            return Known(held)
        place = Place(module.__name__, id(module), False)
        return self.heap.read(Outside(module, self.host.root(module.__name__, module), place), "get_attr", name)

    def _attribute_of_class(self, kind: type, name: str) -> Item:
        found = find_in_class(kind, name)
        if found is None or isinstance(found[1], types.GetSetDescriptorType):
            if hasattr(kind, name):  # of its metaclass: __name__, __mro__
                return Known(getattr(kind, name))
            raise Raised(AttributeError(name))
        owner, held = found
        if isinstance(held, classmethod):
            return Method(Known(held.__func__), Known(kind))
        if is_library(owner.__module__) or isinstance(held, staticmethod | types.FunctionType):
            self._assume_class(owner, name)
            return Known(getattr(kind, name))
        return self.heap.read(self._class(owner), "get_attr", name)

    def _class(self, owner: type) -> Outside:
        place = Place(owner.__qualname__, id(owner), False)
        return Outside(owner, self.host.root(owner.__qualname__.rpartition(".")[2], owner), place)

    def _assume_class(self, owner: type, name: str) -> None:
        """Assume that a class defines a name as it does now."""
        if not is_library(owner.__module__):
            held = getattr(owner, name)
            if isinstance(held, types.FunctionType):
                self.heap.read(self._class(owner), "get_attr", name)

    def _attribute_of_value(self, item: Item, name: str) -> Item:
        kind = self.type_of(item)
        if isinstance(item, Sequence) and kind not in (list, tuple, torch.Size):
            names: tuple[str, ...] = getattr(kind, "_fields", None) or getattr(kind, "__match_args__", ())
            if name in names:
                return item.items[names.index(name)]
        found = getattr(kind, name, None)
        if found is not None and callable(found) and not isinstance(found, property):
            defined = find_in_class(kind, name)
            is_static = defined is not None and isinstance(defined[1], staticmethod | classmethod)
            if isinstance(item, Known) and (is_static or not isinstance(found, types.FunctionType)):
                bound = getattr(item.object, name)
                if not isinstance(bound, types.BuiltinFunctionType | types.MethodWrapperType):
                    return Known(bound)
            return Method(Known(found), item)
        if isinstance(item, Dynamic):
            sample = self.dry_run(getattr, [item.sample, name], {})
            late = self.heap.arrays_changed and _is_array(item.sample)
            return Dynamic(sample, self.host.fetch("get_attr", item.value, name, late))
        try:
            return self.plain(getattr(self.known(item), name))
        except AttributeError as error:
            raise Raised(error) from None

    def _attribute_of_super(self, item: Super, name: str) -> Item:
        order = self.type_of(item.receiver).__mro__
        for owner in order[order.index(item.owner) + 1 :]:
            if name in vars(owner):
                return self._bind(vars(owner)[name], item.receiver, owner, name)
        raise Raised(AttributeError(name))

    def _attribute_of_object(self, item: Outside | Instance, name: str) -> Item:
        kind = self.type_of(item)
        found = find_in_class(kind, name)
        if isinstance(kind.__getattribute__, types.FunctionType):
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __getattribute__")
        if found is not None and is_data_descriptor(found[1]):
            return self._bind(found[1], item, found[0], name)
        own = self._own_attribute(item, name)
        if own is not None:
            return own
        if found is not None:
            return self._bind(found[1], item, found[0], name)
        if isinstance(item, Outside) and isinstance(item.object, nn.Module):
            held = self._module_attribute(item, name)
            if held is not None:
                return held
            if kind.__getattr__ is nn.Module.__getattr__:
                raise Raised(AttributeError(f"'{kind.__name__}' object has no attribute '{name}'"))
        if hasattr(kind, "__getattr__"):
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __getattr__")
        raise Raised(AttributeError(f"'{kind.__name__}' object has no attribute '{name}'"))

    def _own_attribute(self, item: Outside | Instance, name: str) -> Item | None:
        if name == "__dict__" and isinstance(item, Outside):
            raise self.refuse("unsupported_object", "reads __dict__")
        if isinstance(item, Instance):
            return item.attributes.get(name)
        written = self.heap.overwritten(item, "get_attr", name)
        if written is not None:
            return written
        if name not in getattr(item.object, "__dict__", ()):
            return None
        return self.heap.read(item, "get_attr", name)

    def _module_attribute(self, item: Outside, name: str) -> Item | None:
        """Return a parameter, buffer or submodule."""
        for table in ("_parameters", "_buffers", "_modules"):
            held = item.object.__dict__[table]
            if name in held:
                holder = self.heap.read(item, "get_attr", table)
                assert isinstance(holder, Outside)
                return self.heap.read(holder, "get_item", name)
        return None

    def _bind(self, found: Any, item: Item, owner: type, name: str) -> Item:
        """Return what a name defined by a class is when it is read from an instance."""
        match found:
            case types.FunctionType():
                self._assume_class(owner, name)
                return Method(Known(found), item)
            case property():
                if found.fget is None:
                    raise self.refuse("raises", f"AttributeError: {name}")
                return self.call(Known(found.fget), [item], {})
            case classmethod():
                return Method(Known(found.__func__), Known(self.type_of(item)))
            case staticmethod():
                return Known(found.__func__)
            case types.MemberDescriptorType() | types.GetSetDescriptorType() if isinstance(item, Outside):
                return self.heap.read(item, "get_attr", name)
            case types.MethodDescriptorType() | types.WrapperDescriptorType() | types.BuiltinFunctionType():
                return Method(Known(found), item)
            case _ if hasattr(type(found), "__get__"):
                raise self.refuse("unsupported_object", f"{owner.__qualname__}.{name} is a descriptor")
            case _ if isinstance(item, Outside) and not is_library(owner.__module__):
                return self.heap.read(item, "get_attr", name)
            case _:
                return self._attribute_of_class(owner, name)

    # ---- writing -----------------------------------------------------------------------------------------

    def set_attribute(self, item: Item, name: str, value: Item) -> None:
        """Do `item.name = value`."""
        if isinstance(item, Tensor) and name == "grad":
            self.native(setattr, [item, Known(name), value], {})
            return
        if not isinstance(item, Outside | Instance):
            raise self.refuse("unsupported_object", f"writes .{name} of {self.describe(item)}")
        kind = self.type_of(item)
        found = find_in_class(kind, name)
        if found is not None and is_data_descriptor(found[1]) and not isinstance(found[1], types.MemberDescriptorType):
            if isinstance(found[1], property) and found[1].fset is not None:
                self.call(Known(found[1].fset), [item, value], {})
                return
            raise self.refuse("unsupported_object", f"{kind.__qualname__}.{name} is a descriptor")
        if isinstance(item, Instance):
            item.attributes[name] = value
            if item.value is not None:
                self.host.store("set_attr", item.value, name, self.host.argument(value))
        elif isinstance(item.object, nn.Module) and kind.__setattr__ is nn.Module.__setattr__:
            self._set_module_attribute(item, name, value)
        elif isinstance(item.object, torch.optim.Optimizer) and name in ("param_groups", "state", "defaults"):
            raise self.refuse("unsupported_object", f"replaces .{name} of an optimizer")
        elif kind.__setattr__ is object.__setattr__ or isinstance(item.object, torch.optim.Optimizer):
            self.heap.write(item, "set_attr", name, value)
        else:
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __setattr__")

    def _set_module_attribute(self, item: Outside, name: str, value: Item) -> None:
        state = item.object.__dict__
        is_module = isinstance(value, Outside) and isinstance(value.object, nn.Module)
        if name in state["_parameters"] or name in state["_modules"] or is_module:
            raise self.refuse("unsupported_object", f"replaces the parameter or module {name}")
        if isinstance(value, Tensor) and isinstance(value.sample, nn.Parameter):
            raise self.refuse("unsupported_object", f"registers the parameter {name}")
        if name in state["_buffers"]:
            holder = self.heap.read(item, "get_attr", "_buffers")
            assert isinstance(holder, Outside)
            self.heap.write(holder, "set_item", name, value)
        else:
            self.heap.write(item, "set_attr", name, value)

    def set_item(self, item: Item, key: Item, value: Item) -> None:
        """Do `item[key] = value`."""
        match item:
            case Tensor():
                self.native(torch.Tensor.__setitem__, [item, key, value], {})
            case Sequence() if item.kind is list:
                item.items[self.known(key)] = value if not isinstance(self.known(key), slice) else self._slice(value)
                if item.value is not None:
                    self.host.store("set_item", item.value, constant(self.known(key)), self.host.argument(value))
            case Mapping() if item.kind is not set:
                item.entries[self.key(key)] = value
                if item.value is not None:
                    self.host.store("set_item", item.value, self.host.argument(key), self.host.argument(value))
            case Dynamic() if _is_array(item.sample):
                self.dry_run(operator.setitem, [item.sample, self.sample(key), self.sample(value)], {})
                self.heap.arrays_changed = True
                self.host.store("set_item", item.value, self.host.nested(key), self.host.argument(value))
            case Outside() if isinstance(item.object, (list, *DICTS)):
                self._set_item_of_container(item, self.known(key), value)
            case Outside() | Instance():
                self.call(self.attribute(item, "__setitem__"), [key, value], {})
            case _:
                raise self.refuse("unsupported_object", f"writes an item of {self.describe(item)}")

    def _slice(self, value: Item) -> Any:
        return list(self.iterate(value))

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


def _is_array(held: Any) -> bool:
    return isinstance(held, np.ndarray)

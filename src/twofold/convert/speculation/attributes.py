"""Attributes: reading and writing them as Python does, class, instance and module tables in order."""

from __future__ import annotations

import inspect
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn

from .heap import is_lasting, is_value
from .items import NONE, Dynamic, Instance, Item, Known, Mapping, Method, Outside, Place, Sequence, Super, Tensor
from .library import find_in_class, is_data_descriptor, is_library
from .objects import Namespace, Objects, Raised
from .speculation import defined, inherits

FieldOfTuple = type(inspect.getattr_static(NamedTuple("One", [("field", int)]), "field"))
"""The type of the descriptors of a named tuple's fields."""


class Attributes(Objects):
    """Reading and writing of attributes."""

    def method_of_generator(self, item: Item, name: str) -> Method | None:
        """Return a method of a random generator, none of which is written in Python; None for all else."""
        raise NotImplementedError

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
            case Known() if isinstance(item.object, types.FunctionType) and name in ("__defaults__", "__kwdefaults__"):
                return NONE if getattr(item.object, name) is None else self.part_of(item.object, name)
            case Known() if isinstance(item.object, types.FunctionType) and name in vars(item.object):
                return self.heap.read(self._function(item.object), "get_attr", name)
            case Mapping() if name in item.attributes:
                return item.attributes[name]
            case Mapping() if not hasattr(item.kind, name):
                raise Raised(AttributeError(f"'{item.kind.__name__}' object has no attribute '{name}'"))
            case Known() | Dynamic() | Sequence() | Mapping():
                return self._attribute_of_value(item, name)
            case Super():
                return self._attribute_of_super(item, name)
            case Outside() | Instance():
                return self.method_of_generator(item, name) or self._attribute_of_object(item, name)
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
        if isinstance(held, types.ModuleType) or (is_library(module.__name__) and is_lasting(held)):
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
        is_code = is_lasting(held) or hasattr(type(held), "__get__")
        if (is_library(owner.__module__) and is_code) or isinstance(held, staticmethod | types.FunctionType):
            self._assume_class(owner, name)
            return Known(getattr(kind, name))
        return self.heap.read(self._class(owner), "get_attr", name)

    def _function(self, function: types.FunctionType) -> Outside:
        place = Place(function.__qualname__, id(function), False)
        return Outside(function, self.host.root(function.__name__, function), place)

    def part_of(self, function: types.FunctionType, name: str) -> Outside:
        """Return the defaults of a function, to be read one by one: its calls share those that can change."""
        found = self.heap.read_object(self._function(function), name)
        assert isinstance(found, Outside)
        return found

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
            return Dynamic(sample, self.host.fetch("get_attr", item.value, name))
        try:
            held = getattr(self.known(item), name)
        except AttributeError as error:
            raise Raised(error) from None
        if not (is_value(held) or is_lasting(held)):
            raise self.refuse("unsupported_object", f"reads .{name} of {self.describe(item)}")
        return self.plain(held)

    def _attribute_of_super(self, item: Super, name: str) -> Item:
        order = self.type_of(item.receiver).__mro__
        for owner in order[order.index(item.owner) + 1 :]:
            if name in vars(owner):
                return self.bind(vars(owner)[name], item.receiver, owner, name)
        raise Raised(AttributeError(name))

    def _attribute_of_object(self, item: Outside | Instance, name: str) -> Item:
        kind = self.type_of(item)
        found = find_in_class(kind, name)
        if name == "__dict__" and isinstance(item, Instance):
            return Mapping(Namespace, item.attributes)
        if isinstance(kind.__getattribute__, types.FunctionType):
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __getattribute__")
        if found is not None and is_data_descriptor(found[1]):
            return self.bind(found[1], item, found[0], name)
        own = self._own_attribute(item, name)
        if own is not None:
            return own
        if found is not None:
            self._assume_not_own(item, name)
            return self.bind(found[1], item, found[0], name)
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

    def _assume_not_own(self, item: Outside | Instance, name: str) -> None:
        """Assume that an object has nothing of its own under the name of what its class defines."""
        if isinstance(item, Outside) and isinstance(getattr(item.object, "__dict__", None), dict):
            place = Place(f"vars({item.place.name}) without {name!r}", (id(item.object), "vars", name), False)
            self.host.assume_once(place, inherits, item.value, name)

    def _module_attribute(self, item: Outside, name: str) -> Item | None:
        """Return a parameter, buffer or submodule."""
        for table in ("_parameters", "_buffers", "_modules"):
            held = item.object.__dict__[table]
            if name in held:
                holder = self.heap.read(item, "get_attr", table)
                assert isinstance(holder, Outside)
                return self.heap.read(holder, "get_item", name)
        return None

    def bind(self, found: Any, item: Item, owner: type, name: str) -> Item:
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
            case _ if isinstance(found, FieldOfTuple) and isinstance(item, Outside):
                return self.heap.read(item, "get_item", type(item.object)._fields.index(name))
            case _ if isinstance(getattr(type(found), "__get__", None), types.FunctionType):
                getter = Method(Known(type(found).__get__), self._descriptor(found, owner, name))
                return self.call(getter, [item, Known(self.type_of(item))], {})
            case _ if hasattr(type(found), "__get__"):
                raise self.refuse("unsupported_object", f"{owner.__qualname__}.{name} is a descriptor")
            case _ if isinstance(item, Outside) and not is_library(owner.__module__):
                written = self.heap.overwritten(self._class(owner), "get_attr", name)
                return self.heap.read(item, "get_attr", name) if written is None else written
            case _:
                return self._attribute_of_class(owner, name)

    def _descriptor(self, found: Any, owner: type, name: str) -> Item:
        """Return a descriptor that is written in Python, assumed to stay what the class defines."""
        place = Place(f"{owner.__qualname__}.{name}", (id(owner), "defines", name), False)
        if is_library(owner.__module__):
            return self.heap.fixed(found, self.host.root(name, found), place)
        return self.heap.item(found, self.host.call(defined, self._class(owner).value, name), place)

    # ---- writing -----------------------------------------------------------------------------------------

    def set_attribute(self, item: Item, name: str, value: Item) -> None:
        """Do `item.name = value`."""
        if isinstance(item, Tensor) and name in ("grad", "requires_grad"):
            self.native(setattr, [item, Known(name), value], {})
            return
        if isinstance(item, Known) and isinstance(item.object, types.FunctionType) and not name.startswith("__"):
            item = self._function(item.object)
        elif isinstance(item, Known) and type(item.object) is type and not is_library(item.object.__module__):
            held = vars(item.object).get(name)
            if name.startswith("__") or is_data_descriptor(held) or isinstance(held, types.FunctionType):
                raise self.refuse("unsupported_object", f"writes .{name} of a class")
            self.heap.write(self._class(item.object), "set_attr", name, value)
            return
        if isinstance(item, Mapping) and item.kind is OrderedDict and not hasattr(OrderedDict, name):
            self._set_made(item, name, value)
            return
        if not isinstance(item, Outside | Instance):
            raise self.refuse("unsupported_object", f"writes .{name} of {self.describe(item)}")
        kind = self.type_of(item)
        found = find_in_class(kind, name)
        if found is not None and is_data_descriptor(found[1]) and not isinstance(found[1], types.MemberDescriptorType):
            if isinstance(found[1], property) and found[1].fset is not None:
                self.call(Known(found[1].fset), [item, value], {})
                return
            if isinstance(getattr(type(found[1]), "__set__", None), types.FunctionType):
                setter = Method(Known(type(found[1]).__set__), self._descriptor(found[1], found[0], name))
                self.call(setter, [item, value], {})
                return
            raise self.refuse("unsupported_object", f"{kind.__qualname__}.{name} is a descriptor")
        if isinstance(item, Instance):
            self._set_made(item, name, value)
        elif isinstance(item.object, nn.Module) and kind.__setattr__ is nn.Module.__setattr__:
            self._set_module_attribute(item, name, value)
        elif isinstance(item.object, torch.optim.Optimizer) and name in ("param_groups", "state", "defaults"):
            raise self.refuse("unsupported_object", f"replaces .{name} of an optimizer")
        elif kind.__setattr__ is object.__setattr__ or isinstance(item.object, torch.optim.Optimizer):
            self.heap.write(item, "set_attr", name, value)
        else:
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __setattr__")

    def _set_made(self, item: Instance | Mapping, name: str, value: Item) -> None:
        """Write an attribute of what the call made, which may have been handed out."""
        item.attributes[name] = value
        if item.value is not None:
            self.host.store("set_attr", item.value, name, self.host.argument(value))

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

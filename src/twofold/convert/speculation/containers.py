"""Methods of lists, dictionaries, sets and iterators: those the call made, and those from outside."""

from __future__ import annotations

import operator
from typing import Any

from .attributes import Attributes
from .heap import is_value
from .host import constant
from .items import NONE, Dynamic, Item, Known, Mapping, Outside, Sequence, Stream, View
from .library import DICT_CHANGES, LIST_CHANGES, PURE, SET_CHANGES
from .objects import DICTS, LISTS, Namespace, Raised


class Containers(Attributes):
    """Calls of methods of containers."""

    def container_method(self, item: Item, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call a method of a builtin container."""
        name = function.__name__
        item = self.heap.current(item)
        match item:
            case Sequence() if item.kind is list and name in LIST_CHANGES:
                return self._change_sequence(item, name, arguments, keywords)
            case Sequence():
                return self._ask_sequence(item, name, arguments)
            case Mapping() if item.kind is set:
                return self._set_method(item, name, arguments)
            case Mapping():
                return self._mapping_method(item, name, arguments, keywords)
            case Outside() if isinstance(item.object, DICTS) and name not in DICT_CHANGES:
                return self._ask_dictionary(item, name, arguments)
            case Outside() if isinstance(item.object, (*LISTS, *DICTS, set)):
                return self._change_outside(item, function, arguments, keywords)
            case Stream() if name == "__next__":
                return next(item.upcoming)
            case _:
                return self.method_of_object(item, function, arguments, keywords)

    def method_of_object(self, item: Item, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call a method that is not written in Python."""
        name = getattr(function, "__name__", type(function).__name__)
        if name in ("__init__", "__init_subclass__") and not arguments:
            return NONE
        if name == "__setattr__" and len(arguments) == 2:
            self.set_attribute(item, self.known(arguments[0]), arguments[1])
            return NONE
        raise self.refuse("foreign_function", f"calls {name} of {self.describe(item)}")

    # ---- lists and tuples --------------------------------------------------------------------------------

    def _change_sequence(self, item: Sequence, name: str, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        result = self._change_items(item.items, name, arguments, keywords)
        if item.value is not None:
            given = [self.host.argument(argument) for argument in arguments]
            named = {key: self.host.argument(argument) for key, argument in keywords.items()}
            self.host.effect(getattr(list, name), item.value, *given, keywords=named)
        return result

    def delete_item(self, item: Item, key: Item) -> None:
        """Do `del item[key]`."""
        item = self.heap.current(item)
        match item:
            case Sequence() if item.kind is list and item.value is None:
                self._delete(item.items, self.known(key))
            case Mapping() if item.kind not in (set, Namespace) and item.value is None:
                self._delete(item.entries, self.key(key))
            case Outside() if isinstance(item.object, (list, *DICTS)):
                self._delete_outside(item, self.known(key))
            case _:
                raise self.refuse("unsupported_syntax", f"deletes an item of {self.describe(item)}")

    def _delete(self, held: Any, key: Any) -> None:
        try:
            del held[key]
        except (KeyError, IndexError, TypeError) as error:
            raise Raised(error) from None

    def _delete_outside(self, item: Outside, key: Any) -> None:
        """Have the host graph delete an item. Where there may be none, that is found out before the launch."""
        if not isinstance(key, slice):
            if isinstance(item.object, DICTS) and not self.contains(item, key):
                raise Raised(KeyError(key))
            self.subscript(item, Known(key))
        copied = self.heap.change(item)
        self.dry_run(operator.delitem, [copied, key], {})
        self.host.effect(operator.delitem, item.value, constant(key))

    def _change_items(self, items: list[Item], name: str, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        try:
            match name:
                case "append":
                    items.append(*arguments)
                case "extend":
                    items.extend(list(self.iterate(arguments[0])))
                case "insert":
                    items.insert(self.known(arguments[0]), arguments[1])
                case "pop":
                    return items.pop(*[self.known(argument) for argument in arguments])
                case "clear":
                    items.clear()
                case "reverse":
                    items.reverse()
                case "remove":
                    known, wanted = [self.known(item) for item in items], self.known(arguments[0])
                    if wanted not in known:
                        known.remove(wanted)  # raises what the program's own would
                    items.pop(known.index(wanted))
                case _:
                    items[:] = self.sorted_items(items, keywords)
        except (IndexError, ValueError, TypeError) as error:
            raise Raised(error) from None
        return NONE

    def sorted_items(self, items: list[Item], keywords: dict[str, Item]) -> list[Item]:
        """Return items in order, by keys that are constants."""
        key = keywords.get("key", NONE)
        keyed = [(item if self._is_none(key) else self.call(key, [item], {}), item) for item in items]
        known = [(self.known(by), item) for by, item in keyed]
        reverse = self.truth(keywords.get("reverse", Known(False)))
        return [item for _, item in sorted(known, key=operator.itemgetter(0), reverse=reverse)]

    def _is_none(self, item: Item) -> bool:
        return isinstance(item, Known) and item.object is None

    def _ask_sequence(self, item: Sequence, name: str, arguments: list[Item]) -> Item:
        if name == "copy":
            return Sequence(list, list(item.items))
        if name == "__len__":
            return self.length(item)
        if name == "__getitem__":
            return self.subscript(item, arguments[0])
        if name == "__iter__":
            return Stream(self.iterate(item))
        function = getattr(item.kind, name)
        if function in PURE or item.kind not in (list, tuple):
            return self.compute(function, item, *arguments)
        raise self.refuse("foreign_function", f"calls {name} of a {item.kind.__qualname__}")

    # ---- dictionaries ------------------------------------------------------------------------------------

    def make_mapping(self, kind: type, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Return `dict(...)`, `set(...)` and their like."""
        made = Mapping(set if kind is frozenset else kind, {})
        if kind in (set, frozenset):
            for item in self.iterate(arguments[0]) if arguments else ():
                made.entries[self.key(item)] = item
            return Known(frozenset(made.entries)) if kind is frozenset else made
        self._update(made, arguments, keywords)
        return made

    def _update(self, made: Mapping, arguments: list[Item], keywords: dict[str, Item]) -> None:
        for argument in arguments:
            is_mapping = isinstance(argument, Mapping) or (
                isinstance(argument, Outside) and isinstance(argument.object, DICTS)
            )
            for item in self.iterate(argument):
                key, value = (item, self.subscript(argument, item)) if is_mapping else self.iterate(item)
                made.entries[self.key(key)] = value
        made.entries.update(keywords)

    def _mapping_method(self, item: Mapping, name: str, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        entries = item.entries
        if name in DICT_CHANGES and (item.value is not None or item.kind is Namespace):
            raise self.refuse("unsupported_object", f"calls {name} of a dictionary that others have")
        match name:
            case "get" | "pop" | "setdefault":
                key = self.key(arguments[0])
                if key in entries:
                    return entries.pop(key) if name == "pop" else entries[key]
                default = arguments[1] if len(arguments) > 1 else NONE
                if name == "pop" and len(arguments) == 1:
                    raise Raised(KeyError(key))
                if name == "setdefault":
                    entries[key] = default
                return default
            case "items" | "keys" | "values":
                return View(type(getattr(item.kind(), name)()), name, item)
            case "__iter__":
                return Stream(self.iterate(item))
            case "copy":
                return Mapping(item.kind, dict(entries))
            case "update":
                self._update(item, arguments, keywords)
                return NONE
            case "clear":
                entries.clear()
                return NONE
            case "__contains__":
                return Known(self.key(arguments[0]) in entries)
            case "__getitem__":
                return self.subscript(item, arguments[0])
            case _:
                raise self.refuse("unsupported_call", f"calls {name} of a dictionary")

    def _ask_dictionary(self, item: Outside, name: str, arguments: list[Item]) -> Item:
        held = item.object
        match name:
            case "get":
                key = self.known(arguments[0])
                if self.contains(item, key):
                    return self.subscript(item, Known(key))
                return arguments[1] if len(arguments) > 1 else NONE
            case "items" | "keys" | "values":
                return View(type(getattr(held, name)()), name, item)
            case "__iter__":
                return Stream(self.iterate(item))
            case "copy":
                entries = {key: self.subscript(item, Known(key)) for key in self.heap.keys(item)}
                return Mapping(type(held), entries)
            case "__contains__":
                return Known(self.contains(item, self.known(arguments[0])))
            case "__getitem__":
                return self.subscript(item, arguments[0])
            case "__len__":
                return self.length(item)
            case _:
                raise self.refuse("unsupported_call", f"calls {name} of a dictionary")

    def contains(self, item: Outside, key: Any) -> bool:
        """Decide whether a dictionary from outside has a key."""
        if id(item.object) in self.heap.changed:
            raise self.refuse("unsupported_object", "asks for keys of a dictionary that the call changes")
        if self.heap.overwritten(item, "get_item", key) is not None:
            return True
        self.heap.assume_contains(item, key, key in item.object)
        return key in item.object

    # ---- sets --------------------------------------------------------------------------------------------

    def _set_method(self, item: Mapping, name: str, arguments: list[Item]) -> Item:
        entries = item.entries
        if name in SET_CHANGES and item.value is not None:
            raise self.refuse("unsupported_object", f"calls {name} of a set that was handed out")
        match name:
            case "add":
                entries.setdefault(self.key(arguments[0]), arguments[0])
            case "discard":
                entries.pop(self.key(arguments[0]), None)
            case "update":
                entries.update((self.key(one), one) for one in self.iterate(arguments[0]))
            case "copy":
                return Mapping(set, dict(entries))
            case _:
                raise self.refuse("unsupported_call", f"calls {name} of a set")
        return NONE

    # ---- containers from outside -------------------------------------------------------------------------

    def _change_outside(self, item: Outside, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Have the host graph call a method that changes a container from outside, in program order."""
        name = function.__name__
        allowed = LIST_CHANGES if isinstance(item.object, list) else {*DICT_CHANGES, *SET_CHANGES, *_DEQUE}
        if name not in allowed:
            if name in ("__len__", "__getitem__", "__iter__", "__contains__", "copy", "index", "count"):
                return self._ask_outside(item, name, function, arguments)
            raise self.refuse("unsupported_call", f"calls {name} of {self.describe(item)}")
        if isinstance(item.object, (set, *DICTS)) or name in ("sort", "remove"):
            given = [Known(self.known(argument)) for argument in arguments[:1]] + arguments[1:]
        else:
            given = [self.spread(a) if name in ("extend", "extendleft") else a for a in arguments]
        taken = self._taken(item, name, given)
        copied = self.heap.change(item)
        samples = [self._stand_in(one) for one in given]
        named = {key: self.known(value) for key, value in keywords.items()}
        self.dry_run(getattr(type(copied), name), [copied, *samples], named)
        nested = [self.host.argument(one) for one in given]
        self.host.effect(function, item.value, *nested, keywords={k: constant(v) for k, v in named.items()})
        if name == "clear":
            self.heap.empty(item)
        return taken

    def _taken(self, item: Outside, name: str, given: list[Item]) -> Item:
        """Return what a method that takes an item out will take: the host graph reads it before."""
        if name not in ("pop", "popleft", "popitem", "setdefault"):
            return NONE
        if name in ("popitem", "setdefault") or isinstance(item.object, set) or len(given) > 1:
            raise self.refuse("unsupported_call", f"calls {name} of {self.describe(item)}")
        key = Known(0) if name == "popleft" else given[0] if given else Known(-1)
        return self.subscript(item, key)

    def _stand_in(self, item: Item) -> Any:
        try:
            return self.sample(item)
        except Exception:  # noqa: BLE001 - a closure, an instance: only its being there counts
            return item

    def _ask_outside(self, item: Outside, name: str, function: Any, arguments: list[Item]) -> Item:
        match name:
            case "__len__":
                return self.length(item)
            case "__getitem__":
                return self.subscript(item, arguments[0])
            case "__iter__":
                return Stream(self.iterate(item))
            case "copy":
                return self.spread(item)
            case _:
                if not all(is_value(one) for one in item.object):
                    raise self.refuse("unsupported_call", f"calls {name} of a container of objects")
                late = id(item.object) in self.heap.changed
                given = [self.host.nested(argument) for argument in arguments]
                samples = [self.heap.copy_of(item.object), *map(self.sample, arguments)]
                return Dynamic(
                    self.dry_run(function, samples, {}), self.host.call(function, item.value, *given, late=late)
                )


_DEQUE = ("append", "appendleft", "extend", "extendleft", "pop", "popleft", "clear", "rotate")

"""What the interpreter computes with: objects of the dry run, and what stands for them in the host graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import torch

from twofold.graph import Value

from .source import Code

GLOBALS = "globals()"
"""The name of a module's namespace, of which programs write the items alone."""


_TABLES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something from outside is read: as the program would write it, and a key for it."""

    name: str
    location: Hashable
    is_given: bool
    """Whether it hangs on an argument, so that it may be another object in each call."""

    def attribute(self, holder: Any, name: str) -> Place:
        """Return the place of an attribute of what is here."""
        written = self.name if isinstance(holder, CellType) else f"{self.name}.{name}"
        return Place(written, (self._key(holder), "get_attr", name), self.is_given)

    def item(self, holder: Any, key: Any) -> Place:
        """Return the place of an item of what is here."""
        owner, _, table = self.name.rpartition(".")
        if self.name == GLOBALS:
            written = str(key)
        elif table in _TABLES:
            written = f"{owner}[{key}]" if str(key).isdigit() else f"{owner}.{key}"
        else:
            written = f"{self.name}[{key!r}]"
        return Place(written, (self._key(holder), "get_item", key), self.is_given)

    def _key(self, holder: Any) -> Hashable:
        return self.location if self.is_given else id(holder)


class Item:
    """Something the program computes with."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class Known(Item):
    """An object that the host graph relies on: a literal, a function, a class, a value that is assumed."""

    object: Any


@dataclass(eq=False, slots=True)
class Dynamic(Item):
    """An object of Python that is computed anew in each call. `sample` is that of the dry run."""

    sample: Any
    value: Value


@dataclass(eq=False, slots=True)
class Tensor(Item):
    """A tensor: made by the unit (`slot`), or known to the host graph (`value`)."""

    sample: torch.Tensor
    slot: int | None = None
    value: Value | None = None
    place: Place | None = None


@dataclass(eq=False, slots=True)
class Outside(Item):
    """An object of the heap: the same in each call, or one of the same type, if its place is given."""

    object: Any
    value: Value
    place: Place


@dataclass(eq=False, slots=True)
class Sequence(Item):
    """A list or tuple that the call made. `value` once the host graph has made it too."""

    kind: type
    items: list[Item]
    value: Value | None = None


@dataclass(eq=False, slots=True)
class Mapping(Item):
    """A dictionary, or a set (of keys alone), that the call made."""

    kind: type
    entries: dict[Any, Item]
    value: Value | None = None
    attributes: dict[str, Item] = field(default_factory=dict[str, Item])
    """Of an `OrderedDict`, which has such as other objects do: `state_dict()` keeps versions there."""


@dataclass(eq=False, slots=True)
class Instance(Item):
    """An instance of a plain class that the call made."""

    kind: type
    attributes: dict[str, Item]
    value: Value | None = None


@dataclass(eq=False, slots=True)
class Scope:
    """The variables of one activation of a function, lambda or comprehension."""

    code: Code
    names: frozenset[str]
    parent: Scope | None
    variables: dict[str, Item] = field(default_factory=dict[str, Item])
    exports: frozenset[str] = frozenset()
    """Names declared global."""


@dataclass(eq=False, slots=True)
class Closure(Item):
    """A function made by the call."""

    code: Code
    scope: Scope
    defaults: list[Item]
    keyword_defaults: dict[str, Item]


@dataclass(eq=False, slots=True)
class Method(Item):
    """A function bound to a receiver."""

    function: Item
    receiver: Item


@dataclass(eq=False, slots=True)
class Super(Item):
    """`super()`: the receiver seen from behind a class."""

    owner: type
    receiver: Item


@dataclass(eq=False, slots=True)
class Stream(Item):
    """An iterator. `kind` is its class, where that is known."""

    upcoming: Iterator[Item]
    kind: type | None = None


@dataclass(eq=False, slots=True)
class View(Item):
    """What `keys`, `values` or `items` (`name`) of a dictionary returned: it shows what is there when it is asked."""

    kind: type
    name: str
    mapping: Item


def rebuild(kind: type, items: list[Any]) -> Any:
    """Make a list or tuple, named ones included."""
    if kind in (list, tuple, torch.Size) or kind.__module__ == "torch.return_types":
        return kind(items)
    return kind(*items)


NONE = Known(None)

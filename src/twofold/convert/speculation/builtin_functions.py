"""Builtin functions that ask about objects, make iterators, or have an effect."""

from __future__ import annotations

import ast
import builtins
import functools
import itertools
import logging
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .expressions import Expressions
from .items import NONE, Dynamic, Instance, Item, Known, Mapping, Method, Outside, Place, Sequence, Stream, Tensor
from .objects import DICTS, LISTS, Raised, is_array

Special = Callable[[list[Item], dict[str, Item]], Item]


class BuiltinFunctions(Expressions):
    """The functions that are done by the interpreter itself."""

    yielded: list[Item] = []  # noqa: RUF012 - replaced while a generator of the library runs

    def special(self, function: Any) -> Special | None:
        """Return how to do a function that asks the interpreter itself; None for all others."""
        try:
            name = _SPECIAL.get(function)
        except TypeError:
            return None
        return None if name is None else getattr(self, "_do_" + name)

    # ---- what objects are --------------------------------------------------------------------------------

    def _do_isinstance(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        kinds = self.known(arguments[1])
        item = arguments[0]
        if isinstance(item, Known | Outside):
            return Known(isinstance(item.object, kinds))
        return Known(self._is_subclass(self._class_of(item), kinds))

    def _class_of(self, item: Item) -> type:
        if not isinstance(item, Stream):
            return self.type_of(item)
        if item.kind is None:
            raise self.refuse("unsupported_object", "asks for the class of an iterator")
        return item.kind

    def _is_subclass(self, kind: type, kinds: Any) -> bool:
        return issubclass(kind, kinds)

    def _do_type(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        if len(arguments) != 1:
            raise self.refuse("unsupported_syntax", "makes a class")
        return Known(self._class_of(arguments[0]))

    def _do_callable(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        item = arguments[0]
        return Known(
            callable(item.object) if isinstance(item, Known | Outside) else not isinstance(item, Dynamic | Tensor)
        )

    def _do_len(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return self.length(arguments[0])

    def _do_getattr(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        name = self.known(arguments[1])
        try:
            return self.attribute(arguments[0], name)
        except Raised as raised:
            if len(arguments) < 3 or not isinstance(raised.error, AttributeError):
                raise
        self._assume_no_attribute(arguments[0], name)
        return arguments[2]

    def _do_hasattr(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        name = self.known(arguments[1])
        item = arguments[0]
        if isinstance(item, Tensor):
            return Known(hasattr(torch.Tensor, name))
        try:
            self.attribute(item, name)
        except Raised:
            self._assume_no_attribute(item, name)
            return Known(False)
        return Known(True)

    def _assume_no_attribute(self, item: Item, name: str) -> None:
        if isinstance(item, Outside):
            value = self.host.call(hasattr, item.value, name)
            place = Place(f"hasattr({item.place.name}, {name!r})", (id(item.object), "hasattr", name), False)
            self.host.assume_branch(value, False, place)

    def _do_setattr(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        self.set_attribute(arguments[0], self.known(arguments[1]), arguments[2])
        return NONE

    def _do_super(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return self.make_super(arguments)

    def _do_has_torch_function(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        """Answer as PyTorch does where nobody listens: by the types of tensors, which are checked anyhow."""
        return Known(torch.overrides.has_torch_function(*map(self.sample, arguments)))

    # ---- iterators ---------------------------------------------------------------------------------------

    def _do_enumerate(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        start = self.known(keywords.get("start", arguments[1] if len(arguments) > 1 else Known(0)))
        items = self.iterate(arguments[0])
        return Stream((Sequence(tuple, [Known(index), item]) for index, item in enumerate(items, start)), enumerate)

    def _do_zip(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        strict = self.truth(keywords.get("strict", Known(False)))
        streams = [self.iterate(argument) for argument in arguments]

        def rows() -> Iterator[Item]:
            try:
                for row in zip(*streams, strict=strict):
                    yield Sequence(tuple, list(row))
            except ValueError as error:
                raise Raised(error) from None

        return Stream(rows(), zip)

    def _do_reversed(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Stream(reversed(list(self.iterate(arguments[0]))))

    def _do_map(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        function, *sources = arguments
        streams = [self.iterate(source) for source in sources]
        return Stream((self.call(function, list(row), {}) for row in zip(*streams, strict=False)), map)

    def _do_filter(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        function, source = arguments
        return Stream((one for one in self.iterate(source) if self.truth(self.call(function, [one], {}))), filter)

    def _do_islice(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Stream(itertools.islice(self.iterate(arguments[0]), *map(self.known, arguments[1:])))

    def _do_chain(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Stream(item for argument in arguments for item in self.iterate(argument))

    def _do_product(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        pools = [list(self.iterate(argument)) for argument in arguments]
        return Stream(Sequence(tuple, list(row)) for row in itertools.product(*pools))

    def _do_iter(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        if len(arguments) != 1:
            raise self.refuse("unsupported_call", "iter with a sentinel")
        if isinstance(arguments[0], Outside) and not isinstance(arguments[0].object, (*LISTS, *DICTS, nn.Module)):
            raise self.refuse("unsupported_object", f"iterates over {self.describe(arguments[0])}")
        return Stream(self.iterate(arguments[0]))

    def _do_next(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        stream = arguments[0]
        if not isinstance(stream, Stream):
            raise self.refuse("unsupported_object", f"takes the next item of {self.describe(stream)}")
        item = next(stream.upcoming, None)
        if item is None and len(arguments) > 1:
            return arguments[1]
        if item is None:
            raise Raised(StopIteration())
        return item

    # ---- of all items ------------------------------------------------------------------------------------

    def _do_list(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Sequence(list, list(self.iterate(arguments[0])) if arguments else [])

    def _do_tuple(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Sequence(tuple, list(self.iterate(arguments[0])) if arguments else [])

    def _do_any(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Known(any(self.truth(item) for item in self.iterate(arguments[0])))

    def _do_all(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Known(all(self.truth(item) for item in self.iterate(arguments[0])))

    def _do_sum(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        total = keywords.get("start", arguments[1] if len(arguments) > 1 else Known(0))
        numbers: list[Item] = []
        for item in self.iterate(arguments[0]):
            if isinstance(total, Tensor | Sequence) or isinstance(item, Tensor | Sequence | Outside | Instance):
                total = self.operate(operator.add, "add", self._sum_of(numbers, total), item)
                numbers.clear()
            else:
                numbers.append(item)
        return self._sum_of(numbers, total)

    def _sum_of(self, numbers: list[Item], start: Item) -> Item:
        """Add numbers up in one go, as `sum` does with its own way of rounding."""
        return self.compute(sum, Sequence(list, list(numbers)), start) if numbers else start

    def _do_min(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        return self._extreme(min, ast.Lt(), arguments, keywords)

    def _do_max(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        return self._extreme(max, ast.Gt(), arguments, keywords)

    def _extreme(self, function: Any, kind: ast.cmpop, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        items = list(self.iterate(arguments[0])) if len(arguments) == 1 else arguments
        if not items and "default" in keywords:
            return keywords["default"]
        if not keywords and not any(isinstance(item, Tensor) for item in items):
            return self.compute(function, Sequence(list, items))
        key = keywords.get("key")
        keyed = [(item if key is None else self.call(key, [item], {}), item) for item in items]
        best = keyed[0]
        for one in keyed[1:]:
            if self.truth(self._compare(kind, one[0], best[0])):
                best = one
        return best[1]

    def _do_sorted(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        source = arguments[0]
        if isinstance(source, Mapping):  # a set perhaps, whose order is of no account here
            items: list[Item] = list(map(Known, source.entries))
        else:
            items = list(self.iterate(source))
        if not keywords and any(isinstance(item, Dynamic) for item in items):
            return self.compute(sorted, Sequence(list, items))
        return Sequence(list, self.sorted_items(items, keywords))

    def _do_range(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Known(range(*map(self.known, arguments)))

    # ---- numbers and text --------------------------------------------------------------------------------

    def _do_bool(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        item = arguments[0] if arguments else Known(False)
        if isinstance(item, Tensor | Dynamic):
            return self.compute(bool, item)
        return Known(self.truth(item))

    def _do_str(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return self.to_text(str, *arguments) if arguments else Known("")

    def _do_repr(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return self.to_text(repr, *arguments)

    def _do_format(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return self.to_text(format, *arguments)

    # ---- effects -----------------------------------------------------------------------------------------

    def _do_print(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        self._write(print, arguments, keywords)
        return NONE

    def _write(self, function: Any, arguments: list[Item], keywords: dict[str, Item], *first: Any) -> None:
        """Have the host graph write something, with what it says decided here."""
        given = [self._as_written(item) for item in arguments]
        named = {name: self.host.nested(item) for name, item in keywords.items()}
        self.host.effect(function, *first, *map(self.host.nested, given), keywords=named)

    def _as_written(self, item: Item) -> Item:
        """Return an item, or one like it, whose text cannot change until the call is over."""
        match item:
            case Dynamic() if is_array(item.sample):
                return self.compute(np.ndarray.copy, item)
            case Known() | Dynamic():
                return item
            case Sequence() | Mapping() if self._holds_tensors(item):
                raise self.refuse("unsupported_object", "writes tensors within a container")
            case Sequence() | Mapping():
                self.note_data(item)
                return item
            case Outside() if isinstance(item.object, (*LISTS, *DICTS)):
                self.note_data(item)
                return item
            case _:
                return self.to_text(str, item)

    def _holds_tensors(self, item: Sequence | Mapping) -> bool:
        held = item.items if isinstance(item, Sequence) else list(item.entries.values())
        return any(
            isinstance(one, Tensor) or (isinstance(one, Sequence | Mapping) and self._holds_tensors(one))
            for one in held
        )

    def call(self, callee: Item, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call an item."""
        if isinstance(callee, Method) and isinstance(callee.function, Known):
            function, receiver = callee.function.object, callee.receiver
            if function in _LOGGING and isinstance(receiver, Outside):
                self._log(function, arguments, keywords, receiver)
                return NONE
        return super().call(callee, arguments, keywords)

    def _log(self, function: Any, arguments: list[Item], keywords: dict[str, Item], receiver: Outside) -> None:
        """Have the host graph log something. An object is given as its text, which `%s` alone leaves as it is."""
        message = next((item.object for item in arguments if isinstance(item, Known) and type(item.object) is str), "")
        if "%" in message.replace("%s", "") and any(isinstance(i, Tensor | Outside | Instance) for i in arguments):
            raise self.refuse("unsupported_call", "logs an object other than by %s")
        self._write(function, arguments, keywords, receiver.value)

    def _do_partial(self, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        raise self.refuse("unsupported_call", "functools.partial within the call")

    def _do_bind(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        return Method(arguments[0], arguments[1])

    def _do_setitem(self, arguments: list[Item], _: dict[str, Item]) -> Item:
        self.set_item(*arguments)
        return NONE

    # ---- generators of the library -----------------------------------------------------------------------

    def _evaluate_Yield(self, node: ast.Yield) -> Item:
        self.yielded.append(NONE if node.value is None else self.evaluate(node.value))
        return NONE

    def _evaluate_YieldFrom(self, node: ast.YieldFrom) -> Item:
        self.yielded.extend(self.iterate(self.evaluate(node.value)))
        return NONE


_LOGGING = frozenset(getattr(logging.Logger, name) for name in ("debug", "info", "warning", "error", "critical", "log"))

_NAMES = (
    "isinstance type callable len getattr hasattr setattr super enumerate zip reversed map filter iter next list tuple"
    " any all sum min max sorted range bool str repr format print"
)
_SPECIAL: dict[Any, str] = {getattr(builtins, name): name for name in _NAMES.split()} | {
    functools.partial: "partial",
    operator.setitem: "setitem",
    types.FunctionType.__get__: "bind",
    itertools.islice: "islice",
    itertools.chain: "chain",
    itertools.product: "product",
    torch.overrides.has_torch_function: "has_torch_function",
}

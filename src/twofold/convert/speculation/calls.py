"""Calls: what is interpreted, what is asked of PyTorch under the listener, and what is left to the host graph."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as _hooks
from torch.optim.optimizer import Optimizer

from twofold.capture.functions import FROM_HOST_DATA
from twofold.capture.intercept import without_preparation
from twofold.capture.leaf_modules import call_of, leaf_of

from .draws import DRAWS
from .heap import Heap
from .host import Host
from .items import (
    NONE,
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
)
from .library import (
    CONTEXTS,
    PURE,
    find_in_class,
    is_library,
    is_overridable,
    is_plain_class,
    is_torch,
    sets_process_state,
)
from .objects import is_array
from .source import Code
from .speculation import referent, unhooked
from .torch_calls import TorchCalls
from .walk import Walk

MAX_DEPTH = 60
"""Calls within calls that are interpreted: deeper recursion is for graphs of its own."""

_TENSOR = torch.Tensor


class Calls(TorchCalls):
    """Calls of everything. Subclasses know how to run the body of a function."""

    def __init__(self, host: Host, heap: Heap, scope: Scope, walk: Walk) -> None:
        super().__init__(host, heap, scope, walk)
        self._depth = 0

    def run(self, code: Code, scope: Scope) -> Item:
        """Run the body of a function."""
        raise NotImplementedError

    # ---- dispatch ----------------------------------------------------------------------------------------

    def call(self, callee: Item, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Call an item."""
        match callee:
            case Method():
                return self._call_method(callee, arguments, keywords)
            case Closure():
                return self._inline(callee.code, callee.scope, self._bind_closure(callee, arguments, keywords))
            case Known():
                return self._call_known(callee.object, arguments, keywords)
            case Outside() if isinstance(callee.object, nn.Module):
                return self._call_module(callee, arguments, keywords)
            case Outside() if isinstance(callee.object, types.MethodType):
                bound: Any = callee.object
                receiver = self.attribute(callee, "__self__")
                return self.call(Method(Known(bound.__func__), receiver), arguments, keywords)
            case Outside() if isinstance(callee.object, functools.partial):
                function, given, named = (self.attribute(callee, n) for n in ("func", "args", "keywords"))
                merged = {str(k): self.subscript(named, Known(k)) for k in self.iterate_known(named)}
                return self.call(function, [*self.iterate(given), *arguments], merged | keywords)
            case Outside() if isinstance(callee.object, weakref.ref):
                place = Place(f"{callee.place.name}()", (id(callee.object), "()"), False)
                return self.heap.item(callee.object(), self.host.call(referent, callee.value), place)
            case Outside() | Instance():
                found = find_in_class(self.type_of(callee), "__call__")
                if found is None:
                    raise self.refuse("raises", f"{self.describe(callee)} is not callable")
                return self.call(Method(Known(found[1]), callee), arguments, keywords)
            case _:
                raise self.refuse("unsupported_call", f"calls {self.describe(callee)}")

    def iterate_known(self, item: Item) -> list[Any]:
        """Return the keys of a mapping."""
        return [self.known(key) for key in self.iterate(item)]

    def _call_method(self, method: Method, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        receiver = method.receiver
        if isinstance(method.function, Known):
            function = method.function.object
            if isinstance(receiver, Outside) and type(receiver.object) in DRAWS:
                return self.draw(receiver, function.__name__, arguments, keywords)
            if isinstance(receiver, Sequence | Mapping | Outside | Instance | Stream) and not isinstance(
                function, types.FunctionType
            ):
                return self.container_method(receiver, function, arguments, keywords)
            if isinstance(receiver, Dynamic | Known) and not isinstance(function, types.FunctionType):
                return self._call_method_of_value(receiver, function, arguments, keywords)
        return self.call(method.function, [receiver, *arguments], keywords)

    def _call_method_of_value(self, item: Item, function: Any, arguments: list[Item], keywords: Any) -> Item:
        name = getattr(function, "__name__", "")
        if isinstance(item, Dynamic) and is_array(item.sample) and name in ("fill", "sort", "put"):
            return self.change_array(item, function, arguments, keywords)
        return self._call_known(function, [item, *arguments], keywords)

    def change_array(self, item: Dynamic, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Have the host graph change an array in place; return it, or None, as the function does."""
        if item.sample.dtype.hasobject or not _owns_memory(item.sample):
            raise self.refuse("unsupported_object", "changes an array of objects, or memory of a tensor")
        named = {name: self.sample(given) for name, given in keywords.items()}
        result = self.dry_run(function, [self.sample(item), *map(self.sample, arguments)], named)
        self.heap.arrays_changed.append(item)
        nested = {name: self.host.nested(one) for name, one in keywords.items()}
        self.host.change(function, item.value, list(map(self.host.nested, arguments)), nested)
        return NONE if result is None else item

    def _call_known(self, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        function = without_preparation(function)
        special = self.special(function)
        if special is not None:
            return special(arguments, keywords)
        if isinstance(function, type):
            return self._construct(function, arguments, keywords)
        generator = self.generator_of(function)
        if generator is not None:
            return self.draw(generator, function.__name__, arguments, keywords)
        if isinstance(function, types.MethodType):
            raise self.refuse("foreign_function", f"calls {function.__qualname__}")
        if is_torch(function):
            if sets_process_state(function):
                raise self.refuse("foreign_function", f"calls torch.{function.__name__}, for the whole process")
            return self._call_torch(function, arguments, keywords)
        try:
            is_pure = function in PURE
        except TypeError:
            is_pure = False
        if is_pure:
            return self.compute(function, *arguments, **keywords)
        if isinstance(function, types.FunctionType):
            return self._inline_function(function, arguments, keywords)
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        raise self.refuse("foreign_function", f"calls {name}, whose source or effect is not known")

    def special(self, function: Any) -> Callable[[list[Item], dict[str, Item]], Item] | None:
        """Return how to do a function that asks the interpreter itself; None for all others."""
        raise NotImplementedError

    # ---- functions written in Python ---------------------------------------------------------------------

    def _inline_function(self, function: types.FunctionType, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        code = Code.of(function) if _may_inline(function) else None
        if code is None:
            raise self.refuse("foreign_function", f"calls {function.__module__}.{function.__qualname__}")
        defaults = self._defaults(function)
        named = self._keyword_defaults(function)
        closure = Closure(code, Scope(code, frozenset(), None), defaults, named)
        return self._inline(code, None, self._bind_closure(closure, arguments, keywords))

    def _defaults(self, function: types.FunctionType) -> list[Item]:
        """Return the default values of a function: mutable ones are shared by its calls."""
        if not function.__defaults__:
            return []
        held = self.part_of(function, "__defaults__")
        return [self.heap.read(held, "get_item", index) for index in range(len(function.__defaults__))]

    def _keyword_defaults(self, function: types.FunctionType) -> dict[str, Item]:
        if not function.__kwdefaults__:
            return {}
        held = self.part_of(function, "__kwdefaults__")
        return {name: self.heap.read(held, "get_item", name) for name in function.__kwdefaults__}

    def _bind_closure(self, closure: Closure, given: list[Item], named: dict[str, Item]) -> dict[str, Item]:
        """Return the variables that a function begins with."""
        arguments = closure.code.definition.args
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        variables: dict[str, Item] = dict(zip(positional, given, strict=False))
        rest = dict(named)
        extra = given[len(positional) :]
        if arguments.vararg is not None:
            variables[arguments.vararg.arg] = Sequence(tuple, extra)
        elif extra:
            raise self.refuse("raises", f"TypeError: {closure.code.name}() takes {len(positional)} arguments")
        for name in (*positional, *(a.arg for a in arguments.kwonlyargs)):
            if name in rest and name not in variables:
                variables[name] = rest.pop(name)
        defaults = dict(zip(positional[len(positional) - len(closure.defaults) :], closure.defaults, strict=True))
        for name, item in (defaults | closure.keyword_defaults).items():
            variables.setdefault(name, item)
        if arguments.kwarg is not None:
            variables[arguments.kwarg.arg] = Mapping(dict, dict(rest))
        elif rest:
            raise self.refuse(
                "raises", f"TypeError: {closure.code.name}() got an unexpected argument {next(iter(rest))}"
            )
        missing = {*positional, *(a.arg for a in arguments.kwonlyargs)} - variables.keys()
        if missing:
            raise self.refuse("raises", f"TypeError: {closure.code.name}() misses the argument {min(missing)}")
        return variables

    def _inline(self, code: Code, parent: Scope | None, variables: dict[str, Item]) -> Item:
        if code.is_generator and not code.is_library:
            raise self.refuse("unsupported_syntax", f"calls {code.name}, a generator or coroutine")
        if self._depth >= MAX_DEPTH:
            raise self.refuse("too_deep", f"calls nested more than {MAX_DEPTH} deep")
        outer, node, origin = self.scope, self.node, self.host.origin
        self.scope = Scope(code, code.names, parent, variables)
        self._depth += 1
        try:
            return self.run(code, self.scope)
        finally:
            self._depth -= 1
            self.scope, self.node, self.host.origin = outer, node, origin

    # ---- objects made by the call ------------------------------------------------------------------------

    def _construct(self, kind: type, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        if issubclass(kind, CONTEXTS) or kind in _CONSTANTS:
            named = {name: self.known(item) for name, item in keywords.items()}
            with torch._C.DisableTorchFunction():
                return Known(kind(*map(self.known, arguments), **named))
        if kind is dict or kind is OrderedDict or kind is set or kind is frozenset:
            return self.make_mapping(kind, arguments, keywords)
        if issubclass(kind, tuple) and hasattr(kind, "_fields") and not keywords:
            return Sequence(kind, arguments)
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            names: tuple[str, ...] = getattr(kind, "_fields")  # noqa: B009
            return Sequence(kind, [*arguments, *(keywords[name] for name in names[len(arguments) :])])
        if issubclass(kind, BaseException) and not isinstance(kind.__init__, types.FunctionType):
            named = {name: self.known(item) for name, item in keywords.items()}
            return Known(kind(*map(self.known, arguments), **named))
        if kind in PURE:
            return self.compute(kind, *arguments, **keywords)
        if not is_plain_class(kind):
            raise self.refuse("unsupported_object", f"makes a {kind.__qualname__}")
        made = Instance(kind, {})
        if dataclasses.is_dataclass(kind) and "<string>" in kind.__init__.__code__.co_filename:
            self._fill_dataclass(made, arguments, keywords)
        elif kind.__init__ is not object.__init__:
            self.call(self.attribute(made, "__init__"), arguments, keywords)
        return made

    def _fill_dataclass(self, made: Instance, arguments: list[Item], keywords: dict[str, Item]) -> None:
        kind: Any = made.kind
        given = inspect.signature(kind).bind(*arguments, **keywords).arguments
        for field in dataclasses.fields(kind):
            if not field.init:
                raise self.refuse("unsupported_object", f"makes a {kind.__qualname__} with fields that are not given")
            if field.name in given:
                made.attributes[field.name] = given[field.name]
            elif field.default_factory is not dataclasses.MISSING:
                made.attributes[field.name] = self.call(Known(field.default_factory), [], {})
            else:
                made.attributes[field.name] = self.plain(field.default)
        if hasattr(kind, "__post_init__"):
            self.call(self.attribute(made, "__post_init__"), [], {})

    # ---- modules -----------------------------------------------------------------------------------------

    def _call_module(self, item: Outside, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        module: nn.Module = item.object
        kind = type(module)
        if find_in_class(kind, "__call__") != find_in_class(nn.Module, "__call__"):
            raise self.refuse("unsupported_object", f"{kind.__qualname__} defines __call__")
        self._assume_no_hooks(item)
        leaf = leaf_of(module) if self.walk.path is None else None
        if leaf is not None:
            # The attributes are those that this call has set: `train()` may come before.
            call = call_of(leaf, tuple(self.known(self.attribute(item, name)) for name in leaf.attributes))
            if call is not None:
                tensors = [self.attribute(item, name) for name in (*leaf.parameters, *leaf.buffers)]
                return self.native(call, [*tensors, *arguments], keywords)
        owner, forward = find_in_class(kind, "forward") or (nn.Module, nn.Module.forward)
        return self.call(self.bind(forward, item, owner, "forward"), arguments, keywords)

    def _assume_no_hooks(self, item: Outside) -> None:
        if not unhooked(item.object) or any(getattr(_hooks, name) for name in _GLOBAL_HOOKS):
            raise self.refuse("module_hook", f"{type(item.object).__qualname__} has hooks, or a forward of its own")
        place = Place(f"{item.place.name} without hooks", (id(item.object), "hooks"), False)
        self.host.assume_once(place, unhooked, item.value)
        for name in _GLOBAL_HOOKS:
            table = getattr(_hooks, name)
            place = Place(f"torch.nn.modules.module.{name}", id(table), False)
            self.host.assume_once(place, operator.not_, self.host.root(name, table))

    # ---- torch functions ---------------------------------------------------------------------------------

    def _call_torch(self, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        receiver = arguments[0] if arguments else None
        held = receiver.object if isinstance(receiver, Outside) else None
        name = getattr(function, "__name__", "")
        if isinstance(held, Optimizer | nn.Module) and name == "zero_grad":
            return self.native(function, arguments, keywords, owner=held)
        if isinstance(held, Optimizer) and name == "step":
            return self._step(receiver, arguments[1:], keywords)
        if isinstance(function, types.FunctionType) and not is_overridable(function):
            return self._inline_function(function, arguments, keywords)
        if function in FROM_HOST_DATA:
            return self._from_host_data(function, arguments, keywords)
        return self.native(function, arguments, keywords)

    def _step(self, receiver: Item | None, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        assert isinstance(receiver, Outside)
        optimizer: Any = receiver.object
        if arguments or keywords:
            raise self.refuse("unsupported_call", "optimizer.step takes a closure")
        if self.walk.path is not None:
            raise self.refuse("several_units", "an optimizer steps after the unit has ended")
        kind_step = type(optimizer).step
        self._listen(lambda: kind_step(optimizer))
        self._settle([])
        return NONE

    # ---- super -------------------------------------------------------------------------------------------

    def make_super(self, arguments: list[Item]) -> Item:
        """Return `super()` or `super(kind, receiver)`."""
        if arguments:
            return Super(self.known(arguments[0]), arguments[1])
        scope: Scope | None = self.scope
        while scope is not None:
            cell = scope.code.cells.get("__class__")
            if cell is not None:
                first = (*scope.code.definition.args.posonlyargs, *scope.code.definition.args.args)[0].arg
                return Super(cell.cell_contents, scope.variables[first])
            scope = scope.parent
        raise self.refuse("unsupported_call", "super() outside a method")


_CONSTANTS = frozenset({torch.Size, torch.device, torch.Generator, torch.finfo, torch.iinfo, np.finfo, np.iinfo})
"""Types of PyTorch's whose instances are made of constants and no tensors."""

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

_OWN_CODE = str(Path(__file__).parents[2])


def _owns_memory(array: Any) -> bool:
    """Whether an array shows memory of an array."""
    return array is None or (isinstance(array, np.ndarray) and _owns_memory(array.base))


def _may_inline(function: types.FunctionType) -> bool:
    """Whether a function is the program's own, or PyTorch's: other libraries are taken from the tables alone."""
    file = function.__code__.co_filename
    if file.startswith(_OWN_CODE):
        return False
    if is_library(function.__module__) and not is_torch(function):
        return False
    return "/site-packages/" in file or not any(part in file for part in ("/lib/python3", "<frozen"))

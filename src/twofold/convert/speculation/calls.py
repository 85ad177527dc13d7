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

from twofold.capture.functions import FROM_HOST_DATA, METADATA, display_name
from twofold.capture.intercept import Interception, unheard
from twofold.capture.leaf_modules import LEAVES, leaf_call
from twofold.graph import current_ambient
from twofold.capture.trace import External, leaves
from twofold.capture.trace_graph import PathNode
from twofold.convert.refusals import Refusal, Refused
from twofold.graph import Argument, TensorSpec
from twofold.graph.effects import target_has_effect

from .containers import Containers
from .heap import Heap
from .host import Host, constant
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
    Tensor,
)
from .library import CONTEXTS, PURE, find_in_class, is_change, is_overridable, is_plain_class, is_pure, is_torch
from .objects import LISTS
from .source import Code
from .speculation import metadata, referent, unhooked
from .walk import Walk

MAX_DEPTH = 60
"""Calls within calls that are interpreted: deeper recursion is for graphs of its own."""

_TENSOR = torch.Tensor


class Calls(Containers):
    """Calls of everything. Subclasses know how to run the body of a function."""

    def __init__(self, host: Host, heap: Heap, scope: Scope, walk: Walk) -> None:
        super().__init__(host, heap, scope)
        self.walk = walk
        self._interception = Interception(walk)
        self._depth = 0
        self._measured: dict[int, Tensor] = {}
        """Tensors from outside of which Python has asked more than the unit checks."""
        self._guarded: set[int] = set()
        """Tensors of library modules, by `id`, that are assumed to be where they are."""
        self.slot_items: dict[int, Tensor] = {}
        self._events = 0
        self._tensors_changed = False
        """Whether the call has written to tensors after its unit."""

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
            if isinstance(receiver, Sequence | Mapping | Outside | Stream) and not isinstance(
                function, types.FunctionType
            ):
                return self.container_method(receiver, function, arguments, keywords)
            if isinstance(receiver, Dynamic | Known) and not isinstance(function, types.FunctionType):
                return self._call_method_of_value(receiver, function, arguments, keywords)
        return self.call(method.function, [receiver, *arguments], keywords)

    def _call_method_of_value(self, item: Item, function: Any, arguments: list[Item], keywords: Any) -> Item:
        is_array = isinstance(item, Dynamic) and isinstance(item.sample, np.ndarray)
        if is_array and getattr(function, "__name__", "") in ("fill", "sort", "put", "resize"):
            return self.change_array(item, function, arguments, keywords)
        return self._call_known(function, [item, *arguments], keywords)

    def change_array(self, item: Item, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        """Have the host graph change an array in place."""
        named = {name: self.sample(given) for name, given in keywords.items()}
        result = self.dry_run(function, [self.sample(item), *map(self.sample, arguments)], named)
        self.heap.arrays_changed = True
        given = [self.host.nested(one) for one in (item, *arguments)]
        self.host.effect(function, *given, **{n: self.host.nested(one) for n, one in keywords.items()})
        return NONE if result is None else item

    def _call_known(self, function: Any, arguments: list[Item], keywords: dict[str, Item]) -> Item:
        special = self.special(function)
        if special is not None:
            return special(arguments, keywords)
        if isinstance(function, type):
            return self._construct(function, arguments, keywords)
        if isinstance(function, types.MethodType):
            raise self.refuse("foreign_function", f"calls {function.__qualname__}")
        if is_torch(function):
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
        defaults = list(map(self.default(function), range(len(function.__defaults__ or ()))))
        named = {name: self.default(function)(name) for name in function.__kwdefaults__ or {}}
        closure = Closure(code, Scope(code, frozenset(), None), defaults, named)
        return self._inline(code, None, self._bind_closure(closure, arguments, keywords))

    def default(self, function: types.FunctionType) -> Callable[[Any], Item]:
        """Return how to read a default value of a function: mutable ones are shared by its calls."""

        def read(key: int | str) -> Item:
            held: Any = (function.__defaults__ if isinstance(key, int) else function.__kwdefaults__)[key]  # type: ignore[index]
            root = self.host.root(function.__name__, function)
            name = "__defaults__" if isinstance(key, int) else "__kwdefaults__"
            place = Place(f"{function.__name__}.{name}[{key}]", (id(function), name, key), False)
            if isinstance(held, bool | int | float | str | type(None)):
                return Known(held)
            return self.heap.item(
                held, self.host.fetch("get_item", self.host.fetch("get_attr", root, name), key), place
            )

        return read

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
        if issubclass(kind, CONTEXTS) or kind in (torch.Size, torch.device, torch.Generator):
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
        if self.walk.path is None and kind in LEAVES and leaf_call(module) is not None:
            self._assume_leaf(item)
            return self.native(module, arguments, keywords)
        return self.call(self.attribute(item, "forward"), arguments, keywords)

    def _assume_no_hooks(self, item: Outside) -> None:
        if not unhooked(item.object) or any(getattr(_hooks, name) for name in _GLOBAL_HOOKS):
            raise self.refuse("module_hook", f"{type(item.object).__qualname__} has hooks, or a forward of its own")
        place = Place(f"{item.place.name} without hooks", (id(item.object), "hooks"), False)
        self.host.assume_once(place, unhooked, item.value)
        for name in _GLOBAL_HOOKS:
            table = getattr(_hooks, name)
            place = Place(f"torch.nn.modules.module.{name}", id(table), False)
            self.host.assume_once(place, operator.not_, self.host.root(name, table))

    def _assume_leaf(self, item: Outside) -> None:
        """Assume all that the forward of a leaf module reads."""
        leaf = LEAVES[type(item.object)]
        for name in leaf.attributes:
            held = self.attribute(item, name)
            if not isinstance(held, Known):
                self.known(held)
        for table, names in (("_parameters", leaf.parameters), ("_buffers", leaf.buffers)):
            for name in names:
                held = self.attribute(item, name)
                if isinstance(held, Tensor) and held.value is not None:
                    self._guarded.add(id(held.sample))
                    place = held.place or self.here()
                    self.host.assume_identity(held.value, held.sample, place, "tensor")
                elif not isinstance(held, Known):
                    raise self.refuse("no_graph", f"{table} of a module were replaced within the call")

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
        if any(self.heap.is_changed(held) for held in (optimizer.param_groups, *optimizer.param_groups)):
            raise self.refuse("unsupported_object", "the call sets an optimizer before it steps")
        kind_step = type(optimizer).step
        self._listen(lambda: kind_step(optimizer))
        self._settle([])
        return NONE

    def native(self, function: Any, arguments: list[Item], keywords: dict[str, Item], owner: Any = None) -> Item:
        """Call a torch function under the listener, with placeholders for what the unit makes."""
        if self.walk.path is not None:
            return self._call_late(function, arguments, keywords, owner)
        given = [self._for_torch(item) if owner is None or index else owner for index, item in enumerate(arguments)]
        named = {name: self._for_torch(item) for name, item in keywords.items()}
        numbers: list[Dynamic] = []
        self._collect_numbers([*arguments, *keywords.values()], numbers)
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
            refusal = error.refusal
            where = self.scope.code.origin(self.node)
        except Exception as error:  # noqa: BLE001 - what PyTorch says to the program
            text = f"{type(error).__name__}: {str(error)[:160]}"
            refusal, where = Refusal("raises", text), self.scope.code.origin(self.node)
        finally:
            self._interception.stop()
        del action
        raise self.refuse(refusal.code, refusal.construct) if where is not None else Refused(refusal)

    def _for_torch(self, item: Item) -> Any:
        match item:
            case Outside() if isinstance(item.object, LISTS):
                return self._for_torch(self.spread(item))
            case Outside() if isinstance(item.object, nn.Module):
                return item.object
            case Sequence():
                items = [self._for_torch(inner) for inner in item.items]
                return item.kind(items) if item.kind in (list, tuple, torch.Size) else item.kind(*items)
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
                self._check_settings(node)
                continue
            self._assume_statics(node)
            for index in node.fed:
                self._give(index, self.walk.feeds[index], numbers, fed)
        for event in self.walk.steps:
            self.host.step(event)
        self.walk.steps.clear()
        return fed

    def _check_settings(self, node: PathNode) -> None:
        """Refuse an optimizer that was set by this call: the step reads what is on the heap when it is launched."""
        optimizer: Any = None if node.event is None or node.kind == "zero_grad" else node.event.arguments[0]
        if optimizer is not None and any(map(self.heap.is_written, optimizer.param_groups)):
            raise self.refuse("unsupported_object", "an optimizer is set in the call that it steps in")

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
        late = self.heap.arrays_changed and any(isinstance(self.sample(item), np.ndarray) for item in given)
        nested = {name: self.host.nested(item) for name, item in keywords.items()}
        value = self.host.call(
            function, *map(self.host.nested, arguments), late=late, ambient=current_ambient(), **nested
        )
        return self.heap.add_tensor(made, value, self.here().name)

    # ---- after the unit ----------------------------------------------------------------------------------

    def _call_late(self, function: Any, arguments: list[Item], keywords: dict[str, Item], owner: Any) -> Item:
        """Call a torch function when the unit is over: eagerly, by the host graph."""
        items = [*arguments, *keywords.values()]
        if owner is not None or function in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
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
            given = map(self.host.nested, arguments)
            self.host.effect(function, *given, ambient=current_ambient(), **self._nested_all(keywords))
            return arguments[0]
        given = [self.host.nested(self._settled(item)) for item in arguments]
        named = self._nested_all({name: self._settled(item) for name, item in keywords.items()})
        value = self.host.call(function, *given, ambient=current_ambient(), late=self._tensors_changed, **named)
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
        self._note_measured([item])
        return Known(result)

    def _late_sample(self, item: Item, is_look: bool = False) -> Any:
        if isinstance(item, Sequence) and item.kind in (list, tuple):
            return item.kind(self._late_sample(inner, is_look) for inner in item.items)
        if not isinstance(item, Tensor):
            return self.sample(item)
        with unheard(), torch.no_grad():
            if item.slot is None and item.value in self.host.from_unit:
                # Made by a dry run. A copy has other strides.
                return item.sample.detach() if is_look else item.sample.clone()
            known = self.walk.graph.placeholders.get(id(item.sample))
            spec = TensorSpec.of(item.sample) if known is None else known[1].spec
            shape = [size for size in spec.shape if size is not None]
            seen = None if self.walk.path is None else self.walk.path.trace.samples.get(item.slot)
            sample = torch.full(shape, 0 if seen is None else seen, dtype=spec.dtype, device=spec.device)
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


_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

_OWN_CODE = str(Path(__file__).parents[2])


def _may_inline(function: types.FunctionType) -> bool:
    """Whether a function is the program's own, or PyTorch's: other libraries are taken from the tables alone."""
    file = function.__code__.co_filename
    if file.startswith(_OWN_CODE):
        return False
    return is_torch(function) or not any(part in file for part in ("/site-packages/", "/lib/python3", "<frozen"))


def _differ(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left is not right
    return left is not right and repr(left) != repr(right)

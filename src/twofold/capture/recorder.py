"""Record one unit while it runs eagerly: user's Python in, `Trace` out.

The program's own results are never touched: every call runs as it would have, and only weak references to its
tensors are kept, so that memory is freed when eager execution frees it. A unit that cannot run as a graph gets a
`Refusal`; from there on nothing is recorded and everything still runs.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from twofold.graph import Ambient, Origin, TensorSpec

from .functions import (
    FROM_HOST_DATA,
    HISTORY,
    HOOKS,
    MEMORY_READS,
    METADATA,
    SETTERS,
    VALUE_READS,
    display_name,
)
from .history import (
    Layout,
    Reach,
    Watch,
    differentiate,
    example_tangents,
    fits_outputs,
    held_by_python,
    layout_of,
    reach,
)
from .intercept import unheard, user_origin
from .number_feeds import number_as_tensor
from .trace import (
    Backward,
    Event,
    EventKind,
    External,
    Gradient,
    History,
    Made,
    Number,
    Operation,
    Refusal,
    Slot,
    Trace,
    leaves,
    map_leaves,
    sample_of,
)

MAX_EVENTS = 20_000
"""A unit longer than this is not a training step: recording it costs more than it can give back."""

MAX_STEPS = 4
"""Optimizer steps in one unit, two for an adversarial pair: with more, its end would never be found."""

_DIFFERENTIATE = frozenset({torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward})
_NOT_FORWARD = _DIFFERENTIATE | {torch.Tensor.grad.__set__, torch.Tensor.grad.__delete__}  # type: ignore[attr-defined]
_DYNAMIC_TAGS = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
_TENSOR = torch.Tensor
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""The types, exact, of tensors whose behaviour is PyTorch's own."""


def current_ambient() -> Ambient:
    """Describe the modes of this thread under which an operation would run."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    return Ambient(
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        autocast=autocast,
        autocast_cache=torch.is_autocast_cache_enabled(),
    )


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Identify the memory a tensor shows: equal keys of live storages alias each other exactly."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


class Recorder:
    """Listens to one unit. Mutable; `finish` hands out the trace and ends its life."""

    def __init__(
        self,
        host_device_only: bool,
        host_sites: frozenset[tuple[Any, Origin | None]],
        number_sites: frozenset[tuple[Any, Origin | None]] = frozenset(),
    ) -> None:
        """Start with nothing seen.

        `host_device_only`: the program computes on an accelerator, so calls on CPU tensors alone are Python's.
        `host_sites`: calls (function, line) that Python keeps doing, because their arguments never repeat.
        `number_sites`: calls whose number is fed as a tensor, because it never repeats.
        """
        self.trace = Trace()
        self._leave_cpu_to_python = host_device_only
        self._host_sites = host_sites
        self._number_sites = number_sites
        self.watch: Watch | None = None
        """Set where the unit hands out history: it hears the backward that comes later."""
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._references: dict[int, Slot | External] = {}
        self._alive: dict[int, weakref.ref[torch.Tensor]] = {}
        self._operations: list[Operation] = []
        self._announced = 0
        self._optimizer: Optimizer | None = None
        self._step_gradients: tuple[Number | None, ...] = ()
        self._state_size = 0
        self._freed: dict[Any, None] = {}
        self._entry_gradients: dict[int, torch.Tensor | None] = {}
        self._leaves: dict[int, torch.Tensor] = {}
        self._written: set[int] = set()
        self._steps_passed = 0
        self._borrowed: list[tuple[torch.Tensor, torch.Tensor]] = []

    # ---- what the listener hears -------------------------------------------------------------------------

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run a torch function and record it."""
        if self.trace.refusal or self._announced:
            return self._run_announced(function, arguments, keywords)
        if function in METADATA or (
            function in FROM_HOST_DATA and not self._touches_unit(leaves((arguments, keywords), _TENSOR))
        ):
            return self._run_unrecorded(function, arguments, keywords)
        if function in HISTORY:
            if HISTORY[function] not in ("requires_grad", "is_leaf") and self._is_made_here(arguments[0]):
                self._refuse("unsupported_call", f"reads .{HISTORY[function]} of an intermediate tensor")
            return function(*arguments, **keywords)
        if self._refuses(function, arguments, keywords):
            return function(*arguments, **keywords)
        return self.record("call", function, arguments, keywords, user_origin())

    def record(
        self,
        kind: EventKind,
        function: Any,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        origin: Origin | None,
    ) -> Any:
        """Run `function` and append it as an event, unless it turns out to be Python's own business."""
        number = self._fed_number(function, arguments, keywords, origin)
        if number is not None:
            arguments = (arguments[0], number)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if not all(map(_is_plain, given)):
            self._refuse("unsupported_call", "a tensor subclass, or a tensor of a function transform, is used", origin)
            return function(*arguments, **keywords)
        known = len(self.trace.externals)
        if self._is_host_call(function, given, origin):
            return self._run_unrecorded(function, arguments, keywords)
        ambient = current_ambient()
        self._note_leaves(given)
        templates = self._templates(arguments, keywords)
        if number is not None:
            self.trace.fed_numbers.add(templates[0][1].index)
        if function in _DIFFERENTIATE:
            self._note_backward(arguments, keywords, origin)
        result = self._run_announced(function, arguments, keywords)
        operations, self._operations = tuple(self._operations), []
        made: list[torch.Tensor] = leaves(result, _TENSOR)
        if kind == "call" and self._is_fetch(function, given, made, result):
            if not given or not self._touches_unit(given):
                self._forget_externals(known)
                return result
            kind = "fetch"
            templates = self._templates(tuple(given), {})
        if self._is_cpu_work(given, made, operations):
            self._forget_externals(known)
            return result
        self._append(kind, function, templates, result, ambient, origin, operations)
        return result

    def operation(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run an ATen operation and record it beneath the call that announced it."""
        result = target(*arguments, **keywords)
        if self.trace.refusal is not None:
            return result
        made: list[torch.Tensor] = leaves(result, _TENSOR)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if not all(tensor.layout is torch.strided for tensor in (*made, *given)):
            self._refuse("unsupported_call", f"{target} works on sparse tensors")
            return result
        if not self._announced:
            if target is not torch.ops.aten.lift_fresh.default and any(map(self._is_known_memory, given)):
                self._refuse("foreign_operation", f"{target} ran beneath no call of a torch function")
            return result
        if target.namespace == "profiler":
            return result
        if not made and not target._schema.is_mutable:
            return result  # a question, answered to Python: a fetch if a call announced it
        if _has_dynamic_shape(target, arguments):
            self._refuse("data_dependent_shape", f"{target} yields a shape that depends on values")
            return result
        if "mkldnn_rnn" in target.name():  # its workspace exists only in grad mode, where graphs do not run
            self._refuse("unsupported_call", f"{target} keeps what its backward needs out of sight")
            return result
        operation = self._describe(target, arguments, keywords, result)
        self._operations.append(operation)
        if torch.Tag.nondeterministic_seeded in target.tags and self.trace.first_random is None:
            self.trace.first_random = len(self.trace.events)
        if target._schema.is_mutable:
            self._written.update(tensor.untyped_storage()._cdata for tensor in given)
        return result

    def before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Any) -> None:
        """Begin to record `step` as one event; it runs for real."""
        if self.trace.refusal is None:
            if has_step_hooks(optimizer):
                self._refuse("tensor_hook", "the optimizer has hooks on its step")
            if len(arguments) > 1 or keywords:
                self._refuse("unsupported_call", "optimizer.step takes a closure, which runs the model itself")
            self._note_leaves(parameters_of(optimizer))
        self._step_gradients = tuple(
            None if p.grad is None else self._operand(p.grad) for p in parameters_of(optimizer)
        )
        self._state_size = _state_size(optimizer)
        self._optimizer = optimizer
        self._announced += 1

    def after_step(self, optimizer: Optimizer) -> None:
        """End the event begun by `before_step`."""
        if self._optimizer is not optimizer:
            return
        self._optimizer = None
        self._announced -= 1
        operations, self._operations = tuple(self._operations), []
        if self.trace.refusal is None:
            if _state_size(optimizer) != self._state_size:
                self.trace.makes_state = True
            templates = ((optimizer,), {})
            self._append(
                "optimizer",
                type(optimizer).step,
                templates,
                self._step_gradients,
                current_ambient(),
                user_origin(),
                operations,
            )

    def zero_grad(self, owner: Any, original: Callable[..., None], arguments: tuple[Any, ...], keywords: Any) -> None:
        """Run `zero_grad` of an optimizer or module as one event."""
        if self.trace.refusal or self._announced:
            original(owner, *arguments, **keywords)
            return
        self._note_leaves(parameters_of(owner))
        self._run_announced(original, (owner, *arguments), keywords)
        operations, self._operations = tuple(self._operations), []
        self._append(
            "zero_grad",
            original,
            ((owner, *arguments), dict(keywords)),
            None,
            current_ambient(),
            user_origin(),
            operations,
        )

    def custom_function(self, name: str, origin: Origin | None = None) -> None:
        """Take note of a custom autograd function: its backward is Python, and the graph has none."""
        code = "tensor_hook" if name.startswith("BackwardHook") else "autograd_function"
        self._refuse(code, f"{name} runs Python in backward", origin)

    def random_state_changes(self) -> None:
        """Take note that the program seeds or sets a random generator."""
        if self.trace.first_random is not None and self.trace.refusal is None:
            self._refuse("unsupported_call", "the random state is read, set or drawn from after a draw of the unit")

    def refuse(self, code: str, reason: str, origin: Origin | None) -> None:
        """Stop recording for a reason found elsewhere."""
        self._refuse(code, reason, origin)

    # ---- replaying a prefix that the skeleton had already walked -----------------------------------------

    def repeat(self, event: Event, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run a validated event for real, as part of the trace, at its old origin."""
        if event.kind == "optimizer":
            optimizer = arguments[0]
            self.before_step(optimizer, (optimizer,), {})
            try:
                getattr(event.function, "__wrapped__", event.function)(optimizer)
            finally:
                self.after_step(optimizer)
            return None
        if event.kind == "zero_grad":
            self.zero_grad(arguments[0], event.function, arguments[1:], keywords)
            return None
        if self.trace.refusal:
            return event.function(*arguments, **keywords)
        return self.record("call", event.function, arguments, keywords, event.origin)

    def append_fetch(self, event: Event, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Add a fetch whose value Python already has."""
        if self.trace.refusal is None:
            templates = self._templates(tuple(leaves((arguments, keywords), _TENSOR)), {})
            self._append("fetch", event.function, templates, event.sample, event.ambient, event.origin, ())

    def rename(self, tensor: torch.Tensor, placeholder: torch.Tensor) -> None:
        """Take note that `placeholder` is now the object that `tensor` was."""
        reference = self._references.pop(id(tensor), None)
        self._alive.pop(id(tensor), None)
        if reference is not None:
            self._remember(placeholder, reference)

    # ---- the end -----------------------------------------------------------------------------------------

    def goes_on_after_step(self) -> bool:
        """Whether the unit must go on because a live tensor carries autograd history that no backward has freed."""
        if self.trace.refusal is not None or not self._has_live_history():
            return False
        self._steps_passed += 1
        if self._steps_passed == MAX_STEPS:
            self._refuse("history_escapes", f"autograd history is kept across {MAX_STEPS} optimizer steps")
        return self._steps_passed < MAX_STEPS

    def _slots(self) -> list[tuple[int, weakref.ref[torch.Tensor]]]:
        """Return the tensors made in this unit, in order, dead ones too."""
        slots = [(r.index, self._alive[identity]) for identity, r in self._references.items() if isinstance(r, Slot)]
        return sorted(slots, key=operator.itemgetter(0))

    def _has_live_history(self) -> bool:
        return any(
            _history(tensor, self._freed) == "live"
            for _, reference in self._slots()
            if (tensor := reference()) is not None
        )

    def record_history(self, layouts: Iterable[Layout]) -> None:
        """Record the derivative of what outlives the unit, for a backward that comes later, in these layouts.

        Only for a unit that is a forward and nothing else. Operations must be heard meanwhile.
        """
        trace = self.trace
        live = self._live_outputs() if self._is_forward() else {}
        if not live:
            return
        outputs = list(live.values())
        reached = reach(outputs, trace.externals)
        given = [trace.externals[i] for i in set(reached.edges.values()) if not trace.externals[i].is_leaf]
        if reached.foreign or any(tensor._backward_hooks or tensor.retains_grad for tensor in given):
            reason = reached.foreign or "a tensor that the unit is given has a gradient hook"
            self._refuse("history_escapes", f"a later backward cannot be recorded: {reason}")
            return
        wanted = [layout for layout in layouts if fits_outputs(layout, outputs)] or [layout_of(outputs)]
        backwards = {layout: self._differentiate(outputs, reached, layout) for layout in wanted}
        trace.history = History(tuple(live), tuple(reached.edges.values()), backwards)
        self.watch = Watch(outputs)

    def refuse_history(self) -> None:
        """Keep the unit eager if it hands out history, since gradients of its gradients are taken."""
        if self._is_forward() and self._live_outputs():
            self._refuse("double_backward", "gradients of gradients are taken of what the unit returns")

    def _is_forward(self) -> bool:
        """Whether the unit is a forward and nothing else."""
        return self.trace.refusal is None and all(
            event.kind in ("call", "fetch") and event.function not in _NOT_FORWARD for event in self.trace.events
        )

    def _live_outputs(self) -> dict[int, torch.Tensor]:
        held = [(slot, tensor) for slot, alive in self._slots() if (tensor := held_by_python(alive)) is not None]
        return {slot: tensor for slot, tensor in held if _history(tensor, self._freed) == "live"}

    def _differentiate(self, outputs: list[torch.Tensor], reached: Reach, layout: Layout) -> Backward:
        known, drawn = len(self.trace.hidden), self.trace.first_random
        with unheard():
            tangents = example_tangents(layout, outputs)
            numbers = tuple(None if tangent is None else self._number(tangent)[0] for tangent in tangents)
        try:
            found = self._run_announced(differentiate, (outputs, tangents, self.trace.externals), {})
        except RuntimeError as error:  # what eager execution would raise, if the program asked
            self._refuse("history_escapes", f"a later backward cannot be recorded: {str(error)[:200]}")
            return Backward(numbers, (), ())
        operations, self._operations = tuple(self._operations), []
        made = tuple(self._number_if_known(found.get(edge)) for edge in reached.edges)
        if -1 in made or len(self.trace.hidden) > known or self.trace.first_random != drawn:
            self._refuse("history_escapes", "a later backward reads what the unit did not make")
        return Backward(numbers, made, operations)

    def finish(self) -> Trace:
        """Close the trace: what escaped, which gradients are left, whether random numbers were drawn."""
        trace = self.trace
        if not all(map(torch.equal, *zip(*self._borrowed, strict=True)) if self._borrowed else ()):
            self._refuse("mutated_outside", "the NumPy array behind a tensor changed within the unit")
        for slot, reference in self._slots():
            tensor = reference()
            if tensor is not None:
                trace.escapes[slot] = _history(tensor, self._freed)
                if tensor.numel() == 1:
                    trace.samples[slot] = tensor.detach().item()
        if trace.history is not None:  # what autograd alone still holds is live too, and no output
            others = [slot for slot, state in trace.escapes.items() if state == "live"]
            for slot in set(others) - set(trace.history.outputs):
                del trace.escapes[slot]
        if trace.refusal is None:
            for leaf in self._leaves.values():
                trace.gradients.append(
                    Gradient(leaf, self._number_if_known(self._entry_gradients[id(leaf)]), self._exit_gradient(leaf))
                )
        self._alive.clear()
        self._freed.clear()
        return trace

    # ---- inside ------------------------------------------------------------------------------------------

    def _run_announced(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._announced += 1
        try:
            return function(*arguments, **keywords)
        except BaseException:
            self._operations.clear()
            raise
        finally:
            self._announced -= 1

    def _run_unrecorded(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        try:
            return self._run_announced(function, arguments, keywords)
        finally:
            self._operations.clear()

    def _refuse(self, code: str, reason: str, origin: Origin | None = None) -> None:
        if self.trace.refusal is None:
            self.trace.refusal = Refusal(code, reason, origin or user_origin())

    def _refuses(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        if keywords.get("out") is not None:
            self._refuse("unsupported_call", f"{display_name(function)} writes to a tensor given as out=")
        elif leaves((arguments, keywords), torch.Generator):
            self._refuse("unsupported_call", f"{display_name(function)} draws from a generator of its own")
        elif function in MEMORY_READS:
            if not self._touches_unit([arguments[0]]):
                return True
            self._refuse("unsupported_call", f"{display_name(function)} exposes the memory of a tensor of the unit")
        elif function in HOOKS:
            self._refuse("tensor_hook", f"{display_name(function)} on a tensor of the unit")
        elif function in SETTERS and (self._is_made_here(arguments[0]) or self._is_known_memory(arguments[0])):
            self._refuse("unsupported_call", f"{display_name(function)} changes a tensor of the unit")
        elif function in SETTERS:
            return True
        elif len(self.trace.events) >= MAX_EVENTS:
            self._refuse("too_large", f"more than {MAX_EVENTS} tensor calls in one unit")
        return self.trace.refusal is not None

    def _is_made_here(self, tensor: Any) -> bool:
        return isinstance(self._references.get(id(tensor)), Slot) and self._alive[id(tensor)]() is tensor

    def _is_known_memory(self, tensor: torch.Tensor) -> bool:
        try:
            cdata = tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
            return False
        return cdata in self._storages

    def _touches_unit(self, tensors: list[torch.Tensor]) -> bool:
        return any(self._is_known_memory(tensor) or tensor.requires_grad for tensor in tensors)

    def _is_host_call(self, function: Any, given: list[torch.Tensor], origin: Origin | None) -> bool:
        return (function, origin) in self._host_sites and not any(
            self._is_made_here(tensor) or tensor.untyped_storage()._cdata in self._written for tensor in given
        )

    def _fed_number(self, function: Any, arguments: Any, keywords: Any, origin: Origin | None) -> torch.Tensor | None:
        if (function, origin) not in self._number_sites:
            return None
        with unheard():
            return number_as_tensor(function, arguments, keywords)

    def _is_cpu_work(
        self, given: list[torch.Tensor], made: list[torch.Tensor], operations: tuple[Operation, ...]
    ) -> bool:
        """Whether a call of an accelerator program is Python's: it computed on the CPU, or brought data over."""
        if not self._leave_cpu_to_python or any(map(self._is_made_here, given)):
            return False
        if given:
            return all(tensor.device.type == "cpu" for tensor in given)
        return bool(made) and all(tensor.device.type == "cpu" for tensor in made)

    def _is_fetch(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor], result: Any) -> bool:
        if made:
            if function in FROM_HOST_DATA or function in VALUE_READS:
                return True
            crossed = any(t.device.type != "cpu" for t in given) and all(t.device.type == "cpu" for t in made)
            return crossed and self._leave_cpu_to_python
        return result is not None or function is _TENSOR.__repr__

    def _note_leaves(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_leaf and id(tensor) not in self._leaves and tensor.requires_grad:
                self._leaves[id(tensor)] = tensor
                self._entry_gradients[id(tensor)] = tensor.grad
                if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                    self._refuse("tensor_hook", "a parameter has a gradient hook")
            elif isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
                self.trace.frozen[id(tensor)] = tensor

    def _note_backward(self, arguments: tuple[Any, ...], keywords: dict[str, Any], origin: Origin | None) -> None:
        keeps = bool(keywords.get("retain_graph") or keywords.get("create_graph"))
        roots: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        pending = [root.grad_fn for root in roots if root.grad_fn is not None]
        seen: dict[Any, None] = {}
        while pending:
            function = pending.pop()
            if function in seen:
                continue
            seen[function] = None
            if isinstance(function, torch.autograd.function.BackwardCFunction):
                self.custom_function(type(function).__name__, origin)
            variable = getattr(function, "variable", None)
            if variable is not None:
                self._note_leaves((variable,))
            pending.extend(edge for edge, _ in function.next_functions if edge is not None)
        if any(tensor.grad_fn in seen for tensor in self.trace.externals if tensor.grad_fn is not None):
            self._refuse("history_escapes", "backward goes on into autograd history made before this unit", origin)
        if not keeps:
            self._freed.update(seen)

    def _number(self, tensor: torch.Tensor) -> tuple[int, bool]:
        """Return the value number of a tensor, and whether it was new."""
        key = memory_key(tensor)
        number = self._numbers.get(key)
        if number is not None:
            return number, False
        number = len(self.trace.specs)
        self._numbers[key] = number
        self.trace.specs.append(replace(TensorSpec.of(tensor), requires_grad=False))
        storage = tensor.untyped_storage()
        # Invariant: a weak reference keeps the address of a freed storage from being used again, so a key
        # never names two pieces of memory within one trace.
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return number, True

    def _number_if_known(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.layout is not torch.strided:
            self._refuse("unsupported_call", "a sparse tensor or gradient")
            return -1
        return self._numbers.get(memory_key(tensor), -1)

    def _exit_gradient(self, leaf: torch.Tensor) -> int | None:
        gradient = leaf.grad
        if gradient is not None and gradient is self._entry_gradients[id(leaf)]:
            return self._number_if_known(gradient)
        number = self._number_if_known(gradient)
        if number == -1:
            self._refuse("unsupported_call", "a gradient came from outside the unit")
        return number

    def _describe(self, target: Any, arguments: Any, keywords: Any, result: Any) -> Operation:
        positional, named = map_leaves((tuple(arguments), dict(keywords)), _TENSOR, self._operand)
        results = tuple(self._number(tensor)[0] for tensor in leaves(result, _TENSOR))
        return Operation(target, positional, named, results)

    def _operand(self, tensor: torch.Tensor) -> Any:
        try:
            number, new = self._number(tensor)
        except (RuntimeError, NotImplementedError):
            self._refuse("unsupported_call", f"a {tensor.layout} tensor")
            return None
        if new:
            self.trace.hidden[number] = tensor.detach()
        return Number(number)

    def _templates(self, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        return map_leaves((tuple(arguments), dict(keywords)), _TENSOR, self._reference)

    def _reference(self, tensor: torch.Tensor) -> Slot | External:
        reference = self._references.get(id(tensor))
        if reference is not None and self._alive[id(tensor)]() is tensor:
            return reference
        reference = External(len(self.trace.externals))
        try:
            number, _ = self._number(tensor)
        except (RuntimeError, NotImplementedError):
            self._refuse("unsupported_call", f"a {tensor.layout} tensor")
            number = -1
        self.trace.externals.append(tensor)
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            with unheard():
                self._borrowed.append((tensor, tensor.detach().clone()))
        self.trace.external_numbers.append(number)
        self.trace.hidden.pop(number, None)
        self._remember(tensor, reference)
        return reference

    def _forget_externals(self, count: int) -> None:
        """Take back the externals past the first `count`: what used them was no event of the unit."""
        for tensor in self.trace.externals[count:]:
            del self._references[id(tensor)], self._alive[id(tensor)]
        del self.trace.externals[count:], self.trace.external_numbers[count:]
        self.trace.fed_numbers = {index for index in self.trace.fed_numbers if index < count}

    def _remember(self, tensor: torch.Tensor, reference: Slot | External) -> None:
        self._references[id(tensor)] = reference
        self._alive[id(tensor)] = weakref.ref(tensor)

    def _append(
        self,
        kind: EventKind,
        function: Any,
        templates: tuple[Any, Any],
        result: Any,
        ambient: Ambient,
        origin: Origin | None,
        operations: tuple[Operation, ...],
    ) -> None:
        if self.trace.refusal is not None:
            return
        made: list[Made] = []
        first = len(self.trace.slot_numbers)

        def outcome(tensor: torch.Tensor) -> Any:
            known = self._references.get(id(tensor))
            if known is not None and self._alive[id(tensor)]() is tensor:
                return known
            number = self._number_if_known(tensor)
            if number == -1 or number is None:
                entry = next((n for n in self._entry_gradients.values() if n is tensor), None)
                if entry is None:
                    self._refuse("unsupported_call", f"{display_name(function)} returned an unknown tensor", origin)
                    return None
                number, _ = self._number(tensor)
            slot = Slot(len(self.trace.slot_numbers))
            self.trace.slot_numbers.append(number)
            grad_function = None if tensor.grad_fn is None else type(tensor.grad_fn).__name__
            made.append(Made(TensorSpec.of(tensor), tensor.is_leaf, grad_function))
            self._remember(tensor, slot)
            return slot

        template = None if kind == "fetch" else map_leaves(result, _TENSOR, outcome)
        self.trace.events.append(
            Event(
                kind,
                function,
                *templates,
                template,
                tuple(made),
                first,
                ambient,
                origin,
                operations,
                sample_of(result) if kind == "fetch" else None,
            )
        )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in PLAIN_TENSORS and not is_functorch_wrapped_tensor(tensor)


def parameters_of(owner: Any) -> list[torch.Tensor]:
    """Return the parameters of an optimizer or a module."""
    if isinstance(owner, Optimizer):
        return [parameter for group in owner.param_groups for parameter in group["params"]]
    return list(owner.parameters())


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether the program runs code of its own before or after a step; one global pair of hooks is ours."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or len(_global_optimizer_pre_hooks) > 1
        or len(_global_optimizer_post_hooks) > 1
    )


def _state_size(optimizer: Optimizer) -> int:
    return sum(value is not None for state in optimizer.state.values() for value in state.values())


def _history(tensor: torch.Tensor, freed: dict[Any, None]) -> str:
    try:
        function = tensor.grad_fn
    except RuntimeError:  # a view whose base was changed in a way that autograd refuses
        return "live"
    if function is None:
        return "none"
    return "freed" if function in freed else "live"


def _has_dynamic_shape(target: Any, arguments: tuple[Any, ...]) -> bool:
    if target is not torch.ops.aten.index.Tensor:  # tagged so, but only a mask makes it so
        return not _DYNAMIC_TAGS.isdisjoint(target.tags)
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])

"""Record one unit while it runs eagerly: user's Python in, `Trace` out.

The program's own results are never touched: every call runs as it would have. What it is, an event of the unit or
Python's own business, is decided here; `TraceWriter` writes it down. A unit that cannot run as a graph gets a
`Refusal`; from there on nothing is recorded and everything still runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._ops import HigherOrderOperator
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from twofold.graph import Origin, current_ambient

from .functions import (
    CONTENT_QUESTIONS,
    FROM_HOST_DATA,
    HISTORY,
    HOOKS,
    MEMORY_READS,
    METADATA,
    REQUIRES_GRAD,
    SETTERS,
    SHOWN_ANEW,
    VALUE_READS,
    asks_to_check,
    display_name,
    has_dynamic_shape,
    is_mutable,
    is_plain,
    is_random,
    is_strided,
    keeps_workspace,
    leaves_out_results,
)
from .gradients import COPIES, DROPS, READS
from .history import Layout, Watch, following_nodes
from .intercept import unheard, user_origin
from .number_feeds import number_as_tensor
from .output_history import DIFFERENTIATE, live_outputs, record_history
from .trace import Event, EventKind, Number, Trace, leaves, memory_key
from .trace_writer import TraceWriter

MAX_EVENTS = 20_000
"""A unit longer than this is not a training step: recording it costs more than it can give back."""

MAX_STEPS = 4
"""Optimizer steps in one unit, two for an adversarial pair: with more, its end would never be found."""

_TENSOR = torch.Tensor

UNUSUAL_TENSOR = (
    "a tensor subclass, one that is sparse or no plain memory else, one of a function transform, or a part of a split "
    "tensor that was changed in place is used"
)


class Recorder:
    """Listens to one unit. Mutable; `finish` hands out the trace and ends its life."""

    def __init__(
        self,
        host_device_only: bool,
        host_sites: frozenset[tuple[Any, Origin | None]],
        number_sites: frozenset[tuple[Any, Origin | None]] = frozenset(),
        meets_recursion: Callable[[], str | None] | None = None,
    ) -> None:
        """Start with nothing seen.

        `host_device_only`: the program computes on an accelerator, so calls on CPU tensors alone are Python's.
        `host_sites`: calls (function, line) that Python keeps doing, because their arguments never repeat.
        `meets_recursion`: says which function it is if the running code calls itself, which no record can follow.
        `number_sites`: calls whose number is fed as a tensor, because it never repeats.
        """
        self._writer = TraceWriter()
        self.trace: Trace = self._writer.trace
        self.refuse = self._writer.refuse  # for a reason found elsewhere
        self.rename = self._writer.rename
        self.watch: Watch | None = None
        """Set where the unit hands out history: it hears the backward that comes later."""
        self._leave_cpu_to_python = host_device_only
        self._host_sites = host_sites
        self._number_sites = number_sites
        self._meets_recursion = meets_recursion
        self._announced = 0
        self._asked = False
        """Whether an operation of the call going on has answered with a number from a tensor."""
        self._reads_values = False
        """Whether that call is a fetch, whatever operations it takes."""
        self._optimizer: Optimizer | None = None
        self._step_gradients: tuple[Number | None, ...] = ()
        self._state_size = 0
        self._steps_passed = 0

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
            if HISTORY[function] not in ("requires_grad", "is_leaf") and self._writer.is_made_here(arguments[0]):
                self.refuse("unsupported_call", f"reads .{HISTORY[function]} of an intermediate tensor")
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
        if self._meets_recursion is not None and (name := self._meets_recursion()) is not None:
            self.refuse("recursion", f"{name} calls itself", origin)
            return function(*arguments, **keywords)
        number = self._fed_number(function, arguments, keywords, origin)
        if number is not None:
            arguments = (arguments[0], number)
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        if not all(map(_can_be_recorded, given)):
            self.refuse("unsupported_call", UNUSUAL_TENSOR, origin)
            return function(*arguments, **keywords)
        known = len(self.trace.externals)
        if self._is_host_call(function, given, origin):
            return self._run_unrecorded(function, arguments, keywords)
        ambient = current_ambient()
        self._look_at_gradients(function, given, origin)
        templates = self._writer.templates(arguments, keywords)
        if number is not None:
            self.trace.fed_numbers.add(templates[0][1].index)
        if function in DIFFERENTIATE:
            self._note_backward(arguments, keywords, origin, function is not torch.autograd.grad)
        self._asked = False
        self._reads_values = function in VALUE_READS
        drawn = self.trace.first_random
        try:
            result = self._run_announced(function, arguments, keywords)
        except BaseException:  # no event, so what it alone was given is none of the unit's
            self._writer.forget_externals(known)
            raise
        finally:
            self._reads_values = False
        if function in DROPS:
            self._writer.gradients.drop(given[:1])
        operations = self._writer.take_operations()
        made: list[torch.Tensor] = leaves(result, _TENSOR)
        if not all(map(_can_be_recorded, made)):
            self.refuse("unsupported_call", UNUSUAL_TENSOR, origin)
            return result
        if kind == "call" and self._is_fetch(function, given, made, result):
            if not given or not self._touches_unit(given):
                self._writer.forget_externals(known)
                return result
            kind = "fetch"
            templates = self._writer.templates(tuple(given), {})
        elif function in REQUIRES_GRAD and not self._writer.is_made_here(given[0]):
            kind = "requires_grad"
            self._writer.note_requires_grad(given[0])
        elif kind == "call" and self._asked and not asks_to_check(function, arguments, keywords):
            self.refuse("unsupported_call", f"{display_name(function)} takes a number out of a tensor", origin)
        if self._is_cpu_work(given, made):
            self._writer.forget_externals(known)
            self.trace.first_random = drawn  # it drew from the CPU's generator, which no graph of such a program uses
            if not given:
                self.trace.host_sites.add((function, origin))
            return result
        self._writer.append(kind, function, templates, result, ambient, origin, operations)
        return result

    def operation(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run an ATen operation and record it beneath the call that announced it."""
        given: list[torch.Tensor] = leaves((arguments, keywords), _TENSOR)
        before = self._memory_before(target, given)
        result = target(*arguments, **keywords)
        if isinstance(target, HigherOrderOperator):
            self.refuse("foreign_operation", f"{target.name()} runs functions of the program out of sight")
            return result
        if self.trace.refusal is not None:
            return result
        made: list[torch.Tensor] = leaves(result, _TENSOR)
        if not all(map(is_strided, (*made, *given))):
            self.refuse("unsupported_call", f"{target} works on sparse or nested tensors")
            return result
        if not self._announced:
            if target is not torch.ops.aten.lift_fresh.default and any(map(self._writer.is_known_memory, given)):
                self.refuse("foreign_operation", f"{target} ran beneath no call of a torch function")
            return result
        if target.namespace == "profiler":
            return result
        if not made and not is_mutable(target):
            self._asked = self._asked or target in CONTENT_QUESTIONS
            return result  # a question, answered to Python: a fetch if a call announced it
        if leaves_out_results(target, result):
            self.refuse("unsupported_call", f"{target} leaves out a result and returns a list")
            return result
        if has_dynamic_shape(target, arguments):
            self.refuse("data_dependent_shape", f"{target} yields a shape that depends on values")
            return result
        if keeps_workspace(target):  # its workspace exists only in grad mode, where graphs do not run
            self.refuse("unsupported_call", f"{target} keeps what its backward needs out of sight")
            return result
        if any(map(operator.ne, map(memory_key, before), map(memory_key, given))):
            if self._reads_values:
                return result
            view = None if self._writer.is_referred_to(given[0]) else self._view_made(target, arguments, before)
            if view is None:
                self.refuse("unsupported_call", f"{target} changes the shape of a tensor in place")
                return result
            # Only what PyTorch does inside of one of its calls comes here: Python never sees the tensor as it was.
            target, arguments = view
            given = [arguments[0]]
        self._writer.add_operation(target, arguments, keywords, given, made)
        return result

    def _view_made(
        self, target: Any, arguments: tuple[Any, ...], before: list[torch.Tensor]
    ) -> tuple[Any, tuple[Any, ...]] | None:
        """Return the operation that makes the view which one in place has made of its operand; None if none does."""
        if target in SHOWN_ANEW:
            return SHOWN_ANEW[target], (before[0], *arguments[1:])
        if target is not torch.ops.aten.set_.source_Storage:  # cuDNN's recurrent layers so look at all weights at once
            return None
        changed = arguments[0]
        owner = self._writer.parameter_in(arguments[1], changed.dtype)
        if owner is None:
            return None
        return torch.ops.aten.as_strided.default, (owner, changed.shape, changed.stride(), changed.storage_offset())

    def _memory_before(self, target: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return what shows the memory of tensors as they do now, if an operation on them may change how they do."""
        if isinstance(target, HigherOrderOperator) or not self._announced or not is_mutable(target):
            return []
        with unheard():
            return [tensor.detach() for tensor in given]

    def before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Any) -> None:
        """Begin to record `step` as one event; it runs for real."""
        if self.trace.refusal is None:
            if has_step_hooks(optimizer):
                self.refuse("tensor_hook", "the optimizer has hooks on its step")
            if len(arguments) > 1 or keywords:
                self.refuse("unsupported_call", "optimizer.step takes a closure, which runs the model itself")
            self._writer.gradients.note(parameters_of(optimizer), are_owned=True)
            self._writer.gradients.look_at(parameters_of(optimizer))
        with unheard():  # no operation of the unit may have seen a gradient from before it
            self._step_gradients = tuple(
                None if p.grad is None else self._writer.operand(p.grad) for p in parameters_of(optimizer)
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
        operations = self._writer.take_operations()
        if self.trace.refusal is None:
            if _state_size(optimizer) != self._state_size:
                self.trace.makes_state = True
            templates = ((optimizer,), {})
            self._writer.append(
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
        gradients, parameters = self._writer.gradients, parameters_of(owner)
        gradients.note(parameters, are_owned=True)
        if not keywords.get("set_to_none", arguments[0] if arguments else True):
            gradients.look_at(parameters)
        self._run_announced(original, (owner, *arguments), keywords)
        gradients.drop(parameters)
        operations = self._writer.take_operations()
        self._writer.append(
            "zero_grad",
            original,
            ((owner, *arguments), dict(keywords)),
            None,
            current_ambient(),
            user_origin(),
            operations,
        )

    def random_state_changes(self) -> None:
        """Take note that the program seeds or sets a random generator."""
        if self.trace.first_random is not None and self.trace.refusal is None:
            self.refuse("unsupported_call", "the random state is read, set or drawn from after a draw of the unit")

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
            templates = self._writer.templates(tuple(leaves((arguments, keywords), _TENSOR)), {})
            self._writer.append("fetch", event.function, templates, event.sample, event.ambient, event.origin, ())

    # ---- the end -----------------------------------------------------------------------------------------

    def can_end(self) -> bool:
        """Whether the unit may end here: no live tensor carries autograd history that no backward has freed."""
        return not self._writer.has_live_history()

    def goes_on_after_step(self) -> bool:
        """Whether the unit must go on because a live tensor carries autograd history that no backward has freed."""
        if self.trace.refusal is not None or not self._writer.has_live_history():
            return False
        self._steps_passed += 1
        if self._steps_passed == MAX_STEPS:
            self.refuse("history_escapes", f"autograd history is kept across {MAX_STEPS} optimizer steps")
        return self._steps_passed < MAX_STEPS

    def record_history(self, layouts: Iterable[Layout]) -> None:
        """Record the derivative of what outlives the unit, for a backward that comes later, in these layouts.

        Only for a unit that is a forward and nothing else. Operations must be heard meanwhile.
        """
        self.watch = record_history(self._writer, layouts, lambda f, given: self._run_announced(f, given, {}))

    def refuse_history(self) -> None:
        """Keep the unit eager if it hands out history, since gradients of its gradients are taken."""
        if live_outputs(self._writer):
            self.refuse("double_backward", "gradients of gradients are taken of what the unit returns")

    def finish(self) -> Trace:
        """Close the trace: what escaped, which gradients are left, whether random numbers were drawn."""
        return self._writer.close()

    # ---- inside ------------------------------------------------------------------------------------------

    def _run_announced(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._announced += 1
        try:
            return function(*arguments, **keywords)
        except BaseException:
            self._writer.take_operations()
            raise
        finally:
            self._announced -= 1

    def _run_unrecorded(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        drawn = self.trace.first_random
        try:
            return self._run_announced(function, arguments, keywords)
        finally:
            if any(is_random(operation.target) for operation in self._writer.take_operations()):
                self.trace.first_random = drawn  # Python draws at the same place when the unit is a graph
                self.random_state_changes()

    def _refuses(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        if keywords.get("out") is not None:
            self.refuse("unsupported_call", f"{display_name(function)} writes to a tensor given as out=")
        elif leaves((arguments, keywords), torch.Generator):
            self.refuse("unsupported_call", f"{display_name(function)} draws from a generator of its own")
        elif function in MEMORY_READS:
            if not self._touches_unit([arguments[0]]):
                return True
            self.refuse("unsupported_call", f"{display_name(function)} exposes the memory of a tensor of the unit")
        elif function in HOOKS:
            self.refuse("tensor_hook", f"{display_name(function)} on a tensor of the unit")
        elif function in REQUIRES_GRAD:
            if self._writer.is_made_here(arguments[0]):
                self._writer.touch(arguments[0])
        elif function in SETTERS and (
            self._writer.is_made_here(arguments[0]) or self._writer.is_known_memory(arguments[0])
        ):
            self.refuse("unsupported_call", f"{display_name(function)} changes a tensor of the unit")
        elif function in SETTERS:
            return True
        elif len(self.trace.events) >= MAX_EVENTS:
            self.refuse("too_large", f"more than {MAX_EVENTS} tensor calls in one unit")
        return self.trace.refusal is not None

    def _look_at_gradients(self, function: Any, given: list[torch.Tensor], origin: Origin | None) -> None:
        gradients = self._writer.gradients
        self._note_leaves(given)
        if function in DROPS or function in READS:  # a gradient can be given to what requires none, and stepped on
            self._note_leaves(given[:1], are_asked=True)
        if function in COPIES and (gradients.is_of_unit(given[0]) or self._writer.has_gradient_of_unit(given[0])):
            self.refuse("unsupported_call", "a leaf is copied with the gradient that the unit gave it", origin)
        if function in READS:
            gradients.look_at(given[:1])

    def _note_leaves(self, tensors: Iterable[torch.Tensor], are_asked: bool = False) -> None:
        """Take note of gradients from before the unit: leaves that it made itself have none."""
        others = (tensor for tensor in tensors if not self._writer.is_made_here(tensor))
        self._writer.gradients.note(others, are_asked=are_asked)

    def _touches_unit(self, tensors: list[torch.Tensor]) -> bool:
        return any(self._writer.is_known_memory(tensor) or tensor.requires_grad for tensor in tensors)

    def _is_host_call(self, function: Any, given: list[torch.Tensor], origin: Origin | None) -> bool:
        return (function, origin) in self._host_sites and not any(
            self._writer.is_made_here(tensor) or self._writer.is_written(tensor) for tensor in given
        )

    def _fed_number(self, function: Any, arguments: Any, keywords: Any, origin: Origin | None) -> torch.Tensor | None:
        if (function, origin) not in self._number_sites:
            return None
        with unheard():
            return number_as_tensor(function, arguments, keywords)

    def _is_cpu_work(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
        """Whether a call of an accelerator program is Python's: it computed on the CPU, or brought data over."""
        if not self._leave_cpu_to_python or any(map(self._writer.is_made_here, given)):
            return False
        if given:
            return all(tensor.device.type == "cpu" for tensor in given)
        return bool(made) and all(tensor.device.type == "cpu" for tensor in made)

    def _is_fetch(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor], result: Any) -> bool:
        if made:
            if function in FROM_HOST_DATA or function in VALUE_READS:  # as_tensor may give what it was given
                return not any(tensor is one for tensor in made for one in given)
            crossed = any(t.device.type != "cpu" for t in given) and all(t.device.type == "cpu" for t in made)
            return crossed and self._leave_cpu_to_python
        return result is not None or function is _TENSOR.__repr__

    def _note_backward(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any], origin: Origin | None, accumulates: bool
    ) -> None:
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
                name = type(function).__name__
                code = "tensor_hook" if name.startswith("BackwardHook") else "autograd_function"
                self.refuse(code, f"{name} runs Python in backward", origin)
            variable = getattr(function, "variable", None)
            if variable is not None:
                self._note_leaves((variable,))
                if accumulates:
                    self._writer.gradients.look_at((variable,))
            pending.extend(following_nodes(function))
        if any(tensor.grad_fn in seen for tensor in self.trace.externals if tensor.grad_fn is not None):
            self.refuse("history_escapes", "backward goes on into autograd history made before this unit", origin)
        if not keeps:
            self._writer.note_freed(seen)


def _can_be_recorded(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and not is_functorch_wrapped_tensor(tensor)


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

"""Where Twofold listens: the only file that knows PyTorch's modes, hooks and patch points.

A `Listener` hears of every torch function called in its thread (function mode), of every ATen operation that
reaches the dispatcher (dispatch mode: one that no function announced is foreign code at work), and of optimizers
(global step hooks, and `zero_grad`, which else would read and write `.grad` once a parameter).

Optimizers are skipped without patching their classes: a step pre-hook may replace the arguments of `step`, self
included, so a listener answers with a stand-in that has no parameters and the real update stays undone.

It has over 500 lines, since all that depends on PyTorch's ways to be listened to shall change in one place.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CodeType, FunctionType
from typing import Any, Final, Protocol

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import dataloader

from twofold.graph import Origin

from . import landmarks
from .dispatcher import ask_where_modes_are, keep_asking_after_inference_mode
from .dynamo import keep_from_dynamo
from .leaf_modules import LEAVES, leaf_call
from .warned_lines import name_lines_of_program

NO_KEYWORDS: dict[str, Any] = {}


NOT_ANSWERED: Final = object()
"""In place of an answer: PyTorch shall do as if nobody listened."""


class Listener(Protocol):
    """Who is told what the program does. Calls come from the thread that entered `listening`."""

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer a torch function. Modes are off for torch functions meanwhile, not for operations."""

    def leaf_module(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer the call of a module of a class in `LEAVES`, if just that was expected; else return `NOT_ANSWERED`."""

    def operation(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Answer an ATen operation. Operations of the autograd engine come from its own threads."""

    def before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Any) -> Any:
        """Say with which arguments `step` shall run, or None for its own."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Take note that `step` has returned."""

    def zero_grad(self, owner: Any, original: Callable[..., None], arguments: tuple[Any, ...], keywords: Any) -> None:
        """Do, or record, `zero_grad` of an optimizer or module."""

    def host_work(self) -> None:
        """Take note that library code is about to run unheard, or that the random state is read or set."""

    def foreign_call(self, code: str, what: str) -> None:
        """Take note that code is about to run whose tensor work cannot be followed."""

    def unwatch(self, code: str, what: str) -> None:
        """Take note that the rest of the unit runs unheard."""


class _Current(threading.local):
    listener: Listener | None = None
    mode: _FunctionMode | None = None
    interception: Interception | None = None
    watch: Watch | None = None


_current = _Current()
_landmarks = landmarks.current


class _FunctionMode(TorchFunctionMode):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.call = listener.call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or NO_KEYWORDS)


class _DispatchMode(TorchDispatchMode):
    """Not one of PyTorch's own (`is_infra_mode`): code made by torch.compile would run beneath it unheard."""

    supports_higher_order_operators = True

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.operation = listener.operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.operation(func, args, kwargs or NO_KEYWORDS)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep PyTorch from wrapping the handler: 5 µs an operation. `keep_from_dynamo` does it instead."""
        return False


class Watch(TorchFunctionMode):
    """Tells of each torch function in this thread before it runs, and changes nothing. Entered with `with`."""

    def __init__(self, before: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._before = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._before(func, args, kwargs or NO_KEYWORDS)
        return func(*args, **(kwargs or NO_KEYWORDS))

    def __enter__(self) -> Watch:
        install_patches()
        super().__enter__()
        _current.watch = self
        return self

    def __exit__(self, *error: Any) -> None:
        _current.watch = None
        super().__exit__(*error)

    @property
    def is_alone(self) -> bool:
        """Whether it is on, and no other mode is."""
        return _mode_count() == 1 and _mode_at(0) is self and torch._C._len_torch_dispatch_stack() == 0


def is_within_unit() -> bool:
    """Whether a listener hears this thread, or a `Watch` has been entered in it."""
    current = _current
    return current.listener is not None or current.watch is not None


def unwatched() -> AbstractContextManager[None]:
    """Run Twofold's own work so that the `Watch` of this thread, if it is the first to be told, does not hear it."""
    watch = _current.watch
    if watch is None or not _mode_count() or _mode_at(_mode_count() - 1) is not watch:
        return _AS_IT_IS  # at each call of a recursive function: a generator took 2 µs of its 40
    return _taken_off(watch)


_AS_IT_IS = nullcontext()


@contextmanager
def _taken_off(watch: Watch) -> Generator[None]:
    _pop_mode()
    try:
        yield
    finally:
        _push_mode(watch)


class Interception:
    """Both modes of one listener, entered and left any number of times."""

    def __init__(self, listener: Listener) -> None:
        install_patches()
        self._listener = listener
        self._functions = _FunctionMode(listener)
        self._operations = _DispatchMode(listener)
        self._hears_operations = False
        self._beneath: tuple[int, int] | None = None
        """How many modes of the program's own were on at the start."""
        self.active = False

    def start(self) -> None:
        """Begin to listen in this thread. `torch.compile`d parts run as plain Python meanwhile."""
        self._beneath = _modes_on()
        self._enter()

    def resume(self) -> bool:
        """Listen again, or for the first time.

        False where the program has entered a mode since the start: it would leave ours in the place of its own.
        """
        if self._beneath is not None and self._beneath != _modes_on():
            return False
        self._beneath = _modes_on()
        self._enter()
        return True

    def _enter(self) -> None:
        self.hear_operations()
        self._functions.__enter__()
        _current.listener = self._listener
        _current.mode = self._functions
        _current.interception = self
        self.active = True
        _choose_kernels_as_unheard(self, is_active=True)

    def ask(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Have the listener, whose modes were just entered, answer a call that PyTorch would not announce."""
        return _ask(self._listener.call, function, arguments, keywords)

    def stop(self) -> bool:
        """End listening. False, and still listening, if another mode was entered since and not left."""
        if not self.active:
            return True
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]
        if not stack or stack[-1] is not self._functions:
            return False
        self._functions.__exit__(None, None, None)
        if self._hears_operations:
            self._hears_operations = False
            self._operations.__exit__(None, None, None)
        _current.listener = None
        self.active = False
        _choose_kernels_as_unheard(self, is_active=False)
        return True

    def hear_operations(self) -> None:
        """Hear ATen operations, too; what `miss_operations` began ends."""
        if not self._hears_operations:
            self._hears_operations = True
            self._operations.__enter__()

    def hearing_operations(self) -> AbstractContextManager[Any]:
        """Hear operations within the answer to one, too, for which their mode is off."""
        depth = torch._C._len_torch_dispatch_stack()
        is_on = any(torch._C._get_dispatch_stack_at(index) is self._operations for index in range(depth))
        return self._operations if self._hears_operations and not is_on else _AS_IT_IS

    def miss_operations(self) -> None:
        """Hear torch functions alone from now on, which saves the program some 50 µs an operation."""
        if self._hears_operations and torch._C._len_torch_dispatch_stack() == 1:
            self._hears_operations = False
            self._operations.__exit__(None, None, None)


def _modes_on() -> tuple[int, int]:
    return _mode_count(), torch._C._len_torch_dispatch_stack()


def saved_tensor_hooks_in_force() -> bool:
    """Whether the program keeps, in this thread, what operations save for backward by Python of its own."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]


def current_listener() -> Listener | None:
    """Return who listens in this thread, if anyone does."""
    return _current.listener


def heard_by_listener_alone() -> bool:
    """Whether this thread's listener hears what is called, and no mode of the program's own does."""
    alone = _mode_count() == 1 and torch._C._len_torch_dispatch_stack() == 1
    return alone and _current.listener is not None and _hears_first()


def hears(listener: Listener) -> bool:
    """Whether this thread's listener is this one, and it is not answering a call just now."""
    return _current.listener is listener and any(_mode_at(i) is _current.mode for i in range(_mode_count()))


def hearing_operations() -> AbstractContextManager[Any]:
    """Have the listener hear operations, wherever in the program's code it is that it was told of something."""
    interception = _current.interception
    return _AS_IT_IS if interception is None else interception.hearing_operations()


def unwatch(code: str, what: str) -> bool:
    """Have the rest of the unit run unheard. False, and nothing done, if other modes than the listener's are on."""
    if not heard_by_listener_alone():
        return False
    _tell(lambda listener: listener.unwatch(code, what))
    assert _current.interception is not None
    return _current.interception.stop()


class unheard:
    """Run Twofold's own tensor work so that no mode of this thread sees it."""

    __slots__ = ("_functions", "_operations")

    def __enter__(self) -> None:
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        self._operations = torch._C._DisableTorchDispatch()  # type: ignore[attr-defined]
        self._operations.__enter__()

    def __exit__(self, *_error: object) -> None:
        self._operations.__exit__(None, None, None)
        self._functions.__exit__(None, None, None)


@contextmanager
def modes_taken_off() -> Generator[None]:
    """Run code that enters modes of its own, a compiler, as if this thread had none."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextmanager
def paused() -> Generator[None]:
    """Let library code run as if nobody listened. Whatever it is has been announced."""
    listener = _current.listener
    _current.listener = None
    try:
        with modes_taken_off():
            yield
    finally:
        _current.listener = listener


_preparations: list[Callable[[], None]] = []


def call_before_unheard_code(preparation: Callable[[], None]) -> None:
    """Call `preparation` before every `optimizer.step()` of the process, and before code takes tensors unheard.

    Through the one hook of ours: a second global hook would count as the program's own, and keep units eager.
    """
    install_patches()
    _preparations.append(preparation)


def _prepare() -> None:
    if _preparations:
        with unwatched():
            for preparation in _preparations:
                preparation()


def _is_within_backward() -> bool:
    """Whether PyTorch's engine runs in this thread: an optimizer that steps in a hook of it ends no unit.

    Modes that are entered there would be gone when the engine returns.
    """
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def _before_step(optimizer: Optimizer, arguments: Any, keywords: Any) -> Any:
    _prepare()
    if _is_within_backward():
        return None
    landmarks.before_step()
    listener = _current.listener
    if listener is None:
        return None
    with torch._C.DisableTorchFunction():
        return listener.before_step(optimizer, arguments, keywords)


def _after_step(optimizer: Optimizer, _arguments: Any, _keywords: Any) -> None:
    if _is_within_backward():
        return
    landmarks.after_step()
    listener = _current.listener
    if listener is not None:
        with torch._C.DisableTorchFunction():
            listener.after_step(optimizer)
        return
    for observer in tuple(_step_observers):
        observer(optimizer)


_step_observers: list[Callable[[Optimizer], None]] = []


def observe_steps(observer: Callable[[Optimizer], None]) -> Callable[[], None]:
    """Call `observer` after every `optimizer.step()` that no listener hears; return how to end that."""
    install_patches()
    _step_observers.append(observer)
    return lambda: _step_observers.remove(observer)


def _tell(action: Callable[[Listener], None]) -> None:
    listener = _current.listener
    if listener is not None:
        with torch._C.DisableTorchFunction():
            action(listener)


def _tell_before(owner: Any, name: str, action: Callable[[Listener], None]) -> None:
    """Have `owner.name` tell the listener before it does what it does."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def announced(*arguments: Any, **keywords: Any) -> Any:
        _prepare()
        if _current.listener is not None:
            _tell(action)
        return original(*arguments, **keywords)

    setattr(owner, name, announced)


def _announce_custom_functions() -> None:
    original: Any = torch.autograd.Function.__dict__["apply"].__func__

    def apply(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        _prepare()
        if _current.listener is not None and not cls.__module__.startswith("twofold."):
            code = "tensor_hook" if cls.__name__ == "BackwardHookFunction" else "autograd_function"
            _tell(lambda listener: listener.foreign_call(code, f"{cls.__name__}.apply runs Python in backward"))
        return original(cls, *arguments, **keywords)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]


def _announce_foreign_code() -> None:
    scripted = "a scripted function runs beneath no call of a torch function"
    hooks = "hooks on saved tensors run Python in backward"
    thread = "a thread is started or given work within a unit"
    parameter = "a parameter is made within a unit"
    for owner, name, code, what in (
        (torch._C.ScriptFunction, "__call__", "foreign_operation", scripted),
        (torch._C.ScriptMethod, "__call__", "foreign_operation", scripted),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__", "tensor_hook", hooks),
        (threading.Thread, "start", "thread", thread),
        (ThreadPoolExecutor, "submit", "thread", thread),
        (torch.nn.Parameter, "__new__", "unsupported_call", parameter),
    ):
        _tell_before(owner, name, lambda listener, code=code, what=what: listener.foreign_call(code, what))


def _prepare_before_changes_of_modules() -> None:
    """What waits calls modules as they were; a parameter that is replaced is registered."""
    hooks = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "backward_hook"]
    for name in ("train", "register_parameter", *(f"register_{hook}" for hook in hooks)):
        original = getattr(torch.nn.Module, name)
        _tell_before(torch.nn.Module, name, lambda listener: None)
        _PREPARED[getattr(torch.nn.Module, name)] = original


_PREPARED: dict[Any, Callable[..., Any]] = {}


def without_preparation(function: Any) -> Any:
    """Return PyTorch's own function where what it is found as only minds what waits, or who listens."""
    return _PREPARED.get(function, function) if isinstance(function, FunctionType) else function


def _announce_random_state() -> None:
    for owner, names in (
        (torch, ("manual_seed", "seed", "set_rng_state", "get_rng_state")),
        (torch.random, ("manual_seed", "seed", "set_rng_state", "get_rng_state")),
        (torch.cuda, ("manual_seed", "manual_seed_all", "set_rng_state", "get_rng_state")),
    ):
        for name in names:
            _tell_before(owner, name, lambda listener: listener.host_work())


def _announce_zero_grad(owner_class: Any) -> None:
    original = owner_class.zero_grad

    @functools.wraps(original)
    def zero_grad(self: Any, *arguments: Any, **keywords: Any) -> None:
        listener = _current.listener
        if listener is None:
            original(self, *arguments, **keywords)
        else:
            with torch._C.DisableTorchFunction():
                listener.zero_grad(self, original, arguments, keywords)

    owner_class.zero_grad = zero_grad


_is_mode_enabled = torch._C._is_torch_function_mode_enabled
_mode_count = torch._C._len_torch_function_stack
_mode_at = torch._C._get_function_stack_at
_pop_mode = torch._C._pop_torch_function_stack
_push_mode = torch._C._push_on_torch_function_stack


def _hears_first() -> bool:
    """Whether this thread's listener is the first mode to be asked: none of the program's own is above it."""
    return _is_mode_enabled() and _mode_at(_mode_count() - 1) is _current.mode


def _ask(answer: Callable[..., Any], called: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Have the listener answer a call as PyTorch would, modes beneath its own on, if it is the first to be asked."""
    if not _is_mode_enabled():
        return NOT_ANSWERED
    mode = _pop_mode()
    try:
        return answer(called, arguments, keywords) if mode is _current.mode else NOT_ANSWERED
    finally:
        _push_mode(mode)


def _call_leaf_modules_at_once() -> None:
    original = torch.nn.Module.__call__

    @functools.wraps(original)
    def __call__(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if (loop := _landmarks.loop) is not None:
            with landmarks.within():
                loop.passes(landmarks.module_landmark(self))
                return __call__(self, *arguments, **keywords)
        listener = _current.listener
        if listener is not None and type(self) in LEAVES:
            answer = _ask(listener.leaf_module, self, arguments, keywords)
            if answer is NOT_ANSWERED and (leaf := leaf_call(self)) is not None:
                answer = _ask(listener.call, leaf[0], leaf[1] + arguments, keywords)
            if answer is not NOT_ANSWERED:
                return answer
        return original(self, *arguments, **keywords)

    torch.nn.Module.__call__ = __call__
    # torch.compile takes a fast path for modules whose call it knows; it may have been imported before.
    for name in ("torch._dynamo.utils", "torch._dynamo.variables.nn_module"):
        if name in sys.modules:
            sys.modules[name].unpatched_nn_module_call = __call__  # type: ignore[attr-defined]


def _shorten_python_functions() -> None:
    """Have PyTorch's functions that are written in Python reach the listener directly, in 1 µs instead of 5."""
    original = torch.overrides.handle_torch_function

    @functools.wraps(original)
    def handle_torch_function(public_api: Any, relevant_args: Any, *arguments: Any, **keywords: Any) -> Any:
        listener = _current.listener
        if listener is not None:
            answer = _ask(listener.call, public_api, arguments, keywords)
            if answer is not NOT_ANSWERED:
                return answer
        return original(public_api, relevant_args, *arguments, **keywords)

    backwards = torch.Tensor.backward, torch.autograd.backward

    def handle_backward(public_api: Any, *arguments: Any, **keywords: Any) -> Any:
        if public_api in backwards:
            return landmarks.with_backward(handle_torch_function, (public_api, *arguments), keywords)
        return handle_torch_function(public_api, *arguments, **keywords)

    for name in ("torch.overrides", "torch.functional", "torch.nn.functional"):
        sys.modules[name].handle_torch_function = handle_torch_function  # type: ignore[attr-defined]
    for name in ("torch._tensor", "torch.autograd"):
        sys.modules[name].handle_torch_function = handle_backward  # type: ignore[attr-defined]


def _is_overridden_unheard(relevant_arguments: Any) -> bool:
    if _current.listener is None or not _hears_first():
        return _is_overridden(relevant_arguments)
    mode = _pop_mode()
    try:
        return _is_overridden(relevant_arguments)
    finally:
        _push_mode(mode)


_is_overridden = torch.overrides.has_torch_function
_PREPARED[_is_overridden_unheard] = _is_overridden
_listening: set[Interception] = set()
_listening_changes = threading.Lock()


def _choose_kernels_as_unheard(interception: Interception, is_active: bool) -> None:
    """Have attention and the layers of transformers take the fused kernels in a unit that they take without modes.

    They ask whether anything is overridden. Only while somebody listens are they answered by us: Dynamo, which knows
    PyTorch's own function, would give up where it met another.
    """
    with _listening_changes:
        (_listening.add if is_active else _listening.discard)(interception)
        torch.overrides.has_torch_function = _is_overridden_unheard if _listening else _is_overridden


def _pause_in(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def unheard_method(self: Any) -> Any:
        if _current.listener is None:
            return original(self)
        _tell(lambda listener: listener.host_work())
        with paused():
            return original(self)

    setattr(owner, name, unheard_method)


def _run_foreign(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run a function that PyTorch compiles for itself, where `torch.cond` is called, such that nobody hears it."""
    what = "PyTorch compiles functions of the program, which torch.cond and flex_attention need"
    _tell(lambda listener: listener.foreign_call("foreign_operation", what))
    with paused():
        return function(*arguments, **keywords)


@functools.cache
def install_patches() -> None:
    """Put the hooks and patches in place, once a process. Without a listener they cost one attribute read."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    _announce_zero_grad(Optimizer)
    _announce_zero_grad(torch.nn.Module)
    _announce_custom_functions()
    _announce_foreign_code()
    _announce_random_state()
    _prepare_before_changes_of_modules()
    _call_leaf_modules_at_once()
    _shorten_python_functions()
    name_lines_of_program()
    keep_from_dynamo(
        (_FunctionMode.__torch_function__, _DispatchMode.__torch_dispatch__, _ask),
        lambda: _current.listener is not None,
        _run_foreign,
        ask_where_modes_are,
    )
    keep_asking_after_inference_mode()
    _pause_in(dataloader.DataLoader, "__iter__")
    _pause_in(dataloader._BaseDataLoaderIter, "__next__")
    landmarks.announce_landmarks()


_OWN_CODE = tuple(module.__path__[0] for module in (torch, sys.modules["twofold"]))


def is_own_code(code: CodeType) -> bool:
    """Whether code is PyTorch's, Twofold's, or made while the program runs."""
    return code.co_filename.startswith(_OWN_CODE) or code.co_filename.startswith("<")


def user_origin() -> Origin | None:
    """Return the innermost line of the running stack that is neither PyTorch's nor Twofold's."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not is_own_code(code):
            return Origin(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None

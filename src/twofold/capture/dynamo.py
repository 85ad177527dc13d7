"""`torch.compile` in a program that is listened to: its compiler, Dynamo, must see nothing of it.

A function that Dynamo meets beneath a mode it gives up for good, and with `fullgraph=True` that is an error. So what
the program compiled runs as plain Python while somebody listens, and compiled at all other times.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RunForeign = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_DYNAMO = "torch._dynamo.eval_frame"
_PYTORCH = str(Path(torch.__file__).parent)


def keep_from_dynamo(
    handlers: Iterable[Callable[..., Any]],
    is_heard: Callable[[], bool],
    run_foreign: RunForeign,
    after_call: Callable[[], None],
) -> None:
    """Have Dynamo leave `handlers` alone, and all else while `is_heard()` in the thread that calls it.

    PyTorch itself compiles in some of its functions, and relies on it: these compiled functions are called through
    `run_foreign`. `after_call` is called when a compiled function has returned and put the dispatcher's state back.
    To be called once.
    """
    frames: Any = getattr(torch._C, "_dynamo").eval_frame  # noqa: B009 - without importing Dynamo, which takes seconds
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for handler in handlers:
        frames.set_code_exec_strategy(handler.__code__, skip)
    bypass = functools.cache(lambda: _bypass(sys.modules[_DYNAMO], is_heard, after_call))
    if _DYNAMO in sys.modules:
        bypass()
    original = torch.compile

    @functools.wraps(original)
    def compile(*arguments: Any, **keywords: Any) -> Any:
        compiled: Any = original(*arguments, **keywords)
        if _DYNAMO in sys.modules:
            bypass()
        if is_heard() and sys._getframe(1).f_code.co_filename.startswith(_PYTORCH):
            return lambda *given, **named: run_foreign(compiled, given, named)
        return compiled

    torch.compile = compile


def _bypass(dynamo: Any, is_heard: Callable[[], bool], after_call: Callable[[], None]) -> None:
    choose, enter_or_leave = dynamo._callback_from_stance, dynamo._maybe_set_eval_frame

    def announced(callback: Any) -> Any:
        after_call()
        return enter_or_leave(callback)

    dynamo._maybe_set_eval_frame = announced
    dynamo._callback_from_stance = lambda callback: None if is_heard() else choose(callback)
    count: Any = getattr(dynamo, "set_fullgraph_compiled_frame_count", None)  # since torch 2.12

    def count_frames(number: int) -> int:
        """Begin to count compiled frames, or stop (-1). An old count of 1 has Dynamo not count at all."""
        return 1 if number >= 0 and is_heard() else count(number)

    if count is not None:
        dynamo.set_fullgraph_compiled_frame_count = count_frames

"""Find functions that call themselves, from the stack of the running program."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Container
from itertools import repeat
from types import CodeType, FrameType, FunctionType
from typing import Any

from .intercept import is_own_code


def recursive_functions(outermost: CodeType, known: Container[CodeType]) -> dict[FunctionType, object]:
    """Return the functions that the running code is in more than once: methods with their receiver, others with None.

    Looked at is the user's code above the innermost frame of `outermost`, without `known` code. Calls of a method with
    different receivers are no recursion. A function is found among all objects, by what it closes over, which takes
    0.1 s where there are 300,000 of them; two that cannot be told apart are both returned.
    """
    frames: list[FrameType] = []
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if not is_own_code(frame.f_code):
            frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    counts = Counter(frame.f_code for frame in frames)
    found: dict[FunctionType, object] = {}
    for code in [code for code, count in counts.items() if count > 1 and code not in known]:
        calls = [frame for frame in frames if frame.f_code is code]
        receiver = _receiver(code, calls[0].f_locals)
        if receiver is _receiver(code, calls[1].f_locals):
            found.update(dict.fromkeys(_functions_of(code, calls[0]), receiver))
    return found


def _receiver(code: CodeType, variables: dict[str, Any]) -> object:
    """Return the object that a call is a method call of, given its variables; None for a plain function."""
    first = variables.get(code.co_varnames[0]) if code.co_argcount else None
    held = next((vars(cls)[code.co_name] for cls in type(first).__mro__ if code.co_name in vars(cls)), None)
    while held is not None and getattr(held, "__code__", None) is not code:
        held = getattr(held, "__wrapped__", None)
    return None if held is None else first


def _functions_of(code: CodeType, call: FrameType) -> list[FunctionType]:
    """Return the functions with this code whose closures hold what a call of one of them sees."""
    seen = call.f_locals
    return [
        function
        for function in gc.get_referrers(code)
        if type(function) is FunctionType
        and function.__code__ is code
        and all(map(_holds, function.__closure__ or (), code.co_freevars, repeat(seen)))
    ]


def _holds(cell: Any, name: str, seen: dict[str, Any]) -> bool:
    try:
        return name in seen and cell.cell_contents is seen[name]
    except ValueError:  # not assigned yet
        return name not in seen

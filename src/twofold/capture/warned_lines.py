"""Warnings that PyTorch gives beneath a call that Twofold makes: they name the program's line, as eager execution's do.

Python takes the line from the stack, and there it finds Twofold's where the program's would be.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from types import FrameType
from typing import Any

import torch

_OWN = sys.modules["twofold"].__path__[0] + os.sep
_BETWEEN = (_OWN, torch.overrides.__file__)


def name_lines_of_program() -> None:
    """Have warnings from Twofold's lines given anew, as from the line of the program that led there."""
    show: Any = getattr(warnings, "_showwarnmsg")  # noqa: B009 - Python calls it under this name

    @functools.wraps(show)
    def show_from_program(message: Any) -> None:
        called = _caller_of_program(sys._getframe(1)) if message.filename.startswith(_OWN) else None
        if called is None:
            show(message)
            return
        warnings.warn_explicit(
            message.message,
            message.category,
            called.f_code.co_filename,
            called.f_lineno,
            called.f_globals.get("__name__") or "<string>",
            called.f_globals.setdefault("__warningregistry__", {}),
            source=message.source,
        )

    setattr(warnings, "_showwarnmsg", show_from_program)  # noqa: B010


def _caller_of_program(frame: FrameType | None) -> FrameType | None:
    """Return the frame from which Twofold was called that made the call in which `frame` is."""
    function = None
    while frame is not None and not frame.f_code.co_filename.startswith(_OWN):
        function, frame = frame, frame.f_back
    if frame is not None:  # what is given at its line once is to be heard of the next time, for another line
        frame.f_globals.pop("__warningregistry__", None)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    # A function of PyTorch's that is written in Python hands itself to those who listen.
    hands_itself = frame is not None and function is not None and frame.f_code is function.f_code
    return frame.f_back if hands_itself and frame is not None else frame

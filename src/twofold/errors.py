"""What can go wrong, and the words for it.

::

    Exception
    └── TwofoldError                 everything raised on purpose by this package
        ├── OptionError              no such option, or a value it cannot take (also a ValueError)
        ├── BackendUnavailableError  the named backend lacks its device or compiler (also a RuntimeError)
        ├── NotConvertibleError      strict mode only: the program would have fallen back to eager
        ├── DeclarationError         a graph built by hand was declared or called in a way that cannot work
        ├── DifferentiationError     a graph built by hand has no derivative
        ├── StaleError               a tensor was written to before a recursive call that reads it was computed
        ├── FailedError              the result of a recursive call whose computation raised
        └── InternalError            a bug in Twofold; the message says how to report it

The user's own exceptions are none of these: they leave as in eager execution. A fallback is no exception
either; it is recorded under one of the ``CODES`` below, and the report shows the reason and the hint.
"""

from __future__ import annotations

from typing import NamedTuple


class TwofoldError(Exception):
    """Base of every error this package raises on purpose."""


class OptionError(TwofoldError, ValueError):
    """An option that does not exist, or a value that it cannot take."""


class BackendUnavailableError(TwofoldError, RuntimeError):
    """A backend was asked for by name, and this machine lacks what it needs."""


class NotConvertibleError(TwofoldError):
    """The program cannot run as a graph, or without its Python where that is demanded, and ``strict=True``.

    ``refusal``: the structured reason why the source was not converted, if that is it.
    """

    def __init__(self, message: str, refusal: object = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class DeclarationError(TwofoldError):
    """A SubGraph was declared, defined or called in a way that cannot work; the message says what to change."""


class DifferentiationError(TwofoldError):
    """A graph, or a value met while it runs, has no derivative here; the message says what to write instead."""


class StaleError(TwofoldError):
    """A tensor was written to between a call of a recursive function and the use of its result."""


class FailedError(TwofoldError):
    """The value of a deferred tensor is asked for, and computing it failed before."""


class InternalError(TwofoldError):
    """A broken invariant of Twofold itself. Never the user's fault."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"{message}\nThis is a bug in Twofold. Run with TWOFOLD_ENGINE=eager to go on without it,"
            " and please report the text above with the program that caused it."
        )


class Code(NamedTuple):
    """What a fallback or refusal code means, and what its reader can do about it."""

    meaning: str
    hint: str


CODES: dict[str, Code] = {
    "new_path": Code(
        "the program took a path not seen before; the unit ran eagerly and the path was added",
        "Nothing to do: the next unit that takes this path runs as a graph.",
    ),
    "too_many_paths": Code(
        "nearly every unit takes a path of its own, so recording more of them would not pay",
        "Look for a Python value that steers the program and differs each time: a size, a count, a coin."
        " Pad or bucket sizes, or make the choice with tensors (torch.where).",
    ),
    "argument_changes": Code(
        "a Python value passed to a tensor call differs on every call and cannot be fed to the graph",
        "Pass it as a tensor, or keep it to a few values.",
    ),
    "tensor_hook": Code(
        "a hook on a tensor, module or gradient runs Python inside backward",
        "Remove the hook, or do its work after backward() on .grad.",
    ),
    "autograd_function": Code(
        "a custom autograd.Function runs Python inside backward",
        "Write the backward with torch operations alone, or register a torch.library operation.",
    ),
    "foreign_operation": Code(
        "operations reached PyTorch's dispatcher unseen: scripted, compiled or C++ code",
        "Call the eager version of that part, or register the C++ operation with torch.library.",
    ),
    "data_dependent_shape": Code(
        "the shape of a tensor depends on the values of another (nonzero, unique, boolean masks)",
        "Use a form of fixed size: torch.where, masked_fill, topk, or multiplication by the mask.",
    ),
    "double_backward": Code(
        "gradients of gradients are taken (create_graph=True)",
        "None yet: these units run eagerly.",
    ),
    "history_escapes": Code(
        "a tensor that leaves the unit carries autograd history which a later unit may differentiate",
        "Detach what is kept between iterations: loss.detach(), state.detach().",
    ),
    "capture_failed": Code(
        "the recorded unit could not be captured or replayed by the backend",
        "The unit runs on the tier below, named under decisions. Try backend='replay' or 'inductor'.",
    ),
    "compile_failed": Code(
        "the compiler failed on this graph; the tier below was kept",
        "Nothing to do. numerics='exact' saves the attempt.",
    ),
    "no_compiler": Code(
        "there is no working C++ compiler (CPU) or Triton (CUDA), so nothing can be compiled",
        "Install g++ or set CXX (CPU); install the triton package that belongs to this torch (CUDA).",
    ),
    "out_of_memory": Code(
        "memory ran out while capturing or compiling; the tier below was kept, at the lowest eager execution",
        "Use a smaller batch, or backend='replay', which needs no memory of its own.",
    ),
    "not_faster": Code(
        "the graph was measured and is not faster than eager execution on this program",
        "Nothing to do: large operations leave nothing to win. A named backend is used without measuring.",
    ),
    "too_large": Code(
        "one unit holds more tensor calls than can be recorded",
        "Decorate a smaller function: one training step instead of a whole epoch.",
    ),
    "thread": Code(
        "the unit was used from several threads at once, or tensors were used in another thread",
        "Run training steps in one thread; data loading in other threads or processes is fine.",
    ),
    "unit_raised": Code(
        "the program raised an exception inside the unit; its state is what eager execution leaves",
        "Nothing to do if the exception is expected.",
    ),
    "recursion": Code(
        "a function of twofold.subgraph was called in the unit; its invocations ran batched, the rest eagerly",
        "Nothing to do: the recursion is a graph of its own.",
    ),
    "unsupported_call": Code(
        "a tensor call whose effect cannot be recorded",
        "Move the call out of the unit, or replace it; the line is named with the reason.",
    ),
    "no_tensor_calls": Code(
        "the unit made no tensor calls, so there is nothing to run as a graph",
        "Decorate the function that computes.",
    ),
    "assumption_failed": Code(
        "calls were other than the graphs made from the function's source assumed, too often to go on assuming it",
        "Nothing to do: the function's Python runs beside its graph. The report lists the assumption that failed.",
    ),
    "gradient_kept": Code(
        "the program keeps a gradient of an earlier unit, in memory that the graph would write to",
        "Nothing to do: from now on the graph copies its gradients. Keep p.grad.clone() to spare it that.",
    ),
    "mutated_outside": Code(
        "a tensor that the graph relies on was replaced or resized outside the unit",
        "Change parameters and buffers in place (p.copy_()); rare replacements cost one eager unit each.",
    ),
}
"""Every code that ``Account.fallback`` and ``Account.refusal`` take."""

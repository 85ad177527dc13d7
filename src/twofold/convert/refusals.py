"""What conversion does not take, as structured values: code, construct, origin with its source line, hint."""

from __future__ import annotations

import linecache
from dataclasses import dataclass

from twofold.graph import Origin

HINTS: dict[str, str] = {
    "no_source": "Define the function in a file, with def.",
    "unsupported_syntax": "Write this part with if, for, comprehensions and calls, or move it out of the function.",
    "unsupported_call": "Call torch functions, nn.Modules, functions written in Python, or pass no tensors to it.",
    "return_in_loop": "Keep in a variable whether the loop was left, and ask for it after the loop.",
    "tensor_fetch": "Read values of single tensors, by .item(), .tolist() or a condition.",
    "tensor_argument": "Pass each tensor as an argument of its own, or several in a tuple.",
    "recursive_helper": "Decorate the helper with twofold.subgraph too.",
    "module_hook": "Remove the hook, or call the operations of the module's forward directly.",
    "random": "Switch the module to evaluation mode; batched execution cannot draw eager's random numbers in order.",
    "inconsistent_results": "Return as many results from every return statement.",
    "kept_tensor": "Keep each tensor once, in the call that computes it; else use twofold.subgraph.",
    "result_structure": "Return tensors, and tuples, dicts and dataclasses of these written in the return statement.",
    "no_graph": "Nothing to do: the path has no graph yet, or is another than the one recorded.",
    "foreign_function": "Move the call out of the function, or hand in what it returns as an argument.",
    "unsupported_object": "Use plain attributes, lists, dictionaries and dataclasses for what the function touches.",
    "raises": "Nothing to do: calls that raise run as plain Python.",
    "late_decision": "Decide before the last optimizer step, or with torch.where.",
    "several_units": "Decorate a function that holds one training step.",
    "too_deep": "Decorate the recursive function with twofold.subgraph.",
    "converter_failed": "Nothing to do. Please report this with the program that caused it.",
}
"""For each code, what to write instead."""


@dataclass(frozen=True)
class Refusal:
    """Why a function is not converted. `construct` says what was met, `line` is the text of the source line."""

    code: str
    construct: str
    origin: Origin | None = None
    line: str = ""

    @property
    def hint(self) -> str:
        """What to write instead."""
        return HINTS[self.code]

    def __str__(self) -> str:
        where = f" ({self.origin})" if self.origin else ""
        shown = f"\n    {self.line.strip()}" if self.line else ""
        return f"{self.code}: {self.construct}{where}{shown}\n{self.hint}"


def line_of(origin: Origin) -> str:
    """Return the text of a source line, or nothing where it cannot be read."""
    return linecache.getline(origin.file, origin.line)


class Refused(Exception):
    """Raised inside the conversion; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

"""Twofold: imperative PyTorch programs at the speed of symbolic graphs.

`function` and `program` run ordinary training code as graphs while its Python stays alive; `report` says what ran
where and why.
"""

from twofold.api import Function, Program, function, program, report, wait_for_compilation
from twofold.errors import BackendUnavailableError, NotConvertibleError, OptionError, TwofoldError
from twofold.subgraph import subgraph

__all__ = [
    "BackendUnavailableError",
    "Function",
    "NotConvertibleError",
    "OptionError",
    "Program",
    "TwofoldError",
    "function",
    "program",
    "report",
    "subgraph",
    "wait_for_compilation",
]

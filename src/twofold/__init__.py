"""Twofold: imperative PyTorch programs at the speed of symbolic graphs.

`function` and `program` run ordinary training code as graphs while its Python stays alive; `report` says what ran
where and why. `DeclaredSubGraph`, `if_` and `while_` build recursive graphs by hand.
"""

from twofold.api import Function, Program, function, program, report, wait_for_compilation
from twofold.declare import DeclaredSubGraph, if_, while_
from twofold.errors import BackendUnavailableError, DeclarationError, NotConvertibleError, OptionError, TwofoldError
from twofold.graph import TensorSpec, show
from twofold.subgraph import subgraph

__all__ = [
    "BackendUnavailableError",
    "DeclarationError",
    "DeclaredSubGraph",
    "Function",
    "NotConvertibleError",
    "OptionError",
    "Program",
    "TensorSpec",
    "TwofoldError",
    "function",
    "if_",
    "program",
    "report",
    "show",
    "subgraph",
    "wait_for_compilation",
    "while_",
]

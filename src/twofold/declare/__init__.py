"""Graphs built by hand: SubGraphs declared before they are defined, with symbolic tensors, `if_` and `while_`."""

from .declared import DeclaredSubGraph
from .flow import if_, while_

__all__ = ["DeclaredSubGraph", "if_", "while_"]

"""From the source of recursive Python functions to graphs of SubGraphs, and to what runs them."""

from .convert import Converted, Function, convert
from .functions import Outer, Recursive
from .refusals import Refusal, Refused

__all__ = ["Converted", "Function", "Outer", "Recursive", "Refusal", "Refused", "convert"]

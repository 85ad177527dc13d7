"""Recursive SubGraphs at run time: calls are planned at once and computed together when a value is needed."""

from .deferred import PENDING, Deferred, changed, flush_before_unheard_code
from .parts import NATIVE
from .program import AbandonedError, Program

__all__ = ["NATIVE", "PENDING", "AbandonedError", "Deferred", "Program", "changed", "flush_before_unheard_code"]

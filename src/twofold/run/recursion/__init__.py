"""Recursive SubGraphs at run time: calls are planned at once and computed together when a value is needed."""

from .deferred import PENDING, Deferred, flush_before_steps
from .program import AbandonedError, Program

__all__ = ["PENDING", "AbandonedError", "Deferred", "Program", "flush_before_steps"]

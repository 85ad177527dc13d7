"""From the source of recursive Python functions to graphs of SubGraphs, and to what runs them."""

from twofold.convert.refusals import Refusal, Refused, line_of

from .blocks import Block, Operand, make_block, tensor_results
from .convert import Converted, convert
from .functions import Function, Outer, Recursive
from .planner import PlannerSource, planner_source
from .slices import Kind, Slices, slice_graph

__all__ = [
    "Block",
    "Converted",
    "Function",
    "Kind",
    "Operand",
    "Outer",
    "PlannerSource",
    "Recursive",
    "Refusal",
    "Refused",
    "Slices",
    "convert",
    "line_of",
    "make_block",
    "planner_source",
    "slice_graph",
    "tensor_results",
]

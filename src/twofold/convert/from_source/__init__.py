"""From the source of recursive Python functions to graphs of SubGraphs, and to what runs them."""

from twofold.convert.refusals import Refusal, Refused, line_of
from twofold.convert.targets import apply

from .blocks import Block, Cut, Operand, is_cut, tensor_parameters, tensor_results
from .convert import Converted, convert
from .functions import Function, Outer, Recursive
from .planner import PlannerSource, planner_source
from .scope import constructed
from .slices import Kind, Slices, slice_graph
from .walk import CUT, make_block, make_cut, make_entry

__all__ = [
    "CUT",
    "Block",
    "Converted",
    "Cut",
    "Function",
    "Kind",
    "Operand",
    "Outer",
    "PlannerSource",
    "Recursive",
    "Refusal",
    "Refused",
    "Slices",
    "apply",
    "constructed",
    "convert",
    "is_cut",
    "line_of",
    "make_block",
    "make_cut",
    "make_entry",
    "planner_source",
    "slice_graph",
    "tensor_parameters",
    "tensor_results",
]

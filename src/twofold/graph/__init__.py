"""The intermediate representation of programs, and what is done to it.

`ir` and `ops` define it, `build` makes it, `verify` checks it, `text` prints and reads it, `interpret`
gives its meaning, and `passes` improve it. This package knows neither a source language nor threads nor
devices.
"""

from .ambient import AmbientSwitch, ambient_context, current_ambient, inference_mode
from .build import GraphBuilder, SubGraphBuilder
from .effects import call_has_effect, effectful_subgraphs, has_effect
from .equivalence import equivalent
from .interpret import AssertionFailed, Environment, evaluate, interpret, run_node
from .ir import (
    SCALAR_TYPES,
    Ambient,
    Argument,
    Constant,
    Graph,
    MalformedGraphError,
    Node,
    Origin,
    SubGraph,
    TensorSpec,
    Value,
    all_nodes,
    count_reads,
    map_values,
    outer_references,
    values_in,
)
from .names import UnnamedCallableError, qualified_name, resolve
from .observe import Effect, Outcome, same, snapshot
from .ops import CONTROL_FLOW, OPS
from .parse import GraphSyntaxError, parse
from .passes import PASSES, eliminate_common_subexpressions, eliminate_dead_code, optimize
from .text import show
from .verify import describe, verify

__all__ = [
    "CONTROL_FLOW",
    "OPS",
    "PASSES",
    "SCALAR_TYPES",
    "Ambient",
    "AmbientSwitch",
    "Argument",
    "AssertionFailed",
    "Constant",
    "Effect",
    "Environment",
    "Graph",
    "GraphBuilder",
    "GraphSyntaxError",
    "MalformedGraphError",
    "Node",
    "Origin",
    "Outcome",
    "SubGraph",
    "SubGraphBuilder",
    "TensorSpec",
    "UnnamedCallableError",
    "Value",
    "all_nodes",
    "ambient_context",
    "call_has_effect",
    "count_reads",
    "current_ambient",
    "describe",
    "effectful_subgraphs",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "equivalent",
    "evaluate",
    "has_effect",
    "inference_mode",
    "interpret",
    "map_values",
    "optimize",
    "outer_references",
    "parse",
    "qualified_name",
    "resolve",
    "run_node",
    "same",
    "show",
    "snapshot",
    "values_in",
    "verify",
]

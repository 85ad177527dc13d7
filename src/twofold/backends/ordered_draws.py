"""Inductor's kernels draw random numbers in the order of the graph. Imports Inductor.

Before PyTorch 2.13 it takes draws for independent of one another and moves them: of 12 random programs with some ten
operations each, two drew each other's numbers with 2.11. What needs no gradient it moves for locality besides.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch.utils._ordered_set import OrderedSet

from twofold.capture.functions import is_random


def _draws(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and is_random(n.target)]


class _Chain(CustomGraphPass):
    """Has each draw wait for the one before it."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        draws = _draws(graph)
        if len(draws) > 1:
            waits = {later: OrderedSet([_tensor_of(graph, draw)]) for draw, later in itertools.pairwise(draws)}
            preserve_node_ordering(graph, waits)

    def uuid(self) -> str:
        """Name the pass in the keys of Inductor's cache."""
        return "twofold.ordered_draws"


def _tensor_of(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """Return a node whose value is one tensor that another makes: what makes several is no such dependency."""
    made = node.meta["val"]
    if isinstance(made, torch.Tensor):
        return node
    with graph.inserting_after(node):
        first = graph.call_function(operator.getitem, (node, 0))
    first.meta["val"] = made[0]
    return first


def settings_for(module: torch.fx.GraphModule) -> dict[str, Any]:
    """Return the settings of Inductor under which the code of a module draws in order."""
    if len(_draws(module.graph)) < 2:
        return {}
    return {"reorder_for_locality": False, "post_grad_custom_post_pass": _Chain()}

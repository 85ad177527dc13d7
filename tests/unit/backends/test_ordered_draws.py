"""Draws are chained before Inductor lowers a graph."""

import itertools
from typing import Any

import torch
from torch._inductor.fx_passes.control_dependencies import control_deps

from twofold.backends.ordered_draws import settings_for

aten: Any = torch.ops.aten


def drawing(count: int) -> torch.fx.GraphModule:
    """A graph of dropouts, which make two tensors each, and of noise."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(4)
    results = []
    for number in range(count):
        if number % 2:
            node = graph.call_function(aten.rand_like.default, (x,))
            node.meta["val"] = torch.ones(4)
        else:
            node = graph.call_function(aten.native_dropout.default, (x, 0.5, True))
            node.meta["val"] = torch.ones(4), torch.ones(4)
        results.append(node)
    graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_one_draw_needs_no_order() -> None:
    assert settings_for(drawing(1)) == {}


def test_each_draw_waits_for_a_tensor_of_the_one_before() -> None:
    module = drawing(4)
    settings = settings_for(module)
    assert settings["reorder_for_locality"] is False
    settings["post_grad_custom_post_pass"](module.graph)
    module.graph.lint()
    (made,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
    assert [draw.target is control_deps for draw in made] == [False, True, True, True]
    for earlier, later in itertools.pairwise(made):
        (awaited,) = later.args[0]
        assert awaited is earlier or awaited.args == (earlier, 0)
        assert isinstance(awaited.meta["val"], torch.Tensor)

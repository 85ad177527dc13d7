"""Convolutions of a training step in channels-last: the same results, in the layout that they had."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from tests.unit.capture.recording import recorded_path
from twofold.backends.executable import lower_to_fx
from twofold.backends.inductor import rewrite_for_inductor
from twofold.backends.layout import rewrite_to_channels_last
from twofold.convert.from_traces import build_program
from twofold.graph import Graph, Value, parse

aten: Any = torch.ops.aten


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.classify = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.second(x) + x, 2)
        return self.classify(x.flatten(1))


def training_step() -> Graph:
    torch.manual_seed(0)
    network = Network().double()  # so that another order of additions does not show
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2])

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss

    (segment,) = build_program(recorded_path(step), exact=True).segments
    return rewrite_for_inductor(segment.graph)


def fakes(values: Any) -> list[torch.Tensor]:
    return [torch.empty(v.spec.shape, dtype=v.spec.dtype) for v in values if isinstance(v, Value)]


def rewritten(graph: Graph, module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    with FakeTensorMode(), torch.no_grad():
        return rewrite_to_channels_last(module, fakes(graph.inputs), fakes(graph.outputs), lambda *_, **__: True)


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(v.spec.shape).to(v.spec.dtype) for v in graph.inputs if v.spec is not None]


def run(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [*module(*inputs), *inputs]


def test_a_training_step_computes_the_same_in_the_same_layout():
    graph = training_step()
    module = lower_to_fx(graph)
    changed = rewritten(graph, module)
    assert changed is not module
    for got, expected in zip(run(changed, inputs_of(graph)), run(module, inputs_of(graph)), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


def test_every_convolution_has_its_images_in_channels_last():
    graph = training_step()
    seen = 0
    for node in rewritten(graph, lower_to_fx(graph)).graph.nodes:
        count = {aten.convolution.default: 1, aten.convolution_backward.default: 2}.get(node.target, 0)
        for operand in node.args[:count]:
            assert operand.meta["val"].is_contiguous(memory_format=torch.channels_last)
            seen += 1
    assert seen == 2 * 1 + 2 * 2


CONVOLVE = "call aten.convolution.default(%x, %w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)"
CHANGED_IN_PLACE = f"""
graph g(%w: f32[4,3,3,3], %x: f32[2,3,8,8]):
  %a: f32[2,4,8,8] = {CONVOLVE}
  %b: f32[2,3,8,8] = call aten.add_.Tensor(%x, 1)
  %c: f32[2,4,8,8] = {CONVOLVE}
  return %a, %c
"""
CHANGED_BEHIND_A_VIEW = f"""
graph g(%w: f32[4,3,3,3], %x: f32[2,3,8,8]):
  %a: f32[2,4,8,8] = {CONVOLVE}
  %b: f32[2,256] = call aten.view.default(%a, [2, 256])
  %c: f32[2,4,8,8] = call aten.add_.Tensor(%a, 1)
  return %b
"""


@pytest.mark.parametrize("text", [CHANGED_IN_PLACE, CHANGED_BEHIND_A_VIEW])
def test_what_is_changed_in_place_is_read_anew(text: str):
    graph = parse(text.lstrip())
    module = lower_to_fx(graph)
    for got, expected in zip(
        run(rewritten(graph, module), inputs_of(graph)), run(module, inputs_of(graph)), strict=True
    ):
        torch.testing.assert_close(got, expected)

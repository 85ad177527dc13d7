"""Channels-last for the convolutions of a compiled piece, forward and backward alike.

Inductor chooses channels-last for convolutions by itself, but the strides that it keeps for a `convolution_backward`
are those of the graph it is given. A piece that holds a whole training step was recorded in eager's row-major layout,
so its backward changed layouts around every convolution: ResNet-18 at 128x32x32 on an H200 spent 2.5 ms a step in
kernels where torch.compile, whose backward is a graph of its own, spent 1.6. LeNet at 128 on two cores took 5.7 ms
instead of 5.25.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.graph import GraphLowering

aten: Any = torch.ops.aten

_IMAGES = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}
"""The positions of the arguments that are wanted in channels-last. Weights stay as they are: cuDNN copies them where it
needs to, and where images have one pixel, a weight in channels-last would have a gradient of other strides than fake
tensors say."""
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def prefer_channels_last(
    module: torch.fx.GraphModule, examples: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Return a training step with the operands of its convolutions in channels-last, or the module as it is.

    `examples` are fake inputs, `outputs` fake tensors in the layout that the outputs must keep. Only where Inductor's
    own rule for its forward graphs says that channels-last pays.
    """
    targets = {node.target for node in module.graph.nodes}
    if aten.convolution_backward.default not in targets:
        return module
    return rewrite_to_channels_last(module, examples, outputs, GraphLowering.decide_layout_opt)


def rewrite_to_channels_last(
    module: torch.fx.GraphModule,
    examples: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    pays: Callable[..., bool],
) -> torch.fx.GraphModule:
    """Do so on any device, if `pays(module, is_inference=False)` for a module whose nodes have example values."""
    rewriter = _Rewriter(module, examples)
    if not pays(module, is_inference=False):
        return module
    return rewriter.rewrite(outputs) or module


class _Rewriter:
    """Runs a module on fake tensors twice: as it is, and while it is copied with changes."""

    def __init__(self, module: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> None:
        self._module = module
        self._examples = examples
        self._graph = torch.fx.Graph()
        self._copies: dict[torch.fx.Node, torch.fx.Node] = {}
        self._converted: dict[torch.fx.Node, torch.fx.Node] = {}
        self._copied_views: set[torch.fx.Node] = set()  # what they showed
        _run_on_fakes(module, examples)

    def rewrite(self, outputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule | None:
        """Return the copy; None if it would not do the same, or would need outputs of unusual strides."""
        examples = iter(self._examples)
        for node in self._module.graph.nodes:
            if written := _written(node):
                self._converted.clear()  # what was copied may be out of date
                if not self._copied_views.isdisjoint(map(_root_of, written)):
                    return None  # what was a view should see this
            if node.op == "placeholder":
                copied = self._graph.placeholder(node.name)
                copied.meta["val"] = next(examples)
            elif node.op == "output":
                kept = [self._keep(self._copies[n], like) for n, like in zip(node.args[0], outputs, strict=True)]
                if None in kept:
                    return None
                self._graph.output(kept)
                break
            else:
                copied = self._copy_call(node)
            self._copies[node] = copied
        return torch.fx.GraphModule(self._module, self._graph)

    def _copy_call(self, node: torch.fx.Node) -> torch.fx.Node:
        arguments: list[Any] = list(torch.fx.map_arg(node.args, self._copies.__getitem__))  # type: ignore[arg-type]
        keywords = torch.fx.map_arg(node.kwargs, self._copies.__getitem__)
        for position in _IMAGES.get(node.target, ()):
            arguments[position] = self._in_channels_last(arguments[position])
        target = node.target
        if target in _VIEWS and not _can_view(arguments[0].meta["val"], arguments[1]):
            target = aten.reshape.default
            self._copied_views.add(_root_of(node))
        return self._call(target, tuple(arguments), keywords)

    def _call(self, target: Any, arguments: tuple[Any, ...], keywords: Any) -> torch.fx.Node:
        copied = self._graph.call_function(target, arguments, keywords)
        copied.meta["val"] = _value_of(copied)
        return copied

    def _in_channels_last(self, node: torch.fx.Node) -> torch.fx.Node:
        value: torch.Tensor = node.meta["val"]
        if value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last):
            return node
        if node not in self._converted:
            keywords = {"memory_format": torch.channels_last}
            self._converted[node] = self._call(aten.clone.default, (node,), keywords)
        return self._converted[node]

    def _keep(self, node: torch.fx.Node, like: torch.Tensor) -> torch.fx.Node | None:
        """Return an output in the layout it must have; None if that is not to be had by a copy."""
        if node.meta["val"].stride() == like.stride():
            return node
        if not like.is_contiguous():
            return None
        return self._call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})


def _run_on_fakes(module: torch.fx.GraphModule, examples: Sequence[torch.Tensor]) -> None:
    given = iter(examples)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = next(given)
        elif node.op == "call_function":
            node.meta["val"] = _value_of(node)


def _value_of(node: torch.fx.Node) -> Any:
    target: Any = node.target
    arguments, keywords = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return target(*arguments, **keywords)


def _written(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the arguments that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _nodes_in(written)


def _root_of(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node whose memory a tensor shows: views and results of writing are followed back."""
    schema = getattr(node.target, "_schema", None)
    is_alias = schema is not None and any(result.alias_info is not None for result in schema.returns)
    if is_alias or node.target is operator.getitem:
        shown = node.args[0]
        if isinstance(shown, torch.fx.Node):
            return _root_of(shown)
    return node


def _nodes_in(argument: Any) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(argument, found.append)
    return found


def _can_view(tensor: torch.Tensor, shape: Any) -> bool:
    try:
        tensor.view(shape)
    except (RuntimeError, ValueError):  # the latter from fake tensors
        return False
    return True

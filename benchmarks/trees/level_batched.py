"""The binary TreeLSTM batched by hand, level by level: what an expert makes of `benchmarks.programs.tree_lstm`.

Nodes are numbered by depth, deepest level last, and within a level in the order of their parents, left child
before right. The states of a level, as they lie in memory, are then the pairs of children that the level above
reads: no gathers, and `h[roots:]` seen as rows of pairs is the input of all inner nodes at once.
"""

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from benchmarks.programs.tree_lstm import TreeLSTM
from benchmarks.trees.data import BinaryNode

# Gradient and result of a sigmoid or tanh to the gradient of its argument, in one pass; `grad_input` is written to.
sigmoid_backward: Any = torch.ops.aten.sigmoid_backward
tanh_backward: Any = torch.ops.aten.tanh_backward


@dataclass(frozen=True)
class Plan:
    """The schedule of one batch, all tensors i64 and views of one upload.

    `starts[d]` is the first node of depth d, the last entry the number of nodes; `inner_counts[d]` is how many
    nodes of depth d have children. `inner` and `leaves` are positions among all nodes, in their order.
    """

    starts: list[int]
    inner_counts: list[int]
    labels: Tensor
    words: Tensor
    leaves: Tensor
    inner: Tensor


def make_plan(batch: list[BinaryNode], device: torch.device) -> Plan:
    """Walk the trees once, breadth first."""
    labels: list[int] = []
    words: list[int] = []
    leaves: list[int] = []
    inner: list[int] = []
    starts = [0]
    inner_counts: list[int] = []
    level = batch
    while level:
        below: list[BinaryNode] = []
        for position, node in enumerate(level, len(labels)):
            left = node.left
            if left is None:
                leaves.append(position)
                words.append(node.word)
            else:
                inner.append(position)
                below.append(left)
                below.append(node.right)  # pyright: ignore[reportArgumentType] the children of a node with a left
        labels.extend([node.label for node in level])
        starts.append(len(labels))
        inner_counts.append(len(below) // 2)
        level = below
    parts = labels, words, leaves, inner
    everything = torch.frombuffer(array("q", [number for part in parts for number in part]), dtype=torch.int64)
    if device.type == "cuda":
        everything = everything.pin_memory().to(device, non_blocking=True)
    return Plan(starts, inner_counts, *everything.split([len(part) for part in parts]))


def loss_by_autograd(model: TreeLSTM, plan: Plan) -> Tensor:
    """Return the losses of all nodes summed; differentiated by autograd, one graph node an operation."""
    words = F.embedding(plan.words, model.embedding.weight)
    i, o, u = model.leaf(words).chunk(3, 1)
    leaf_c = i.sigmoid() * u.tanh()
    leaf_states = torch.cat((o.sigmoid() * leaf_c.tanh(), leaf_c), 1)
    leaf_counts = [end - start for start, end in zip(plan.starts, plan.starts[1:], strict=False)]
    leaf_counts = [count - inner for count, inner in zip(leaf_counts, plan.inner_counts, strict=True)]
    leaves_by_level = leaf_states.split(leaf_counts)
    leaf_positions, inner_positions = plan.leaves.split(leaf_counts), plan.inner.split(plan.inner_counts)
    hidden = leaf_c.size(1)
    below = leaves_by_level[-1]
    levels = [below]
    for depth in range(len(leaf_counts) - 2, -1, -1):
        h, c = below.view(-1, 2, 2, hidden).unbind(2)
        i, o, forget, u = model.inner(h.flatten(1)).split((hidden, hidden, 2 * hidden, hidden), 1)
        c = i.sigmoid() * u.tanh() + (forget.sigmoid() * c.flatten(1)).view(-1, 2, hidden).sum(1)
        below = torch.cat((o.sigmoid() * c.tanh(), c), 1)
        if leaf_counts[depth]:
            states = torch.cat((below, leaves_by_level[depth]))
            positions = torch.cat((inner_positions[depth], leaf_positions[depth])) - plan.starts[depth]
            below = torch.empty_like(states).index_copy(0, positions, states)
        levels.append(below)
    logits = model.classify(torch.cat(levels[::-1])[:, :hidden])
    return F.cross_entropy(logits, plan.labels, reduction="sum")


class _Loss(torch.autograd.Function):
    """Forward and backward by hand; arguments: plan, embedding, then weight and bias of leaf, inner, classify.

    Of the backward pass only what the levels hand to one another is in the loop. The derivatives of the gates
    are factors made for all nodes at once before it, and a weight's gradient is one matmul after it.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, embedding: Tensor, *parameters: Tensor) -> Tensor:
        leaf_weight, leaf_bias, inner_weight, inner_bias, classify_weight, classify_bias = parameters
        words = embedding.index_select(0, plan.words)
        leaf_gates = torch.addmm(leaf_bias, words, leaf_weight.t())
        hidden = leaf_gates.size(1) // 3
        leaf_gates[:, : 2 * hidden].sigmoid_()
        leaf_gates[:, 2 * hidden :].tanh_()
        h, c = leaf_gates.new_empty(2, plan.starts[-1], hidden)
        leaf_c = leaf_gates[:, :hidden] * leaf_gates[:, 2 * hidden :]
        c.index_copy_(0, plan.leaves, leaf_c)
        leaf_tanh = leaf_c.tanh()
        h.index_copy_(0, plan.leaves, leaf_gates[:, hidden : 2 * hidden] * leaf_tanh)

        inner_gates, inner_tanh = _run_levels(plan, h, c, inner_weight, inner_bias)
        logits = torch.addmm(classify_bias, h, classify_weight.t())
        log_probabilities = logits.log_softmax(1)
        ctx.plan = plan
        ctx.saved = words, leaf_gates, leaf_tanh, inner_gates, inner_tanh, h, c, log_probabilities
        ctx.weights = inner_weight, classify_weight
        return F.nll_loss(log_probabilities, plan.labels, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        words, leaf_gates, leaf_tanh, inner_gates, inner_tanh, h, c, log_probabilities = ctx.saved
        inner_weight, classify_weight = ctx.weights
        roots = plan.starts[1]
        hidden = h.size(1)

        d_logits = log_probabilities.exp()
        d_logits.scatter_add_(1, plan.labels.unsqueeze(1), d_logits.new_full((1, 1), -1.0).expand(len(d_logits), 1))
        d_logits.mul_(gradients[0])
        d_h = d_logits @ classify_weight
        d_c = torch.empty_like(d_h)
        d_c[:roots] = 0.0
        d_inner = _run_levels_back(
            plan, d_h, d_c, c[roots:].view(-1, 2 * hidden), inner_gates, inner_tanh, inner_weight
        )

        d_leaf_h, d_leaf_c = d_h.index_select(0, plan.leaves), d_c.index_select(0, plan.leaves)
        i, o, u = leaf_gates.split(hidden, 1)
        d_leaf_c.add_(tanh_backward(d_leaf_h * o, leaf_tanh))
        d_i, d_o, d_u = (d_leaf := torch.empty_like(leaf_gates)).split(hidden, 1)
        sigmoid_backward(d_leaf_c * u, i, grad_input=d_i)
        sigmoid_backward(d_leaf_h * leaf_tanh, o, grad_input=d_o)
        tanh_backward(d_leaf_c * i, u, grad_input=d_u)
        pairs = h[roots:].view(-1, 2 * hidden)
        return (
            None,
            None,
            *(d_leaf.t() @ words, d_leaf.sum(0)),
            *(d_inner.t() @ pairs, d_inner.sum(0)),
            *(d_logits.t() @ h, d_logits.sum(0)),
        )


def _run_levels(plan: Plan, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in h and c, f32[nodes, hidden], of inner nodes; return their gates after activation and tanh(c)."""
    hidden = h.size(1)
    gates = h.new_empty(len(plan.inner), 5 * hidden)
    tanh_c = h.new_empty(len(plan.inner), hidden)
    weight = weight.t()
    positions = plan.inner.split(plan.inner_counts)
    end = len(plan.inner)
    for depth in range(len(plan.inner_counts) - 2, -1, -1):
        begin = end - plan.inner_counts[depth]
        below = slice(plan.starts[depth + 1], plan.starts[depth + 2])
        gate, tanh = gates[begin:end], tanh_c[begin:end]
        torch.addmm(bias, h[below].view(-1, 2 * hidden), weight, out=gate)
        gate[:, : 4 * hidden].sigmoid_()
        gate[:, 4 * hidden :].tanh_()
        i, o, left, right, u = gate.split(hidden, 1)
        c_left, c_right = c[below].view(-1, 2 * hidden).split(hidden, 1)
        level_c = (i * u).addcmul_(left, c_left).addcmul_(right, c_right)
        torch.tanh(level_c, out=tanh)
        c.index_copy_(0, positions[depth], level_c)
        h.index_copy_(0, positions[depth], o * tanh)
        end = begin
    return gates, tanh_c


def _run_levels_back(
    plan: Plan, d_h: Tensor, d_c: Tensor, c_pairs: Tensor, gates: Tensor, tanh_c: Tensor, weight: Tensor
) -> Tensor:
    """Complete d_h and d_c, f32[nodes, hidden], from the roots down; return the gradient of gates before activation."""
    hidden = d_h.size(1)
    blocks = hidden, hidden, 2 * hidden, hidden
    i, o, forget, u = gates.split(blocks, 1)
    factor_i, factor_o, factor_forget, factor_u = (factors := torch.empty_like(gates)).split(blocks, 1)
    sigmoid_backward(u, i, grad_input=factor_i)
    sigmoid_backward(tanh_c, o, grad_input=factor_o)
    sigmoid_backward(c_pairs, forget, grad_input=factor_forget)
    tanh_backward(i, u, grad_input=factor_u)
    factor_h = tanh_backward(o, tanh_c)
    positions = plan.inner.split(plan.inner_counts)
    begin = 0
    for depth, count in enumerate(plan.inner_counts[:-1]):
        end = begin + count
        below = slice(plan.starts[depth + 1], plan.starts[depth + 2])
        level_h = d_h.index_select(0, positions[depth])
        level_c = d_c.index_select(0, positions[depth]).addcmul_(level_h, factor_h[begin:end])
        level_factors = factors[begin:end].view(-1, 5, hidden)
        level_factors[:, 1].mul_(level_h)
        level_factors[:, 0].mul_(level_c)
        level_factors[:, 2:].mul_(level_c.unsqueeze(1))
        d_h[below].view(-1, 2 * hidden).addmm_(factors[begin:end], weight)
        torch.mul(forget[begin:end].view(-1, 2, hidden), level_c.unsqueeze(1), out=d_c[below].view(-1, 2, hidden))
        begin = end
    return factors


def loss_by_hand(model: TreeLSTM, plan: Plan) -> Tensor:
    """Return the losses of all nodes summed; its backward pass is written by hand too."""
    parameters = (parameter for layer in (model.leaf, model.inner, model.classify) for parameter in layer.parameters())
    return _Loss.apply(plan, model.embedding.weight, *parameters)

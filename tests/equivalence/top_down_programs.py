"""Recursive programs that pass tensors down, or decide by values of tensors; as `recursive_programs`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .recursive_programs import HIDDEN, LABELS, Decorate, Recursion, Tree, _layers, _parameters


def state_of_the_parent(decorate: Decorate) -> Recursion:
    """A state goes down, is used before and after the calls, and sums come up."""
    (own, to_child, classify), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, LABELS))

    @decorate
    def down(node: Any, h: Tensor) -> Any:
        state = torch.tanh(own(h) + embedding.weight[node.word])
        loss = F.cross_entropy(classify(state).unsqueeze(0), torch.tensor([node.label]))
        for child in node.children:
            loss = loss + down(child, to_child(state) * child.weight)
        return loss + (h * state).sum()

    root = torch.linspace(-1, 1, HIDDEN).requires_grad_()
    return Recursion(down, lambda tree: down(tree, root), [*_parameters(own, to_child, classify, embedding), root])


def both_ways(decorate: Decorate) -> Recursion:
    """Each call depends on the result of the one before it, and on the parent's state."""
    (own, mix), embedding = _layers((HIDDEN, HIDDEN), (2 * HIDDEN, HIDDEN))

    @decorate
    def visit(node: Any, h: Tensor, depth: int) -> Any:
        state = torch.sigmoid(own(h)) + embedding.weight[node.word]
        size = 1
        for child in node.children:
            below, deep, count = visit(child, state, depth + 1)
            state = torch.tanh(mix(torch.cat([state, below]))) + 0.1 * deep * count
            size += count
        return state, h * depth, size

    def call(tree: Tree) -> Tensor:
        state, h, size = visit(tree, torch.full((HIDDEN,), 0.3), 1)
        return state.sum() * size + h.sum()

    return Recursion(visit, call, _parameters(own, mix, embedding))


def chain_of_states(decorate: Decorate) -> Recursion:
    """A chain: `state = step(node.next, state)` by the first child."""
    (own,), embedding = _layers((HIDDEN, HIDDEN))
    cell = nn.LSTMCell(HIDDEN, HIDDEN)

    @decorate
    def step(node: Any, h: Tensor, c: Tensor) -> Any:
        h, c = cell(embedding.weight[node.word].unsqueeze(0), (h, c))
        if not node.children:
            return own(h).sum()
        return step(node.children[0], h, c)

    start = torch.zeros(1, HIDDEN)
    return Recursion(step, lambda tree: step(tree, start, start), _parameters(own, cell, embedding))


def pairs_of_states(decorate: Decorate) -> Recursion:
    """The state is a tuple, passed and returned as one."""
    (own,), embedding = _layers((HIDDEN, HIDDEN))
    cell = nn.LSTMCell(HIDDEN, HIDDEN)

    @decorate
    def step(node: Any, state: Any) -> Any:
        state = cell(embedding.weight[node.word].unsqueeze(0), state)
        total = own(state[0]).sum()
        for child in node.children:
            total = total + step(child, state)
        return total

    start = torch.zeros(1, HIDDEN)
    return Recursion(step, lambda tree: step(tree, (start, start)), _parameters(own, cell, embedding))


def decided_by_the_parent(decorate: Decorate) -> Recursion:
    """Generated from the root down: whether a node has children is decided by its state."""
    (grow, to_left, to_right), embedding = _layers((HIDDEN, 1), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN))
    nn.init.constant_(grow.bias, 0.4)
    nn.init.uniform_(grow.weight, -0.4, 0.4)

    @decorate
    def generate(node: Any, h: Tensor, depth: int) -> Any:
        score = grow(h)
        loss = F.softplus(score).sum()
        if node is not None:
            h = h + embedding.weight[node.word]
            loss = loss + h.pow(2).sum()
        if depth == 4 or score.item() <= 0:
            return loss, 1
        left, right = (None, None) if node is None else (node.left, node.right)
        loss_left, count_left = generate(left, torch.tanh(to_left(h)), depth + 1)
        loss_right, count_right = generate(right, torch.tanh(to_right(h)), depth + 1)
        return loss + loss_left + loss_right, 1 + count_left + count_right

    def call(tree: Tree) -> Tensor:
        loss, count = generate(tree, embedding.weight[tree.word] * 3.0, 0)
        return loss / count

    return Recursion(generate, call, _parameters(grow, to_left, to_right, embedding))


def decided_by_the_children(decorate: Decorate) -> Recursion:
    """What is computed at a node depends on the values of its children's results."""
    (own, other), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        state = embedding.weight[node.word]
        chosen = 0
        for child in node.children:
            below, count = encode(child)
            if below.sum() > state.sum() and child.label > 0:
                state, chosen = torch.tanh(own(below)) + state, chosen + count + 1
            elif bool((below > 0).all()):
                state = state - other(below)
            else:
                state = state * 0.5
        return state, chosen

    def call(tree: Tree) -> Tensor:
        state, chosen = encode(tree)
        return state.sum() * (1 + chosen)

    return Recursion(encode, call, _parameters(own, other, embedding))


def a_forest(decorate: Decorate) -> Recursion:
    """The function over the batch is recursive too, so that the trees of a batch get on side by side."""
    inner = decided_by_the_parent(decorate)
    generate, embedding_weight = inner.encode, inner.parameters[-1]

    @decorate
    def forest(trees: Any) -> Any:
        total = torch.zeros(())
        for tree in trees:
            loss, count = generate(tree, embedding_weight[tree.word] * 3.0, 0)
            total = total + loss / count
        return total

    return Recursion(forest, lambda tree: forest([tree, *tree.children]), inner.parameters)


PROGRAMS = {
    maker.__name__: maker
    for maker in (
        state_of_the_parent,
        both_ways,
        chain_of_states,
        pairs_of_states,
        decided_by_the_parent,
        decided_by_the_children,
        a_forest,
    )
}

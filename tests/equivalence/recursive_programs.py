"""Recursive programs as users write them: each maker returns the undecorated function and the parameters that it uses.

A maker is given `decorate`, so that the function that calls itself by name calls the decorated one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twofold

HIDDEN = 3
WORDS = 7
LABELS = 4

Decorate = Callable[[Any], Any]


def strict(function: Any) -> Any:
    """Run batched, or raise."""
    return twofold.subgraph(function, strict=True)


def plain(function: Any) -> Any:
    """Run as it stands."""
    return function


@dataclass(eq=False)
class Tree:
    """A node with any number of children; `left` and `right` are the first two."""

    word: int = 0
    label: int = 0
    weight: float = 1.0
    children: list["Tree"] = field(default_factory=list)

    @property
    def left(self) -> "Tree | None":
        return self.children[0] if self.children else None

    @property
    def right(self) -> "Tree | None":
        return self.children[-1] if self.children else None


@dataclass
class Recursion:
    """A recursive function, how it is called for one tree, and the parameters whose gradients are compared."""

    encode: Any
    call: Callable[[Tree], Any]
    parameters: list[Tensor]


def _layers(*sizes: tuple[int, int]) -> tuple[list[nn.Linear], nn.Embedding]:
    torch.manual_seed(0)
    return [nn.Linear(*size) for size in sizes], nn.Embedding(WORDS, HIDDEN)


def _parameters(*modules: nn.Module) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


def binary_tree_lstm(decorate: Decorate) -> Recursion:
    (leaf, inner, classify), embedding = _layers((HIDDEN, 9), (2 * HIDDEN, 15), (HIDDEN, LABELS))

    @decorate
    def encode(node: Any) -> Any:
        if node.left is None:
            i, o, u = leaf(embedding.weight[node.word].unsqueeze(0)).chunk(3, 1)
            c, loss = i.sigmoid() * u.tanh(), 0.0
        else:
            hl, cl, loss_l = encode(node.left)
            hr, cr, loss_r = encode(node.right)
            i, o, fl, fr, u = inner(torch.cat((hl, hr), 1)).chunk(5, 1)
            c, loss = i.sigmoid() * u.tanh() + fl.sigmoid() * cl + fr.sigmoid() * cr, loss_l + loss_r
        h = o.sigmoid() * c.tanh()
        return h, c, loss + F.cross_entropy(classify(h), torch.tensor([node.label]))

    return Recursion(encode, lambda tree: encode(tree)[2], _parameters(leaf, inner, classify, embedding))


def child_sum(decorate: Decorate) -> Recursion:
    (gates, sums, forget), embedding = _layers((HIDDEN, 9), (HIDDEN, 9), (HIDDEN, HIDDEN))
    hidden = HIDDEN

    @decorate
    def encode(node: Any) -> Any:
        word = gates(embedding.weight[node.word].unsqueeze(0))
        total = torch.zeros(1, hidden)
        kept = torch.zeros(1, hidden)
        loss: Any = 0.0
        for child in node.children:
            h, c, loss_of_child = encode(child)
            total = total + h
            loss = loss + loss_of_child
            kept += (word[:, :hidden] + forget(h)).sigmoid() * c
        i, o, u = (word + sums(total)).chunk(3, 1)
        c = i.sigmoid() * u.tanh() + kept
        h = o.sigmoid() * c.tanh()
        return h, c, loss + F.cross_entropy(h, torch.tensor([node.label % HIDDEN]))

    return Recursion(
        encode, lambda tree: encode(tree)[2] + encode(tree)[0].sum(), _parameters(gates, sums, forget, embedding)
    )


def lists_and_reductions(decorate: Decorate) -> Recursion:
    (own, down), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        states = [encode(child) for child in node.children if child.word != 1]
        x = own(embedding(torch.tensor([node.word])))
        if len(states) == 0:
            return x.tanh()
        best = torch.stack(states).amax(0) if node.label % 2 else sum(states) / len(states)
        return torch.relu(x + down(best)) * node.weight

    return Recursion(encode, lambda tree: encode(tree).sum(), _parameters(own, down, embedding))


def memoised(decorate: Decorate) -> Recursion:
    (own, classify), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, LABELS))

    @decorate
    def encode(node: Any, states: Any, losses: Any) -> Any:
        if node in states:
            return states[node]
        total = torch.zeros(1, HIDDEN)
        for child in node.children:
            total = total + encode(child, states, losses)
        state = torch.tanh(own(embedding.weight[node.word].unsqueeze(0) + total))
        losses.append(F.cross_entropy(classify(state), torch.tensor([node.label])))
        states[node] = state
        return state

    def call(tree: Tree) -> Tensor:
        losses: list[Tensor] = []
        root = encode(tree, {}, losses)
        return torch.stack(losses).sum() + root.sum()

    return Recursion(encode, call, _parameters(own, classify, embedding))


class Encoder(nn.Module):
    """A recursive method, a helper, a submodule of the user's own, and a host result beside the tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.cell = Cell()
        self.scale = 0.5

    def forward(self, tree: Any) -> Any:
        state, depth = self.encode(tree)
        return state.sum() * depth

    def word(self, node: Any) -> Any:
        return self.embedding.weight[node.word].unsqueeze(0) * self.scale

    def encode(self, node: Any) -> Any:
        if not node.children:
            return self.word(node), 1
        left, depth_l = self.encode(node.children[0])
        right, depth_r = self.encode(node.children[-1])
        return self.cell(left, right, self.word(node)), max(depth_l, depth_r) + 1


class Cell(nn.Module):
    """Combines two states and a word, each f32[1, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, left: Tensor, right: Tensor, word: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.linear(torch.cat([left, right, word], dim=1)))) + word


def method(decorate: Decorate) -> Recursion:
    class Decorated(Encoder):
        encode = decorate(Encoder.encode)

    model = Decorated()
    return Recursion(model.encode, model, _parameters(model))


def mutual(decorate: Decorate) -> Recursion:
    (even_layer, odd_layer), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, HIDDEN))

    @decorate
    def even(node: Any) -> Any:
        x = embedding.weight[node.word]
        loss = x.pow(2).sum()
        for child in node.children:
            h, below = odd(child)
            x, loss = x + h, loss + below
        return torch.tanh(even_layer(x)), loss

    @decorate
    def odd(node: Any) -> Any:
        x = embedding.weight[node.word]
        loss = x.sum()
        for child in node.children:
            h, below = even(child)
            x, loss = x * h, loss + 2.0 * below
        return torch.sigmoid(odd_layer(x)), loss

    return Recursion(
        even, lambda tree: even(tree)[0].sum() + even(tree)[1], _parameters(even_layer, odd_layer, embedding)
    )


def sums_used_inside(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        h = own(embedding.weight[node.word])
        total = h.sum()
        for child in node.children:
            below, loss = encode(child)
            h = h + below * loss.tanh()
            total = total + loss
        return h.tanh(), total

    return Recursion(encode, lambda tree: encode(tree)[1], _parameters(own, embedding))


def tensors_at_nodes(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))
    vectors = [row.detach().clone().requires_grad_() for row in embedding.weight]

    @decorate
    def encode(node: Any, given: Any) -> Any:
        h = F.linear(given[node.word], own.weight, own.bias)
        with torch.no_grad():
            scale = h.abs().mean()
        for child in node.children:
            h = h + encode(child, given)
        return h * scale

    return Recursion(encode, lambda tree: encode(tree, vectors).tanh().sum(), [*_parameters(own), *vectors])


def handed_on(decorate: Decorate) -> Recursion:
    """Gradients go from parents to children as they are, and a result is only a sum of children's."""
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        count = 1.0
        state = embedding.weight[node.word]
        size = embedding.weight[node.word].sum() * 2.0
        for child in node.children:
            below, deep = encode(child)
            state = state + below
            size = size + deep + 1.0
        return state, size + count

    return Recursion(encode, lambda tree: own(encode(tree)[0]).sum() + encode(tree)[1], _parameters(own, embedding))


PROGRAMS = {
    maker.__name__: maker
    for maker in (
        binary_tree_lstm,
        child_sum,
        lists_and_reductions,
        memoised,
        method,
        mutual,
        sums_used_inside,
        tensors_at_nodes,
        handed_on,
    )
}

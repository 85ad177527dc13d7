"""The binary TreeLSTM (Tai, Socher and Manning 2015, section 3.2, N = 2), a label asked for at every node.

Dynamic control flow: the recursion, over a tree of any shape. Dynamic types: children are nodes or None, a loss is a
number or a tensor. Impure functions: none but the step of the optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, WIDTHS, Decorate, training, undecorated
from benchmarks.trees.data import BinaryNode, binary_syntax_trees


class TreeLSTM(nn.Module):
    """The parameters: gates i, o, u of a leaf and i, o, f left, f right, u of an inner node; embedding frozen."""

    def __init__(self, words: int, labels: int, width: int = 300, hidden: int = 168) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.embedding.weight.requires_grad_(False)
        self.leaf = nn.Linear(width, 3 * hidden)
        self.inner = nn.Linear(2 * hidden, 5 * hidden)
        self.classify = nn.Linear(hidden, labels)


Encode = Callable[[BinaryNode], tuple[Tensor, Tensor, Any]]


def recursion(model: TreeLSTM, compile_model: CompileModel = identity, decorate: Decorate = undecorated) -> Encode:
    """Return the plain recursive function: h and c, f32[1, hidden], and the losses of all nodes summed."""
    leaf, inner, classify = compile_model(model.leaf), compile_model(model.inner), compile_model(model.classify)
    embedding = model.embedding
    device = embedding.weight.device

    @decorate
    def encode(node: BinaryNode) -> tuple[Tensor, Tensor, Any]:
        if node.left is None:
            i, o, u = leaf(embedding.weight[node.word].unsqueeze(0)).chunk(3, 1)
            c, loss = i.sigmoid() * u.tanh(), 0.0
        else:
            hl, cl, loss_l = encode(node.left)
            hr, cr, loss_r = encode(node.right)
            i, o, fl, fr, u = inner(torch.cat((hl, hr), 1)).chunk(5, 1)
            c, loss = i.sigmoid() * u.tanh() + fl.sigmoid() * cl + fr.sigmoid() * cr, loss_l + loss_r
        h = o.sigmoid() * c.tanh()
        return h, c, loss + F.cross_entropy(classify(h), torch.tensor([node.label], device=device))

    return encode


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = binary_syntax_trees(FUNCTIONS[size])
    model = TreeLSTM(corpus.words, corpus.labels, *WIDTHS[size]).to(device)
    encode = recursion(model, compile_model, decorate)

    def loss_of(batch: list[BinaryNode]) -> Tensor:
        return sum(encode(tree)[2] for tree in batch)

    return training(model, loss_of, corpus.trees, size)

"""The TreeRNN (Socher et al. 2011): one tanh layer a node. The recursion is a method of the module.

Dynamic control flow: the recursion, over a tree of any shape. Dynamic types: a node's children are nodes or None.
Impure functions: the list of losses that every call appends to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, WIDTHS, Decorate, training, undecorated
from benchmarks.trees.data import BinaryNode, binary_syntax_trees


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = binary_syntax_trees(FUNCTIONS[size])
    width, hidden = WIDTHS[size]

    class TreeRNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(corpus.words, width)
            self.leaf = compile_model(nn.Linear(width, hidden))
            self.inner = compile_model(nn.Linear(2 * hidden, hidden))
            self.classify = compile_model(nn.Linear(hidden, corpus.labels))

        @decorate
        def encode(self, node: BinaryNode, losses: list[Tensor]) -> Tensor:
            """Return the state, f32[1, hidden]; append the loss of each node, children first."""
            if node.left is None or node.right is None:
                h = torch.tanh(self.leaf(self.embedding.weight[node.word].unsqueeze(0)))
            else:
                left, right = self.encode(node.left, losses), self.encode(node.right, losses)
                h = torch.tanh(self.inner(torch.cat((left, right), 1)))
            losses.append(F.cross_entropy(self.classify(h), torch.tensor([node.label], device=device)))
            return h

    model = TreeRNN().to(device)

    def loss_of(batch: list[BinaryNode]) -> Tensor:
        losses: list[Tensor] = []
        for tree in batch:
            model.encode(tree, losses)
        return torch.stack(losses).sum()

    return training(model, loss_of, corpus.trees, size)

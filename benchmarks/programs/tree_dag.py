"""A recursive network over graphs without cycles: a node that is reached twice is computed once.

The graphs are syntax trees in which equal subtrees are one object; the recursion keeps its results in a dict.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, WIDTHS, Decorate, training, undecorated
from benchmarks.trees.data import Node, share_equal_subtrees, syntax_trees


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = syntax_trees(FUNCTIONS[size])
    width, hidden = WIDTHS[size]
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(corpus.words, width),
            "cell": nn.GRUCell(width, hidden),
            "classify": nn.Linear(hidden, corpus.labels),
        }
    ).to(device)
    embedding, classify = model["embedding"], model["classify"]
    cell = compile_model(model["cell"])

    @decorate
    def encode(node: Node, states: dict[Node, Tensor], losses: list[Tensor]) -> Tensor:
        """Return the state, f32[1, hidden]; keep it in `states` and the loss of each distinct node in `losses`."""
        if node in states:
            return states[node]
        total = torch.zeros(1, hidden, device=device)
        for child in node.children:
            total = total + encode(child, states, losses)
        state = cell(embedding.weight[node.word].unsqueeze(0), total)
        losses.append(F.cross_entropy(classify(state), torch.tensor([node.label], device=device)))
        states[node] = state
        return state

    def loss_of(batch: list[Node]) -> Tensor:
        losses: list[Tensor] = []
        for graph in batch:
            encode(graph, {}, losses)
        return torch.stack(losses).sum()

    return training(model, loss_of, [share_equal_subtrees(tree) for tree in corpus.trees], size)

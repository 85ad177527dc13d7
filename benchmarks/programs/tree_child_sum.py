"""The child-sum TreeLSTM (Tai, Socher and Manning 2015, section 3.1): any number of children."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, WIDTHS, Decorate, training, undecorated
from benchmarks.trees.data import Node, syntax_trees


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = syntax_trees(FUNCTIONS[size])
    width, hidden = WIDTHS[size]
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(corpus.words, width),
            "gates_of_word": nn.Linear(width, 4 * hidden),
            "gates_of_sum": nn.Linear(hidden, 3 * hidden, bias=False),
            "forget_of_child": nn.Linear(hidden, hidden, bias=False),
            "classify": nn.Linear(hidden, corpus.labels),
        }
    ).to(device)
    embedding, classify = model["embedding"], model["classify"]
    gates_of_word, gates_of_sum = compile_model(model["gates_of_word"]), compile_model(model["gates_of_sum"])
    forget_of_child = compile_model(model["forget_of_child"])

    @decorate
    def encode(node: Node) -> tuple[Tensor, Tensor, Any]:
        """Return h and c, f32[1, hidden], and the losses of all nodes summed."""
        word = gates_of_word(embedding.weight[node.word].unsqueeze(0))
        forget = word[:, 3 * hidden :]
        total = torch.zeros(1, hidden, device=device)
        remembered = torch.zeros(1, hidden, device=device)
        loss: Any = 0.0
        for child in node.children:
            h, c, loss_of_child = encode(child)
            total = total + h
            remembered = remembered + (forget + forget_of_child(h)).sigmoid() * c
            loss = loss + loss_of_child
        i, o, u = (word[:, : 3 * hidden] + gates_of_sum(total)).chunk(3, 1)
        c = i.sigmoid() * u.tanh() + remembered
        h = o.sigmoid() * c.tanh()
        return h, c, loss + F.cross_entropy(classify(h), torch.tensor([node.label], device=device))

    def loss_of(batch: list[Node]) -> Tensor:
        return sum(encode(tree)[2] for tree in batch)

    return training(model, loss_of, corpus.trees, size)

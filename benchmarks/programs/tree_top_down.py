"""A top-down TreeLSTM that generates trees: whether a node gets children is the network's own decision.

After the top-down TreeLSTM of Zhang, Lu and Lapata (2016). The network is trained towards a given tree, in
which it walks as long as it is inside; beyond the tree's leaves it should have stopped. The function over the trees
of a batch is decorated too, so that all of them are generated side by side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, WIDTHS, Decorate, training, undecorated
from benchmarks.trees.data import BinaryNode, binary_syntax_trees

DEEPEST = 8


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = binary_syntax_trees(FUNCTIONS[size])
    _, hidden = WIDTHS[size]
    model = nn.ModuleDict(
        {
            "root": nn.Embedding(corpus.labels, 2 * hidden),
            "left": nn.LSTMCell(hidden, hidden),
            "right": nn.LSTMCell(hidden, hidden),
            "expand": nn.Linear(hidden, 1),
            "classify": nn.Linear(hidden, corpus.labels),
        }
    ).to(device)
    root, expand, classify = model["root"], model["expand"], model["classify"]
    to_left, to_right = compile_model(model["left"]), compile_model(model["right"])

    @decorate
    def generate(node: BinaryNode | None, h: Tensor, c: Tensor, depth: int) -> tuple[Tensor, int]:
        """Generate from h and c, f32[1, hidden], towards `node`; return the losses summed and the number of nodes."""
        grow = expand(h)
        inside = node is not None and node.left is not None
        loss = F.binary_cross_entropy_with_logits(grow, torch.tensor([[float(inside)]], device=device))
        if node is not None:
            loss = loss + F.cross_entropy(classify(h), torch.tensor([node.label], device=device))
        if depth == DEEPEST or grow.item() <= 0:
            return loss, 1
        hl, cl = to_left(h, (h, c))
        hr, cr = to_right(h, (h, c))
        loss_left, nodes_left = generate(node.left if node is not None else None, hl, cl, depth + 1)
        loss_right, nodes_right = generate(node.right if node is not None else None, hr, cr, depth + 1)
        return loss + loss_left + loss_right, 1 + nodes_left + nodes_right

    @decorate
    def loss_of(batch: list[BinaryNode]) -> Tensor:
        loss = torch.zeros((), device=device)
        for tree in batch:
            h, c = root.weight[tree.label].unsqueeze(0).chunk(2, 1)
            loss_of_tree, nodes = generate(tree, h, c, 0)
            loss = loss + loss_of_tree / nodes
        return loss

    return training(model, loss_of, corpus.trees, size, lr=0.3)

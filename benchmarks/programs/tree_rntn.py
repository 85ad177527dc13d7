"""The recursive neural tensor network (Socher et al. 2013, section 4.3): children multiply through a tensor."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, identity
from benchmarks.programs.tree_training import FUNCTIONS, Decorate, training, undecorated
from benchmarks.trees.data import BinaryNode, binary_syntax_trees

# Words and states have one width; the tensor holds 4 width ** 3 numbers.
WIDTH: dict[Size, int] = {"small": 5, "full": 30}


class Composition(nn.Module):
    """x -> tanh(x' V x + W x + b), f32[n, 2 width] to f32[n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tensor = nn.Bilinear(2 * width, 2 * width, width, bias=False)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tensor(x, x) + self.linear(x))


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, decorate: Decorate = undecorated
) -> Program:
    corpus = binary_syntax_trees(FUNCTIONS[size])
    width = WIDTH[size]
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(corpus.words, width),
            "composition": Composition(width),
            "classify": nn.Linear(width, corpus.labels),
        }
    ).to(device)
    embedding, classify = model["embedding"], model["classify"]
    compose = compile_model(model["composition"])

    def loss_at(node: BinaryNode, state: Tensor) -> Tensor:
        return F.cross_entropy(classify(state), torch.tensor([node.label], device=device))

    @decorate
    def encode(node: BinaryNode) -> tuple[Tensor, Tensor]:
        """Return the state, f32[1, width], and the losses of all nodes summed."""
        if node.left is None or node.right is None:
            state = torch.tanh(embedding.weight[node.word].unsqueeze(0))
            return state, loss_at(node, state)
        left, loss_left = encode(node.left)
        right, loss_right = encode(node.right)
        state = compose(torch.cat((left, right), 1))
        return state, loss_left + loss_right + loss_at(node, state)

    def loss_of(batch: list[BinaryNode]) -> Tensor:
        return torch.stack([encode(tree)[1] for tree in batch]).sum()

    return training(model, loss_of, corpus.trees, size)

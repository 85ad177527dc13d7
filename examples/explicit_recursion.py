"""Learn the truth of random formulas with a recursive network that is built as a graph by hand.

python examples/explicit_recursion.py --steps 300

A formula is a tree in index arrays: an operation and two children, or a literal. The network is one SubGraph that
invokes itself; the graph is built once, and runs forward and backward over trees of any shape.
"""

import argparse
import random

import torch
from torch import Tensor, nn

from twofold import DeclaredSubGraph, if_, show

WORDS = ("false", "true", "and", "or")


class Network(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), size)
        self.combine = nn.Linear(3 * size, size)
        self.answer = nn.Linear(size, 1)

    def declare(self, size: int) -> DeclaredSubGraph:
        """The state of a node: its index and the arrays of its tree go in, f32[size] comes out."""
        state = DeclaredSubGraph("state", inputs=["i64[]", "i64[?]", "i64[?]", "i64[?]"], outputs=[f"f32[{size}]"])

        @state.define
        def _(node: Tensor, word: Tensor, left: Tensor, right: Tensor) -> Tensor:
            own = self.words(word[node])

            def inner() -> Tensor:
                children = [state(side[node], word, left, right) for side in (left, right)]
                return torch.tanh(self.combine(torch.cat([own, *children])))

            return if_(left[node] < 0, lambda: own, inner)

        return state


def formula(depth: int) -> tuple[list[list[int]], bool]:
    """A random formula as rows of word, left child, right child, the root first; and its truth."""
    if depth == 0 or random.random() < 0.2:
        truth = random.random() < 0.5
        return [[int(truth), -1, -1]], truth
    operation = random.choice((2, 3))
    rows, truths = [[operation, 0, 0]], []
    for side in (1, 2):
        below, truth = formula(depth - 1)
        rows[0][side] = len(rows)
        start = len(rows)
        rows += [[word, *(child + start if child >= 0 else -1 for child in children)] for word, *children in below]
        truths.append(truth)
    return rows, all(truths) if operation == 2 else any(truths)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the truth of random formulas with an explicit recursive graph.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="formulas in one step")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    random.seed(options.seed)
    network = Network(16)
    state = network.declare(16)
    print(show(state.graph))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    right, seen = 0, 0
    for step in range(1, options.steps + 1):
        loss = torch.zeros(())
        for _ in range(options.batch):
            rows, truth = formula(options.depth)
            answer = network.answer(state(torch.tensor(0), *torch.tensor(rows).unbind(1)))
            loss = loss + nn.functional.binary_cross_entropy_with_logits(answer, torch.tensor([float(truth)]))
            right, seen = right + int((answer.item() > 0) == truth), seen + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item() / options.batch:.4f}  right {right / seen:.3f}")
            right, seen = 0, 0


if __name__ == "__main__":
    main()

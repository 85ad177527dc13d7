"""Teach a recursive network to tell what kind each piece of syntax is, on functions of Python's standard library.

python examples/trees.py --epochs 3

A tree is a plain Python object and the network a plain recursive function over it, one call a node: a child-sum
TreeLSTM (Tai, Socher and Manning 2015) that reads the names and constants at the leaves and is asked for the kind
of syntax (`Call`, `If`, ...) at every node above them.
"""

import argparse
import ast
import random
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import twofold

MODULES = (argparse, ast, random)
WORDS = 1024
KINDS = sorted(name for name, kind in vars(ast).items() if isinstance(kind, type) and issubclass(kind, ast.AST))


@dataclass(eq=False)
class Node:
    word: int
    kind: int
    children: list["Node"] = field(default_factory=list)


def read(syntax: ast.AST) -> Node:
    """Return the tree of a piece of syntax; its words are the texts of its leaves, by hash."""
    children = [read(child) for child in ast.iter_child_nodes(syntax) if not isinstance(child, ast.expr_context)]
    text = "" if children else " ".join(str(value) for _, value in ast.iter_fields(syntax))
    return Node(zlib.crc32(text.encode()) % WORDS, KINDS.index(type(syntax).__name__), children)


def functions() -> list[Node]:
    found = []
    for module in MODULES:
        syntax = ast.parse(Path(module.__file__).read_text())
        found += [read(node) for node in ast.walk(syntax) if isinstance(node, ast.FunctionDef)]
    return found


class ChildSumTreeLSTM(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.of_word = nn.Linear(width, 4 * width)
        self.of_sum = nn.Linear(width, 3 * width, bias=False)
        self.forget = nn.Linear(width, width, bias=False)
        self.kinds = nn.Linear(width, len(KINDS))


def recursion(model: ChildSumTreeLSTM):
    embedding, of_word, of_sum, forget, kinds = (
        model.embedding, model.of_word, model.of_sum, model.forget, model.kinds
    )  # fmt: skip

    @twofold.subgraph
    def encode(node: Node, losses: list[Tensor], right: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return h and c, f32[1, width]; append the loss and a 1 or 0 for each node that has children."""
        i, o, u, f = of_word(embedding.weight[node.word].unsqueeze(0)).chunk(4, 1)
        total, remembered = torch.zeros_like(i), torch.zeros_like(i)
        for child in node.children:
            h, c = encode(child, losses, right)
            total = total + h
            remembered = remembered + torch.sigmoid(f + forget(h)) * c
        di, do, du = of_sum(total).chunk(3, 1)
        c = torch.sigmoid(i + di) * torch.tanh(u + du) + remembered
        h = torch.sigmoid(o + do) * torch.tanh(c)
        if node.children:
            logits, kind = kinds(h), torch.tensor([node.kind])
            losses.append(functional.cross_entropy(logits, kind))
            right.append((logits.argmax(1) == kind).float())
        return h, c

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recursive network on the syntax of Python's own library.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--functions", type=int, help="train on this many functions alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    trees = functions()
    random.Random(options.seed).shuffle(trees)
    trees = trees[: options.functions]
    model = ChildSumTreeLSTM()
    encode = recursion(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(1, options.epochs + 1):
        start, total, correct, nodes = time.perf_counter(), 0.0, 0.0, 0
        for first in range(0, len(trees), options.batch_size):
            losses: list[Tensor] = []
            right: list[Tensor] = []
            for tree in trees[first : first + options.batch_size]:
                encode(tree, losses, right)
            optimizer.zero_grad()
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(losses)
            correct += torch.stack(right).sum().item()
            nodes += len(losses)
        speed = len(trees) / (time.perf_counter() - start)
        print(f"epoch {epoch}  loss {total / nodes:.4f}  right {correct / nodes:.3f}  {speed:.0f} trees/s")


if __name__ == "__main__":
    main()

"""Random recursive programs: a grammar of statements, written as source, and the functions made from it.

A program is a function of a node, and of a state if tensors go down. Its statements are drawn from what bodies may
hold: helpers, modules, conditions on the node and on values, calls of itself in a loop, in a comprehension or in turn,
sums and folds over results, lists of states that the caller hands in, early returns.
"""

import itertools
import linecache
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .recursive_programs import HIDDEN, LABELS, WORDS, Decorate, Recursion, Tree

_files = itertools.count()

OWN = (
    "h = embedding.weight[node.word]",
    "h = linear(embedding.weight[node.word]) * node.weight",
    "h = helper(embedding.weight[node.word], node.label)",
)
DECISIONS = (
    "if node.label == 1:\n    h = h.tanh()",
    "if node.label < 2:\n    h = linear(h)\nelse:\n    h = h * node.weight",
    "if h.sum() > 0:\n    h = h - other(h)",
    "if h.mean().item() < 0.1 and node.label != 3:\n    h = torch.sigmoid(h)",
    "while h.abs().max() > 1:\n    h = h * 0.5",
    "h = helper(h, len(node.children))",
    "for step in range(node.label):\n    h = (h + step * 0.1).tanh()",
)
CHILDREN = (
    "for child in node.children:\n    below, loss = {call}\n    total = total + loss\n    h = h + other(below)",
    "found = [{call} for child in node.children]\nfor below, loss in found:\n    total = total + loss.tanh()\n"
    "    h = torch.maximum(h, below)",
    "for child in node.children:\n    if child.word == 2:\n        continue\n    below, loss = {call}\n"
    "    h = torch.tanh(h * below) + h\n    total = total * 0.5 + loss\n    if child.word > 4:\n        break",
    "if node.children:\n    child = node.children[0]\n    first, loss = {call}\n    child = node.children[-1]\n"
    "    last, more = {call}\n    h = linear(first) * last\n    total = loss + more",
    "states = [{call}[0] for child in node.children]\nif len(states) > 0:\n    h = h + torch.stack(states).amax(0)",
    "for child in node.children:\n    below, loss = {call}\n    if below.sum() > h.sum():\n        h = below * 0.5\n"
    "    else:\n        total = total + loss",
)
KEEPS = ("", "kept.append(h)", "kept.append(h * 2.0)")
RETURNS = ("", "if node.word == 3:\n    return h, total", "if h.sum() < -1:\n    return h * 0.1, total + 1.0")
CALLS = {"node": "run(child, kept)", "state": "run(child, h * 0.5 + down, kept)", "pass": "run(child, down, kept)"}


@dataclass(frozen=True)
class Text:
    """The statements of a program, and what goes down with a call: the node, the state, or the parent's state."""

    given: str
    statements: tuple[str, ...]

    @property
    def source(self) -> str:
        """The program as Python."""
        parameters = "node, kept" if self.given == "node" else "node, down, kept"
        start = () if self.given == "node" else ("h = h + down",)
        own, *rest = self.statements
        body = [own, "total = h.sum()", *start, *rest, "return h, total + h.pow(2).sum()"]
        text = "\n".join(body).format(call=CALLS[self.given])
        return f"def run({parameters}):\n" + "\n".join("    " + line for line in text.splitlines()) + "\n"


def texts() -> st.SearchStrategy[Text]:
    """Return programs."""
    return st.builds(
        Text,
        st.sampled_from(sorted(CALLS)),
        st.tuples(
            st.sampled_from(OWN),
            st.sampled_from(DECISIONS),
            st.sampled_from(RETURNS),
            st.sampled_from(CHILDREN),
            st.sampled_from(KEEPS),
            st.sampled_from(DECISIONS),
        ),
    )


def helper(h: Any, number: int) -> Any:
    """Do something with a state that depends on a number."""
    return h * 0.5 if number > 1 else torch.relu(h) + 0.1


def make(text: Text, decorate: Decorate) -> Recursion:
    """Make the function of a program; `call` returns its results for a tree, and a sum of what it kept."""
    torch.manual_seed(0)
    embedding, linear, other = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    file = f"<random recursion {next(_files)}>"
    linecache.cache[file] = (len(text.source), None, text.source.splitlines(keepends=True), file)
    scope = {"torch": torch, "embedding": embedding, "linear": linear, "other": other, "helper": helper}
    exec(compile(text.source, file, "exec"), scope)
    run: Any = decorate(scope["run"])
    scope["run"] = run
    root = torch.linspace(-0.5, 0.5, HIDDEN).requires_grad_()

    def call(tree: Tree) -> Any:
        kept: list[Any] = []
        h, total = run(tree, kept) if text.given == "node" else run(tree, root, kept)
        weights = range(1, 1 + len(kept))
        return h.sum() + total + sum((state * weight).sum() for state, weight in zip(kept, weights, strict=True))

    parameters = [p for module in (embedding, linear, other) for p in module.parameters()]
    return Recursion(run, call, [*parameters, root])


def dags() -> st.SearchStrategy[Tree]:
    """Return structures in which nodes may be reached in several ways."""
    numbers = (st.integers(0, WORDS - 1), st.integers(0, LABELS - 1), st.floats(0.5, 1.5))
    return st.lists(st.tuples(*numbers, st.lists(st.integers(0, 5), max_size=2)), min_size=1, max_size=6).map(_joined)


def _joined(drawn: list[Any]) -> Tree:
    nodes: list[Tree] = []
    for word, label, weight, children in drawn:
        below = [nodes[-1 - index] for index in children if index < len(nodes)]
        nodes.append(Tree(word, label, weight, below or nodes[-1:]))
    return nodes[-1]

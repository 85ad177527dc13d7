"""Training steps with recursion that nobody decorated, for `test_plain_recursion`."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.programs import Program

WORDS, WIDTH = 8, 4


class Tree:
    """A node with two children or none."""

    def __init__(self, word: int, left: "Tree | None" = None, right: "Tree | None" = None) -> None:
        self.word, self.left, self.right = word, left, right


def tree(depth: int, word: int = 1) -> Tree:
    if depth == 0:
        return Tree(word % WORDS)
    shorter = depth > 1 and word % 3 == 0
    return Tree(word % WORDS, tree(depth - 1, 2 * word + 1), tree(depth - 1 - shorter, 3 * word + 2))


def trees(index: int) -> tuple[list[Tree]]:
    return ([tree(3, index + 1), tree(2, index + 2), tree(4, index + 3)],)


class Model(nn.Module):
    """The recursion is a method; what `at_node` does is the program's."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def encode(self, node: Tree, losses: list[Tensor]) -> Tensor:
        """Return f32[1, WIDTH]; append a loss a node."""
        if node.left is None or node.right is None:
            h = self.embedding.weight[node.word].unsqueeze(0).tanh()
        else:
            h = self.inner(torch.cat((self.encode(node.left, losses), self.encode(node.right, losses)), 1)).tanh()
        losses.append((h * h).mean())
        return h

    def shifted(self, node: Tree, by: list[float]) -> Tensor:
        if node.left is None or node.right is None:
            return self.embedding.weight[node.word].unsqueeze(0) + torch.tensor(by)
        return self.inner(torch.cat((self.shifted(node.left, by), self.shifted(node.right, by)), 1)).tanh()

    def printed(self, node: Tree) -> Tensor:
        if node.left is None or node.right is None:
            print("leaf", node.word)
            return self.embedding.weight[node.word].unsqueeze(0).tanh()
        print("inner", node.word)
        left, right = self.printed(node.left), self.printed(node.right)
        print("done", node.word)
        return self.inner(torch.cat((left, right), 1)).tanh()

    def dropped(self, node: Tree) -> Tensor:
        if node.left is None or node.right is None:
            return self.embedding.weight[node.word].unsqueeze(0).tanh()
        return self.dropout(self.inner(torch.cat((self.dropped(node.left), self.dropped(node.right)), 1)).tanh())

    def kept(self, node: Tree, states: list[Tensor]) -> Tensor:
        if node.left is None or node.right is None:
            h = self.embedding.weight[node.word].unsqueeze(0).tanh()
        else:
            h = self.inner(torch.cat((self.kept(node.left, states), self.kept(node.right, states)), 1)).tanh()
        states.append(h)
        return h

    def kept_twice(self, node: Tree, states: list[Tensor], others: list[Tensor]) -> Tensor:
        if node.left is None or node.right is None:
            h = self.embedding.weight[node.word].unsqueeze(0).tanh()
        else:
            left, right = self.kept_twice(node.left, states, others), self.kept_twice(node.right, states, others)
            h = self.inner(torch.cat((left, right), 1)).tanh()
        states.append(h)
        others.append(h)
        return h

    def forward(self, node: Tree) -> Tensor:
        if node.left is None or node.right is None:
            return self.embedding.weight[node.word].unsqueeze(0).tanh()
        return self.inner(torch.cat((self(node.left), self(node.right)), 1)).tanh()


@dataclass
class Observed:
    """What a program keeps."""

    values: list[Any] = field(default_factory=list)


Forward = Callable[[Model, list[Tree], Observed, int], Tensor]


def training(forward: Forward, dropout: float = 0.0, batches: Any = trees) -> Program:
    """Train by SGD on what `forward` returns, given the number of the step."""
    model = Model(dropout)
    optimizer = SGD(model.parameters(), lr=0.1)
    observed = Observed()
    count = 0

    def step(batch: list[Tree]) -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = forward(model, batch, observed, count)
        loss.backward()
        optimizer.step()
        return loss

    return Program(step, batches, {"model": model}, {"sgd": optimizer}, {"observed": observed})


def summed(model: Model, batch: list[Tree], _observed: Observed, _count: int) -> Tensor:
    losses: list[Tensor] = []
    for node in batch:
        model.encode(node, losses)
    return torch.stack(losses).sum()


def by_call(model: Model, batch: list[Tree], _observed: Observed, _count: int) -> Tensor:
    return sum(model(node).sum() for node in batch)


def printing(model: Model, batch: list[Tree], _observed: Observed, _count: int) -> Tensor:
    total = torch.zeros(())
    for node in batch:
        print("tree", node.word)
        total = total + model.printed(node).sum()
    return total


def dropping(model: Model, batch: list[Tree], _observed: Observed, count: int) -> Tensor:
    model.train(count % 8 >= 4)
    return sum(model.dropped(node).sum() for node in batch)


def evaluating(model: Model, batch: list[Tree], observed: Observed, _count: int) -> Tensor:
    with torch.no_grad():
        losses: list[Tensor] = []
        for node in batch:
            model.encode(node, losses)
        observed.values.append([loss.requires_grad for loss in losses])
    return summed(model, batch, observed, 0) + sum(losses)


def writing(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    losses: list[Tensor] = []
    with torch.no_grad():
        before = model.encode(batch[0], losses)
        model.inner.weight.mul_(0.9)
        after = model.encode(batch[0], losses)
    observed.values.append(before)
    return summed(model, batch, observed, count) + (before - after).sum()


def restructuring(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    losses: list[Tensor] = []
    model.encode(batch[0], losses)
    batch[0].left, batch[0].word = tree(1, count), count % WORDS
    model.encode(batch[0], losses)
    return torch.stack(losses).sum()


def hooked(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    if count == 6:
        model.inner.register_forward_hook(lambda *_: observed.values.append(count))
    return summed(model, batch, observed, count)


def backward_hooked(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    if count == 6:
        model.inner.register_full_backward_pre_hook(lambda *_: observed.values.append(count))
    return summed(model, batch, observed, count)


def raising(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    losses: list[Tensor] = []
    for node in batch:
        model.encode(node, losses)
    if count in (5, 6):
        broken = tree(2, count)
        broken.right = "no tree"  # type: ignore[assignment]
        try:
            model.encode(broken, losses)
        except AttributeError as error:
            observed.values.append((str(error), len(losses)))
            if count == 6:
                raise
    return torch.stack(losses).sum()


def drawing(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    noise = torch.rand(())
    losses: list[Tensor] = []
    for node in batch:
        model.encode(node, losses)
        noise = noise + torch.rand(()) * torch.randn(1, WIDTH).sum()
    return torch.stack(losses).sum() * noise


def at_the_same_time(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    def work() -> None:
        with torch.no_grad():
            found: list[Tensor] = []
            result = model.encode(batch[1], found)
            observed.values.append((type(result).__name__, type(found[0]).__name__, result))

    losses: list[Tensor] = []
    model.encode(batch[0], losses)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    model.encode(batch[1], losses)
    return torch.stack(losses).sum()


def keeping(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    states: list[Tensor] = []
    roots = [model.kept(node, states) for node in batch]
    observed.values.append([root is state for root in roots for state in states])
    observed.values.append(states[-3:] if count % 2 else states[:2])
    return torch.cat(roots).sum()


def keeping_twice(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    states: list[Tensor] = []
    others: list[Tensor] = []
    roots = [model.kept_twice(node, states, others) for node in batch]
    observed.values.append([state is other for state, other in zip(states, others, strict=True)])
    return torch.cat(roots).sum()


def asking_within(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    states: list[Tensor] = []
    root = model.kept(batch[0], states)
    (gradient,) = torch.autograd.grad(root.sum(), states[0], retain_graph=True)
    observed.values.append(gradient)
    return root.sum()


def changing(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    """Change what a call has read and what it runs with, before its result is used."""
    numbers = [0.1, 0.2, 0.3, count / 10]
    first = model.shifted(batch[0], numbers)
    numbers[0], numbers[3] = -0.5, 0.0
    second = model.shifted(batch[0], numbers)
    model.eval()
    third = model.shifted(batch[1], numbers)
    model.train()
    old = model.inner.bias
    if count == 7:
        model.inner.bias = nn.Parameter(torch.ones(WIDTH))
    fourth = model.shifted(batch[2], numbers)
    if count == 7:
        model.inner.bias = old
    return (first + 2 * second + 3 * third + 4 * fourth).sum()


class Doubled(torch.autograd.Function):
    """Doubles, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def custom_function(model: Model, batch: list[Tree], observed: Observed, count: int) -> Tensor:
    losses: list[Tensor] = []
    roots = [Doubled.apply(model.encode(node, losses)) for node in batch]
    return torch.cat(roots).sum()


# Functions of the module, which can be replaced.

linear: nn.Linear


def fold(node: Tree) -> Tensor:
    if node.left is None or node.right is None:
        return torch.full((1, WIDTH), node.word / WORDS)
    return linear(fold(node.left) + fold(node.right)).tanh()


def other_fold(node: Tree) -> Tensor:
    if node.left is None or node.right is None:
        return torch.full((1, WIDTH), -node.word / WORDS)
    return linear(fold(node.left) - fold(node.right)).sigmoid()


_fold = fold


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) * 1.5

    return call


def of_module(when: Callable[[int], Any]) -> Program:
    """Train with `fold`; `when` is told the number of each step before it."""
    global linear, fold
    fold = _fold
    linear = nn.Linear(WIDTH, WIDTH)
    optimizer = SGD(linear.parameters(), lr=0.1)
    count = 0

    def step(batch: list[Tree]) -> Tensor:
        nonlocal count
        count += 1
        when(count)
        optimizer.zero_grad()
        loss = sum(fold(node).sum() for node in batch)
        loss.backward()
        optimizer.step()
        return loss

    return Program(step, trees, {"linear": linear}, {"sgd": optimizer})


def replacing(count: int) -> None:
    """Put another function in place of the one that calls itself, and put it back."""
    global fold
    fold = other_fold if 5 <= count < 8 else _fold


def decorating(count: int) -> None:
    """Wrap the function, which from then on calls itself through what wraps it."""
    global fold
    if count == 1:
        fold = logged(_fold)


def nothing(count: int) -> None:
    """Leave all as it is."""

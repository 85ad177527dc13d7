"""What recursive functions meet around them, and blocks must not take for granted: each case against plain Python."""

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.equivalence.recursive_programs import HIDDEN, WORDS, Decorate, Tree, plain, strict

Body = Callable[[Any, Tensor], Tensor]


def balanced(depth: int, word: int = 0) -> Tree:
    children = [balanced(depth - 1, word + 1), balanced(depth - 1, word + 2)] if depth else []
    return Tree(word % WORDS, word % 4, 1.0 + word / 8, children)


def nothing(step: int) -> None:
    """Change nothing between batches."""


class Folding:
    """A recursion in which `body(node, h)` makes the state of a node from that of its word; and what it learned."""

    def __init__(self, decorate: Decorate, body: Body, *modules: nn.Module, embedding: Any = None) -> None:
        torch.manual_seed(0)
        embedding = nn.Embedding(WORDS, HIDDEN) if embedding is None else embedding
        for module in modules:
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)

        @decorate
        def fold(node: Any) -> Any:
            h = body(node, embedding(torch.tensor(node.word)))
            for child in node.children:
                h = h + fold(child)
            return h.tanh()

        self.fold = fold
        self.parameters = [p for module in (embedding, *modules) for p in module.parameters()]

    def steps(self, before: Callable[[int], None] = nothing, count: int = 6) -> list[Tensor]:
        """Return losses and gradients of some batches."""
        found: list[Tensor] = []
        for step in range(count):
            before(step)
            for parameter in self.parameters:
                parameter.grad = None
            loss = sum(self.fold(tree).pow(2).sum() for tree in (balanced(2, step), balanced(1), Tree(step % WORDS)))
            loss.backward()
            found += [loss.detach(), *(torch.zeros(1) if p.grad is None else p.grad for p in self.parameters)]
        return found


def both(run: Callable[[Decorate], list[Any]], decorate: Decorate = strict) -> None:
    for got, expected in zip(run(decorate), run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_gradients_are_called_with_those_of_batches_alone() -> None:
    def run(decorate: Decorate) -> list[Any]:
        linear = nn.Linear(HIDDEN, HIDDEN)

        def body(node: Any, h: Tensor) -> Tensor:
            return linear(h)

        folding = Folding(decorate, body, linear)
        calls: list[Tensor] = []

        def doubled(gradient: Tensor) -> Tensor:
            calls.append(gradient)
            return gradient * 2

        linear.weight.register_hook(doubled)
        return [*folding.steps(), torch.tensor(len(calls)), *calls]

    both(run)


def test_hooks_on_a_tensor_that_was_computed_outside() -> None:
    def run(decorate: Decorate) -> list[Any]:
        weight = nn.Parameter(torch.full((HIDDEN,), 0.3))
        scaled = weight * 2
        scaled.register_hook(lambda gradient: gradient * 3)
        scaled.retain_grad()

        def body(node: Any, h: Tensor) -> Tensor:
            return h * scaled

        folding = Folding(decorate, body)
        found: list[Any] = []
        for tree in (balanced(1), balanced(2), balanced(2)):
            folding.fold(tree).sum().backward(retain_graph=True)
            found += [weight.grad.clone(), scaled.grad.clone()]
        return found

    both(run)


def test_settings_of_modules_that_change() -> None:
    def run(decorate: Decorate) -> list[Any]:
        slope, norm = nn.LeakyReLU(0.1), nn.LayerNorm(HIDDEN)

        def body(node: Any, h: Tensor) -> Tensor:
            return norm(slope(h))

        def change(step: int) -> None:
            slope.negative_slope = 0.9 if step == 3 else slope.negative_slope
            norm.eps = 1.0 if step == 4 else norm.eps

        return Folding(decorate, body, slope, norm).steps(change)

    both(run)


def test_buffers_that_are_replaced() -> None:
    def run(decorate: Decorate) -> list[Any]:
        norm = nn.BatchNorm1d(HIDDEN).eval()

        def body(node: Any, h: Tensor) -> Tensor:
            return norm(h.unsqueeze(0)).squeeze(0)

        def change(step: int) -> None:
            if step == 3:
                norm.running_mean = torch.ones(HIDDEN)

        return Folding(decorate, body, norm).steps(change)

    both(run)


def test_a_model_of_another_dtype() -> None:
    def run(decorate: Decorate) -> list[Any]:
        torch.manual_seed(0)
        linear, embedding = nn.Linear(HIDDEN, HIDDEN), nn.Embedding(WORDS, HIDDEN)

        def body(node: Any, h: Tensor) -> Tensor:
            return linear(h)

        folding = Folding(decorate, body, linear, embedding=embedding)

        def change(step: int) -> None:
            if step == 3:
                linear.double()
                embedding.double()

        return folding.steps(change)

    both(run)


def bound_methods() -> Body:
    """Methods of containers, and the functions of `random`, by their own names."""
    table = {0: 0.5, 1: 1.5}
    look_up, add, numbers = table.get, table.__setitem__, itertools.count()
    draw, following = random.Random(3).random, numbers.__next__

    def body(node: Any, h: Tensor) -> Tensor:
        h = h * look_up(node.word, 1.0) + draw()
        add(node.word, node.label * 0.3)
        node.number = following()
        return h * 2 if random.random() < 0.5 else h * node.number

    return body


def other_generators() -> Body:
    generator = np.random.default_rng(0)

    def body(node: Any, h: Tensor) -> Tensor:
        h = h * random.choice((1, 2, 3)) + random.uniform(0, 1)
        return h * 2 if generator.random() < 0.5 else h

    return body


@pytest.mark.parametrize("make", [bound_methods, other_generators])
def test_calls_of_the_host_are_made_once_in_plain_order(make: Callable[[], Body]) -> None:
    def run(decorate: Decorate) -> list[Any]:
        random.seed(1)
        folding = Folding(decorate, make())
        return [*folding.steps(), torch.tensor(random.random())]

    both(run)


def test_a_bound_method_that_keeps_tensors() -> None:
    def run(decorate: Decorate) -> list[Any]:
        states: list[Any] = []
        keep = states.append

        def body(node: Any, h: Tensor) -> Tensor:
            keep(h)
            return h * node.weight

        return [*Folding(decorate, body).steps(), *states]

    both(run)


def test_a_bound_method_of_a_tensor() -> None:
    weight = torch.full((HIDDEN,), 0.3, requires_grad=True)
    scaled = weight.mul

    def body(node: Any, h: Tensor) -> Tensor:
        return scaled(h)

    both(lambda decorate: Folding(decorate, body).steps())


def test_gradients_that_count_words_are_not_those_of_a_batch() -> None:
    def run(decorate: Decorate) -> list[Any]:
        torch.manual_seed(0)
        embedding = nn.Embedding(WORDS, HIDDEN, scale_grad_by_freq=True)

        def body(node: Any, h: Tensor) -> Tensor:
            return h * node.weight

        return Folding(decorate, body, embedding=embedding).steps()

    both(run)


def test_making_blocks_warns_of_nothing() -> None:
    linear = nn.Linear(HIDDEN, HIDDEN)

    def body(node: Any, h: Tensor) -> Tensor:
        return linear(h) - F.multi_margin_loss(h.unsqueeze(0), torch.tensor([node.label % HIDDEN]))

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Folding(strict, body, linear).steps(count=3)
    assert not heard

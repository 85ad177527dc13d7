"""Recursive programs with loops that are left, `try`, lambdas and helpers; as `recursive_programs`."""

from typing import Any

import torch
from torch import Tensor

from .recursive_programs import HIDDEN, Decorate, Recursion, _layers, _parameters


def loops_that_are_left(decorate: Decorate) -> Recursion:
    (own, down), embedding = _layers((HIDDEN, HIDDEN), (HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        state = embedding.weight[node.word]
        for child in node.children:
            if child.word == 2:
                continue
            below, stopped = encode(child)
            state = torch.tanh(state + own(below))
            if stopped or child.word > 3:
                break
            state = state * 1.5
        for index, child in enumerate(node.children):
            for grandchild in child.children:
                if grandchild.label == 3:
                    return down(state) * index, True
            state = state + 0.1
        return state, False

    return Recursion(encode, lambda tree: encode(tree)[0].sum(), _parameters(own, down, embedding))


def while_loops(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        state, index = embedding.weight[node.word], 0
        while index < len(node.children) and node.children[index].label != 3:
            state = torch.tanh(own(state) + encode(node.children[index]))
            index += 1
        steps = node.label
        while True:
            if steps == 0:
                return state
            state = state * 0.9
            steps -= 1

    return Recursion(encode, lambda tree: encode(tree).sum(), _parameters(own, embedding))


def while_a_value_is_large(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        state, halvings = embedding.weight[node.word] * 3.0, 0
        for child in node.children:
            state = state + own(encode(child))
        while state.abs().max() > 1:
            state = state / 2
            halvings += 1
        return state * (1 + halvings)

    return Recursion(encode, lambda tree: encode(tree).sum(), _parameters(own, embedding))


def host_code(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))
    weights = {0: 0.5, 1: 2.0}

    @decorate
    def encode(node: Any, scale: float = 1.0, *, depth: int = 0) -> Any:
        try:
            weight = weights[node.word]
            node.children[0].word  # noqa: B018 - it may raise
        except KeyError:
            weight = 1.25
        except IndexError:
            weight = -1.0
        state = own(embedding.weight[node.word]) * weight * scale

        def combined(state: Tensor, below: Tensor) -> Tensor:
            return torch.tanh(state + below * weight)

        for child in sorted(node.children, key=lambda child: (child.word, child.label)):
            state = combined(state, encode(child, scale=0.5 + depth, depth=depth + 1))
        double = lambda h: h * 2.0  # noqa: E731
        return double(state)

    return Recursion(encode, lambda tree: encode(tree).sum(), _parameters(own, embedding))


PROGRAMS = {maker.__name__: maker for maker in (loops_that_are_left, while_loops, while_a_value_is_large, host_code)}

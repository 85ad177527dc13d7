"""Recursive programs whose results are dataclasses, dicts and nested tuples; as `recursive_programs`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .recursive_programs import HIDDEN, Decorate, Recursion, _layers, _parameters


@dataclass
class State:
    """What is known of a node: f[HIDDEN], and how many nodes are beneath."""

    h: Any
    count: int = 1


class Pair(NamedTuple):
    """Two tensors."""

    h: Any
    total: Any


def dataclasses_as_results(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        state = State(embedding.weight[node.word])
        for child in node.children:
            below = encode(child)
            state = State(state.h + own(below.h).tanh() * below.count, count=state.count + below.count)
        return state

    def call(tree: Any) -> Any:
        state = encode(tree)
        assert type(state) is State
        assert type(state.count) is int
        return state.h.sum() * state.count

    return Recursion(encode, call, _parameters(own, embedding))


def dicts_as_results(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        if not node.children:
            return {"h": embedding.weight[node.word], "count": 1}
        below = [encode(child)["h"] for child in node.children]
        first = encode(node.children[0])
        return {"h": own(sum(below)).tanh() + first["h"] * first["count"], "count": first["count"] + 1}

    def call(tree: Any) -> Any:
        state = encode(tree)
        assert list(state) == ["h", "count"]
        assert type(state["count"]) is int
        return state["h"].sum() * state["count"]

    return Recursion(encode, call, _parameters(own, embedding))


def nested_results(decorate: Decorate) -> Recursion:
    (own,), embedding = _layers((HIDDEN, HIDDEN))

    @decorate
    def encode(node: Any) -> Any:
        h = embedding.weight[node.word]
        total, size = h.sum(), node.weight
        for child in node.children:
            (pair, below), more = encode(child)
            h = h + own(pair.h).sigmoid() * below
            total = total + pair[1]
            size = size + more
        return (Pair(h, total), h * 2.0), size

    def call(tree: Any) -> Any:
        (pair, twice), size = encode(tree)
        assert type(pair) is Pair
        return (pair.h + twice).sum() * size + pair.total

    return Recursion(encode, call, _parameters(own, embedding))


PROGRAMS = {maker.__name__: maker for maker in (dataclasses_as_results, dicts_as_results, nested_results)}

"""What is not converted: the code, the construct and the line, and never a crash."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import twofold
from tests.hazards.programs import MakeStep, Parts, training
from tests.unit.convert.speculation.executing import EXACT
from twofold.convert.refusals import HINTS, Refusal, Refused
from twofold.convert.speculation.convert import speculate

REFUSED: dict[str, tuple[MakeStep, str, str]] = {}


def refused(code: str, line: str) -> Callable[[MakeStep], MakeStep]:
    """Register a step that is refused under a code; `line` is part of the source line named."""

    def register(make_step: MakeStep) -> MakeStep:
        REFUSED[make_step.__name__] = make_step, code, line
        return make_step

    return register


@refused("foreign_function", "random.seed(number)")
def seeds_the_generator_of_python(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        random.seed(number)
        return parts.train(x * (1.0 if random.random() < 2 else 0.0), y)

    return step


@refused("foreign_function", "np.random.get_state()")
def reads_the_generator_of_numpy(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        return parts.train(x, y), np.random.get_state()[2]

    return step


@refused("unsupported_syntax", "for item in items()")
def generator(parts: Parts) -> Callable[..., Any]:
    def items():
        yield 1.0

    def step(number, x, y):
        for item in items():
            x = x * item
        return parts.train(x, y)

    return step


@refused("unsupported_syntax", "import math")
def inline_import(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        import math

        return parts.train(x * math.pi, y)

    return step


@refused("unsupported_syntax", "class Local")
def inline_class(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        class Local:
            scale = 1.0

        return parts.train(x * Local.scale, y)

    return step


class Magic:
    def __getattr__(self, name: str) -> float:
        return 1.0


class Watchful:
    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@refused("unsupported_object", "magic.anything")
def custom_getattr(parts: Parts) -> Callable[..., Any]:
    magic = Magic()

    def step(number, x, y):
        return parts.train(x * magic.anything, y)

    return step


@refused("unsupported_object", "watchful.count = 1")
def custom_setattr(parts: Parts) -> Callable[..., Any]:
    watchful = Watchful()

    def step(number, x, y):
        watchful.count = 1
        return parts.train(x, y)

    return step


@refused("foreign_function", "open(")
def files(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        open("/dev/null").close()  # noqa: PTH123
        return parts.train(x, y)

    return step


@refused("unsupported_object", "self.optimizer.step()")
def group_updated_before_the_step(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        parts.optimizer.param_groups[0].update(lr=0.1 / (number + 1))
        return parts.train(x, y)

    return step


@refused("no_source", "exec")
def no_source(parts: Parts) -> Callable[..., Any]:
    scope: dict[str, Any] = {"parts": parts}
    exec("def step(number, x, y):\n    return parts.train(x, y)", scope)
    return scope["step"]


@refused("unsupported_call", "closure")
def optimizer_closure(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        def closure():
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            return loss

        return parts.optimizer.step(closure)

    return step


def refusal_of(make_step: MakeStep) -> Refusal:
    """Return why a step is not converted, after six calls of it."""
    torch.manual_seed(0)
    program = training(make_step)()
    function = twofold.function(program.step, **EXACT)
    for number in range(6):
        function(*program.batches(number))
    graph = function._driver.graph
    with pytest.raises(Refused) as caught:
        speculate(program.step, program.batches(6), {}, graph, graph.signature())
    return caught.value.refusal


class Recursion:
    """A recursive function, alone, as a method, and built by hand."""

    def __init__(self) -> None:
        self.leaf = SimpleNamespace(children=[])
        self.tree = SimpleNamespace(children=[self.leaf, self.leaf])
        self.double = twofold.DeclaredSubGraph("double", inputs=["f32[6,4]"], outputs=["f32[6,4]"])
        self.double.define(lambda x: x * 2)

        @twofold.subgraph
        def leaves(node: Any) -> torch.Tensor:
            return sum((leaves(child) for child in node.children), torch.zeros(1)) if node.children else torch.ones(1)

        self.leaves = leaves

    @twofold.subgraph
    def count(self, node: Any) -> torch.Tensor:
        total = torch.ones(1)
        for child in node.children:
            total = total + self.count(child)
        return total


RECURSIVE_CALLS: dict[str, tuple[str, Callable[[Recursion, torch.Tensor], Any]]] = {
    "call": ("foreign_function", lambda recursion, x: recursion.leaves(recursion.tree)),
    "map": ("foreign_function", lambda recursion, x: recursion.leaves.map([recursion.tree])),
    "key": ("foreign_function", lambda recursion, x: max([recursion.leaf, recursion.tree], key=recursion.leaves)),
    "method": ("foreign_function", lambda recursion, x: recursion.count(recursion.tree)),
    "declared": ("foreign_function", lambda recursion, x: recursion.double(x)),
}


@pytest.mark.parametrize("name", RECURSIVE_CALLS)
def test_recursive_calls_are_neither_run_nor_left_out(name: str) -> None:
    code, call = RECURSIVE_CALLS[name]
    recursion = Recursion()

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number, x, y):
            call(recursion, x)
            return parts.train(x, y)

        return step

    assert refusal_of(make).code == code


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_code_and_line(name: str) -> None:
    make_step, code, line = REFUSED[name]
    refusal = refusal_of(make_step)
    assert refusal.code == code, refusal
    assert refusal.code in HINTS
    assert line in refusal.line or line in refusal.construct or code == "no_source", refusal

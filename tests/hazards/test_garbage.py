"""What a unit made is freed when eager execution frees it: no tensor waits for the garbage collector.

On an accelerator a recorded unit that does would take the memory of two. And PyTorch keeps one node that accumulates a
leaf's gradient as long as any history has it: a leaf that is given another shape meanwhile gets gradients of the old.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import twofold
from benchmarks.programs import PROGRAMS
from tests.differential import exact_backend
from tests.hazards.programs import Parts, training
from twofold.capture.trace_writer import TraceWriter

STEPS = 10
ENGINES = pytest.mark.parametrize("engine", ["coexecution", "auto"])


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what was there before is none of ours, and costs time
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def left_to_the_collector() -> list[str]:
    """What was unreachable, and held tensors or was ours."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    kinds = [type(one) for one in gc.garbage if isinstance(one, torch.Tensor) or _is_ours(one)]
    gc.garbage.clear()
    return sorted({kind.__name__ for kind in kinds})


def _is_ours(one: object) -> bool:
    return type(one).__module__.startswith("twofold")


def left_by(step: Callable[..., Any], batches: Callable[[int], tuple[Any, ...]], **options: Any) -> list[list[str]]:
    function: Any = twofold.function(step, backend=exact_backend(), background=False, **options)
    left: list[list[str]] = []
    for number in range(STEPS):
        with contextlib.suppress(ValueError):
            function(*batches(number))
        left.append(left_to_the_collector())
    return left


@ENGINES
@pytest.mark.parametrize("name", ["mlp", "lstm_loop", "dcgan", "logging_net", "coin_flip", "actor_critic"])
def test_corpus(name: str, engine: str) -> None:
    program = PROGRAMS[name]("small", torch.device("cpu"))
    assert left_by(program.step, program.batches, engine=engine) == [[]] * STEPS


def raises(parts: Parts) -> Any:
    """Where a value was read, at an operation, and at the end."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        value = parts.train(x, y).item()
        if number % 4 == 2:
            raise ValueError(value)
        if number % 4 == 3:
            parts.model(x[:, :3]).sum().item()
        return value

    def guarded(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        try:
            return step(number, x, y)
        except RuntimeError:
            return 0.0

    return guarded


def goes_new_ways(parts: Parts) -> Any:
    """Each unit another one, found out late."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        value = parts.train(x, y).item()
        for _ in range(number):
            x = x + value
        return x.sum().item()

    return step


def hands_out_history(parts: Parts) -> Any:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return parts.loss(x, y)

    return step


def is_refused(parts: Parts) -> Any:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.add(parts.loss(x, y), 1, out=torch.empty(()))

    return torch.no_grad()(step)


@ENGINES
@pytest.mark.parametrize("make", [raises, goes_new_ways, hands_out_history, is_refused])
def test_ends_of_units(make: Callable[[Parts], Any], engine: str) -> None:
    program = training(make)()
    assert left_by(program.step, program.batches, engine=engine) == [[]] * STEPS


def test_finds_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    create = TraceWriter.__init__

    def in_a_cycle(self: Any) -> None:
        create(self)
        self.itself = self

    monkeypatch.setattr(TraceWriter, "__init__", in_a_cycle)
    program = PROGRAMS["mlp"]("small", torch.device("cpu"))
    assert "TraceWriter" in left_by(program.step, program.batches)[0]


@ENGINES
def test_another_shape_after_recorded_units(engine: str) -> None:
    """The program that showed it: the first units had left their history behind."""
    net = torch.nn.Linear(4, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def train(x: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    function: Any = twofold.function(train, backend=exact_backend(), background=False, engine=engine)
    for _ in range(STEPS):
        function(torch.randn(6, 4))
    net.bias.data = net.bias.data[:1]
    function(torch.randn(6, 4))
    assert net.bias.grad is not None
    assert net.bias.grad.shape == (1,)

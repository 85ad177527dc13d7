"""The smallest training program, for a hazard to be put into, and the three verdicts on it.

`training(make_step)` is a factory of programs: a two-layer network, SGD, four batches in turn. `make_step`
gets a `Parts` and returns the user's step, called as `step(number, x, y)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.programs import Program
from tests.differential import Factory, assert_same, exact_backend, function, program

Mode = Literal["function", "program"]
MODES: tuple[Mode, ...] = ("function", "program")
STEPS = 8
BATCH = 6
BATCHES = 4


@dataclass
class Parts:
    """What a step is made of. What `seen` holds is compared with eager, as are model and optimizer."""

    model: Any
    optimizer: Any
    seen: dict[str, Any] = field(default_factory=dict)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.model(x), y)

    def train(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One ordinary step."""
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.optimizer.step()
        return loss


def assertion_without_words() -> Any:
    """Here, since pytest writes the assertions of its own files anew."""
    try:
        assert not STEPS
    except AssertionError as error:
        return error.args


MakeStep = Callable[[Parts], Callable[..., Any]]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def training(
    make_step: MakeStep,
    *,
    model: Callable[[], nn.Module] = net,
    optimizer: Callable[[Any], Optimizer] = sgd,
    between: Callable[[int, Parts], None] | None = None,
    sizes: Callable[[int], int] = lambda number: BATCH,
) -> Factory:
    """`between(number, parts)` is the user's code outside the unit, before step `number`."""

    def build() -> Program:
        built = model()
        parts = Parts(built, optimizer(built))
        pool = [(torch.randn(BATCH, 4), torch.randn(BATCH, 3)) for _ in range(BATCHES)]

        def batches(number: int) -> tuple[Any, ...]:
            if between is not None:
                between(number, parts)
            x, y = pool[number % BATCHES]
            size = sizes(number)
            return (number, x, y) if size == BATCH else (number, x[:size], y[:size])

        step = make_step(parts)
        return Program(step, batches, {"net": built}, {"optimizer": parts.optimizer}, {"seen": parts.seen})

    return build


def same(factory: Factory, steps: int = STEPS, mode: Mode = "function", **options: Any) -> dict[str, Any]:
    """Nobody can tell the program from eager; return the report."""
    options = {"numerics": "exact", "backend": exact_backend(), "background": False, **options}
    if mode == "program":
        # Observing between two steps would itself be part of the loop.
        report = assert_same(factory, steps, program(**options), observe="end")
    else:
        report = assert_same(factory, steps, function(**options))
        assert report["iterations"] >= steps, summary(report)
    assert report["iterations"] == report["graph_iterations"] + report["eager_iterations"], summary(report)
    return report


def runs_as_graph(
    factory: Factory, steps: int = STEPS, mode: Mode = "function", at_least: int = 1, **options: Any
) -> dict[str, Any]:
    """As `same`, and at least so many units ran as graphs."""
    report = same(factory, steps, mode, **options)
    assert report["graph_iterations"] >= at_least, summary(report)
    return report


def stays_eager(factory: Factory, code: str, steps: int = STEPS, mode: Mode = "function") -> dict[str, Any]:
    """As `same`, and the report gives `code` as a reason."""
    report = same(factory, steps, mode)
    assert code in {entry["code"] for entry in report["fallbacks"]}, summary(report)
    return report


def each_unit_is_a_path(
    factory: Factory, steps: int = STEPS, mode: Mode = "function", forgotten: int = 0
) -> dict[str, Any]:
    """As `same`, and no unit went the way of another: a limit that the documents state.

    `forgotten`: paths that were dropped when another number, which can be fed, had been learned.
    """
    report = same(factory, steps, mode)
    assert report["paths"] + forgotten == report["iterations"] == report["eager_iterations"], summary(report)
    return report


def accounted(factory: Factory, steps: int = STEPS, mode: Mode = "function") -> dict[str, Any]:
    """As `same`, and either graphs ran or the report says why not."""
    report = same(factory, steps, mode)
    assert report["graph_iterations"] or report["fallbacks"], summary(report)
    return report


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that explains why graphs did not run."""
    names = ("iterations", "graph_iterations", "eager_iterations", "paths", "fallbacks", "decisions")
    return {name: report[name] for name in names}

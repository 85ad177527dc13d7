"""Small programs that random loops (tests/properties/random_loops.py) came down to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hazards.programs import MODES, Mode, Parts, runs_as_graph, same, summary, training


def test_a_unit_that_is_recorded_after_a_graph_is_one_unit() -> None:
    """It ended where the graph did, before it had seen anything."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            if number in (9, 15):  # the units that follow begin in another state
                torch.backends.cudnn.benchmark = number == 9
            parts.optimizer.step()
            return loss.detach()

        return step

    report = runs_as_graph(training(make), 24, "program", at_least=16)
    assert report["iterations"] == 25, summary(report)  # what follows the last step is a unit, too
    assert "no_tensor_calls" not in {entry["code"] for entry in report["fallbacks"]}


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_raises_is_the_first_to_use_a_tensor(mode: Mode) -> None:
    """The roles of tensors from outside are counted from event to event, and that call is no event."""

    def make(parts: Parts) -> Callable[..., Any]:
        wrong = torch.ones(5, 5)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if number < 4:
                try:
                    x @ wrong
                except RuntimeError as error:
                    parts.seen[f"error {number}"] = str(error)
            return parts.train(x, y).detach()

        return step

    runs_as_graph(training(make), 12, mode)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_were_read_in_a_unit_that_is_left(mode: Mode) -> None:
    """A placeholder stood for `.grad`: it must not take the memory of the tensor that the leaf goes on with."""

    def make(parts: Parts) -> Callable[..., Any]:
        weight = next(parts.model.parameters())

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad(set_to_none=False)
            before = weight.grad
            norm = 0.0 if before is None else weight.grad.norm().item()  # type: ignore[union-attr]
            factor = {7: 2.0, 8: 2.0, 9: 2.0, 11: 3.0, 12: 2.0, 13: 3.0, 15: 2.0}.get(number)
            if factor is not None:  # a path not seen before, at first
                x = x * factor
            loss = parts.loss(x, y)
            loss.backward()
            parts.seen["gradient"], parts.seen["norm"] = before, norm
            parts.optimizer.step()
            return loss.detach()

        return step

    report = same(training(make), 20, mode)
    assert report["graph_iterations"] > 6, summary(report)
    assert report["discards"] > 1, summary(report)

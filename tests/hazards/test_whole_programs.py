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


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_of_a_unit_that_ends_in_inference_mode(keeps: bool) -> None:
    """A call of the model in the evaluation ends it: what it leaves are ordinary tensors nevertheless."""

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["state"] = torch.zeros(3)
        parts.seen["outputs"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> None:
            loss = parts.loss(x, y)
            loss.backward()
            if number % 2 == 1:
                parts.optimizer.step()
                parts.optimizer.zero_grad()
            parts.seen["state"] = parts.seen["state"] * 0.9 + y.mean(0)
            if number % 8 == 6:
                with torch.inference_mode():
                    for _ in range(6):
                        parts.seen["outputs"].append(parts.model(x).sum() if keeps else parts.model(x).sum().item())

        return step

    report = runs_as_graph(training(make), 40, "program", at_least=10)
    assert keeps == any("inference" in entry["reason"] for entry in report["fallbacks"]), summary(report)


def test_tensors_of_an_evaluation_that_a_unit_of_training_begins_with() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                parts.seen["mean"] = x.mean()
            parts.seen["mean"] = parts.seen["mean"].detach()  # a view of one is one
            loss = parts.train(x, y).detach()
            if number % 4 == 3:
                try:
                    parts.seen["mean"] += 1
                except RuntimeError as error:
                    print(error)
            return loss

        return step

    for mode in MODES:
        same(training(make), 12, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_an_inference_tensor_has_no_gradients(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        with torch.inference_mode():
            made = torch.ones(6, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
            try:
                return parts.train(made if number in (6, 9) else x, y).detach()
            except RuntimeError as error:
                print(error)
                return None

        return step

    runs_as_graph(training(make), 12, mode)

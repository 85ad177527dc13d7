"""Draws from Python's and NumPy's generators in speculated calls: eager's streams, also where a call is taken back."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.hazards.programs import Parts, same, summary, training
from twofold.run.speculation.unit import SpeculatedUnit

Step = Callable[..., Any]


def speculates(factory: Any, steps: int = 40, at_least: int = 20, **options: Any) -> dict[str, Any]:
    report = same(factory, steps, engine="speculation", **options)
    assert report["speculated_iterations"] >= at_least, {**summary(report), "refusals": report["refusals"]}
    return report


class Draw(NamedTuple):
    """How to draw, and how to make a generator of the program's own to draw from."""

    use: Callable[[Any], float]
    make: Callable[[], Any] = lambda: None


DRAWS: dict[str, Draw] = {
    "random.random": Draw(lambda _: random.random()),
    "random.gauss": Draw(lambda _: random.gauss(0.0, 1.0)),  # keeps every second number
    "random.randint": Draw(lambda _: random.randint(0, 100) / 100),
    "random.choice": Draw(lambda _: random.choice([0.25, 0.5, 0.75])),
    "random.choices": Draw(lambda _: random.choices([0.25, 0.5], weights=[1, 3], k=2)[1]),
    "random.sample": Draw(lambda _: sum(random.sample([0.1, 0.2, 0.3], 2))),
    "numpy.random.rand": Draw(lambda _: float(np.random.rand())),
    "numpy.random.randn": Draw(lambda _: float(np.random.randn(3)[1])),  # keeps every second number
    "numpy.random.choice": Draw(lambda _: float(np.random.choice([0.25, 0.5, 0.75], p=[0.5, 0.25, 0.25]))),
    "random.Random": Draw(lambda generator: generator.uniform(0, 1), lambda: random.Random(3)),
    "RandomState": Draw(lambda generator: float(generator.uniform()), lambda: np.random.RandomState(3)),
    "Generator": Draw(lambda generator: float(generator.normal()), lambda: np.random.default_rng(3)),
    "Generator.integers": Draw(
        lambda generator: int(generator.integers(0, 100, dtype=np.int32)) / 100,  # keeps half of 64 bits
        lambda: np.random.Generator(np.random.MT19937(3)),
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draw_steers(name: str) -> None:
    draw = DRAWS[name]

    def make(parts: Parts) -> Step:
        parts.seen["generator"] = draw.make()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if draw.use(parts.seen["generator"]) < 0.5:
                x = -x
            return parts.train(x, y).detach()

        return step

    speculates(training(make))


@pytest.mark.parametrize("name", DRAWS)
def test_draw_is_computed_with_and_kept(name: str) -> None:
    draw = DRAWS[name]

    def make(parts: Parts) -> Step:
        parts.seen["generator"] = draw.make()
        parts.seen["drawn"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            first = draw.use(parts.seen["generator"])
            loss = parts.train(x * first, y)
            parts.seen["drawn"].append((first, draw.use(parts.seen["generator"])))
            print("drawn", first)
            return loss.detach()

        return step

    speculates(training(make))


@pytest.mark.parametrize("where", ["before the draw", "between two draws", "after the draws", "after the step"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_taken_back(name: str, where: str) -> None:
    """A decision on a tensor goes the other way: what was drawn by then is put back, and the call runs again."""
    draw = DRAWS[name]

    def make(parts: Parts) -> Step:
        parts.seen["generator"] = draw.make()
        parts.seen["high"], parts.seen["drawn"] = 0, []

        def decide(loss: torch.Tensor, here: str) -> None:
            if where == here and loss.item() > 50:
                parts.seen["high"] += 1

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(F.dropout(x, 0.1)), y)
            decide(loss, "before the draw")
            first = draw.use(parts.seen["generator"])
            decide(loss, "between two draws")
            second = draw.use(parts.seen["generator"])
            parts.seen["drawn"].append(first - second)
            decide(loss, "after the draws")
            (loss if first < second else loss * 2).backward()
            parts.optimizer.step()
            if where == "after the step" and loss.item() > 50:
                parts.seen["high"] += 1
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number in (24, 31) else 0.0)

    report = speculates(training(make, between=between), 50, at_least=12)
    assert report["discards"] >= 1


def test_draw_depends_on_a_fetched_value() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            scale = random.uniform(0.0, x.abs().max().item())
            parts.seen["scale"] = scale
            loss = parts.train(x * scale, y).detach()
            parts.seen["after"] = random.uniform(0.0, loss.item())
            return loss

        return step

    speculates(training(make), 30, at_least=12)


def test_shuffled_rows() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            rows = list(range(len(x)))
            random.shuffle(rows)
            part = torch.tensor(rows[:4])
            return parts.train(x[part], y[part]).detach(), rows

        return step

    speculates(training(make))


def test_shuffled_and_chosen_objects_steer() -> None:
    def make(parts: Parts) -> Step:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts_of_x = [x[:3], x[3:]]
            random.shuffle(parts_of_x)
            activation = random.choice([torch.tanh, torch.sin])
            return parts.train(activation(torch.cat(parts_of_x)), y).detach()

        return step

    speculates(training(make), 60)


def test_generator_that_is_given_or_replaced() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["generator"] = np.random.default_rng(1)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x * float(parts.seen["generator"].random()), y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 20:
            parts.seen["generator"] = np.random.default_rng(7)

    speculates(training(make, between=between), 50)


def test_two_generators_share_their_bits() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["generator"] = np.random.default_rng(1)
        other = np.random.Generator(parts.seen["generator"].bit_generator)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            drawn = [parts.seen["generator"].random(), other.random(), parts.seen["generator"].random()]
            if loss.item() > 50:
                drawn.append(0.0)
            parts.seen["drawn"] = drawn
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number == 20 else 0.0)

    report = speculates(training(make, between=between), 40, at_least=10)
    assert report["discards"] >= 1


def test_draw_that_raises_leaves_at_its_own_line() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["count"] = 1

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y).detach()
            parts.seen["drawn"] = random.random() + random.randrange(parts.seen["count"])
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["count"] = 0 if number == 20 else 1 + number % 3

    speculates(training(make, between=between))


@pytest.mark.parametrize("what", ["seed", "state", "subclass", "own list"])
def test_what_is_no_plain_draw_is_refused(what: str) -> None:
    class Named(random.Random):
        name = "what may override anything"

    def make(parts: Parts) -> Step:
        named, rows = Named(1), [1, 2, 3]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            match_what = {"seed": 0, "state": 1, "subclass": 2, "own list": 3}[what]
            if match_what == 0:
                random.seed(number)
            elif match_what == 1:
                random.getstate()
            elif match_what == 2:
                x = x * named.random()
            else:
                random.shuffle(rows)
            return parts.train(x, y).detach()

        return step

    report = same(training(make), 20, engine="speculation")
    assert report["speculated_iterations"] == 0
    assert {entry["code"] for entry in report["refusals"]} <= {"foreign_function", "unsupported_object"}
    assert report["refusals"]


def test_oracle_sees_draws_that_are_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def discard(unit: SpeculatedUnit) -> None:
        unit._undo.clear()
        whole(unit)

    whole = SpeculatedUnit.discard
    monkeypatch.setattr(SpeculatedUnit, "discard", discard)
    with pytest.raises(AssertionError, match="differences from eager"):
        test_draws_are_taken_back("random.random", "after the draws")

"""Gradients lent in memory of a captured graph: nobody can tell, whoever keeps one, and whenever they are dropped.

On a CPU no memory is used again; here `replay` does so, and its first segment spoils all of it, as a CUDA graph may.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.differential import exact_backend
from tests.hazards import test_gradient_memory as memory
from tests.hazards.programs import Parts, same, training
from tests.hazards.test_gradient_memory import reusing as reusing  # a fixture
from tests.hazards.test_launch_ahead import ahead as ahead  # a fixture
from twofold.backends.executable import Environment
from twofold.backends.replay import ReplayExecutable
from twofold.run import builder
from twofold.run.builder import Builder, PathState
from twofold.run.lent_gradients import LentGradients

STEPS = 30


@pytest.fixture
def lending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have gradients lent; return whether they were known to be dropped, for each time that they were taken back."""
    take_back = LentGradients.take_back
    taken: list[bool] = []

    def take_back_and_tell(self: LentGradients, are_dropped: bool) -> None:
        take_back(self, are_dropped)
        taken.append(are_dropped)

    monkeypatch.setattr(LentGradients, "take_back", take_back_and_tell)
    monkeypatch.setattr(builder, "LENT_BYTES", 0)
    if exact_backend() == "replay":
        request.getfixturevalue("reusing")
        _lend_what_is_replayed(monkeypatch)
    return taken


def _lend_what_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, install_as_it_is = ReplayExecutable.launch, Builder._install

    def launch_over_all(self: Any, index: int, environment: Environment) -> None:
        if index == 0:
            for kept in self.memory.values():
                kept.fill_(torch.nan if kept.is_floating_point() else 77)
        launch(self, index, environment)

    def install(self: Builder, path: Any, state: PathState, inner: Any, accelerator: bool) -> None:
        inner.lends_outputs = state.may_lend
        install_as_it_is(self, path, state, inner, accelerator)

    monkeypatch.setattr(Builder, "_install", install)
    monkeypatch.setattr(ReplayExecutable, "launch", launch_over_all)


def weight(parts: Parts) -> Any:
    return next(parts.model.parameters())


def trains(parts: Parts, number: int) -> None:
    """Keep nothing."""


def keeps_once(parts: Parts, number: int) -> None:
    """The object itself, for one step."""
    parts.seen["kept"] = [weight(parts).grad] if number == 12 else []


def keeps_from_then_on(parts: Parts, number: int) -> None:
    if number >= 12:
        parts.seen.setdefault("kept", []).append(weight(parts).grad)


def keeps_view(parts: Parts, number: int) -> None:
    """Memory of it, in another tensor."""
    if number == 12:
        parts.seen["view"] = weight(parts).grad[1:]


def keeps_detached(parts: Parts, number: int) -> None:
    if number == 12:
        parts.seen["detached"] = weight(parts).grad.detach()


def keeps_array(parts: Parts, number: int) -> None:
    if number == 12:
        parts.seen["array"] = weight(parts).grad.numpy()


def keeps_in_history(parts: Parts, number: int) -> None:
    """What a history saved is no object of Python's."""
    if number == 12:
        scale = torch.ones(8, 4, requires_grad=True)
        parts.seen["history"] = [scale, (scale * weight(parts).grad).sum()]
    if number == 14:
        scale, loss = parts.seen.pop("history")
        loss.backward()
        parts.seen["saved"] = scale.grad


def changes(parts: Parts, number: int) -> None:
    """The gradients are the program's own: it may write to them, and give them other memory."""
    gradient = weight(parts).grad
    if number == 12:
        gradient.mul_(2)
    if number == 16:
        gradient.data = gradient.data * 3
    if number == 20:
        gradient.resize_(20, 4)


def shortens(parts: Parts, number: int) -> None:
    """A gradient that has another shape than its parameter cannot be set, but it can be there."""
    bias = parts.model[0].bias
    if number == 12:
        parts.seen["whole"], bias.data = bias.data, bias.data[:1]
    if number == 13:
        bias.data = parts.seen.pop("whole")


def replaces(parts: Parts, number: int) -> None:
    if number % 5 == 3:
        weight(parts).grad = torch.ones(8, 4)
    if number % 5 == 4:
        weight(parts).grad = None


AFTER: dict[str, Callable[[Parts, int], None]] = {
    function.__name__: function
    for function in (
        trains,
        keeps_once,
        keeps_from_then_on,
        keeps_view,
        keeps_detached,
        keeps_array,
        keeps_in_history,
        changes,
        shortens,
        replaces,
    )
}


def drops_first(parts: Parts) -> Any:
    return lambda number, x, y: parts.train(x, y).item()


def drops_behind_a_fetch(parts: Parts) -> Any:
    """A number is read, and the step given up because of it, before gradients are dropped."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = parts.loss(x, y)
        value = loss.item()
        if number % 7 == 5:
            return value
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return value

    return step


def reads_now_and_then(parts: Parts) -> Any:
    """What was left in `.grad` is read before it is dropped, in some steps: first thing, or behind a fetch."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        if number % 6 == 4:
            parts.seen.setdefault("norms", []).append(weight(parts).grad.norm().item())
        loss = parts.loss(x, y)
        value = loss.item()
        if number % 6 == 5:
            parts.seen.setdefault("norms", []).append(weight(parts).grad.norm().item())
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return value

    return step


def adds_now_and_then(parts: Parts) -> Any:
    """Some steps add to the gradients of the one before."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if number % 4:
            parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        return loss.detach()

    return step


def raises_late(parts: Parts) -> Any:
    """An exception behind a fetch, where gradients were dropped and where they were not."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        if number % 2:
            parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        value = loss.item()
        if number in (13, 18):
            raise ValueError(value)
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return value

    return step


STEP: dict[str, Callable[[Parts], Any]] = {
    function.__name__: function
    for function in (drops_first, drops_behind_a_fetch, reads_now_and_then, adds_now_and_then, raises_late)
}
KEPT = [pytest.param(name, marks=pytest.mark.cpu) if name == "keeps_array" else name for name in AFTER]
ENGINES = pytest.mark.parametrize("engine", ["coexecution", "speculation"])


@ENGINES
@pytest.mark.parametrize("name", KEPT)
def test_what_the_program_does_with_gradients(name: str, engine: str, lending: list[bool]) -> None:
    def between(number: int, parts: Parts) -> None:
        if number:
            AFTER[name](parts, number - 1)

    report = same(training(drops_first, between=between), STEPS, engine=engine)
    assert report["graph_iterations"] > STEPS // 2, report["fallbacks"]
    assert True in lending
    is_kept = any(fallback["code"] == "gradient_kept" for fallback in report["fallbacks"])
    assert is_kept is (name.startswith("keeps") or name == "changes")


@ENGINES
@pytest.mark.parametrize("name", STEP)
def test_when_gradients_are_dropped(name: str, engine: str, lending: list[bool]) -> None:
    report = same(training(STEP[name]), STEPS, engine=engine)
    assert report["graph_iterations"] > STEPS // 3
    assert lending


@ENGINES
@pytest.mark.parametrize("name", [*memory.PROGRAMS, *STEP])
@pytest.mark.usefixtures("lending", "ahead")
def test_where_the_device_goes_ahead(name: str, engine: str) -> None:
    same(training((memory.PROGRAMS | STEP)[name]), STEPS, engine=engine)


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("name", ["keeps_once", "keeps_view", "keeps_in_history"])
def test_harness_catches_gradients_that_nobody_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LentGradients, "_has_other_holders", lambda _: False)

    def between(number: int, parts: Parts) -> None:
        if number:
            AFTER[name](parts, number - 1)

    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(drops_first, between=between), STEPS, engine="coexecution")


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("name", ["drops_behind_a_fetch", "reads_now_and_then"])
def test_harness_catches_gradients_taken_back_too_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_back = LentGradients.take_back
    monkeypatch.setattr(LentGradients, "take_back", lambda self, are_dropped: take_back(self, True))
    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(STEP[name]), STEPS, engine="coexecution")

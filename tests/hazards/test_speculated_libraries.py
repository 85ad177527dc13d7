"""Speculation on what other libraries' text does, and on a model that is given the state of another, as eager."""

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from tests.hazards.programs import Parts, training
from tests.hazards.test_speculation import Step, failed, speculates
from twofold.convert.speculation import speculation

CHANGED_AT = 14


# ---- a model is given the state of another ---------------------------------------------------------------------


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def copying(parts: Parts) -> Step:
    target = parts.target = with_buffers()  # type: ignore[attr-defined]
    parts.seen["loaded"] = []

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        with torch.no_grad():
            for theirs, own in zip(target.parameters(), parts.model.parameters(), strict=False):
                theirs.lerp_(own, 0.25)
        found = parts.model.load_state_dict(target.state_dict(), strict=False)
        return parts.train(x, y), found.missing_keys, found.unexpected_keys

    return step


def add_a_buffer(parts: Parts) -> None:
    parts.model.register_buffer("scale", torch.ones(2))


def add_a_persistent_one_to_both(parts: Parts) -> None:
    for model in (parts.model, parts.target):  # type: ignore[attr-defined]
        model.register_buffer("scale", torch.rand(2))


def hook_what_is_saved(parts: Parts) -> None:
    def rename(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state[prefix + "weights"] = state.pop(prefix + "weight")

    parts.target[2].register_state_dict_post_hook(rename)  # type: ignore[attr-defined]


def hook_what_is_loaded(parts: Parts) -> None:
    parts.model.register_load_state_dict_post_hook(lambda _module, keys: parts.seen["loaded"].append(len(keys[0])))


def replace_a_parameter(parts: Parts) -> None:
    target: Any = parts.target  # type: ignore[attr-defined]
    target[0].weight = nn.Parameter(torch.rand(4, 4))


def load_by_assigning(parts: Parts) -> None:
    load = parts.model.load_state_dict
    parts.model.load_state_dict = lambda state, strict: load(state, strict=strict, assign=True)


@pytest.mark.parametrize(
    "disturb",
    [
        None,
        add_a_buffer,
        add_a_persistent_one_to_both,
        hook_what_is_saved,
        hook_what_is_loaded,
        replace_a_parameter,
        load_by_assigning,
    ],
)
def test_a_model_is_given_the_state_of_another(disturb: Callable[[Parts], None] | None) -> None:
    def between(number: int, parts: Parts) -> None:
        if number == CHANGED_AT and disturb is not None:
            disturb(parts)

    factory = training(copying, model=with_buffers, between=between)
    speculates(factory, 28, at_least=8 if disturb is None else 6)


# ---- numbers that are chosen -----------------------------------------------------------------------------------


def choosing(parts: Parts) -> Step:
    class Environment:
        pass

    here: Any = Environment()
    here.force, here.pull, here.total = 1.0, 2.0, 0.0
    parts.seen["here"] = here

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        here.total += here.force if random.random() < 0.5 else -here.pull
        return parts.train(x, y)

    return step


def test_a_chosen_number_is_no_way_of_its_own() -> None:
    report = speculates(training(choosing), 40, at_least=32)
    assert report["discards"] == 0
    assert "branch" not in failed(report)


def test_harness_catches_a_number_that_is_always_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation.chosen, "__code__", (lambda condition, one, other: one).__code__)
    with pytest.raises(AssertionError, match="differences from eager"):
        speculates(training(choosing), 40)


@pytest.mark.parametrize("number", [3, "text", torch.ones(())])
def test_a_number_that_is_chosen_becomes_another_object(number: Any) -> None:
    def make(parts: Parts) -> Step:
        class Environment:
            pass

        here: Any = Environment()
        here.force, here.pull = 1.0, 2.0
        parts.seen["here"] = here

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(x, y), here.force if number % 2 else here.pull

        return step

    def between(at: int, parts: Parts) -> None:
        if at == CHANGED_AT:
            parts.seen["here"].pull = number

    speculates(training(make, between=between), 28)


def test_a_number_that_is_not_chosen_need_not_be_there() -> None:
    class Environment:
        force, pull = 1.0, 2.0

    here = Environment()
    here.force, here.pull = 1.0, 2.0
    x = torch.ones(3)

    def step(number: int) -> Any:
        return x * 2, here.force if number > 0 else here.pull

    run = twofold.function(step, engine="speculation", backend="replay", background=False)
    for number in range(12):
        run(number + 1)
    before = twofold.report(run).to_dict()["speculated_iterations"]
    assert before > 4
    del here.pull, Environment.pull
    assert [run(number)[1] for number in (1, 2)] == [1.0, 1.0]
    with pytest.raises(AttributeError, match="pull"):
        run(-1)


# ---- the text of other libraries -------------------------------------------------------------------------------

LIBRARY = """
import numpy as np

LIMIT = 3.0


class Pendulum:
    def __init__(self):
        self.angle = 0.0
        self.swings = 0

    def push(self, force):
        assert isinstance(force, float)
        self.angle = self.angle + force
        over = bool(abs(self.angle) > LIMIT)
        if over:
            self.swings += 1
            self.angle = 0.0
        return np.array([self.angle, force], dtype=np.float32), over

    def changed_in_place(self):
        self.path = np.zeros(2)
        self.path += 1.0
        return bool(self.path[0] > 0.5)
"""


@pytest.fixture
def library(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that lies where packages are installed."""
    file = tmp_path / "site-packages" / "pendulum.py"
    file.parent.mkdir()
    file.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("pendulum", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["pendulum"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pendulum"]


def swinging(library: Any) -> Callable[[Parts], Step]:
    def make(parts: Parts) -> Step:
        pendulum = parts.seen["pendulum"] = library.Pendulum()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            moved, over = pendulum.push(loss.item())
            parts.optimizer.zero_grad()
            (loss + torch.from_numpy(moved).sum()).backward()
            parts.optimizer.step()
            return loss.detach(), over

        return step

    return make


@pytest.mark.cpu  # a number of the CPU's enters the loss
def test_an_environment_of_another_library_is_speculated_on(library: Any) -> None:
    report = speculates(training(swinging(library)), 60, at_least=40)
    assert failed(report).get("branch"), "the pendulum went over"


@pytest.mark.cpu  # a number of the CPU's enters the loss
def test_a_constant_of_another_library_that_changes(library: Any) -> None:
    def between(number: int, parts: Parts) -> None:
        library.LIMIT = 3.0 if number < CHANGED_AT else 2.0 + number / 10

    report = speculates(training(swinging(library), between=between), 40, at_least=20)
    assert failed(report)["value"] >= 1


@pytest.mark.cpu  # a number of the CPU's enters the loss
def test_a_method_of_another_library_that_is_replaced(library: Any) -> None:
    push = library.Pendulum.push

    def between(number: int, parts: Parts) -> None:
        library.Pendulum.push = push if number < CHANGED_AT else lambda self, force: push(self, 2 * force)

    report = speculates(training(swinging(library), between=between), 40, at_least=8)
    assert failed(report)["identity"] >= 1

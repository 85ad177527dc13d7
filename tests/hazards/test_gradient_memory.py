"""What outlives a unit: nothing that was launched and undone, or launched again, may show in it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import twofold
from tests.hazards import test_lifetimes as lifetimes
from tests.hazards import test_tensors_in_python as reads
from tests.hazards.programs import Parts, same, training
from tests.hazards.test_launch_ahead import ahead as ahead  # a fixture
from twofold.backends.executable import Environment
from twofold.backends.replay import ReplayExecutable
from twofold.convert.from_traces import Program
from twofold.run.graph_runner import GraphRunner
from twofold.run.installed import Installed

STEPS = 30


def accumulates(parts: Parts) -> Any:
    """Gradients are added to for three steps; behind a fetch the way is another one now and then."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        if number % 3 == 0:
            parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        value = loss.item()
        if number in (17, 22):
            parts.seen.setdefault("doubled", []).append(next(parts.model.parameters()).grad * 2)
        if number % 3 == 2:
            parts.optimizer.step()
        return value

    return step


def clears_late(parts: Parts) -> Any:
    """Whether gradients are cleared is decided behind a fetch."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = parts.loss(x, y)
        value = loss.item()
        if number % 7 != 6:
            parts.optimizer.zero_grad()
        loss.backward()
        total = next(parts.model.parameters()).grad.sum().item()
        parts.optimizer.step()
        return value + total

    return step


def keeps(parts: Parts) -> Any:
    """The program keeps the gradients of each step, and a view of one."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y)
        loss.backward()
        parts.optimizer.step()
        kept = parts.seen.setdefault("kept", [])
        gradient = next(parts.model.parameters()).grad
        kept += [gradient, gradient[0]]
        del kept[:-6]
        return loss.detach()

    return step


def shows_gradient(parts: Parts) -> Any:
    """The program is handed the very memory of a gradient, and what it writes there is in `.grad`."""

    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts.optimizer.zero_grad()
        parts.loss(x, y).backward()
        parts.optimizer.step()
        return next(parts.model.parameters()).grad[0]

    return step


PROGRAMS = {"accumulates": accumulates, "clears_late": clears_late, "keeps": keeps}
LIFETIMES: dict[str, Callable[[], None]] = {
    "aliases": lifetimes.test_aliasing_outputs_of_one_unit_without_a_step,
    "gradients in place": lifetimes.test_gradients_in_place_are_kept,
    **{name: partial(reads.test_read_of_an_intermediate_tensor, name) for name in ("tensor copy", "ellipsis", "copy")},
}


@pytest.fixture
def reusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `replay` write its results where it wrote them the last time, as a captured CUDA graph does."""
    launch = ReplayExecutable.launch

    def launch_into_memory(self: Any, index: int, environment: Environment) -> None:
        program: Program = self.memory_program
        launch(self, index, environment)
        for value in program.segments[index].outputs:
            made = environment[value]
            kept = self.memory.setdefault(value, made.clone())
            environment[value] = kept.copy_(made)

    create = ReplayExecutable.__init__

    def remember(self: Any, program: Program) -> None:
        create(self, program)
        self.memory_program, self.memory = program, {}

    monkeypatch.setattr(ReplayExecutable, "__init__", remember)
    monkeypatch.setattr(ReplayExecutable, "launch", launch_into_memory)
    monkeypatch.setattr(ReplayExecutable, "reuses_outputs", True)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_eagers(name: str, engine: str) -> None:
    report = same(training(PROGRAMS[name]), STEPS, engine=engine)
    assert report["graph_iterations"] > STEPS // 2


@pytest.mark.usefixtures("reusing")
@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_eagers_where_memory_is_used_again(name: str, engine: str) -> None:
    report = same(training(PROGRAMS[name]), STEPS, engine=engine)
    assert report["graph_iterations"] > STEPS // 2


@pytest.mark.usefixtures("reusing")
@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_gradients_are_eagers_where_the_device_goes_ahead(engine: str, ahead: list[int]) -> None:
    report = same(training(clears_late), STEPS, engine=engine)
    # A speculated call launches all that it has before it reads a number, where that can be undone.
    assert ahead if engine == "coexecution" else report["speculated_iterations"]


@pytest.mark.usefixtures("reusing", "ahead")
@pytest.mark.parametrize("name", ["keeps", "clears_late"])
def test_harness_catches_gradients_in_memory_that_is_used_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Installed.__post_init__

    def copy_nothing(self: Installed) -> None:
        prepare(self)
        self.exits = replace(self.exits, copied=())

    monkeypatch.setattr(Installed, "__post_init__", copy_nothing)
    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(PROGRAMS[name]), STEPS, engine="coexecution")


def test_harness_catches_gradients_that_are_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    save = GraphRunner._save
    monkeypatch.setattr(
        GraphRunner, "_save", lambda self, written: save(self, [v for v in written if v in self.program.statics])
    )
    with pytest.raises(AssertionError, match="differences from eager"):
        same(training(accumulates), STEPS, engine="coexecution")


@pytest.mark.usefixtures("reusing")
def test_gradient_that_is_handed_out_shares_its_memory() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = twofold.function(shows_gradient(Parts(model, optimizer)), backend="replay", background=False)
    for number in range(6):
        shown = step(number, torch.randn(6, 4), torch.randn(6, 3))
        shown.mul_(2)
        assert torch.equal(shown, model.weight.grad[0])
    assert twofold.report(step).to_dict()["graph_iterations"] == 4


@pytest.mark.usefixtures("reusing")
@pytest.mark.parametrize("name", LIFETIMES)
def test_what_is_handed_out_lasts_where_memory_is_used_again(name: str) -> None:
    LIFETIMES[name]()


@pytest.mark.usefixtures("reusing")
@pytest.mark.parametrize("name", ["aliases", "ellipsis"])
def test_harness_catches_copies_that_share_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "owned_value", lambda self, value: self.value(value).clone())
    with pytest.raises(AssertionError, match="differences from eager"):
        LIFETIMES[name]()


def versions(numerics: str | None) -> list[int]:
    """Return the version counters of all parameters and buffers after some steps; None: eager."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    parts = Parts(model, torch.optim.Adam(model.parameters(), lr=0.1))
    step: Any = parts.train
    if numerics:
        step = twofold.function(parts.train, numerics=numerics, backend="replay", background=False)
    for _ in range(9):
        step(torch.randn(6, 4), torch.randn(6, 3))
    if numerics:
        assert twofold.report(step).to_dict()["graph_iterations"] > 4
    return [tensor._version for tensor in (*model.parameters(), model[1].num_batches_tracked)]


@pytest.mark.parametrize("numerics", ["exact", "fused"])
@pytest.mark.parametrize("memory", ["of its own", "used again"])
def test_changes_are_counted_for_autograd(memory: str, numerics: str, request: pytest.FixtureRequest) -> None:
    if memory == "used again":
        request.getfixturevalue("reusing")
        # What is captured is launched with no counter of PyTorch's noticing.
        launch = ReplayExecutable.launch

        def unnoticed(self: Any, index: int, environment: Environment) -> None:
            with torch.autograd._unsafe_preserve_version_counter(tuple(self.memory_program.statics.values())):
                launch(self, index, environment)

        request.getfixturevalue("monkeypatch").setattr(ReplayExecutable, "launch", unnoticed)
    assert versions(numerics) == versions(None)


@pytest.mark.parametrize("numerics", ["exact", "fused"])
def test_weights_changed_between_forward_and_backward_are_an_error(numerics: str) -> None:
    """A forward of one function, a training step by another, and then the backward, too late."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    options: dict[str, Any] = {"numerics": numerics, "backend": "replay", "background": False}
    forward, train = twofold.function(model, **options), twofold.function(parts.train, **options)
    for _ in range(8):
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        output = forward(x)
        train(x, y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    assert all(twofold.report(f).to_dict()["graph_iterations"] > 2 for f in (forward, train))

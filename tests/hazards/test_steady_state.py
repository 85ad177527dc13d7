"""What is checked before each unit in the steady state: each check is broken alone, and would be missed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from tests.differential import exact_backend
from tests.hazards.programs import Parts, same, sgd, training
from twofold import driver
from twofold.backends.inductor import CompileFailed
from twofold.capture.trace_graph import Path
from twofold.convert.from_traces import OptimizerPlan
from twofold.driver import MAX_REST, Driver, Mode
from twofold.run import builder
from twofold.run.builder import Builder, PathState
from twofold.run.contest import SAMPLES, Contest
from twofold.run.placement import Placement
from twofold.run.speculation import unit

STEPS = 24
DISTURBED = 14

Disturb = Callable[[Parts], None]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def first(parts: Parts) -> nn.Parameter:
    return parts.optimizer.param_groups[0]["params"][0]


def replace_state_tensor(parts: Parts) -> None:
    parts.optimizer.state[first(parts)]["exp_avg"] = torch.ones_like(first(parts))


def replace_state_dictionary(parts: Parts) -> None:
    state = parts.optimizer.state[first(parts)]
    parts.optimizer.state[first(parts)] = {**state, "exp_avg": torch.ones_like(first(parts))}


def exchange_owners(parts: Parts) -> None:
    """The states stay in their order, those of the two first weights change their keys."""
    items = list(parts.optimizer.state.items())
    owners = [owner for owner, _ in items]
    owners[0], owners[2] = owners[2], owners[0]
    parts.optimizer.state.clear()
    parts.optimizer.state.update(zip(owners, [state for _, state in items], strict=True))


def forget_last_state(parts: Parts) -> None:
    """Nothing is left of it, so the optimizer begins anew with that parameter."""
    parts.optimizer.state.popitem()


def load_state(parts: Parts) -> None:
    state = parts.optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.ones_like(first(parts))
    parts.optimizer.load_state_dict(state)


def set_weight_decay(parts: Parts) -> None:
    parts.optimizer.param_groups[0]["weight_decay"] = 0.5


def take_parameter_away(parts: Parts) -> None:
    del parts.optimizer.param_groups[0]["params"][-1]


def replace_parameter(parts: Parts) -> None:
    parts.optimizer.param_groups[0]["params"][0] = nn.Parameter(first(parts).detach().clone())


def add_group(parts: Parts) -> None:
    """A parameter is stepped twice."""
    group = parts.optimizer.param_groups[0]
    parts.optimizer.param_groups.append({**group, "params": [first(parts)]})


def move_parameter(parts: Parts) -> None:
    first(parts).data = first(parts).data * 0.5


DISTURBANCES = (
    replace_state_tensor, replace_state_dictionary, exchange_owners, forget_last_state, load_state, set_weight_decay,
    take_parameter_away, replace_parameter, add_group,
)  # fmt: skip


def disturbed(disturb: Disturb) -> Any:
    def make(parts: Parts) -> Any:
        return lambda number, x, y: parts.train(x, y)

    def between(number: int, parts: Parts) -> None:
        if number == DISTURBED:
            disturb(parts)

    # Where a parameter changes, the optimizer has no state that would show it.
    optimizer = sgd if disturb in (take_parameter_away, replace_parameter) else adam
    return training(make, model=net, optimizer=optimizer, between=between)


def run(disturb: Disturb, engine: str) -> dict[str, Any]:
    return same(disturbed(disturb), STEPS, numerics="fused", engine=engine)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize("disturb", [*DISTURBANCES, move_parameter])
def test_state_that_changes_between_units(disturb: Disturb, engine: str) -> None:
    report = run(disturb, engine)
    assert report["graph_iterations"] > DISTURBED // 2
    assert (report["speculated_iterations"] > DISTURBED // 3) is (engine == "speculation")


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_harness_catches_an_optimizer_that_is_not_looked_at(disturb: Disturb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptimizerPlan, "still_holds", lambda _: True)
    with pytest.raises(AssertionError, match="differences from eager"):
        run(disturb, "speculation")


def test_harness_catches_memory_that_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "has_kept_memory", lambda _: True)
    with pytest.raises(AssertionError, match="differences from eager"):
        run(move_parameter, "speculation")


def on_two_paths() -> Any:
    """Each path has a square weight of its own; one is transposed in its memory while calls take the other path."""

    def make(parts: Parts) -> Any:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            parts.optimizer.zero_grad()
            chosen = parts.model[0] if number % 8 < 5 else parts.model[2]
            loss = (chosen(x)[:, :3] - y).square().mean()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 37:  # the path that was followed last, and is likely, is the other
            weight = parts.model[0].weight
            weight.data = weight.data.t()

    return training(make, model=lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), between=between)


def test_layouts_are_looked_at_on_a_path_that_was_not_likely() -> None:
    assert same(on_two_paths(), 48, engine="speculation")["speculated_iterations"] > 24


def test_harness_catches_layouts_that_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = unit.TensorWork.runner
    monkeypatch.setattr(unit.TensorWork, "runner", lambda work, feeds, given, _: runner(work, feeds, given, True))
    with pytest.raises(AssertionError, match="differences from eager"):
        same(on_two_paths(), 48, engine="speculation")


# ---- what a unit is given --------------------------------------------------------------------------------------


def usual(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def aliased(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model[0].weight.detach()


def as_parameter(model: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(x.clone())


def requiring_a_gradient(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def with_a_history(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_() * 2


def with_other_strides(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def of_another_type(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.double()


def of_inference_mode(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def given(other: Callable[[Any, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    def make(parts: Parts) -> Any:
        return lambda number, x, y: parts.train(x, y).detach()

    def build() -> Any:
        program = training(make, model=lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))()
        batches = program.batches

        def others(index: int) -> tuple[Any, ...]:
            index, x, y = batches(index)
            return index, other(program.modules["net"], x) if index == DISTURBED else x, y

        program.batches = others
        return program

    return same(build, STEPS, engine="speculation")


@pytest.mark.parametrize(
    "other",
    [
        aliased, as_parameter, requiring_a_gradient, with_a_history, with_other_strides, of_another_type,
        of_inference_mode,
    ],
)  # fmt: skip
def test_no_graph_is_given_what_is_of_another_kind(other: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    assert given(usual)["speculated_iterations"] > given(other)["speculated_iterations"] > DISTURBED // 2


# ---- what a unit hands out -------------------------------------------------------------------------------------


def detached(parts: Parts, loss: torch.Tensor) -> Any:
    return loss.detach()


def number(parts: Parts, loss: torch.Tensor) -> Any:
    return loss.item()


def both(parts: Parts, loss: torch.Tensor) -> Any:
    return loss.detach(), loss


def kept(parts: Parts, loss: torch.Tensor) -> Any:
    parts.seen["last"] = loss
    return loss.detach()


def in_a_tuple(parts: Parts, loss: torch.Tensor) -> Any:
    parts.seen["last"] = ("loss", loss)
    return loss.detach()


def printed(parts: Parts, loss: torch.Tensor) -> Any:
    print(loss)
    return loss.detach()


def computed_with(parts: Parts, loss: torch.Tensor) -> Any:
    return loss.detach(), loss * 2


WITH_HISTORY = (both, kept, in_a_tuple, computed_with)


def handing_out(hand_out: Callable[[Parts, torch.Tensor], Any]) -> dict[str, Any]:
    def make(parts: Parts) -> Any:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return hand_out(parts, parts.train(x, y))

        return step

    return same(training(make), 16, engine="speculation")


@pytest.mark.parametrize("hand_out", [detached, number, printed, *WITH_HISTORY])
def test_history_is_there_for_whom_it_shows(hand_out: Callable[[Parts, torch.Tensor], Any]) -> None:
    assert handing_out(hand_out)["speculated_iterations"] > 4


@pytest.mark.parametrize("hand_out", WITH_HISTORY)
def test_harness_catches_history_that_is_missing(
    hand_out: Callable[[Parts, torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "_seen_with_history", lambda _: set())
    with pytest.raises(AssertionError, match="differences from eager"):
        handing_out(hand_out)


def test_an_eager_call_of_several_units_is_compared_as_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for one unit, its time let graphs stay that took three times as long as eager execution."""
    counted: list[int] = []
    end = Driver.end

    def noted(driver: Driver, units: int = 1) -> None:
        if driver._mode is Mode.IDLE:
            counted.append(units)
        end(driver, units)

    monkeypatch.setattr(Driver, "end", noted)

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for _ in range(3 if number % 4 else 2):
                loss = parts.train(x, y)
            return loss.detach()

        return step

    program = training(make)()
    step = twofold.function(program.step, numerics="exact", background=False)
    for number in range(40):
        counted.clear()
        step(*program.batches(number))
        assert counted in ([], [3 if number % 4 else 2])
        if counted:
            break
    assert counted


def test_units_that_compare_graphs_with_eager_execution_are_counted_until_that_is_decided() -> None:
    model = torch.nn.Linear(4, 3)
    step = twofold.function(model, numerics="exact", engine="coexecution", background=False)
    compared: list[int] = []
    for _ in range(400):
        step(torch.ones(2, 4))
        report = twofold.report(step).to_dict()
        compared.append(report["compared_iterations"])
        if any("replay: " in decision["text"] for decision in report["decisions"]):
            break
    assert compared[1] == 0 < compared[-1] < len(compared)
    for _ in range(20):
        step(torch.ones(2, 4))
    assert twofold.report(step).to_dict()["compared_iterations"] == compared[-1]


def test_tiers_are_judged_by_calls_without_their_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged beside its Python, the graph of a small network is slower than eager execution; without, it is faster."""
    judged: list[int] = []
    note_graph = Builder.note_graph

    def noted(self: Builder, path: Path, seconds: float) -> None:
        judged.append(self.account.speculated_iterations)
        note_graph(self, path, seconds)

    monkeypatch.setattr(Builder, "note_graph", noted)
    program = training(lambda parts: lambda number, x, y: parts.train(x, y).item())()
    step = twofold.function(program.step, numerics="exact", background=False)
    for number in range(40):
        step(*program.batches(number))
    assert len(judged) > SAMPLES
    assert judged == list(range(1, len(judged) + 1))


def test_tiers_of_what_does_not_convert_are_judged_beside_its_python() -> None:
    program = training(lambda parts: lambda number, x, y: [loss.item() for loss in (yield_loss(parts, x, y))])()
    step = twofold.function(program.step, numerics="exact", background=False)
    for number in range(60):
        step(*program.batches(number))
    report = twofold.report(step).to_dict()
    assert report["refusals"]
    assert any(f"{exact_backend()}: " in decision["text"] for decision in report["decisions"])


def yield_loss(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
    """A generator is not converted."""
    yield parts.train(x, y)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units before which it was looked how they begin."""
    numbers: list[int] = []
    choose = Driver.choose

    def noted(self: Driver, goes_on: bool = False) -> None:
        numbers.append(self.account.iterations)
        choose(self, goes_on)

    monkeypatch.setattr(Driver, "choose", noted)
    return numbers


def reject(contest: Contest, is_accepted: bool) -> None:
    assert contest.trial is not None
    contest.rejected.add(contest.trial.tier)
    contest.trial = None


def test_units_rest_where_no_tier_pays_until_something_else_comes(
    looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contest, "settle", reject)

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.loss(x, y) if number >= 300 else parts.train(x, y)

    program = training(make)()
    step = twofold.function(program.step, numerics="exact", background=False)
    for number in range(300):
        step(*program.batches(number))
    report = twofold.report(step).to_dict()
    assert report["iterations"] == 300 == report["eager_iterations"] + report["graph_iterations"]
    assert [entry["code"] for entry in report["fallbacks"]] == ["not_faster"]
    since = [number for number in looks if number >= 100]
    assert 200 // MAX_REST <= len(since) <= 200 // MAX_REST + 1
    with torch.no_grad():
        for number in range(300, 300 + MAX_REST + 2):
            step(*program.batches(number))
    assert twofold.report(step).to_dict()["paths"] == 2


def test_units_rest_where_a_path_that_does_not_come_again_is_not_known_yet(
    looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contest, "settle", reject)

    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.train(-x if number == 1 else x, y)

    program = training(make)()
    step = twofold.function(program.step, numerics="exact", background=False)
    for number in range(300):
        step(*program.batches(number))
    assert twofold.report(step).to_dict()["paths"] == 2
    since = [number for number in looks if number >= 100]
    assert 200 // MAX_REST <= len(since) <= 200 // MAX_REST + 1


def test_units_rest_while_a_compiler_is_at_work_and_no_longer(
    looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: Future[Any] = Future()

    def order(_self: Builder, _path: Path, state: PathState, _accelerator: bool) -> None:
        state.has_ordered, state.orders = True, [kernels]

    monkeypatch.setattr(Builder, "_order", order)
    monkeypatch.setattr(builder, "QUIET_SECONDS", 1e-6)
    for module in (driver, builder):
        monkeypatch.setattr(module, "is_compiling", lambda: not kernels.done())
    program = training(lambda parts: lambda number, x, y: parts.train(x, y))()
    step = twofold.function(program.step, background=False)
    for number in range(290):
        step(*program.batches(number))
    assert 190 // MAX_REST <= len([number for number in looks if number >= 100]) <= 190 // MAX_REST + 1
    kernels.set_exception(CompileFailed("no kernels"))
    looks.clear()
    for number in range(290, 290 + SAMPLES):
        step(*program.batches(number))
    assert looks == list(range(290, 290 + SAMPLES)), "what there is is judged now"


def test_units_that_rest_are_recorded_again_when_that_is_due(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded() -> list[int]:
        parameter = torch.ones(3, requires_grad=True)

        @twofold.function(background=False)
        def step() -> torch.Tensor:
            with torch.no_grad():
                return torch.add(parameter, 1, out=torch.empty(3))

        numbers: list[int] = []
        for number in range(200):
            before = twofold.report(step).to_dict()["traced_iterations"]
            step()
            if twofold.report(step).to_dict()["traced_iterations"] > before:
                numbers.append(number)
        return numbers

    with_rest, looked = recorded(), len(looks)
    looks.clear()
    monkeypatch.setattr(Driver, "_begin_rest", lambda self, at_most=0: Mode.IDLE)
    assert recorded() == with_rest
    assert looked < 100 < len(looks)

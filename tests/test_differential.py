"""The oracle tried on runners that are wrong in one way each: every fault must be reported by name."""

import io
import random
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs import Program
from tests.differential import (
    EXACT,
    FUSED,
    Runner,
    Step,
    Tolerance,
    assert_same,
    compare,
    eager,
    function,
    program,
    run,
)

STEPS = 4
FAILING_STEP = 2


class Counter:
    """A user's object with an attribute that counts."""

    def __init__(self) -> None:
        self.calls = 0


class Net(nn.Module):
    """A parameter with a gradient, one without, and a buffer written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.norm(self.linear(x)), 0.5)


def build() -> Program:
    """A program that does a little of all that the oracle watches; step 2 raises after its forward."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    counter = Counter()
    log: dict[str, list[int]] = {"calls": []}

    def step(x: torch.Tensor) -> dict[str, Any]:
        counter.calls += 1
        log["calls"].append(counter.calls)
        optimizer.param_groups[0]["lr"] = 0.1 / counter.calls
        optimizer.zero_grad()
        loss = model(x).square().sum()
        if counter.calls == FAILING_STEP + 1:
            raise ValueError(f"loss of call {counter.calls}")
        loss.backward()
        optimizer.step()
        print("loss of call", counter.calls)
        return {"loss": loss, "noise": (random.random(), np.random.rand()), "calls": counter.calls}

    batch = torch.randn(8, 4)
    return Program(step, lambda _: (batch,), {"net": model}, {"adam": optimizer}, {"counter": counter, "log": log})


def after_each_step(spoil: Callable[[Program], None]) -> Runner:
    """A runner that is eager but for what `spoil` does to the program after each step."""

    @contextmanager
    def runner(program: Program) -> Generator[Step, None, None]:
        def step(*arguments: Any) -> Any:
            result = program.step(*arguments)
            spoil(program)
            return result

        yield step

    return runner


def around_step(replace: Callable[..., Any]) -> Runner:
    """A runner whose step is `replace(program, *arguments)`."""

    @contextmanager
    def runner(program: Program) -> Generator[Step, None, None]:
        yield lambda *arguments: replace(program, *arguments)

    return runner


def zero_missing_gradient(program: Program) -> None:
    net = program.modules["net"]
    net.unused.grad = torch.zeros_like(net.unused)  # type: ignore[union-attr]


def drop_gradient(program: Program) -> None:
    program.modules["net"].get_parameter("linear.bias").grad = None


def spoil_parameter(program: Program) -> None:
    """The smallest change of one value."""
    with torch.no_grad():
        weight = program.modules["net"].get_parameter("linear.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def reset_buffer(program: Program) -> None:
    program.modules["net"].get_buffer("norm.running_mean").zero_()


def count_step_twice(program: Program) -> None:
    for state in program.optimizers["adam"].state.values():
        state["step"] += 1


def turn_step_count_into_number(program: Program) -> None:
    for state in program.optimizers["adam"].state.values():
        state["step"] = int(state["step"])


def spoil_attribute(program: Program) -> None:
    program.observed["counter"].last_calls = program.observed["counter"].calls


def drop_append(program: Program) -> None:
    program.observed["log"]["calls"].pop()


def switch_to_evaluation(program: Program) -> None:
    program.modules["net"].eval()


def draw_from_python(_: Program) -> None:
    random.random()


def draw_from_numpy(_: Program) -> None:
    np.random.rand()


def draw_from_torch(_: Program) -> None:
    torch.rand(1)


def keep_stale_learning_rate(program: Program, x: torch.Tensor) -> Any:
    """Step with the first step's rate, as a recording that took the number for a constant does."""
    optimizer = program.optimizers["adam"]
    real_step = optimizer.step

    def step_with_stale_rate() -> None:
        current, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.1
        real_step()
        optimizer.param_groups[0]["lr"] = current

    optimizer.step = step_with_stale_rate  # type: ignore[method-assign]
    try:
        return program.step(x)
    finally:
        optimizer.step = real_step  # type: ignore[method-assign]


@contextmanager
def overwrite_outputs(program: Program) -> Generator[Step, None, None]:
    """Return the same tensor every time, as a graph with static outputs does."""
    static = torch.zeros(())

    def step(x: torch.Tensor) -> Any:
        result = program.step(x)
        with torch.no_grad():
            static.copy_(result["loss"])
        # Its metadata are as in eager, so that only the values give it away.
        result["loss"].data = static
        return result

    yield step


def drop_print(program: Program, x: torch.Tensor) -> Any:
    with redirect_stdout(io.StringIO()):
        return program.step(x)


def swallow_exception(program: Program, x: torch.Tensor) -> Any:
    try:
        return program.step(x)
    except ValueError:
        return None


def raise_from_another_line(program: Program, x: torch.Tensor) -> Any:
    try:
        return program.step(x)
    except ValueError as error:
        raise error.with_traceback(None) from None


def change_message(program: Program, x: torch.Tensor) -> Any:
    try:
        return program.step(x)
    except ValueError as error:
        error.args = ("loss",)
        raise


def detach_result(program: Program, x: torch.Tensor) -> Any:
    result = program.step(x)
    return {**result, "loss": result["loss"].detach()}


def change_container(program: Program, x: torch.Tensor) -> Any:
    result = program.step(x)
    return {**result, "noise": list(result["noise"])}


FAULTS: dict[str, tuple[Runner, str]] = {
    "stale learning rate": (around_step(keep_stale_learning_rate), "parameter net.linear.weight"),
    "overwritten output": (overwrite_outputs, "step 0's result at the end['loss']"),
    "dropped print": (around_step(drop_print), "printed"),
    "swallowed exception": (around_step(swallow_exception), "exception"),
    "exception from another line": (around_step(raise_from_another_line), "exception line"),
    "another message": (around_step(change_message), "exception"),
    "extra draw from Python": (after_each_step(draw_from_python), "random of Python"),
    "extra draw from NumPy": (after_each_step(draw_from_numpy), "random of NumPy"),
    "extra draw from torch": (after_each_step(draw_from_torch), "random of torch"),
    "zero instead of no gradient": (after_each_step(zero_missing_gradient), "grad net.unused"),
    "missing gradient": (after_each_step(drop_gradient), "grad net.linear.bias"),
    "parameter off by one bit": (after_each_step(spoil_parameter), "parameter net.linear.weight"),
    "buffer not updated": (after_each_step(reset_buffer), "buffer net.norm.running_mean"),
    "step count off by one": (after_each_step(count_step_twice), "optimizer adam['state'][1]['step']"),
    "step count of another type": (
        after_each_step(turn_step_count_into_number),
        "optimizer adam['state'][1]['step']",
    ),
    "attribute of an observed object": (after_each_step(spoil_attribute), "observed counter['last_calls']"),
    "item of a list in an observed dict": (after_each_step(drop_append), "observed log['calls'][0]"),
    "attribute of a module": (after_each_step(switch_to_evaluation), "attributes net.norm['training']"),
    "result without history": (around_step(detach_result), "result['loss']"),
    "result in another container": (around_step(change_container), "result['noise']"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported_by_name(fault: str) -> None:
    runner, name = FAULTS[fault]
    differences = compare(run(build, STEPS, eager), run(build, STEPS, runner), EXACT)
    assert any(f": {name}: " in difference for difference in differences), differences


def test_eager_equals_eager() -> None:
    for observe in ("each_step", "end"):
        first, second = (run(build, STEPS, eager, observe=observe) for _ in range(2))
        assert compare(first, second, EXACT) == []
        assert len(first) == STEPS + 1


def test_first_difference_comes_first() -> None:
    @contextmanager
    def runner(program: Program) -> Generator[Step, None, None]:
        def step(x: torch.Tensor) -> Any:
            result = program.step(x)
            if result["calls"] == 2:
                spoil_attribute(program)
            return result

        yield step

    differences = compare(run(build, STEPS, eager), run(build, STEPS, runner))
    assert differences[0].startswith("step 1: observed counter: ")


def test_exception_is_observed_with_its_line() -> None:
    facts = run(build, STEPS, eager)[FAILING_STEP].facts
    assert facts["exception"] == "ValueError: loss of call 3"
    assert facts["exception line"].startswith("test_differential.py:")
    assert facts["exception line"].endswith(" in step")


def test_observing_at_the_end_still_finds_a_wrong_parameter() -> None:
    reference = run(build, STEPS, eager, observe="end")
    candidate = run(build, STEPS, after_each_step(spoil_parameter), observe="end")
    assert any(": parameter net.linear.weight: " in found for found in compare(reference, candidate))


class StandIn(ModuleType):
    """A module in twofold's place that runs eagerly, but for what `wrap` does to a step."""

    def __init__(self, wrap: Callable[[Step], Step]) -> None:
        super().__init__("twofold")
        self.function = lambda step, **_: wrap(step)
        self.report = lambda _: SimpleNamespace(to_dict=lambda: {"graph_iterations": 7})

    @contextmanager
    def program(self, **_: Any) -> Generator[object, None, None]:
        yield object()


def test_assert_same_returns_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "twofold", StandIn(lambda step: step))
    for configuration in (function(numerics="exact"), program(numerics="exact")):
        assert assert_same(build, STEPS, configuration) == {"graph_iterations": 7}


def test_assert_same_names_the_first_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(step: Step) -> Step:
        return lambda x: {**step(x), "calls": 0}

    monkeypatch.setitem(sys.modules, "twofold", StandIn(spoil))
    with pytest.raises(AssertionError, match=r"step 0: result\['calls'\]: expected 1, got 0"):
        assert_same(build, STEPS, function(numerics="exact"))


def test_tolerance_allows_rounding_but_no_more() -> None:
    reference = run(build, STEPS, eager)
    rounded = run(build, STEPS, eager)
    for observation in rounded:
        fact: Any = observation.facts["parameter net.linear.weight"]
        fact.values.mul_(1 + 1e-5)
    assert compare(reference, rounded, EXACT) != []
    assert compare(reference, rounded, FUSED) == []
    assert compare(reference, rounded, Tolerance({torch.float32: (1e-7, 0.0)})) != []


def test_nan_equals_nan_and_signed_zeros_differ() -> None:
    def returning(value: float) -> Callable[[], Program]:
        return lambda: Program(lambda: torch.tensor([value]), lambda _: (), {}, {})

    nan, zero, negative = (run(returning(value), 1, eager) for value in (float("nan"), 0.0, -0.0))
    assert compare(nan, run(returning(float("nan")), 1, eager)) == []
    assert compare(zero, negative) != []

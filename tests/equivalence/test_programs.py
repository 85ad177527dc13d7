"""Every program of the corpus at its small size: under twofold exactly what eager gives, and as graphs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.programs import JANUS_NAMES, NAMES, PROGRAMS, Program
from tests.differential import FUSED, assert_same, function, program
from twofold.backends import pieces
from twofold.convert import repeats

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXACT_BACKEND = {"cpu": "replay", "cuda": "cuda_graph"}

DEFAULT_STEPS = 12
# Enough for every path to come a few times: coins, lengths, and the period of two that alternate.
STEPS = {"coin_flip": 30, "varying_loop": 18, "multi_path": 30, "grad_accumulation": 18, "inception_v3": 10, "a3c": 16}

# Adam divides by the size of the gradient: where that is as small as its rounding error, a parameter moves
# by some other part of the learning rate, 1e-3. One of LeNet's 48,000 weights was 4e-5 off after 8 steps
# under torch.compile; plain SGD needs no such allowance.
AFTER_ADAM = replace(FUSED, by_dtype={torch.float32: (2e-4, 1e-4)})
# Its running mean is a float64 of NumPy's, made from norms in float32.
LOGGED = replace(FUSED, by_dtype={torch.float32: (2e-4, 1e-4), torch.float64: (2e-4, 1e-4)})
FUSED_PROGRAMS = {
    "mlp": FUSED,
    "lenet": AFTER_ADAM,
    "lstm_loop": AFTER_ADAM,
    "logging_net": LOGGED,
    "lr_schedule": FUSED,
    "bert": AFTER_ADAM,
}
FUSED_STEPS = 8
LONGEST_PIECE = 200
"""So that the loop, as small as it is here, is compiled in two pieces, as it is at full size."""
SHARED_BODIES = {"lstm_loop": AFTER_ADAM, "varying_loop": AFTER_ADAM, "logging_net": LOGGED}
SAVED_BY_SMALL_LOOPS = 20
MANY_STEPS = 50
# Each batch of trees is a path of its own, and to record one takes many times as long as to run it.
FEW_STEPS = {"tree_rnn": 4, "tree_lstm": 4}
# On a CPU, test_speculated_programs.py runs the others under the same options for as many steps.
SPECULATED = [
    *((name, "cpu") for name in FEW_STEPS),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in JANUS_NAMES),
]


def factory(name: str, device: str, **options: Any) -> Callable[[], Program]:
    return partial(PROGRAMS[name], "small", torch.device(device), **options)


def steps_of(name: str) -> int:
    return STEPS.get(name, DEFAULT_STEPS)


def assert_ran_as_graphs(report: dict[str, Any]) -> None:
    """The reason why not is in the report, so show it whole."""
    assert report["graph_iterations"] > 0, report
    assert report["graph_iterations"] + report["eager_iterations"] == report["iterations"], report


def assert_every_unit_is_counted(name: str, report: dict[str, Any]) -> None:
    """A unit is a call, but for ppo, whose optimizer steps several times in a call."""
    if name == "ppo":
        assert report["iterations"] > steps_of(name)
    else:
        assert report["iterations"] == steps_of(name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_function_with_chosen_backend_is_exact(name: str, device: str) -> None:
    configuration = function(numerics="exact", background=False)
    report = assert_same(factory(name, device), steps_of(name), configuration)
    assert_every_unit_is_counted(name, report)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_function_runs_as_graphs_and_is_exact(name: str, device: str) -> None:
    configuration = function(numerics="exact", backend=EXACT_BACKEND[device], background=False)
    report = assert_same(factory(name, device), steps_of(name), configuration)
    assert_ran_as_graphs(report)
    assert_every_unit_is_counted(name, report)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_function_that_nobody_watches_is_exact_at_the_end(name: str, device: str) -> None:
    configuration = function(numerics="exact", backend=EXACT_BACKEND[device], background=False)
    report = assert_same(factory(name, device), steps_of(name), configuration, observe="end")
    assert_ran_as_graphs(report)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_program_runs_as_graphs_and_is_exact_at_the_end(name: str, device: str) -> None:
    configuration = program(numerics="exact", backend=EXACT_BACKEND[device], background=False)
    report = assert_same(factory(name, device), steps_of(name), configuration, observe="end")
    if name == "actor_critic":  # its episodes are of many lengths, and at small size few come twice
        codes = {fallback["code"] for fallback in report["fallbacks"]}
        assert codes - {"argument_changes"} == {"new_path", "no_tensor_calls"}  # on a GPU, Python keeps tensors
    else:
        assert_ran_as_graphs(report)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_program_that_reads_everything_after_each_step_is_exact(name: str, device: str) -> None:
    configuration = program(numerics="exact", background=False)
    assert_same(factory(name, device), steps_of(name), configuration)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate_however_they_are_cleared(set_to_none: bool, device: str) -> None:
    configuration = function(numerics="exact", backend=EXACT_BACKEND[device], background=False)
    build = factory("grad_accumulation", device, set_to_none=set_to_none)
    assert_ran_as_graphs(assert_same(build, STEPS["grad_accumulation"], configuration))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("environment", ["CartPole-v1", "MountainCar-v0"])
@pytest.mark.parametrize("name", ["a3c", "ppo"])
def test_reinforcement_learning_is_exact_in_other_environments(name: str, environment: str, device: str) -> None:
    configuration = function(numerics="exact", backend=EXACT_BACKEND[device], background=False)
    assert_same(factory(name, device, environment=environment), DEFAULT_STEPS, configuration)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device"), SPECULATED)
def test_speculation_is_exact_over_many_steps(name: str, device: str) -> None:
    configuration = function(engine="speculation", numerics="exact", backend=EXACT_BACKEND[device], background=False)
    steps = FEW_STEPS.get(name, MANY_STEPS)
    report = assert_same(factory(name, device), steps, configuration)
    assert report["iterations"] >= steps
    assert report["graph_iterations"] or report["fallbacks"] or report["refusals"], report


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUSED_PROGRAMS)
def test_fused_kernels_stay_within_tolerance(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_NODES", LONGEST_PIECE)
    configuration = function(numerics="fused", backend="inductor", background=False)
    report = assert_same(factory(name, device), FUSED_STEPS, configuration, tolerance=FUSED_PROGRAMS[name])
    assert_ran_as_graphs(report)
    assert report["backend"] == {"cpu": "inductor", "cuda": "inductor+cuda_graph"}[device], report


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_BODIES)
def test_bodies_that_share_kernels_stay_within_tolerance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "FEWEST_SAVED", SAVED_BY_SMALL_LOOPS)
    configuration = function(numerics="fused", backend="inductor", background=False)
    report = assert_same(factory(name, "cpu"), FUSED_STEPS, configuration, tolerance=SHARED_BODIES[name])
    assert_ran_as_graphs(report)
    assert report["backend"] == "inductor", report

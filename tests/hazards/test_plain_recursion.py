"""Recursion that nobody decorated runs batched under `twofold.function`, and nothing else can be told."""

from functools import partial
from typing import Any

import pytest
import torch

import twofold
from benchmarks.programs import PROGRAMS, Program
from tests.differential import FUSED, Tolerance, assert_same, function
from tests.hazards import plain_recursion_programs as programs
from tests.hazards.plain_recursion_programs import training

STEPS = 10
"""One unit is recorded, one listened to, three at least run batched, and then both ways in turns."""
ROUNDED = Tolerance(FUSED.by_dtype, torch_random=True)


def check(factory: Any, **options: Any) -> dict[str, Any]:
    return assert_same(factory, STEPS, function(**options), tolerance=ROUNDED)


@pytest.mark.parametrize("name", ["tree_rnn", "tree_rntn", "tree_lstm", "tree_child_sum", "tree_dag"])
def test_programs_run_batched_from_plain_source(name: str) -> None:
    report = check(partial(PROGRAMS[name], "small", torch.device("cpu")))
    assert report["batched_iterations"] >= 3
    assert sum(entry["together"] for entry in report["recursions"]) > 100
    assert not report["refusals"]


@pytest.mark.parametrize(
    "forward",
    [
        programs.summed,
        programs.by_call,
        programs.printing,
        programs.evaluating,
        programs.writing,
        programs.restructuring,
        programs.raising,
        programs.drawing,
        programs.changing,
        programs.at_the_same_time,
        programs.keeping,
        programs.custom_function,
    ],
)
def test_a_step_runs_batched(forward: programs.Forward) -> None:
    report = check(partial(training, forward))
    assert report["batched_iterations"] >= 3
    assert report["recursions"][0]["together"] > 20


@pytest.mark.parametrize("forward", [programs.hooked, programs.backward_hooked])
def test_a_hook_in_mid_run_ends_it(forward: programs.Forward) -> None:
    report = check(partial(training, forward))
    assert report["batched_iterations"] >= 3
    assert [refusal["code"] for refusal in report["refusals"]] == ["module_hook"]


@pytest.mark.parametrize("when", [programs.nothing, programs.replacing])
def test_functions_of_a_module(when: Any) -> None:
    report = check(partial(programs.of_module, when))
    assert report["batched_iterations"] >= 3


def test_a_function_that_is_wrapped_with_any_arguments_is_refused() -> None:
    report = check(partial(programs.of_module, programs.decorating))
    assert report["batched_iterations"] == 0
    assert {refusal["code"] for refusal in report["refusals"]} == {"unsupported_syntax"}


def test_dropout_is_refused_when_it_draws() -> None:
    report = check(partial(training, programs.dropping, 0.5))
    (refusal,) = report["refusals"]
    assert refusal["code"] == "random"
    assert "self.dropout(" in refusal["reason"]
    assert "plain_recursion_programs.py" in refusal["origin"]


@pytest.mark.parametrize(
    ("forward", "code"), [(programs.keeping_twice, "kept_tensor"), (programs.asking_within, "tensor_hook")]
)
def test_what_a_batch_cannot_give_runs_as_plain_python(forward: programs.Forward, code: str) -> None:
    report = check(partial(training, forward))
    assert report["batched_iterations"] == 0
    assert code in [entry["code"] for entry in (*report["refusals"], *report["fallbacks"])]


@pytest.mark.parametrize("options", [{"numerics": "exact"}, {"engine": "coexecution"}, {"backend": "replay"}])
def test_what_was_asked_for_is_obeyed(options: dict[str, Any]) -> None:
    report = assert_same(partial(training, programs.summed), 4, function(background=False, **options))
    assert report["batched_iterations"] == 0


def test_a_gradient_within_a_batch_that_is_asked_for_late_is_an_error() -> None:
    def forward(model: Any, batch: Any, observed: Any, count: int) -> torch.Tensor:
        states: list[torch.Tensor] = []
        root = model.kept(batch[0], states)
        if count == 5:
            states[0].retain_grad()
        return root.sum()

    program = training(forward)
    step = twofold.function(program.step)
    for index in range(4):
        step(*program.batches(index))
    with pytest.raises(twofold.TwofoldError, match="engine='coexecution'"):
        step(*program.batches(4))


def test_the_function_is_itself_between_units_and_after_an_exception() -> None:
    own = programs.Model.encode.__code__
    codes: list[bool] = []

    def forward(model: Any, batch: Any, observed: Any, count: int) -> torch.Tensor:
        codes.append(programs.Model.encode.__code__ is own)
        if count == 5:
            raise ValueError(count)
        return programs.summed(model, batch, observed, count)

    program: Program = training(forward)
    step = twofold.function(program.step)
    encode = programs.Model.encode
    for index in range(4):
        step(*program.batches(index))
        assert programs.Model.encode is encode
        assert encode.__code__ is own
    with pytest.raises(ValueError, match="5"):
        step(*program.batches(4))
    assert encode.__code__ is own
    assert codes == [True, True, False, False, False]


def test_results_are_ordinary_tensors_when_the_unit_is_over() -> None:
    kept: list[torch.Tensor] = []

    def forward(model: Any, batch: Any, observed: Any, count: int) -> torch.Tensor:
        kept.append(model.kept(batch[0], kept))
        return torch.zeros((), requires_grad=True) * 1

    program = training(forward)
    step = twofold.function(program.step)
    for index in range(5):
        step(*program.batches(index))
    assert {type(tensor) for tensor in kept} == {torch.Tensor}


def test_memory_that_is_shared_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.plain_recursion.check_exposure", lambda *_: None)
    with pytest.raises(AssertionError, match="observed"):
        check(partial(training, programs.keeping_twice))


def test_a_write_that_is_not_heard_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.plain_recursion.call_has_effect", lambda *_: False)
    with pytest.raises((AssertionError, twofold.TwofoldError), match=r"StaleError|raised an exception"):
        check(partial(training, programs.writing))

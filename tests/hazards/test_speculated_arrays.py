"""Arrays of NumPy that a speculated call changes in place, and then asks: changed before the launch, and taken back."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import twofold
from tests.hazards.programs import Parts, same, summary, training
from tests.hazards.test_speculation import Step, failed, speculates


def logged(name: str) -> tuple[list[str], logging.Logger]:
    """Return a logger, and what it has written."""
    written: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    logger = logging.Logger(name)
    logger.addHandler(Handler())
    return written, logger


def test_an_array_that_is_changed_and_then_asked() -> None:
    """The way that the call goes depends on what it has written, and what it has written is seen once."""

    def make(parts: Parts) -> Step:
        angles = parts.seen["angles"] = np.array([0.0, 1.0, 2.0])
        parts.seen["falls"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            nonlocal angles
            angles += 0.3
            if angles.max() > 3.0:
                angles[angles > 3.0] = 0.0
                parts.seen["falls"] += 1
            return parts.train(x + float(angles[0]), y).detach(), angles.sum()

        return step

    report = speculates(training(make), 60, at_least=35)
    assert failed(report)["branch"] >= 2


def test_what_is_changed_by_a_fetched_number_is_taken_back_where_the_call_goes_another_way() -> None:
    def make(parts: Parts) -> Step:
        means = parts.seen["means"] = np.zeros(3)
        history = parts.seen["history"] = np.zeros((4, 2))
        parts.seen["high"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            value = loss.item()
            means[number % 3] += value
            history[1:, 0] = history[:-1, 0]
            history[0] = value, number
            np.multiply(means, 0.9)
            means.sort()
            if history[:, 0].mean() > 1.0:
                history.fill(0.0)
                parts.seen["high"].append(number)
            parts.optimizer.zero_grad()
            (loss * float(means[1])).backward()
            parts.optimizer.step()
            return float(means[2])

        return step

    report = speculates(training(make), 60, at_least=20)
    assert report["discards"] >= 1, summary(report)


def test_two_names_for_one_memory() -> None:
    def make(parts: Parts) -> Step:
        whole = parts.seen["whole"] = np.arange(6.0)
        part = parts.seen["part"] = whole[2:4]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            before = float(part.sum())
            whole[:] = whole[::-1] + 0.25
            if part[0] > 3.0:
                part[:] = part - 1.5
            return parts.train(x, y).detach(), before, float(whole.sum()), part.copy()

        return step

    speculates(training(make), 40, at_least=15)


def test_what_was_seen_before_a_change_stays_what_it_was() -> None:
    """Printed, kept and returned: each shows the array of its own time."""

    def make(parts: Parts) -> Step:
        angles = parts.seen["angles"] = np.array([0.5, 1.5])
        parts.seen["kept"] = []
        parts.seen["logged"], logger = logged("angles")

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            print("before", angles, angles[0])
            logger.warning("%r of %d", angles, number)
            parts.seen["kept"].append(angles.copy())
            parts.seen["kept"].append(float(angles[1]))
            angles[:] = angles * 1.1
            if angles[1] > 4.0:
                angles[:] = angles / 4
            print("after", angles)
            parts.seen["kept"].append(angles)
            return parts.train(x, y).detach(), angles

        return step

    speculates(training(make), 40, at_least=20)


@pytest.mark.cpu
def test_a_tensor_of_the_memory_that_changes_behind_it() -> None:
    """The tensor is read when it is launched, and so would show what comes behind."""

    def make(parts: Parts) -> Step:
        state = parts.seen["state"] = np.zeros((6, 4), dtype=np.float32)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            shown = torch.from_numpy(state)
            moved = x + shown
            state[:, 0] += 0.5
            if state.max() > 2.0:
                state.fill(0.0)
            return parts.train(moved, y).detach()

        return step

    assert same(training(make), 20, engine="speculation")["speculated_iterations"] == 0


@pytest.mark.cpu
def test_a_tensor_of_memory_that_has_changed_before_it() -> None:
    def make(parts: Parts) -> Step:
        state = parts.seen["state"] = np.zeros((6, 4), dtype=np.float32)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            state[:, 0] += 0.5
            if state.max() > 2.0:
                state.fill(0.0)
            return parts.train(x + torch.from_numpy(state), y).detach()

        return step

    speculates(training(make), 40, at_least=15)


@pytest.mark.cpu
def test_a_tensor_that_comes_to_show_the_array_in_a_later_call() -> None:
    def make(parts: Parts) -> Step:
        state = parts.seen["state"] = np.zeros((6, 4), dtype=np.float32)
        parts.given = torch.from_numpy(np.ones((6, 4), dtype=np.float32))  # type: ignore[attr-defined]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            moved = x + parts.given  # type: ignore[attr-defined]
            state[:] = state + 0.5
            if state.max() > 2.0:
                state.fill(0.0)
            return parts.train(moved, y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        array = parts.seen["state"] if number % 7 == 6 else np.full((6, 4), number, dtype=np.float32)
        parts.given = torch.from_numpy(array)  # type: ignore[attr-defined]

    report = speculates(training(make, between=between), 60, at_least=20)
    assert any(entry["failed"] and "memory" in entry["expected"] for entry in report["assumptions"]), report


def test_an_array_that_may_no_longer_be_written() -> None:
    """Python raises, at its own line, and nothing has changed but what came before."""
    state, other = np.zeros(3), np.zeros(3)
    weight = torch.ones(3)

    def step(number: int) -> Any:
        other[0] += 1.0
        state[0] += 1.0
        if state[0] > 1e6 or other[0] > 1e6:
            return None
        return weight * number

    run = twofold.function(step, engine="speculation", backend="replay", background=False)
    for number in range(12):
        run(number)
    assert twofold.report(run).to_dict()["speculated_iterations"] > 4
    state.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        run(1)
    assert (state[0], other[0]) == (12.0, 13.0)


def test_arrays_of_objects_are_refused() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        held = np.array([1, "two", None], dtype=object)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            held[0] = number
            return parts.train(x, y).detach(), held[0]

        return step

    report = same(training(make), 12, engine="speculation")
    assert {entry["code"] for entry in report["refusals"]} == {"unsupported_object"}


def test_a_list_of_arrays_that_is_printed_before_they_change() -> None:
    def make(parts: Parts) -> Step:
        rows = parts.seen["rows"] = [np.zeros(2), np.ones(2)]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            print(rows)
            first = rows[0]
            first += 0.25
            if first[0] > 2.0:
                first[:] = 0.0
            return parts.train(x, y).detach()

        return step

    same(training(make), 20, engine="speculation")


def test_objects_that_are_logged_in_other_words_than_by_their_text() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["logged"], logger = logged("losses")

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y).detach()
            logger.info("%r, %.3f", loss, loss)
            return loss

        return step

    same(training(make), 20, engine="speculation")

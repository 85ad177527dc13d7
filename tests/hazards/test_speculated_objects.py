"""Python objects that a speculated call empties, fills, replaces and asks: eager's contents and eager's identities."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from tests.hazards.programs import Parts, same, summary, training

Step = Callable[..., Any]


def speculates(factory: Any, steps: int = 40, at_least: int = 20) -> dict[str, Any]:
    report = same(factory, steps, engine="speculation")
    assert report["speculated_iterations"] >= at_least, {**summary(report), "refusals": report["refusals"]}
    return report


# ---- containers that the call empties ----------------------------------------------------------------------


@pytest.mark.parametrize("period", [2, 5])
def test_list_is_emptied_and_asked(period: int) -> None:
    def make(parts: Parts) -> Step:
        parts.seen["state"], parts.seen["kept"] = [], []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            state = parts.seen["state"]
            if number % period == 0:
                state.clear()
            if not state:
                zeros = x.new_zeros(len(x), 4)
                parts.seen["state"] = [(zeros, zeros) for _ in range(2)]
            for index in range(2):
                h, c = parts.seen["state"][index]
                parts.seen["state"][index] = torch.tanh(x + h), x * 0.5 + c
            loss = parts.train(x + parts.seen["state"][-1][0], y).detach()
            for index, (h, c) in enumerate(parts.seen["state"]):
                parts.seen["state"][index] = h.detach(), c.detach()
            return loss

        return step

    speculates(training(make), 50)


def test_emptied_containers_go_by_several_names() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["list"] = parts.seen["same list"] = [1, 2, 3]
        parts.seen["table"] = parts.seen["same table"] = {"a": 1}

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            listed, table = parts.seen["list"], parts.seen["table"]
            append = parts.seen["same list"].append
            listed.clear()
            append(number)
            parts.seen["same list"].extend([number + 1, 5])
            listed[0] += 10
            table.clear()
            parts.seen["same table"]["b"] = number
            if listed is parts.seen["same list"] and len(parts.seen["same list"]) == 3 and "a" not in table:
                x = x * 2
            print(listed, table, sum(parts.seen["same list"]))
            return parts.train(x, y).detach()

        return step

    speculates(training(make))


def test_emptied_list_that_is_another_argument_after_all() -> None:
    """Two objects of the program are given by places that may become one."""

    def make(parts: Parts) -> Step:
        parts.seen["first"], parts.seen["second"] = [1], [2]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["first"].clear()
            parts.seen["length"] = len(parts.seen["second"])
            parts.seen["second"].append(number)
            return parts.train(x, y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["second"] = parts.seen["first"] if number in (15, 16, 25) else [number]

    same(training(make, between=between), 40, engine="speculation")


def test_work_is_undone_after_a_list_was_emptied() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["list"] = [1, 2]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["list"].clear()
            loss = parts.loss(x, y)
            if loss.item() > 50:
                parts.seen["list"].append(number)
            parts.seen["list"].append(loss.detach())
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        parts.model[2].bias.data.fill_(40.0 if number in (20, 30) else 0.0)

    report = speculates(training(make, between=between), at_least=15)
    assert report["discards"] >= 1


def test_items_are_counted_from_both_ends() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["list"] = [1.0, 2.0, 3.0]

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            listed = parts.seen["list"]
            listed[2] = 0.5 + number
            loss = parts.train(x, y).detach()
            last = listed[-1]
            listed[-3] = last + 1
            return loss, last, listed[0], listed[-3]

        return step

    speculates(training(make), 30)


def append_and_read(held: Any, number: int) -> Any:
    before = held[-1]
    held.append(number + 0.5)
    after = held[-1]
    held.pop(0)
    return before, after


def insert_and_read(held: Any, number: int) -> Any:
    before = held[0]
    held.insert(0, number + 0.5)
    after = held[0]
    held.pop()
    return before, after


def set_append_and_read(held: Any, number: int) -> Any:
    before = held[1]
    held[1] = number
    held.append(2)
    held.pop(0)
    return before, held[0], held[-1]


def remove_and_read(held: Any, number: int) -> Any:
    before = held[1], held[2]
    held.remove(held[0])
    held.append(number)
    return before, held[0], held[-1]


def sort_and_read(held: Any, number: int) -> Any:
    before = held[0]
    held.sort(reverse=True)
    return before, held[0]


def rotate_and_read(held: Any, number: int) -> Any:
    before = held[1]
    held.rotate(1)
    held.appendleft(number)
    return before, held[1], held[0], len(held)


def update_and_read(held: Any, number: int) -> Any:
    before = held["a"]
    held.update(a=number)
    return before, held["a"]


CHANGES: dict[Callable[[Any, int], Any], Callable[[], Any]] = {
    append_and_read: lambda: [1.0, 2.0, 3.0],
    insert_and_read: lambda: [1.0, 2.0, 3.0],
    set_append_and_read: lambda: [1, 2, 3],
    remove_and_read: lambda: [1, 2, 3],
    sort_and_read: lambda: [1, 2, 3],
    rotate_and_read: lambda: deque([1, 2, 3], maxlen=3),
    update_and_read: lambda: {"a": 1, "b": 2},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_item_is_read_again_after_its_container_was_changed(change: Callable[[Any, int], Any]) -> None:
    def make(parts: Parts) -> Step:
        parts.seen["held"] = CHANGES[change]()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            read = change(parts.seen["held"], number)
            return parts.train(x, y).detach(), read

        return step

    speculates(training(make), 24, at_least=8)


# ---- objects that are replaced -----------------------------------------------------------------------------


def test_object_that_is_another_one_each_time_is_read_where_it_lies() -> None:
    class Holder:
        def __init__(self, count: int) -> None:
            self.count = count

    def make(parts: Parts) -> Step:
        parts.seen["holder"] = Holder(0)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y).detach()
            parts.seen["holder"].count += 1
            parts.seen["total"] = parts.seen["holder"].count * 2
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        if number >= 10:
            parts.seen["holder"] = Holder(number)

    report = speculates(training(make, between=between))
    assert {entry["kind"] for entry in report["assumptions"] if entry["relaxed"]} >= {"identity"}


# ---- objects of classes -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    function: Callable[[torch.Tensor], torch.Tensor]
    scale: list[float]


class Doubled:
    """A descriptor in Python, which also counts its reads."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        instance.reads += 1
        return 2 * instance.base

    def __set__(self, instance: Any, value: Any) -> None:
        instance.base = value / 2


class Described:
    doubled = Doubled()

    def __init__(self) -> None:
        self.reads, self.base = 0, 1.0


def test_fields_and_descriptors() -> None:
    def make(parts: Parts) -> Step:
        pair = Pair(torch.tanh, [0.5])
        parts.seen["described"] = Described()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            described = parts.seen["described"]
            described.doubled = 1.0 + number % 2
            made = Described()
            made.doubled = 3.0
            names = sorted(made.__dict__)
            loss = parts.train(pair.function(x) * pair.scale[0], y).detach()
            parts.seen["read"] = described.doubled + made.doubled, names, "extra" in made.__dict__
            return loss

        return step

    speculates(training(make))


def test_descriptor_that_is_replaced() -> None:
    class Tripled(Doubled):
        def __get__(self, instance: Any, owner: Any) -> Any:
            return 3 * instance.base

    def make(parts: Parts) -> Step:
        Described.doubled = Doubled()
        parts.seen["described"] = Described()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y).detach()
            parts.seen["read"] = parts.seen["described"].doubled
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        if number == 15:
            Described.doubled = Tripled()  # type: ignore[assignment]

    speculates(training(make, between=between), at_least=12)
    Described.doubled = Doubled()


def test_distributions_and_arrays_that_become_tensors() -> None:
    def make(parts: Parts) -> Step:
        parts.seen["actions"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            observed = np.sin(np.arange(12.0).reshape(3, 4) * (1 + number % 3)).astype(np.float32)
            policy = Categorical(logits=parts.model(torch.as_tensor(observed, device=x.device)))
            action = policy.sample()
            parts.seen["actions"].append(action.tolist())
            parts.optimizer.zero_grad()
            loss = -(policy.log_prob(action) + 0.1 * policy.entropy()).mean()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    speculates(training(make))


@pytest.mark.cpu
def test_array_that_shares_its_memory_with_a_tensor_changes_within_the_call() -> None:
    """The change comes before the tensor is read: it cannot wait until the unit has been launched."""

    def make(parts: Parts) -> Callable[..., Any]:
        buffer = np.zeros(4, dtype=np.float32)
        shown = torch.from_numpy(buffer)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            buffer[:] = buffer + 0.5
            return parts.train(x + shown, y).detach()

        return step

    report = same(training(make), 30, engine="speculation")
    assert "late_decision" in {entry["code"] for entry in report["refusals"]}, summary(report)
    assert report["graph_iterations"] > 20, summary(report)

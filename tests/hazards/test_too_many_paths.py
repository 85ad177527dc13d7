"""Programs whose units take paths of their own are left alone, also where some paths come again."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import twofold
from twofold.capture.trace import Trace


def training() -> Any:
    """Return a step whose path is the number of additions that it is given."""
    parameter = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.01)

    @twofold.function(engine="coexecution", backend="replay")
    def step(additions: int) -> torch.Tensor:
        optimizer.zero_grad()
        x = parameter * 2
        for _ in range(additions):
            x = x + 1
        loss = x.sum()
        loss.backward()
        optimizer.step()
        return loss

    return step


def has_stopped(report: dict[str, Any]) -> bool:
    return "too_many_paths" in [fallback["code"] for fallback in report["fallbacks"]]


def test_recording_stops_where_most_paths_are_new() -> None:
    step = training()
    for unit in range(100):
        step(1 if unit % 4 == 0 else 2 + unit - unit // 4)
    report = twofold.report(step).to_dict()
    assert has_stopped(report)
    assert report["graph_iterations"] > 0
    for unit in range(100, 200):
        step(unit)
    assert twofold.report(step).to_dict()["traced_iterations"] == report["traced_iterations"]


def test_a_few_paths_go_on() -> None:
    step = training()
    for unit in range(150):
        step(unit * 7 % 20)
    report = twofold.report(step).to_dict()
    assert not has_stopped(report)
    assert report["graph_iterations"] > 80


def test_a_path_of_many_feeds_is_added_in_one_pass_over_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of 18,000 operations whose structure a network decides took 22 s to record, one pass for each feed."""
    passes, written_storages = 0, Trace.written_storages

    def count(self: Trace) -> dict[int, StorageWeakRef]:
        nonlocal passes
        passes += 1
        return written_storages(self)

    monkeypatch.setattr(Trace, "written_storages", count)

    def total(tensors: list[torch.Tensor]) -> torch.Tensor:
        result = torch.zeros(3)
        for tensor in tensors:
            result = result + tensor
        return result

    step = twofold.function(total, numerics="exact", backend="replay", background=False)
    for length in (4, 4, 30, 60):
        tensors = [torch.randn(3) for _ in range(length)]
        assert torch.equal(step(tensors), total(tensors))
    assert twofold.report(step).to_dict()["traced_iterations"] == 4
    assert passes <= 3 * 4


@pytest.mark.cpu
def test_a_feed_is_not_taken_for_memory_that_was_written_to_and_is_gone() -> None:
    """A feed that lay where a gradient had lain before made a unit leave its graph each time: 0.11 of eager's speed."""
    parameter = torch.ones(3, requires_grad=True)

    @twofold.function(engine="coexecution", backend="replay")
    def accumulate(x: torch.Tensor) -> torch.Tensor:
        loss = (parameter * x).sum()
        loss.backward()
        return loss.detach()

    feeds = [torch.from_numpy(np.ones(3, dtype=np.float32)) for _ in range(4)]
    accumulate(feeds[0])
    for x in feeds[1:]:
        parameter.grad = torch.zeros(3)
        accumulate(x)
    parameter.grad = None
    feeds += [torch.from_numpy(np.ones(3, dtype=np.float32)) for _ in range(1000)]
    graph = accumulate._driver.graph
    assert graph.writes_to(parameter) is False
    assert len(graph._written_storages) >= 2
    assert not any(map(graph.writes_to, feeds))

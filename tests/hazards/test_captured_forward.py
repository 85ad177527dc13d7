"""A forward alone on an executable whose memory is used again, as that of captured CUDA graphs is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from tests.hazards.test_gradient_memory import reusing as reusing  # a fixture
from twofold.run.graph_runner import GraphRunner

OPTIONS: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False, "engine": "coexecution"}
CALLS = 12


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def differing(context: Any) -> tuple[int, dict[str, Any]]:
    """Keep all that a decorated forward returns; say how many differ from eager's in the end, and the report."""
    plain = model()
    forward = twofold.function(plain, **OPTIONS)
    batches = [torch.full((6, 4), float(number)) for number in range(CALLS)]
    with context():
        kept = [(forward(x), forward(x)[0]) for x in batches]
        expected = [plain(x) for x in batches]
    wrong = sum(
        not (torch.equal(whole, output) and torch.equal(row, output[0]))
        for (whole, row), output in zip(kept, expected, strict=True)
    )
    return wrong, twofold.report(forward).to_dict()


@pytest.mark.usefixtures("reusing")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_kept_outputs_are_eagers(context: Any) -> None:
    wrong, report = differing(context)
    assert wrong == 0
    assert report["graph_iterations"] > CALLS


@pytest.mark.usefixtures("reusing")
def test_outputs_in_memory_that_is_used_again_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "owned_value", lambda self, value: self.value(value).detach())
    wrong, _ = differing(torch.no_grad)
    assert wrong > 0


def test_history_alone_keeps_a_forward_from_being_captured() -> None:
    """What a CUDA program captures is decided by its program: without history there are no residuals to outlive it."""
    for context, has_history in ((torch.no_grad, False), (torch.inference_mode, False), (torch.enable_grad, True)):
        forward = twofold.function(model(), **OPTIONS)
        with context():
            for number in range(6):
                forward(torch.full((6, 4), float(number)))
        programs = [path.program for path in forward._driver.graph.paths if path.program is not None]
        assert programs
        assert all((program.history is not None) == has_history for program in programs)


def test_memory_runs_out_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is dropped, the report says why, and calls are eager and right."""

    def no_memory(*_given: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    plain = model()
    forward = twofold.function(plain, **OPTIONS)
    x = torch.ones(6, 4)
    with torch.no_grad():
        for _ in range(4):
            forward(x)
        driver = forward._driver
        (path,) = driver.graph.paths
        monkeypatch.setattr("twofold.run.builder.CudaGraphExecutable", no_memory)
        driver.builder.options = replace(driver.builder.options, backend="auto")
        path.stale = True
        driver.builder.prepare(path, accelerator=True)
        before = twofold.report(forward).to_dict()["graph_iterations"]
        for _ in range(3):
            assert torch.equal(forward(x), plain(x))
    report = twofold.report(forward).to_dict()
    assert report["graph_iterations"] == before
    assert "out_of_memory" in {entry["code"] for entry in report["fallbacks"]}

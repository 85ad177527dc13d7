"""Loops in which no optimizer steps: where their units end, and that nobody can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import twofold
from tests.differential import EXACT, compare, eager, flatten, run, seed_everything
from tests.differential import program as program_mode
from tests.hazards.programs import Parts, net, same, training
from tests.hazards.test_exceptions import failing_step, raise_stop
from twofold.run.followed_unit import FollowedUnit
from twofold.run.rounds import LoopUnits

OPTIONS: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False}
ITERATIONS = 30

Loop = Callable[[], Any]


def same_in_program(loop: Loop) -> dict[str, Any]:
    """Run a whole loop eagerly and under `twofold.program`; all that it returns must be equal. Returns the report."""
    seed_everything(0)
    expected: dict[str, Any] = {}
    flatten("result", loop(), expected)
    state = torch.get_rng_state()
    seed_everything(0)
    with twofold.program(**OPTIONS) as running:
        result = loop()
    actual: dict[str, Any] = {}
    flatten("result", result, actual)
    assert torch.equal(state, torch.get_rng_state())
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        found = actual[name]
        if isinstance(value, float | int | str) or value is None:
            assert found == value, name
        else:
            assert found.metadata == value.metadata, name
            assert torch.equal(found.values, value.values), name
    return twofold.report(running).to_dict()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches(count: int = ITERATIONS) -> list[torch.Tensor]:
    return [torch.randn(6, 4) for _ in range(count)]


def loader(samples: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(samples, 4), torch.randint(0, 3, (samples,))), batch_size=8)


def inference() -> Any:
    served = model().eval()
    with torch.no_grad():
        return [served(x).softmax(1) for x in batches()]


def inference_inside_inference_mode() -> Any:
    served, total = model().eval(), torch.zeros(3)
    for x in batches(5):
        served(x)
    with torch.inference_mode():
        kept = [served(x) for x in batches()]
    for x in batches(5):
        total += served(x).sum(0).detach()
    return [x.clone() for x in kept], total, model()(batches(1)[0]).sum()


def evaluation_with_metrics() -> Any:
    judged, loss, correct = model().eval(), 0.0, 0
    with torch.no_grad():
        for x, y in loader(8 * ITERATIONS + 3):
            output = judged(x)
            loss += F.cross_entropy(output, y).item()
            correct += int((output.argmax(1) == y).sum().item())
    return loss, correct


def own_sgd() -> Any:
    trained, losses = model(), []
    for number, x in enumerate(batches()):
        loss = F.cross_entropy(trained(x), torch.randint(0, 3, (6,)))
        loss.backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        if number % 10 == 9:
            losses.append(loss.item())
    return losses, trained.state_dict(), list(trained.parameters())


def own_sgd_on_bare_tensors() -> Any:
    first, second = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    for _ in range(ITERATIONS):
        loss = (x.mm(first).clamp(min=0).mm(second) - y).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            for weight in (first, second):
                weight -= 1e-3 * weight.grad  # type: ignore[operator]
                weight.grad.zero_()  # type: ignore[union-attr]
    return first, second, loss.detach()


def own_sgd_on_a_cell() -> Any:
    cell, head = nn.GRUCell(4, 8), nn.Linear(8, 3)
    parameters = [*cell.parameters(), *head.parameters()]
    for _ in range(ITERATIONS):
        state = torch.zeros(6, 8)
        for x in batches(5):
            state = cell(x, state)
        F.cross_entropy(head(state), torch.randint(0, 3, (6,))).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
        for parameter in parameters:
            parameter.grad = None
    return parameters


def training_and_evaluation_in_turns() -> Any:
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    counts, train, judge = [], loader(80), loader(64)
    for _ in range(4):
        trained.train()
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()
        trained.eval()
        with torch.no_grad():
            counts.append(sum((trained(x).argmax(1) == y).sum().item() for x, y in judge))
    return counts, trained.state_dict(), optimizer.state_dict()


def accumulation() -> Any:
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    for _ in range(ITERATIONS):
        for x in batches(4):
            F.cross_entropy(trained(x), torch.randint(0, 3, (6,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(trained.parameters())


LOOPS = [
    inference,
    inference_inside_inference_mode,
    evaluation_with_metrics,
    own_sgd,
    own_sgd_on_bare_tensors,
    own_sgd_on_a_cell,
    training_and_evaluation_in_turns,
    accumulation,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_runs_as_graphs(loop: Loop) -> None:
    report = same_in_program(loop)
    assert report["graph_iterations"] > ITERATIONS // 2, report["fallbacks"]


def test_accumulated_batches_stay_in_one_unit() -> None:
    report = same_in_program(accumulation)
    assert report["iterations"] <= ITERATIONS + 1


@pytest.mark.parametrize("batches_a_step", [1, 2])
def test_the_end_of_an_epoch_ends_no_unit(batches_a_step: int) -> None:
    """The first batch of the next epoch came round: every step of these epochs was recorded, and left."""

    def loop() -> Any:
        trained = net()
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        train, losses = loader(16), []
        for _ in range(ITERATIONS):
            for number, (x, y) in enumerate(train):
                loss = F.cross_entropy(trained(x), y)
                loss.backward()
                if number % batches_a_step == batches_a_step - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses, list(trained.parameters())

    report = same_in_program(loop)
    steps = 2 * ITERATIONS // batches_a_step
    assert report["iterations"] <= steps + 1
    assert report["graph_iterations"] >= steps - 3


def test_evaluation_with_kept_history_stays_eager_and_unheard() -> None:
    def loop() -> Any:
        judged = net()
        outputs = [judged(x) for x in batches()]
        return outputs, sum(output.sum() for output in outputs)

    same_in_program(loop)


def test_closures_of_lbfgs() -> None:
    def loop() -> Any:
        trained = nn.Linear(4, 3)
        optimizer = torch.optim.LBFGS(trained.parameters(), max_iter=5)
        x, y = torch.randn(16, 4), torch.randn(16, 3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(trained(x), y)
            loss.backward()
            return loss

        for _ in range(12):
            optimizer.step(closure)  # type: ignore[arg-type]
        return list(trained.parameters())

    report = same_in_program(loop)
    assert report["iterations"] == 12


def test_mode_of_the_program_entered_in_each_iteration() -> None:
    """A mode that is left in the middle of a unit must not be one of ours."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.device("cpu"):
                if number < 6:
                    x, y = x[x[:, 0] > -9], y[x[:, 0] > -9]  # refused, so that an idle unit follows
                loss = parts.train(x, y)
            return loss.detach()

        return step

    configuration = program_mode(**OPTIONS)
    reference = run(training(make), 20, eager, observe="end")
    assert compare(reference, run(training(make), 20, configuration, observe="end"), EXACT) == []
    assert configuration.report["iterations"] >= 20
    assert configuration.report["graph_iterations"] > 0
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
x, y = torch.randn(160, 4), torch.randint(0, 3, (160,))
train, judge = (DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=8) for a, b in ((0, 80), (80, 160)))
for epoch in range(4):
    for a, b in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
    with torch.inference_mode():
        correct = sum((model(a).argmax(1) == b).sum().item() for a, b in judge)
    print(epoch, correct)
print([p.sum().item() for p in model.parameters()])
"""


@pytest.mark.slow
def test_script_that_trains_and_evaluates(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    under = ["-m", "twofold", "run", "--numerics", "exact", "--backend", "replay", "--report", "r.html", "script.py"]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run_script(way: list[str]) -> str:
        return subprocess.check_output([sys.executable, *way], cwd=tmp_path, env=found, text=True, timeout=120)

    outputs = [run_script(way) for way in (["script.py"], under)]
    assert outputs[0] == outputs[1]
    assert "as graphs" in (tmp_path / "r.html").read_text()


def test_calls_that_are_made_again_pass_no_landmark_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that is left repeats its calls; were a landmark heard then, the unit could end within itself."""
    repeating: list[bool] = [False]
    heard: list[bool] = []
    repeat, passes = FollowedUnit.repeat, LoopUnits.passes

    def noted_repeat(self: Any, *arguments: Any) -> None:
        repeating[0] = True
        try:
            repeat(self, *arguments)
        finally:
            repeating[0] = False

    def noted_passes(self: Any, landmark: Any) -> None:
        heard.append(repeating[0])
        passes(self, landmark)

    monkeypatch.setattr(FollowedUnit, "repeat", noted_repeat)
    monkeypatch.setattr(LoopUnits, "passes", noted_passes)
    report = same(training(lambda parts: failing_step(parts, "backward", raise_stop)), 13, "program")
    assert report["discards"] > 0
    assert heard
    assert not any(heard)

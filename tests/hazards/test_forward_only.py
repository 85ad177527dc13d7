"""Only the model is decorated: its outputs carry history, and backward and optimizer run outside.

Each step is run with the plain model and with the decorated one, bit for bit.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import twofold
from benchmarks.programs import Program
from tests.differential import EXACT, compare, eager, exact_backend, run
from tests.hazards.programs import summary
from twofold.run.history import History

Step = Callable[[int, Any, Any, torch.optim.Optimizer, torch.Tensor, torch.Tensor], Any]
"""`step(number, forward, model, optimizer, x, y)`; `forward` is the model, decorated or not."""


class TwoHeads(nn.Module):
    """Returns two outputs, one of which backward reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.left(hidden), torch.sigmoid(self.right(hidden))


class Stateful(nn.Module):
    """Batch norm, dropout, an activation in place, a buffer that is read after it was written, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop, self.head = (
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.4),
            nn.Linear(8, 3),
        )
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.drop(F.relu(self.norm(self.body(x)), inplace=True))
        with torch.no_grad():
            self.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        return self.head(hidden + self.average), hidden.norm().reshape(1)


class Reshaped(nn.Module):
    """Returns a view of something that the program does not hold, and its own input and weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.body(x).view(2, -1, 3), x, self.body.weight


class Tied(nn.Module):
    """Uses one weight three times; the program uses it once more."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(torch.tanh(self.body(x))))
        return (hidden @ self.body.weight)[:, :3].clone(), hidden.sum(1)


class Halves(nn.Module):
    """Returns two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.body(x).chunk(2, 1)


class KeepsDetached(nn.Module):
    """Keeps its output, detached, on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.body(x).relu()
        self.last = output.detach()
        return output, output.sum()


def differentiated_outside(
    step: Step, model: Callable[[], nn.Module] = TwoHeads, steps: int = 12, **options: Any
) -> dict[str, Any]:
    """Nobody can tell the decorated model from the plain one; return the report."""
    decorated: list[Any] = []

    def build(decorate: bool) -> Program:
        built = model()
        optimizer = torch.optim.SGD(built.parameters(), lr=0.1, momentum=0.9)
        forward: Any = built
        if decorate:
            given = {"numerics": "exact", "backend": exact_backend(), "background": False, **options}
            forward = twofold.function(built, **given)
            decorated.append(forward)
        pool = [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(3)]

        def whole(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return step(number, forward, built, optimizer, x.clone(), y)

        return Program(whole, lambda n: (n, *pool[n % 3]), {"net": built}, {"optimizer": optimizer}, {})

    reference = run(lambda: build(False), steps, eager)
    candidate = run(lambda: build(True), steps, eager)
    differences = compare(reference, candidate, EXACT)
    assert not differences, "\n".join(differences[:5])
    return twofold.report(decorated[0]).to_dict()


def train(forward: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    left, right = forward(x)
    loss = F.mse_loss(left, y) + right.mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def both_outputs(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    return train(forward, optimizer, x, y)


def first_output(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left = forward(x)[0]
    left.square().mean().backward()
    optimizer.step()
    return left.detach()


def outputs_in_turn(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    (F.mse_loss(left, y) if number % 2 else right.sum()).backward()
    optimizer.step()
    return left.detach(), right.detach()


def expanded_tangent(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    (left.sum() + right.t().sum()).backward()
    optimizer.step()


def retained(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    loss = F.mse_loss(left, y) + right.mean()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def backward_twice(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    left, right = forward(x)
    (left.sum() + right.sum()).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
        left.sum().backward()
    return str(caught.value)


def several_calls(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    with torch.no_grad():
        target = forward(x * 3)[0]
    other = forward(x * 2)[0]
    ((left - target) * other).mean().add(right.mean()).backward()
    optimizer.step()
    return target


def chained_calls(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    again, weight = forward(torch.cat([left, right[:, :1]], 1))
    ((again - y).square().mean() * weight.mean()).backward()
    optimizer.step()


def weight_used_outside(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    (left.square().mean() + right.mean() + model.body.weight.square().sum() * 0.01).backward()
    optimizer.step()


def hooks_on_outputs(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left, right = forward(x)
    seen: list[Any] = []
    left.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    right.retain_grad()
    (F.mse_loss(left, y) + right.mean()).backward()
    optimizer.step()
    return seen, right.grad


def hooks_on_parameters(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    if number == 5:
        model.body.weight.register_hook(lambda gradient: gradient * 2)
    if number == 8:
        model.body.bias.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(3))
    return train(forward, optimizer, x, y)


def names_of_nodes(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    left, right = forward(x)
    return type(left.grad_fn).__name__, type(right.grad_fn).__name__, repr(left), left.is_leaf, right.requires_grad


def changed_in_place(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    left = forward(x)[0]
    left += 1
    left.mul_(2)
    left.square().mean().backward()
    optimizer.step()
    return left.detach()


def gradient_of_the_input(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    hidden = x.requires_grad_() * 2
    left, right = forward(hidden)
    return torch.autograd.grad(left.sum() * right.sum(), x)[0]


def accumulated(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    if number % 3 == 0:
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    left, right = forward(x)
    (F.mse_loss(left, y) + right.mean()).backward()
    if number % 3 == 2:
        optimizer.step()


def bias_changed_before_backward(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    """No operation's backward reads a bias, so eager execution does not mind."""
    optimizer.zero_grad()
    left, right = forward(x)
    with torch.no_grad():
        model.body.bias.mul_(0.5)
    (F.mse_loss(left, y) + right.mean()).backward()
    optimizer.step()


def never_differentiated(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    return [output.detach().sum() for output in forward(x)]


def frozen_now_and_then(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    model.body.weight.requires_grad_(number % 4 < 2)
    return train(forward, optimizer, x, y)


def training_and_evaluation(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    model.train(number % 3 != 2)
    if number % 3 == 2:
        with torch.no_grad():
            return forward(x)[0]
    return first_output(number, forward, model, optimizer, x, y)


RUN_AS_GRAPHS = [
    both_outputs, first_output, outputs_in_turn, expanded_tangent, retained, backward_twice, several_calls,
    chained_calls, weight_used_outside, hooks_on_outputs, hooks_on_parameters, names_of_nodes, changed_in_place,
    gradient_of_the_input, accumulated, bias_changed_before_backward, never_differentiated, frozen_now_and_then,
    training_and_evaluation,
]  # fmt: skip


@pytest.mark.parametrize("step", RUN_AS_GRAPHS, ids=lambda step: step.__name__)
def test_forward_and_backward_run_as_graphs(step: Step) -> None:
    report = differentiated_outside(step, steps=14)
    assert report["graph_iterations"] >= (3 if step is hooks_on_parameters else 6), summary(report)


@pytest.mark.parametrize(
    ("model", "step"),
    [
        (Stateful, first_output),
        (Stateful, outputs_in_turn),
        (Stateful, training_and_evaluation),
        (Stateful, accumulated),
        (Reshaped, first_output),
        (Reshaped, changed_in_place),
        (Tied, first_output),
        (Tied, outputs_in_turn),
        (Tied, weight_used_outside),
    ],
    ids=lambda part: part.__name__,
)
def test_models_run_as_graphs(model: Callable[[], nn.Module], step: Step) -> None:
    report = differentiated_outside(step, model, steps=14)
    assert report["graph_iterations"] >= 6, summary(report)


@pytest.mark.parametrize("model", [Halves, KeepsDetached])
def test_outputs_that_share_memory_stay_eager(model: Callable[[], nn.Module]) -> None:
    report = differentiated_outside(first_output, model)
    assert report["graph_iterations"] == 0
    assert "history_escapes" in {entry["code"] for entry in report["fallbacks"]}


def test_gradients_of_gradients_stay_eager() -> None:
    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        inputs = x.requires_grad_() * 1
        left, right = forward(inputs)
        (gradient,) = torch.autograd.grad(left.sum() + right.sum(), inputs, create_graph=True)
        ((gradient.norm() - 1) ** 2 + left.mean()).backward()
        optimizer.step()

    report = differentiated_outside(step, Stateful)
    assert report["graph_iterations"] == 0
    assert "double_backward" in {entry["code"] for entry in report["fallbacks"]}


def test_gradients_of_gradients_after_a_graph_was_made() -> None:
    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        left = forward(x)[0]
        loss = left.mean()
        if number > 5:
            gradients = torch.autograd.grad(left.sum(), [model.body.weight, model.body.bias], create_graph=True)
            loss = sum(gradient.square().sum() for gradient in gradients)
        loss.backward()
        optimizer.step()

    report = differentiated_outside(step, Stateful)
    assert report["graph_iterations"] == 5, summary(report)
    assert "double_backward" in {entry["code"] for entry in report["fallbacks"]}


def test_output_that_backward_reads_is_changed() -> None:
    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        right = forward(x)[1]
        right.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            right.sum().backward()

    assert differentiated_outside(step)["graph_iterations"] > 0


@pytest.mark.parametrize("what", ["weight", "batch"])
def test_what_backward_reads_is_changed(what: str) -> None:
    """The error is eager's. Gradients that eager execution reached before it are not there: a limit."""

    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        left = forward(x)[0]
        with torch.no_grad():
            (model.left.weight if what == "weight" else x).mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            left.sum().backward()
        optimizer.zero_grad()

    assert differentiated_outside(step)["graph_iterations"] > 0


def test_input_made_in_inference_mode() -> None:
    """Eager execution takes it where backward does not read it."""

    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        with torch.inference_mode():
            given = x * 2
        output = forward(given)
        output.square().sum().backward()
        return output.detach()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    assert differentiated_outside(step, Shifted)["graph_iterations"] > 0


def test_checkpointed_now_and_then() -> None:
    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        left, right = checkpoint(forward, x, use_reentrant=False) if number % 3 == 2 else forward(x)
        (F.mse_loss(left, y) + right.mean()).backward()
        optimizer.step()

    report = differentiated_outside(step)
    assert report["graph_iterations"] >= 6
    assert "tensor_hook" in {entry["code"] for entry in report["fallbacks"]}


@pytest.mark.parametrize("model", [TwoHeads, Stateful])
def test_inference_runs_as_graphs(model: Callable[[], nn.Module]) -> None:
    def step(number: int, forward: Any, model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        model.eval()
        with torch.no_grad() if number % 2 else torch.inference_mode():
            return [output.clone() for output in forward(x)]

    report = differentiated_outside(step, model)
    assert report["graph_iterations"] >= 8, summary(report)


@pytest.mark.slow
def test_compiled_kernels_stay_within_tolerance() -> None:
    torch.manual_seed(0)
    plain, compiled = TwoHeads(), TwoHeads()
    compiled.load_state_dict(plain.state_dict())
    forward = twofold.function(compiled, backend="inductor", background=False)
    for number in range(6):
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        losses = [
            train(f, torch.optim.SGD(m.parameters(), lr=0.1), x, y) for f, m in ((plain, plain), (forward, compiled))
        ]
        torch.testing.assert_close(losses[1], losses[0])
        for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=f"step {number}")
    report = twofold.report(forward).to_dict()
    assert report["backend"] == "inductor"
    assert report["graph_iterations"] == 4


def test_harness_catches_a_wrong_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the graph's backward is a little off."""
    right = History.backward

    def wrong(self: History, *arguments: Any) -> Any:
        return [g if g is None else g * (1 + 1e-6) for g in right(self, *arguments)]

    monkeypatch.setattr(History, "backward", wrong)
    with pytest.raises(AssertionError, match="values differ"):
        differentiated_outside(both_outputs)


def test_memory_is_freed_with_the_history() -> None:
    """What a graph kept for backward dies with the last output, without the garbage collector's help."""
    forward = twofold.function(TwoHeads(), numerics="exact", backend="replay", background=False)
    for _ in range(4):
        forward(torch.randn(6, 4))[0].sum().backward()

    def alive() -> int:
        return sum(type(thing) is History for thing in gc.get_objects())

    left = forward(torch.randn(6, 4))[0]
    assert alive() == 1
    del left
    assert alive() == 0

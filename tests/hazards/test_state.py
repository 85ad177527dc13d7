"""Parameters, buffers and optimizer state that the user reads, writes or replaces while training goes on."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import MODES, Mode, Parts, accounted, net, runs_as_graph, same, training


def plain(parts: Parts) -> Callable[..., Any]:
    return lambda number, x, y: parts.train(x, y)


def adam(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_buffers(mode: Mode) -> None:
    runs_as_graph(training(plain, model=normed), 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_train_and_eval_alternate(inside: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if inside:
                parts.model.train(number % 3 != 2)
            return parts.train(x, y).detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if not inside:
            parts.model.train(number % 4 < 2)

    runs_as_graph(training(make, model=normed, between=between), 20, mode)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [True, False])
def test_evaluation_between_training_steps(inside: bool, context: Any) -> None:
    def evaluate(parts: Parts, x: torch.Tensor, y: torch.Tensor) -> float:
        parts.model.eval()
        with context():
            value = parts.loss(x, y).item()
        parts.model.train()
        return value

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["held out"] = torch.ones(5, 4), torch.ones(5, 3)
        parts.seen["scores"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            if inside and number % 3 == 2:
                parts.seen["scores"].append(evaluate(parts, *parts.seen["held out"]))
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if not inside and number % 3 == 2:
            parts.seen["scores"].append(evaluate(parts, *parts.seen["held out"]))

    for mode in MODES:
        runs_as_graph(training(make, model=normed, between=between), 16, mode)


def _hand_over(parts: Parts) -> None:
    """Let the optimizer go on with the parameters that the model has now, and their old state."""
    held = parts.optimizer.param_groups[0]["params"]
    for index, new in enumerate(parts.model.parameters()):
        old, held[index] = held[index], new
        if old is not new and old in parts.optimizer.state:
            parts.optimizer.state[new] = parts.optimizer.state.pop(old)


def replace_parameter(parts: Parts) -> None:
    parts.model[0].weight = nn.Parameter(torch.full((8, 4), 0.1))
    _hand_over(parts)


def replace_parameter_alone(parts: Parts) -> None:
    parts.model[0].weight = nn.Parameter(torch.full((8, 4), 0.1))


def swap_data(parts: Parts) -> None:
    parts.model[0].weight.data = torch.full((8, 4), 0.1)


def swap_data_of_a_view(parts: Parts) -> None:
    parts.model[0].weight.data = torch.full((4, 8), 0.1).t()


def write_data(parts: Parts) -> None:
    parts.model[0].weight.data.fill_(0.1)


def write_without_grad(parts: Parts) -> None:
    with torch.no_grad():
        parts.model[0].weight.copy_(torch.full((8, 4), 0.1))


def write_through_numpy(parts: Parts) -> None:
    parts.model[0].weight.detach().numpy()[:] = 0.1


def load_state(parts: Parts) -> None:
    parts.model.load_state_dict({name: value * 0.5 for name, value in parts.model.state_dict().items()})


def load_state_by_assigning(parts: Parts) -> None:
    state = {name: value.clone() for name, value in parts.model.state_dict().items()}
    parts.model.load_state_dict(state, assign=True)
    _hand_over(parts)


def initialise_again(parts: Parts) -> None:
    parts.model[0].reset_parameters()


def replace_module(parts: Parts) -> None:
    parts.model[0] = nn.Linear(4, 8)


def move_to_its_own_type(parts: Parts) -> None:
    parts.model.to(torch.float32).cpu()


def replace_gradient(parts: Parts) -> None:
    parts.model[0].weight.grad = torch.ones(8, 4)


def swap_two(parts: Parts) -> None:
    first, second = parts.model[0].bias.data, parts.model[0].weight.data[:, 0].clone()
    parts.model[0].bias.data = second
    parts.model[0].weight.data[:, 0] = first


CHANGES = [
    replace_parameter, replace_parameter_alone, swap_data, swap_data_of_a_view, write_data,
    write_without_grad, pytest.param(write_through_numpy, marks=pytest.mark.cpu), load_state, load_state_by_assigning,
    initialise_again, replace_module,
    move_to_its_own_type, replace_gradient, swap_two,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_changed_outside(change: Callable[[Parts], None], mode: Mode) -> None:
    def between(number: int, parts: Parts) -> None:
        if number in (5, 9):
            change(parts)

    runs_as_graph(training(plain, between=between), 14, mode)


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_changed_outside_under_adam(change: Callable[[Parts], None]) -> None:
    def between(number: int, parts: Parts) -> None:
        if number in (5, 9):
            change(parts)

    runs_as_graph(training(plain, optimizer=adam, between=between), 14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["first", "after forward", "after backward", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_changed_inside(change: Callable[[Parts], None], place: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            here = place if number in (5, 9) else ""
            if here == "first":
                change(parts)
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            # An in-place write here is an error in backward, in eager execution too.
            if here == "after forward":
                change(parts)
            loss.backward()
            if here == "after backward":
                change(parts)
            parts.optimizer.step()
            if here == "last":
                change(parts)
            return loss.detach()

        return step

    runs_as_graph(training(make), 14, mode)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_tied(mode: Mode) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.outer.weight = self.inner.weight
            self.last = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.outer(self.inner(x).tanh()))

    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.model.outer.weight = nn.Parameter(parts.model.inner.weight.detach().clone())
        if number == 10:
            parts.model.outer.weight = parts.model.inner.weight

    runs_as_graph(training(plain, model=Tied, optimizer=adam, between=between), 15, mode)


def test_parameters_share_memory() -> None:
    def model() -> nn.Module:
        built = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        built[1].weight.data = built[0].weight.data
        return built

    def one_by_one(built: Any) -> Any:
        """One kernel for all, eager's way on CUDA, writes to shared memory twice at once, and loses a write at will."""
        return torch.optim.SGD(built.parameters(), lr=0.1, foreach=False)

    runs_as_graph(training(plain, model=model, optimizer=one_by_one), 8)


def test_parameters_are_views_of_one_flat_tensor() -> None:
    def model() -> nn.Module:
        built = net()
        flat = torch.cat([p.detach().flatten() for p in built.parameters()])
        start = 0
        for parameter in built.parameters():
            parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return built

    runs_as_graph(training(plain, model=model, optimizer=adam), 8)


def test_buffers_are_replaced_and_written() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("last", torch.zeros(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.linear(x)
            with torch.no_grad():
                self.count += 1
                self.mean.lerp_(output.mean(0), 0.1)
                self.last = output.detach()
            return output - self.mean

    for mode in MODES:
        runs_as_graph(training(plain, model=Counting), 10, mode)


def test_spectral_norm_and_weight_norm() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)),
        )

    for mode in MODES:
        accounted(training(plain, model=model), 8, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["outside", "after forward", "after backward", "after step"])
def test_state_dict_is_read(place: str, mode: Mode) -> None:
    def read(parts: Parts) -> None:
        state = parts.model.state_dict()
        parts.seen["aliases"] = state
        parts.seen["copies"] = {name: value.clone() for name, value in state.items()}
        parts.seen["optimizer"] = copy.deepcopy(parts.optimizer.state_dict())

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            here = place if number % 4 == 3 else ""
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            if here == "after forward":
                read(parts)
            loss.backward()
            if here == "after backward":
                read(parts)
            parts.optimizer.step()
            if here == "after step":
                read(parts)
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if place == "outside" and number % 4 == 3:
            read(parts)

    runs_as_graph(training(make, model=normed, optimizer=adam, between=between), 13, mode)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoint_is_saved_and_loaded(inside: bool) -> None:
    def visit(number: int, parts: Parts) -> None:
        if number == 5:
            parts.seen["file"] = io.BytesIO()
            torch.save(
                {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()},
                parts.seen["file"],
            )
        if number == 9:
            parts.seen["file"].seek(0)
            saved = torch.load(parts.seen["file"])
            parts.model.load_state_dict(saved["model"])
            parts.optimizer.load_state_dict(saved["optimizer"])

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if inside:
                visit(number, parts)
            return parts.train(x, y).detach()

        return step

    for mode in MODES:
        factory = training(make, model=normed, optimizer=adam, between=None if inside else visit)
        runs_as_graph(factory, 15, mode)


def test_model_is_copied_as_a_teacher() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        teacher = copy.deepcopy(parts.model)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            nonlocal teacher
            if number % 5 == 4:
                teacher = copy.deepcopy(parts.model)
            with torch.no_grad():
                target = teacher(x)
            return parts.train(x, target).detach(), target

        return step

    for mode in MODES:
        same(training(make), 12, mode)


def test_parameters_are_compared_and_averaged_outside() -> None:
    def between(number: int, parts: Parts) -> None:
        norms = parts.seen.setdefault("norms", [])
        norms.append(sum(p.norm().item() for p in parts.model.parameters()))

    for mode in MODES:
        runs_as_graph(training(plain, between=between), 8, mode)


def test_model_changes_its_type() -> None:
    def between(number: int, parts: Parts) -> None:
        if number == 6:
            parts.model.double()

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            dtype = parts.model[0].weight.dtype
            return parts.train(x.to(dtype), y.to(dtype)).detach()

        return step

    for mode in MODES:
        accounted(training(make, between=between), 12, mode)


def test_recurrent_modules() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output, (hidden, _) = self.cell(x.unsqueeze(1))
            return self.last(output[:, -1] + hidden[0])

    def clip(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(x), y)
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    for mode in MODES:
        accounted(training(clip, model=Recurrent), 8, mode)


def test_a_batch_is_changed_through_a_view() -> None:
    def make(parts: Parts) -> Any:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            rows = x.unbind()
            rows[0].detach().mul_(2)
            x[1:].add_(1)
            return x[:1] * 1, parts.train(x, y)

        return step

    same(training(make), 10, engine="coexecution")
    same(training(make), 10, engine="speculation")


def test_a_dry_run_sets_nothing_for_the_process() -> None:
    def make(parts: Parts) -> Any:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autograd.set_detect_anomaly(number % 2 == 1):
                return parts.train(x, y)

        return step

    same(training(make), 12, engine="speculation")
    assert not torch.is_anomaly_enabled()


def transpose_in_place(parts: Parts) -> None:
    parts.model[2].weight.data = parts.model[2].weight.data.t()


def shorten_in_place(parts: Parts) -> None:
    parts.model[2].bias.data = parts.model[2].bias.data[:1]


def move_to_another_type(parts: Parts) -> None:
    parts.model.double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [transpose_in_place, shorten_in_place, move_to_another_type])
def test_parameters_keep_their_objects_and_are_laid_out_otherwise(change: Callable[[Parts], None], mode: Mode) -> None:
    """A pointer may be the same then; and where eager raises, it does so at the first use and not at the unit's end."""

    def between(number: int, parts: Parts) -> None:
        if number in (5, 9):
            change(parts)

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    runs_as_graph(training(plain, model=square, between=between), 14, mode)


def test_layout_changes_while_autocast_is_on() -> None:
    """Where PyTorch's own guards say no, as they do under autocast, units are still graphs, and changes are seen."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number in (5, 9):
                parts.model[0].weight.data = parts.model[0].weight.data.t()
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                loss = parts.train(parts.model[0](x), y)
            return loss.detach()

        return step

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    assert runs_as_graph(training(make, model=square), 14)["graph_iterations"] >= 6


@pytest.mark.parametrize("mode", MODES)
def test_version_counters(mode: Mode) -> None:
    """Also where a segment was launched on a prediction that failed, and what it wrote is put back."""

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["versions"] = []
        kept = torch.zeros(3)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number:
                parts.seen["versions"].append((kept._version, parts.model[0].weight._version))
            kept.add_(1)
            if x.sum().item() > 0:
                kept.mul_(0.5)
            return parts.train(x, y).detach()

        return step

    runs_as_graph(training(make), 24, mode, engine="coexecution")

"""Tensors that live longer than the unit that made them, and memory that two names share."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hazards.programs import BATCH, MODES, Mode, Parts, accounted, runs_as_graph, same, stays_eager, training


@pytest.mark.parametrize("mode", MODES)
def test_output_of_an_early_step_keeps_its_value(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return output, loss, output.detach(), output.detach().clone()

        return step

    runs_as_graph(training(make), 8, mode)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_kept_in_a_list(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        losses = parts.seen["losses"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            losses.append(parts.train(x, y).detach())

        return step

    runs_as_graph(training(make), 10, mode)


def test_kept_tensors_are_stacked_later() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        recent: deque[torch.Tensor] = deque(maxlen=3)
        parts.seen["recent"] = recent

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            recent.append(loss.detach())
            return torch.stack(list(recent)).mean()

        return step

    accounted(training(make), 12)


def test_kept_list_is_read_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["losses"], parts.seen["means"] = [], []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["losses"].append(parts.train(x, y).detach())

        return step

    def between(number: int, parts: Parts) -> None:
        if number % 3 == 2:
            parts.seen["means"].append(torch.stack(parts.seen["losses"]).mean().item())

    runs_as_graph(training(make, between=between), 10)


@pytest.mark.parametrize("mode", MODES)
def test_losses_with_history_kept_in_a_list(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        losses = parts.seen["losses"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            losses.append(parts.train(x, y))

        return step

    runs_as_graph(training(make), 10, mode)


def test_loss_with_freed_history_refuses_a_second_backward() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["loss"] = parts.train(x, y)

        return step

    def between(number: int, parts: Parts) -> None:
        if number:
            with pytest.raises(RuntimeError, match="second time"):
                parts.seen["loss"].backward()

    runs_as_graph(training(make, between=between), 8)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
def test_loss_with_freed_history_is_changed_in_place(engine: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["loss"] = parts.train(x, y)

        return step

    def between(number: int, parts: Parts) -> None:
        if number:
            parts.seen["loss"].mul_(0.5)

    report = runs_as_graph(training(make, between=between), 10, engine=engine)
    assert (report["speculated_iterations"] > 0) is (engine == "speculation")


def test_history_that_is_still_alive_is_used_by_a_later_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["pending"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["pending"].append(parts.loss(x, y))
            if number % 3 == 2:
                parts.optimizer.zero_grad()
                sum(parts.seen["pending"]).backward()
                parts.optimizer.step()
                parts.seen["pending"] = []
            return len(parts.seen["pending"])

        return step

    accounted(training(make), 12)


def test_total_in_a_python_float() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["total"] = 0.0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["total"] += parts.train(x, y).item()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_place", [True, False])
def test_total_in_a_tensor(in_place: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["total"] = torch.zeros(())

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            if in_place:
                parts.seen["total"] += loss.detach()
            else:
                parts.seen["total"] = parts.seen["total"] + loss.detach()
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 10, mode)


def test_total_starts_as_a_number() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["total"] = 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            parts.seen["total"] += loss.detach()
            parts.optimizer.step()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 10, mode)


def test_total_after_the_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["total"], parts.seen["count"] = 0.0, 0

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            parts.seen["total"] += loss.detach() * len(x)
            parts.seen["count"] += len(x)
            return parts.seen["total"] / parts.seen["count"]

        return step

    for mode in MODES:
        accounted(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_state_is_carried_from_step_to_step(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["state"] = torch.zeros(BATCH, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x + parts.seen["state"])
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.seen["state"] = F.pad(output, (0, 1)).detach()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make), 10, mode)


def test_carried_state_forgets_to_detach() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["state"] = torch.zeros(BATCH, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x + parts.seen["state"])
            loss = F.mse_loss(output, y)
            loss.backward(retain_graph=True)
            parts.seen["state"] = F.pad(output, (0, 1))
            return loss

        return step

    accounted(training(make), 6)


def test_carried_state_with_history_in_program_mode() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["state"] = torch.zeros(BATCH, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            output = parts.model(x + parts.seen["state"])
            parts.seen["state"] = F.pad(output, (0, 1))
            if number % 3 == 2:
                parts.optimizer.zero_grad()
                loss = F.mse_loss(output, y)
                loss.backward()
                parts.optimizer.step()
                parts.seen["state"] = parts.seen["state"].detach()

        return step

    for mode in MODES:
        accounted(training(make), 15, mode)


def test_last_batch_is_smaller() -> None:
    for mode in MODES:
        factory = training(
            lambda parts: lambda number, x, y: parts.train(x, y),
            sizes=lambda number: 2 if number % 4 == 3 else BATCH,
        )
        runs_as_graph(factory, 16, mode)


def test_batch_of_one_and_of_none() -> None:
    factory = training(
        lambda parts: lambda number, x, y: parts.train(x, y),
        sizes=lambda number: {5: 1, 9: 0, 11: 1}.get(number, BATCH),
    )
    runs_as_graph(factory, 13)


def test_same_batch_object_with_new_contents() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["x"] = torch.zeros(BATCH, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(parts.seen["x"], y)

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["x"].normal_()

    runs_as_graph(training(make, between=between), 10)


def test_batch_is_overwritten_after_the_unit() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["given"] = x
            return parts.train(x, y), x, x.view(-1), x[1:]

        return step

    def between(number: int, parts: Parts) -> None:
        if "given" in parts.seen:
            parts.seen["given"].mul_(-1)

    runs_as_graph(training(make, between=between), 10)


def test_batch_is_a_transposed_or_strided_view() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        wide = torch.randn(4, BATCH * 2)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            given = wide[:, :BATCH].t() if number % 2 else wide.t()[::2]
            return parts.train(given, y), given

        return step

    runs_as_graph(training(make), 12)


def test_two_arguments_are_the_same_tensor() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            left, right = (x, x) if number % 3 else (x, x.clone())
            parts.optimizer.zero_grad()
            loss = F.mse_loss(parts.model(left), y) + (left * right).mean()
            loss.backward()
            parts.optimizer.step()
            return loss, left is right

        return step

    runs_as_graph(training(make), 12)


def test_feeds_alias_each_other() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        memory = torch.randn(BATCH + 3, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            first, second = memory[:BATCH], memory[number % 4 : number % 4 + BATCH]
            loss = parts.train(first + second, y)
            with torch.no_grad():
                first.mul_(0.9)
            return loss, second

        return step

    accounted(training(make), 10)


def test_input_is_changed_in_place() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            x.clamp_(-1, 1).add_(0.1)
            x[0] = 0.5
            return parts.train(x, y), x

        return step

    accounted(training(make), 10)


def test_views_are_written_through() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            work = x.clone()
            row, flat = work[1], work.view(-1)
            row.fill_(2.0)
            flat[::3] = -1.0
            work[:, 0].add_(flat[-1])
            return parts.train(work, y), work, row, flat

        return step

    runs_as_graph(training(make), 10)


def test_views_of_views_with_history() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            scaled = output * 2
            scaled[:, 0].mul_(0.5)
            scaled.t()[1].sub_(1.0)
            left, right = scaled.chunk(2)
            loss = (left * right).mean() + F.mse_loss(scaled, y)
            loss.backward()
            parts.optimizer.step()
            return loss, scaled, left.detach(), scaled.data

        return step

    runs_as_graph(training(make), 10)


def test_outputs_alias_each_other_and_are_written_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.train(x, y)
            with torch.no_grad():
                output = parts.model(x)
            parts.seen["outputs"] = output, output.view(-1), output[0], output
            return parts.seen["outputs"]

        return step

    def between(number: int, parts: Parts) -> None:
        if "outputs" in parts.seen:
            whole, flat, row, again = parts.seen["outputs"]
            flat[0] = 7.0
            row[1] = 8.0
            assert whole is again
            assert whole[0, 0] == 7.0
            assert whole[0, 1] == 8.0

    runs_as_graph(training(make, between=between), 8)


def test_aliasing_outputs_of_one_unit_without_a_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.no_grad():
                output = parts.model(x)
            parts.seen["outputs"] = output, output.view(-1), output[0], output.detach()
            return parts.seen["outputs"]

        return step

    def between(number: int, parts: Parts) -> None:
        if "outputs" in parts.seen:
            _whole, flat, row, detached = parts.seen["outputs"]
            flat[0] = 7.0
            row[1] = 8.0
            detached[1, 1] = 9.0

    runs_as_graph(training(make, between=between), 8)


@pytest.mark.parametrize(
    "output",
    [
        lambda model: model[0].weight,
        lambda model: model[0].weight.data,
        lambda model: model[0].weight.detach(),
        lambda model: model[0].weight.detach().view(-1)[3:5],
        lambda model: model[0].weight.detach().clone(),
        lambda model: model[0].weight.detach().numpy(),
        lambda model: model[0].weight.detach().numpy().copy(),
        lambda model: [p.detach() for p in model.parameters()],
        lambda model: torch.cat([p.detach().flatten() for p in model.parameters()]),
    ],
    ids=["itself", "data", "detached", "view", "clone", "numpy", "copy", "all", "flat"],
)
@pytest.mark.parametrize("before", [True, False])
def test_output_aliases_a_parameter(output: Callable[[Any], Any], before: bool) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            early = output(parts.model) if before else None
            loss = parts.train(x, y)
            return loss, output(parts.model) if not before else early

        return step

    accounted(training(make), 8)


def test_output_aliases_an_input() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            kept = x.view(-1), x.t(), x.detach(), x[0], x
            loss = parts.train(x, y)
            assert kept[-1] is x
            return loss, kept

        return step

    runs_as_graph(training(make), 8)


def test_view_of_an_input_is_written_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["view"] = x.view(-1)[:2]
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            parts.optimizer.step()

        return step

    def between(number: int, parts: Parts) -> None:
        if "view" in parts.seen:
            parts.seen["view"].add_(1.0)

    for mode in MODES:
        accounted(training(make, between=between), 10, mode)


PARTS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.chunk(2),
    lambda x: x.split([1, 2, 3])[1:],
    lambda x: x.unbind()[3],
    lambda x: [part.t() for part in x.tensor_split(3)],
    lambda x: x.chunk(2, 1)[1].chunk(3)[2],
]


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize("parts_of", PARTS, ids=["chunks", "later", "row", "turned", "part of a part"])
def test_parts_of_an_input_are_kept(parts_of: Callable[[torch.Tensor], Any], engine: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            kept = parts_of(x)
            parts.train(x, y)
            return kept

        return step

    runs_as_graph(training(make), 10, engine=engine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_used", [False, True], ids=["kept", "used"])
def test_parts_of_a_weight_are_kept_while_it_is_stepped_on(is_used: bool, mode: Mode) -> None:
    """Autograd tells nothing of them then, and raises where it is asked."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            first, second = parts.model[0].weight.chunk(2)
            loss = (F.linear(x, first) * F.linear(x, second)).pow(2).mean()
            loss.backward()
            parts.optimizer.step()
            return loss, second.detach() if is_used else None

        return step

    stays_eager(training(make), "unsupported_call", 8, mode)


def test_gradients_are_accumulated_over_parts_of_a_batch_from_some_step_on() -> None:
    """Units end at the second part then: no round without a step was known before."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            pieces = 1 if number < 5 else 2
            parts.optimizer.zero_grad()
            losses: list[float] = []
            for some, wanted in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                loss = parts.loss(some, wanted)
                loss.backward()
                losses.append(loss.item())
            parts.optimizer.step()
            return losses

        return step

    runs_as_graph(training(make), 12, "program")


def test_gradient_object_is_kept() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.train(x, y)
            gradient = parts.model[0].weight.grad
            return gradient, gradient.norm()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)


def test_gradient_is_kept_before_the_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            gradients = [p.grad for p in parts.model.parameters()]
            copies = [p.grad.clone() for p in parts.model.parameters()]
            parts.optimizer.step()
            return gradients, copies

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)


def test_gradients_in_place_are_kept() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad(set_to_none=False)
            parts.loss(x, y).backward()
            kept = parts.model[0].weight.grad
            parts.optimizer.step()
            return kept

        return step

    runs_as_graph(training(make), 8)


def test_previous_output_is_compared() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        previous: list[torch.Tensor] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            change = (loss - previous[0]).abs().item() if previous else None
            previous[:] = [loss.detach()]
            return change

        return step

    runs_as_graph(training(make), 10)


def test_replay_buffer_tensor_is_written_by_index() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        memory = parts.seen["memory"] = torch.zeros(5, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            memory[number % 5] = x[0]
            loss = parts.train(x, y)
            return loss, memory.sum()

        return step

    accounted(training(make), 15)


def test_output_keeps_a_big_tensor_alive_by_a_view() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.no_grad():
                hidden = parts.model(x)
            first, rest = hidden.split([1, BATCH - 1])
            del hidden, rest
            loss = parts.train(x, y)
            return loss, first, first.squeeze(0)

        return step

    runs_as_graph(training(make), 8)


def test_output_is_kept_only_sometimes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["kept"] = {}

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            loss = F.mse_loss(output, y)
            loss.backward()
            if number % 5 == 4:
                parts.seen["kept"][number] = output.detach()
            parts.optimizer.step()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 15, mode)


def test_intermediate_is_an_attribute_of_a_module() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.hidden: Any = None
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.hidden = self.first(x).relu()
            self.calls += 1
            return self.second(self.hidden)

    factory = training(lambda parts: lambda number, x, y: parts.train(x, y), model=Remembers)
    for mode in MODES:
        runs_as_graph(factory, 8, mode)


def test_unit_without_an_optimizer() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.no_grad():
                return parts.model(x).argmax(1), (parts.model(x) - y).abs().max()

        return step

    runs_as_graph(training(make), 8)
    same(training(make), 8, "program")


def test_unit_that_only_computes_gradients() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            loss.backward()
            return loss

        return step

    def between(number: int, parts: Parts) -> None:
        if number:
            parts.optimizer.step()
            parts.optimizer.zero_grad()

    runs_as_graph(training(make, between=between), 8)


def test_numpy_view_of_an_output() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.train(x, y)
            with torch.no_grad():
                output = parts.model(x)
            array = output.numpy()
            array += 1
            return output, array, np.mean(array)

        return step

    accounted(training(make), 8)


def test_forward_only_with_history_left_alive() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["loss"] = parts.loss(x, y)
            return parts.seen["loss"]

        return step

    def between(number: int, parts: Parts) -> None:
        if "loss" in parts.seen:
            parts.optimizer.zero_grad()
            parts.seen["loss"].backward()
            parts.optimizer.step()

    runs_as_graph(training(make, between=between), 8)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_made_beside_a_loss_is_freed_with_it(mode: Mode) -> None:
    """The probabilities of a policy are kept, though the loss was made of the logits: a backward from them raises."""
    kept: list[torch.Tensor] = []

    def make(parts: Parts) -> Callable[..., Any]:
        kept.clear()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            logits = parts.model(x)
            kept[:] = [logits.softmax(-1)]
            loss = F.mse_loss(logits, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number % 3 == 2:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                kept[0].sum().backward()

    runs_as_graph(training(make, between=between), 10, mode, at_least=4)


@pytest.mark.parametrize("beside", ["a leaf", "what saves nothing"])
def test_what_was_made_beside_a_loss_and_can_be_differentiated_is_not(beside: str) -> None:
    """The history of what is kept is whole, a penalty of weights, or was never freed: a backward from it works."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            weight = -parts.model[0].weight
            kept = weight + parts.model[2].weight.exp().sum() if beside == "a leaf" else weight.exp()
            loss = parts.loss(x, y) if beside == "a leaf" else weight.sum()
            loss.backward()
            parts.optimizer.step()
            return kept

        return step

    stays_eager(training(make), "history_escapes", 8)

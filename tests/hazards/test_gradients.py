"""`.grad`, hooks and autograd used in other ways than one plain `backward()`."""

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.hazards.programs import MODES, Mode, Parts, accounted, runs_as_graph, same, stays_eager, training
from twofold.capture.intercept import is_within_unit


def plain(parts: Parts) -> Callable[..., Any]:
    return lambda number, x, y: parts.train(x, y)


def clear_none(parts: Parts) -> None:
    parts.optimizer.zero_grad(set_to_none=True)


def clear_zero(parts: Parts) -> None:
    parts.optimizer.zero_grad(set_to_none=False)


def clear_model(parts: Parts) -> None:
    parts.model.zero_grad()


def clear_model_zero(parts: Parts) -> None:
    parts.model.zero_grad(set_to_none=False)


def clear_by_hand(parts: Parts) -> None:
    for parameter in parts.model.parameters():
        parameter.grad = None


def clear_in_place(parts: Parts) -> None:
    for parameter in parts.model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def clear_by_detach(parts: Parts) -> None:
    for parameter in parts.model.parameters():
        if parameter.grad is not None:
            parameter.grad.detach_().zero_()


def clear_never(parts: Parts) -> None:
    pass


CLEARS = [
    clear_none, clear_zero, clear_model, clear_model_zero, clear_by_hand, clear_in_place, clear_by_detach,
    clear_never,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("clear", CLEARS)
def test_ways_to_clear_gradients(clear: Callable[[Parts], None], last: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if not last:
                clear(parts)
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()
            if last:
                clear(parts)
            return loss.detach()

        return step

    accounted(training(make), 10, mode)


def test_way_to_clear_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            CLEARS[number % 3](parts)
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()
            return loss, [p.grad is None for p in parts.model.parameters()]

        return step

    runs_as_graph(training(make), 24)


def test_gradients_are_cleared_outside() -> None:
    def between(number: int, parts: Parts) -> None:
        if number % 2:
            parts.optimizer.zero_grad(set_to_none=number % 4 == 1)

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    runs_as_graph(training(make, between=between), 20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y) / 3
            loss.backward()
            if number % 3 == 2:
                parts.optimizer.step()
                parts.optimizer.zero_grad(set_to_none=set_to_none)
            return loss.detach()

        return step

    runs_as_graph(training(make), 21, mode)


def test_gradient_accumulation_inside_one_unit() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            for half in range(2):
                (parts.loss(x[half * 3 : half * 3 + 3], y[half * 3 : half * 3 + 3]) / 2).backward()
            parts.optimizer.step()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)


def test_number_of_micro_batches_changes() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            for _ in range(1 + number % 3):
                parts.loss(x, y).backward()
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 18)


def module_forward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[0].register_forward_hook(lambda module, given, output: output * 2)


def module_forward_pre_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[0].register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def counting_forward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[1].register_forward_hook(lambda *_: log.append("forward"))


def reading_forward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[1].register_forward_hook(lambda m, i, o: log.append(o.abs().mean().item()))


def keeping_forward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[1].register_forward_hook(lambda m, i, o: log.append(o.detach()))


def module_backward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[2].register_full_backward_hook(lambda m, i, o: log.append(o[0].sum().item()))


def changing_backward_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[2].register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,))


def module_backward_pre_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[2].register_full_backward_pre_hook(lambda m, o: (o[0] * 3,))


def parameter_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[0].weight.register_hook(lambda gradient: gradient * 0.1)


def logging_parameter_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.model[0].weight.register_hook(lambda gradient: log.append(float(gradient.norm())))


def post_accumulate_hook(parts: Parts, log: list[Any]) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        log.append("accumulated")
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    return parts.model[2].bias.register_post_accumulate_grad_hook(hook)


def optimizer_step_hook(parts: Parts, log: list[Any]) -> Any:
    return parts.optimizer.register_step_pre_hook(lambda *_: log.append("step"))


def optimizer_post_hook(parts: Parts, log: list[Any]) -> Any:
    def hook(*_: Any) -> None:
        log.append("stepped")
        with torch.no_grad():
            parts.model[0].bias.clamp_(-0.1, 0.1)

    return parts.optimizer.register_step_post_hook(hook)


def global_forward_hook(parts: Parts, log: list[Any]) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda *_: log.append("any module"))


HOOKS = [
    module_forward_hook, module_forward_pre_hook, counting_forward_hook, reading_forward_hook,
    keeping_forward_hook, module_backward_hook, changing_backward_hook, module_backward_pre_hook,
    parameter_hook, logging_parameter_hook, post_accumulate_hook, optimizer_step_hook, optimizer_post_hook,
    global_forward_hook,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 1, 6], ids=["before", "during warm-up", "later"])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks(register: Callable[..., Any], at: int, mode: Mode) -> None:
    """Registered before or after the first call, and removed again near the end."""
    handles: list[Any] = []

    def between(number: int, parts: Parts) -> None:
        if number == at:
            handles.append(register(parts, parts.seen.setdefault("log", [])))
        if number == 11:
            handles.pop().remove()

    try:
        accounted(training(plain, between=between), 16, mode)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("mode", MODES)
def test_optimizers_step_within_backward(mode: Mode) -> None:
    """As a tutorial of PyTorch does, to save memory. Afterwards nobody listens any more."""

    def make(parts: Parts) -> Callable[..., Any]:
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in parts.model.parameters()}

        def hook(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in parts.model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.loss(x, y)
            loss.backward()
            return loss.detach()

        return step

    stays_eager(training(make), "tensor_hook", 24, mode)
    assert not is_within_unit()


def test_hook_on_an_intermediate_tensor() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["log"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            output.register_hook(lambda gradient: parts.seen["log"].append(gradient.sum().item()))
            output.register_hook(lambda gradient: gradient * 2)
            F.mse_loss(output, y).backward()
            parts.optimizer.step()

        return step

    for mode in MODES:
        stays_eager(training(make), "tensor_hook", 6, mode)


def test_hook_on_an_intermediate_tensor_from_some_step_on() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["log"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if number in (6, 7):
                output.register_hook(lambda gradient: parts.seen["log"].append(gradient.sum().item()))
            F.mse_loss(output, y).backward()
            parts.optimizer.step()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 12, mode)


def test_retain_grad() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if number != 5:
                output.retain_grad()
            F.mse_loss(output, y).backward()
            parts.optimizer.step()
            return output.grad if number != 5 else None

        return step

    accounted(training(make), 10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_layers_are_frozen_and_thawed(inside: bool, mode: Mode) -> None:
    def toggle(number: int, parts: Parts) -> None:
        if number == 5:
            parts.model[0].requires_grad_(False)
        if number == 10:
            parts.model[0].requires_grad_(True)
            parts.model[2].weight.requires_grad = False

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if inside:
                toggle(number, parts)
            return parts.train(x, y)

        return step

    runs_as_graph(training(make, between=None if inside else toggle), 16, mode)


def test_frozen_from_the_start() -> None:
    def model() -> nn.Module:
        built = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        built[0].requires_grad_(False)
        return built

    def between(number: int, parts: Parts) -> None:
        if number == 7:
            parts.model[0].requires_grad_()

    runs_as_graph(training(plain, model=model, between=between), 14)


def test_frozen_and_thawed_within_a_step() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        other = nn.Linear(3, 3)
        rival = torch.optim.SGD(other.parameters(), lr=0.1)
        parts.seen["other"] = other.weight

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            other.requires_grad_(False)
            parts.optimizer.zero_grad()
            first = F.mse_loss(other(parts.model(x)), y)
            first.backward()
            parts.optimizer.step()
            other.requires_grad_(True)
            rival.zero_grad()
            second = -F.mse_loss(other(parts.model(x).detach()), y)
            second.backward()
            rival.step()
            return first, second

        return step

    for mode in MODES:
        accounted(training(make), 10, mode)


def test_input_requires_grad() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            given = x.clone().requires_grad_()
            parts.optimizer.zero_grad()
            parts.loss(given, y).backward()
            parts.optimizer.step()
            return given.grad

        return step

    accounted(training(make), 8)


def test_batch_itself_requires_grad() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            x.requires_grad_()
            x.grad = None
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            parts.optimizer.step()
            return x.grad

        return step

    accounted(training(make), 10)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalty(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            given = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(parts.model(given).sum(), given, create_graph=True)
            loss = parts.loss(x, y) + gradient.square().sum(1).mean()
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    accounted(training(make), 8, mode)


def test_second_derivative_of_parameters() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parameters = list(parts.model.parameters())
            gradients = torch.autograd.grad(parts.loss(x, y), parameters, create_graph=True)
            fast = [p - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
            names = [name for name, _ in parts.model.named_parameters()]
            output = torch.func.functional_call(parts.model, dict(zip(names, fast, strict=True)), (x,))
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss

        return step

    for mode in MODES:
        accounted(training(make), 8, mode)


def test_autograd_grad_and_a_hand_written_update() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parameters = list(parts.model.parameters())
            loss = parts.loss(x, y)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
            return loss.detach()

        return step

    runs_as_graph(training(make), 8)
    same(training(make), 8, "program")


def test_autograd_grad_with_unused_inputs() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            unused = torch.ones(2, requires_grad=True)
            first = torch.autograd.grad(parts.loss(x, y), [parts.model[0].weight, unused], allow_unused=True)
            loss = parts.train(x, y)
            return loss, first

        return step

    same(training(make), 8)


def test_backward_with_a_gradient_and_retained_graph() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            output.backward(torch.ones_like(output), retain_graph=True)
            output.backward(y, inputs=[parts.model[2].weight])
            parts.optimizer.step()
            return output.detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)


def test_several_roots() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            torch.autograd.backward([output.sum(), output.square().mean()])
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 8)


def test_second_backward_raises() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            if number % 3 == 2:
                try:
                    loss.backward()
                except RuntimeError as error:
                    print(str(error)[:40])
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 9)


class Doubling(torch.autograd.Function):
    """Counts its calls in Python; nothing else in it is unusual."""

    log: list[str]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        Doubling.log.append("forward")
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        Doubling.log.append(f"backward {x.shape[0]}")
        return gradients[0] * ctx.factor, None


@pytest.mark.parametrize("mode", MODES)
def test_custom_function_with_side_effects(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        Doubling.log = parts.seen["log"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            F.mse_loss(Doubling.apply(parts.model(x), 2.0), y).backward()
            parts.optimizer.step()

        return step

    stays_eager(training(make), "autograd_function", 6, mode)


def test_custom_function_from_some_step_on() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        Doubling.log = parts.seen["log"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if number > 5:
                output = Doubling.apply(output, 1.0 + number)
            F.mse_loss(output, y).backward()
            parts.optimizer.step()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 10, mode)


def test_custom_function_without_backward() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        Doubling.log = parts.seen["log"] = []

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return parts.train(Doubling.apply(x, 0.5), y)

        return step

    accounted(training(make), 8)


def test_checkpointed_layer() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x)
            output = checkpoint(parts.model[1:], hidden, use_reentrant=False)
            F.mse_loss(output, y).backward()
            parts.optimizer.step()

        return step

    accounted(training(make), 8)


def test_saved_tensor_hooks() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["log"] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            parts.seen["log"].append("pack")
            return tensor * 2

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor / 2):
                loss = parts.loss(x, y)
            loss.backward()
            parts.optimizer.step()

        return step

    accounted(training(make), 6)


def test_unused_parameters_change() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
            return self.left(x) if left else self.right(x)

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            F.mse_loss(parts.model(x, number % 3 > 0), y).backward()
            parts.optimizer.step()
            return [p.grad is None for p in parts.model.parameters()]

        return step

    def adam(model: Any) -> Any:
        return torch.optim.Adam(model.parameters(), 0.01)

    for mode in MODES:
        runs_as_graph(training(make, model=TwoHeads, optimizer=adam), 24, mode)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_edited(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            weight, bias = parts.model[0].weight, parts.model[0].bias
            weight.grad = weight.grad.sign()
            bias.grad.add_(bias.detach(), alpha=0.01)
            parts.model[2].bias.grad = None
            parts.model[2].weight.grad.data.clamp_(-0.1, 0.1)
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 10, mode)


def copied_weights(parts: Parts) -> list[torch.Tensor]:
    """Weights in another precision, which require no gradient and are stepped on, as of a model in half precision."""
    copies = [parameter.detach().double() for parameter in parts.model.parameters()]
    parts.seen["copies"] = copies
    parts.optimizer = torch.optim.SGD(copies, 0.1, momentum=0.9)
    return copies


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("assigned", [True, False], ids=["assigned", "copied"])
def test_gradients_of_copied_weights(assigned: bool, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        copies = copied_weights(parts)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.model.zero_grad()
            loss = parts.loss(x, y)
            loss.backward()
            for copy, parameter in zip(copies, parts.model.parameters(), strict=True):
                if assigned:
                    copy.grad = parameter.grad.double()
                    continue
                if copy.grad is None:
                    copy.grad = torch.empty_like(copy)
                copy.grad.copy_(parameter.grad)
            parts.optimizer.step()
            with torch.no_grad():
                for copy, parameter in zip(copies, parts.model.parameters(), strict=True):
                    parameter.copy_(copy)
            return loss.item()

        return step

    runs_as_graph(training(make), 10, mode)


def test_gradient_of_what_requires_none_comes_and_goes_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["weights"] = weights = torch.ones(4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return weights.grad is None, parts.train(x, y)

        return step

    def between(number: int, parts: Parts) -> None:
        parts.seen["weights"].grad = None if number % 5 < 3 else torch.full((4,), float(number))

    runs_as_graph(training(make, between=between), 20)


def test_gradient_from_outside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        mine = torch.full((8,), 0.5)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            parts.model[0].bias.grad = mine
            parts.optimizer.step()
            mine.mul_(0.9)
            return parts.model[0].bias.grad is mine

        return step

    accounted(training(make), 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_grad_norm(max_norm: float, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            norm = nn.utils.clip_grad_norm_(parts.model.parameters(), max_norm)
            parts.optimizer.step()
            return norm

        return step

    runs_as_graph(training(make), 8, mode)


@pytest.mark.parametrize("mode", MODES)
def test_clip_grad_value_and_logged_norms(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.loss(x, y).backward()
            print([f"{p.grad.norm():.4f}" for p in parts.model.parameters()])
            nn.utils.clip_grad_value_(parts.model.parameters(), 0.05)
            parts.optimizer.step()

        return step

    runs_as_graph(training(make), 8, mode)


@pytest.fixture
def _deterministic() -> Generator[None]:
    """On CUDA eager adds the rows of a sparse gradient up in any order otherwise, and differs from itself."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradient(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            rows = (x * 3).long().abs().clamp(max=9)
            loss = parts.model(rows).mean(1).square().sum()
            loss.backward()
            gradient = parts.model.weight.grad.to_dense()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            return loss.detach(), gradient

        return step

    factory = training(make, model=lambda: nn.Embedding(10, 3, sparse=True))
    accounted(factory, 6, mode)


def test_embedding_with_max_norm_writes_to_its_weight() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.model((x * 3).long().abs().clamp(max=9)).square().sum()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    accounted(training(make, model=lambda: nn.Embedding(10, 3, max_norm=0.5)), 8)


def test_functional_gradients_and_vmap() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            per_sample = torch.func.vmap(torch.func.grad(lambda row: row.square().sum()))(x)
            return parts.train(x + 0.1 * per_sample, y)

        return step

    accounted(training(make), 8)


def test_backward_in_anomaly_mode() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            with torch.autograd.set_detect_anomaly(number % 2 == 1, check_nan=True):
                return parts.train(x, y)

        return step

    same(training(make), 8)


def test_detached_and_no_grad_parts() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            with torch.no_grad():
                target = parts.model(x) * 0.9
            output = parts.model(x)
            loss = F.mse_loss(output, target) + F.mse_loss(output, y) * output.detach().mean()
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), target, target.requires_grad, output.requires_grad, loss.is_leaf

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)

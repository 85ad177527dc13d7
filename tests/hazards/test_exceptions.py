"""Units that do not come to their end: what is left behind is what eager execution leaves."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.hazards.programs import MODES, Mode, Parts, accounted, runs_as_graph, training


class Stop(Exception):
    """The user's own."""


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


PLACES = ["start", "zeroed", "forward", "loss", "fetched", "backward", "stepped", "end"]
FAILING = (5, 9)


def failing_step(parts: Parts, place: str, raise_here: Callable[[], None]) -> Callable[..., Any]:
    def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        fails = number in FAILING

        def visit(here: str, value: Any) -> None:
            parts.seen["last"] = value
            parts.seen["at"] = here
            if fails and here == place:
                raise_here()

        visit("start", x)
        parts.optimizer.zero_grad()
        visit("zeroed", x)
        output = parts.model(x)
        visit("forward", output)
        loss = F.mse_loss(output, y)
        visit("loss", loss)
        print(f"{loss.item():.4f}")
        visit("fetched", loss)
        loss.backward()
        visit("backward", loss)
        parts.optimizer.step()
        visit("stepped", loss)
        scaled = loss.detach() * 2
        visit("end", scaled)
        return scaled

    return step


def raise_stop() -> None:
    raise Stop("the user says so")


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def raise_of_torch() -> None:
    torch.ones(2) @ torch.ones(3)


def raise_with_cause() -> None:
    try:
        raise_stop()
    except Stop as error:
        raise ValueError("from another") from error


RAISES = [raise_stop, raise_interrupt, raise_of_torch, raise_with_cause]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("raises", RAISES)
def test_uncaught(raises: Callable[[], None], place: str, mode: Mode) -> None:
    """In program mode the loop around the step catches it, inside the program."""
    optimizer: Any = lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)  # noqa: E731
    factory = training(lambda parts: failing_step(parts, place, raises), model=model, optimizer=optimizer)
    runs_as_graph(factory, 13, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_caught_inside_the_unit(place: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        inner = failing_step(parts, place, raise_stop)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            try:
                return inner(number, x, y)
            except Stop:
                last = parts.seen["last"]
                return last, last.sum(), last.grad_fn is None

        return step

    runs_as_graph(training(make, model=model), 13, mode)


@pytest.mark.parametrize("mode", MODES)
def test_user_goes_on_from_the_middle(mode: Mode) -> None:
    """What the user holds after the exception are true tensors with their history."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            parts.seen["output"] = output = parts.model(x)
            if number in FAILING:
                raise Stop
            F.mse_loss(output, y).backward()
            parts.optimizer.step()
            return output.detach()

        return step

    def between(number: int, parts: Parts) -> None:
        if number - 1 in FAILING:
            parts.seen["output"].square().mean().backward()
            parts.optimizer.step()

    runs_as_graph(training(make, model=model, between=between), 13, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("raises", [raise_stop, raise_interrupt])
def test_raised_on_every_path_alike(raises: Callable[[], None], mode: Mode) -> None:
    """Raised in every third call, so that the way to the exception becomes a known one."""

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            if number % 3 == 2:
                raises()
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make, model=model), 18, mode)


@pytest.mark.parametrize("mode", MODES)
def test_step_is_skipped_on_a_bad_loss(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x * (float("nan") if number in FAILING else 1.0), y)
            if not torch.isfinite(loss):
                print("skipped")
                return None
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make), 14, mode)


def test_error_in_backward() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x).exp()
            loss = F.mse_loss(parts.model[2](hidden), y)
            if number in FAILING:
                hidden.add_(1)  # exp needs its result in backward
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 13, mode)


def test_error_in_a_tensor_call_on_a_known_path() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if number in FAILING:
                output = output @ torch.ones(7)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 13, mode)


@pytest.mark.cpu
def test_index_error_that_depends_on_values_comes_late() -> None:
    """A limit: eager execution raises at the call, a graph when it runs. Type, message and state are eager's."""
    weight = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    caught: list[str] = []

    def step(row: int) -> torch.Tensor:
        rows = torch.tensor([0, 1, row])
        optimizer.zero_grad()
        try:
            loss = F.embedding(rows, weight).mean()
        except IndexError as error:
            caught.append(str(error))
            raise
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = twofold.function(step, numerics="exact", backend="replay", background=False)
    for _ in range(6):
        run(2)
    before = weight.detach().clone()
    with pytest.raises(IndexError, match="index out of range in self"):
        run(99)
    assert caught == []  # in eager execution the message is here
    assert torch.equal(weight, before)
    assert twofold.report(run).to_dict()["graph_iterations"] > 0
    run(1)
    assert not torch.equal(weight, before)


def by_cross_entropy(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(made, labels)


def by_one_hot(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(made, F.one_hot(labels, num_classes=3).to(made.dtype))


def by_scatter(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(made, torch.zeros_like(made).scatter_(1, labels[:, None], 1.0))


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["replay", "inductor"])
@pytest.mark.parametrize("shift", [3, -3])
@pytest.mark.parametrize("compare", [by_cross_entropy, by_one_hot, by_scatter])
def test_class_out_of_range(compare: Callable[..., torch.Tensor], shift: int, backend: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            labels = y.argmax(1) + (shift if number in FAILING else 0)
            loss = compare(parts.model(x), labels)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make), 13, backend=backend, numerics="exact" if backend == "replay" else "fused")


def test_attribute_error_of_a_tensor() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            found = hasattr(loss, "nonsense"), getattr(x, "_twofold_made", None), hasattr(loss, "item")
            if number in FAILING:
                loss.nonsense  # noqa: B018
            return found

        return step

    runs_as_graph(training(make), 13)


def test_suppressed_and_finally() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            loss = parts.loss(x, y)
            try:
                with contextlib.suppress(Stop):
                    if number in FAILING:
                        raise Stop
                    loss = loss * 2
                loss.backward()
            finally:
                parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 13, mode)


def test_generator_is_closed_midway() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def layers(x: torch.Tensor) -> Generator[torch.Tensor, None, None]:
            try:
                for layer in parts.model:
                    x = layer(x)
                    yield x
            finally:
                parts.seen["closed with"] = x.sum()

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            running = layers(x)
            output = next(running)
            if number in FAILING:
                running.close()
                return output.detach()
            for output in running:  # noqa: B007
                pass
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        accounted(training(make), 13, mode)


def test_generator_spans_units() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def forever() -> Generator[Any, Any, None]:
            x, y = yield
            while True:
                parts.optimizer.zero_grad()
                output = parts.model(x)
                loss = F.mse_loss(output, y)
                x, y = yield output.detach()
                loss.backward()
                parts.optimizer.step()

        running = forever()
        next(running)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            return running.send((x, y))

        return step

    for mode in MODES:
        accounted(training(make), 10, mode)


def test_with_block_left_by_an_exception() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            try:
                with torch.no_grad():
                    target = parts.model(x)
                    if number in FAILING:
                        raise Stop
            except Stop:
                assert torch.is_grad_enabled()
                target = target + 1
            loss = F.mse_loss(parts.model(x), target + y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), target.requires_grad

        return step

    for mode in MODES:
        runs_as_graph(training(make), 13, mode)


def test_program_block_is_left_by_an_exception() -> None:
    """After the block nothing listens any more, and state is eager's."""

    def train(guard: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        built = model()
        optimizer = torch.optim.SGD(built.parameters(), 0.1)
        held: list[torch.Tensor] = []
        x, y = torch.randn(6, 4), torch.randn(6, 3)

        def loop() -> None:
            for number in range(10):
                optimizer.zero_grad()
                output = built(x)
                held.append(output)
                loss = F.mse_loss(output, y)
                if number == 7:
                    raise Stop
                loss.backward()
                optimizer.step()

        with pytest.raises(Stop), guard:
            loop()
        held[-1].sum().backward()
        state = {name: value.clone() for name, value in built.state_dict().items()}
        gradients = {f"{name} grad": p.grad for name, p in built.named_parameters() if p.grad is not None}
        return {**state, **gradients, "held": torch.stack(held), "random": torch.rand(3)}

    expected = train(contextlib.nullcontext())
    actual = train(twofold.program(numerics="exact", backend="replay", background=False))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_function_recovers_after_an_exception() -> None:
    """No mode is left entered, so tensors made afterwards are untouched."""
    step = twofold.function(_fails_when_told, numerics="exact", backend="replay", background=False)
    weight = torch.ones(3, requires_grad=True)
    for number in range(8):
        if number == 5:
            with pytest.raises(Stop):
                step(weight, True)
        else:
            step(weight, False)
        assert not torch.overrides._get_current_function_mode_stack()
    assert twofold.report(step).to_dict()["graph_iterations"] > 0


def _fails_when_told(weight: torch.Tensor, fail: bool) -> torch.Tensor:
    value = (weight * 2).detach().sum()
    if fail:
        raise Stop
    return value + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["first", "last"])
def test_call_that_raises_was_given_a_tensor_of_its_own(place: str, mode: Mode) -> None:
    """It is no event, and counted as given to the unit the tensor shifted those that came after."""

    def make(parts: Parts) -> Callable[..., Any]:
        short = torch.zeros(5)

        def attempt(x: torch.Tensor) -> None:
            try:
                short.add_(x.mean(0))
            except RuntimeError as error:
                print(type(error).__name__)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if place == "first":
                attempt(x)
            loss = parts.train(x, y)
            if place == "last":
                attempt(x)
            return loss.detach()

        return step

    accounted(training(make), 8, mode)


def test_report_counts_the_units_that_raise() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.loss(x, y)
            raise Stop

        return step

    report = accounted(training(make), 8)
    assert [(entry["code"], entry["count"]) for entry in report["fallbacks"]] == [("unit_raised", 8)]

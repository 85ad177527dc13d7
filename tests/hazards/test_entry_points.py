"""What can be decorated, where it can be called from, and what it may be given and return."""

import asyncio
import copy
import functools
import pickle
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from benchmarks.programs import Program
from tests.differential import Factory, compare, eager, exact_backend, function, program, run
from tests.hazards.programs import (
    MODES,
    Mode,
    Parts,
    accounted,
    net,
    runs_as_graph,
    same,
    stays_eager,
    training,
)

OPTIONS: dict[str, Any] = {"numerics": "exact", "backend": exact_backend(), "background": False}
graphed = functools.partial(twofold.function, **OPTIONS)


def graphs(of: Any) -> int:
    return twofold.report(of).to_dict()["graph_iterations"]


Pair = namedtuple("Pair", ["loss", "output"])


@dataclass
class Result:
    loss: torch.Tensor
    parts: list[torch.Tensor] = field(default_factory=list)
    note: str = ""


@pytest.mark.parametrize("mode", MODES)
def test_nested_results(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return {
                "pair": Pair(loss, output.detach()),
                "result": Result(loss.detach(), [output.detach() * 2, x], f"{number}"),
                "ordered": OrderedDict(a=[output.detach()[0]], b=(loss, None, number)),
                "same": (loss, loss),
            }

        return step

    runs_as_graph(training(make), 8, mode)


def test_nested_arguments_keywords_and_defaults() -> None:
    def build() -> Program:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(batch: dict[str, Any], /, *rest: Any, scale: float = 1.0, target: Any = None, **others: Any) -> Any:
            optimizer.zero_grad()
            loss = F.mse_loss(model(batch["x"][0]), batch["y"]) * scale + sum(r.mean() for r in rest)
            loss.backward()
            optimizer.step()
            return loss.detach(), sorted(others)

        def batches(number: int) -> tuple[Any, ...]:
            generator = torch.Generator(torch.empty(0).device).manual_seed(number)
            batch = {
                "x": [torch.randn(6, 4, generator=generator), None],
                "y": torch.randn(6, 3, generator=generator),
            }
            return (batch, *[torch.ones(2)] * (number % 3))

        wrapped: Any = lambda *arguments: step(*arguments, scale=2.0, extra=None)  # noqa: E731
        return Program(wrapped, batches, {"net": model}, {"sgd": optimizer})

    runs_as_graph(build, 18)


def test_function_without_tensors() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: (number * 2, "text", None)

    stays_eager(training(make), "no_tensor_calls", 6)


def test_function_that_returns_nothing_or_itself() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.train(x, y)

        return step

    runs_as_graph(training(make), 8)


def test_decorated_module_forward_with_backward_outside() -> None:
    def build(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = net()
        forward = graphed(model) if wrap else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for number in range(10):
            x, y = torch.full((6, 4), number / 10), torch.ones(6, 3)
            optimizer.zero_grad()
            loss = F.mse_loss(forward(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    for expected, actual in zip(build(False), build(True), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_decorated_module_in_evaluation(context: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    forward = graphed(model)
    kept = []
    with context():
        for number in range(8):
            x = torch.full((6, 4), float(number))
            output = forward(x)
            kept.append((output, model(x)))
    assert graphs(forward) > 0
    for actual, expected in kept:
        assert torch.equal(actual, expected)
        assert actual.is_inference() == expected.is_inference()
        assert actual.requires_grad == expected.requires_grad


def test_decorated_module_is_still_a_module() -> None:
    model = net()
    forward = graphed(model)
    assert len(list(forward.parameters())) == 4
    assert forward.state_dict().keys() == model.state_dict().keys()
    forward.eval()
    assert not model.training
    forward.train()
    assert model.training
    assert forward[0] is model[0]


class Trainer:
    """A user's class with a decorated method."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.calls = 0

    def plain_step(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """One step."""
        self.calls += 1
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(x), y) * scale
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    step = graphed(plain_step)


def test_decorated_method() -> None:
    torch.manual_seed(0)
    first, second = Trainer(), Trainer()
    eager_first, eager_second = copy.deepcopy(first), copy.deepcopy(second)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    for _ in range(8):
        assert torch.equal(first.step(x, y), eager_first.plain_step(x, y))
        assert torch.equal(second.step(x, y, scale=0.5), eager_second.plain_step(x, y, scale=0.5))
    assert first.calls == second.calls == 8
    assert Trainer.step.__name__ == "plain_step"
    assert Trainer.step.__doc__ == "One step."
    assert graphs(first.step) > 0


def test_instance_with_a_decorated_method_is_collected() -> None:
    import gc
    import weakref

    trainer = Trainer()
    for _ in range(5):
        trainer.step(torch.ones(6, 4), torch.ones(6, 3))
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None


class WithDecoratedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    @graphed
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


def test_module_with_a_decorated_forward() -> None:
    model = WithDecoratedForward()
    x = torch.randn(6, 4)
    for _ in range(8):
        output = model(x)
        assert torch.equal(output, model.linear(x).tanh())
        model.zero_grad()
        output.sum().backward()
        expected = torch.autograd.grad(model.linear(x).tanh().sum(), model.linear.weight)[0]
        assert torch.equal(model.linear.weight.grad, expected)
    assert len(model.state_dict()) == 2


def train_step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean().detach()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_decorated_module_is_copied(way: str, used: bool) -> None:
    model = net()
    forward = graphed(model)
    x = torch.randn(6, 4)
    if used:
        with torch.no_grad():
            for _ in range(5):
                forward(x)
    copied = {
        "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    }[way](forward)  # fmt: skip
    with torch.no_grad():
        if way != "copy":
            model[0].weight.zero_()
        for _ in range(5):
            assert torch.equal(forward(x), model(x))
            if way != "copy":
                assert not torch.equal(copied(x), forward(x))
            else:
                assert torch.equal(copied(x), forward(x))


def test_model_with_a_decorated_forward_is_copied_and_pickled() -> None:
    model = WithDecoratedForward()
    x = torch.randn(6, 4)
    for _ in range(5):
        model(x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.linear.weight.zero_()
    for twin in twins:
        for _ in range(5):
            assert torch.equal(twin(x), twin.linear(x).tanh())
            assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("mode", MODES)
def test_nested_decorated_functions(mode: Mode) -> None:
    def nested(wrap: bool) -> Factory:
        def make(parts: Parts) -> Callable[..., Any]:
            inner = graphed(parts.loss) if wrap else parts.loss

            def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
                parts.optimizer.zero_grad()
                loss = inner(x, y)
                loss.backward()
                parts.optimizer.step()
                return loss.detach()

            return step

        return training(make)

    configuration = (function if mode == "function" else program)(**OPTIONS)
    reference = run(nested(False), 8, eager, observe="end")
    assert compare(reference, run(nested(True), 8, configuration, observe="end")) == []
    assert configuration.report["graph_iterations"] > 0


def test_decorated_function_calls_itself() -> None:
    @graphed
    def power(x: torch.Tensor, n: int) -> torch.Tensor:
        return x if n == 0 else power(x, n - 1) * x

    x = torch.tensor([1.0, 2.0])
    for _ in range(6):
        assert torch.equal(power(x, 3), x**4)


def test_functions_share_parameters() -> None:
    def build(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)

        def train(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        def shrink() -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.99)

        def evaluate(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(x)

        units = [graphed(f) if wrap else f for f in (train, shrink, evaluate)]
        results = []
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        for number in range(12):
            results.append(units[0](x, y))
            units[1]()
            results.append(units[2](x))
            if number == 8:
                optimizer.zero_grad(set_to_none=False)
        if wrap:
            assert all(graphs(unit) > 0 for unit in units), [str(twofold.report(u)) for u in units]
        return [*results, *model.state_dict().values()]

    for expected, actual in zip(build(False), build(True), strict=True):
        assert torch.equal(expected, actual)


def test_functions_exchange_results() -> None:
    first = graphed(lambda x: (x * 2).relu())
    second = graphed(lambda h: h.sum() + h[0])
    for number in range(8):
        x = torch.arange(4.0) - number
        hidden = first(x)
        assert torch.equal(second(hidden), (x * 2).relu().sum() + (x * 2).relu()[0])
        assert torch.equal(hidden, (x * 2).relu())
    assert graphs(first) > 0
    assert graphs(second) > 0


def test_function_inside_a_program() -> None:
    model = net()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    forward = graphed(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with twofold.program(**OPTIONS):
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(forward(x), y).backward()
            optimizer.step()
    reference = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(8):
        reference.zero_grad()
        F.mse_loss(twin(x), y).backward()
        reference.step()
    for expected, actual in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_calls_from_several_threads() -> None:
    weight = torch.randn(4, 4)
    step = graphed(lambda x: (x @ weight).tanh().sum(0))
    for _ in range(4):
        step(torch.ones(2, 4))
    failures: list[Any] = []

    def work(seed: int) -> None:
        try:
            for number in range(30):
                x = torch.full((2, 4), seed + number / 10)
                if not torch.equal(step(x), (x @ weight).tanh().sum(0)):
                    failures.append((seed, number))
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_call_in_another_thread_than_the_first() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.train(x, y).detach()

    class Threaded:
        def __init__(self, step: Any) -> None:
            self.step = step

        def __call__(self, *arguments: Any) -> Any:
            results: list[Any] = []
            thread = threading.Thread(target=lambda: results.append(self.step(*arguments)))
            thread.start()
            thread.join()
            return results[0]

    def run(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        program = training(make)()
        step: Any = graphed(program.step) if wrap else program.step
        call = Threaded(step)
        results = [(call if number % 2 else step)(*program.batches(number)) for number in range(10)]
        return [*results, *program.modules["net"].state_dict().values()]

    for expected, actual in zip(run(False), run(True), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("mode", MODES)
def test_tensor_work_in_a_thread_inside_the_unit(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            halves: list[torch.Tensor] = []

            def work() -> None:
                halves.append(x.abs().sqrt())

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return parts.train(x + halves[0], y).detach()

        return step

    accounted(training(make), 8, mode)


def test_intermediate_is_used_in_a_thread_inside_the_unit() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.append(output.detach().sum().item()))
            thread.start()
            thread.join()
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), seen

        return step

    same(training(make), 8)


def test_other_thread_trains_at_the_same_time() -> None:
    def run(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        trainers = [Trainer() for _ in range(2)]
        x, y = torch.randn(6, 4), torch.randn(6, 3)

        def work(trainer: Trainer) -> None:
            step = trainer.step if wrap else trainer.plain_step
            for _ in range(15):
                step(x, y)

        threads = [threading.Thread(target=work, args=(trainer,)) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [p.detach() for trainer in trainers for p in trainer.model.parameters()]

    for expected, actual in zip(run(False), run(True), strict=True):
        assert torch.equal(expected, actual)


def test_one_thread_at_a_time_uses_the_memory_of_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    inside, go_on = threading.Event(), threading.Event()

    @graphed
    def waits(x: torch.Tensor) -> float:
        inside.set()
        go_on.wait(20)
        return x.sum().item()

    @graphed
    def doubles(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    thread = threading.Thread(target=waits, args=(torch.ones(2),))
    thread.start()
    inside.wait(20)
    assert doubles(torch.ones(2)).tolist() == [2.0, 2.0]
    go_on.set()
    thread.join()
    for _ in range(4):
        doubles(torch.ones(2))
    report = twofold.report(doubles).to_dict()
    assert [(entry["code"], entry["count"]) for entry in report["fallbacks"]] == [("thread", 1)]
    assert report["graph_iterations"] == 2


def test_step_in_another_thread_during_a_program() -> None:
    trainer, other = Trainer(), Trainer()
    reference, other_reference = copy.deepcopy(trainer), copy.deepcopy(other)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    with twofold.program(**OPTIONS):
        for _ in range(8):
            thread = threading.Thread(target=other.plain_step, args=(x, y))
            thread.start()
            trainer.plain_step(x, y)
            thread.join()
    for _ in range(8):
        reference.plain_step(x, y)
        other_reference.plain_step(x, y)
    for mine, expected in ((trainer, reference), (other, other_reference)):
        for left, right in zip(mine.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_generator_function_is_decorated() -> None:
    def stream(x: torch.Tensor) -> Any:
        for scale in range(3):
            yield x * scale

    wrapped = graphed(stream)
    for _ in range(5):
        assert [float(v.sum()) for v in wrapped(torch.ones(2))] == [0.0, 2.0, 4.0]


def test_coroutine_function_is_decorated() -> None:
    async def double(x: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return x * 2

    wrapped = graphed(double)
    for number in range(5):
        assert asyncio.run(wrapped(torch.full((2,), float(number)))).tolist() == [2.0 * number] * 2


def test_decorator_forms() -> None:
    @twofold.function
    def plain(x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return x * 2

    @twofold.function(numerics="exact", backend="replay", background=False)
    def configured(x: torch.Tensor, /, *, scale: float = 3.0) -> torch.Tensor:
        return x * scale

    partial = graphed(functools.partial(configured, scale=4.0))
    added = graphed(torch.add)

    class Callable_:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    instance = graphed(Callable_())
    x = torch.ones(2)
    for _ in range(5):
        assert plain(x).tolist() == [2.0, 2.0]
        assert configured(x).tolist() == [3.0, 3.0]
        assert configured(x, scale=5.0).tolist() == [5.0, 5.0]
        assert partial(x).tolist() == [4.0, 4.0]
        assert added(x, x).tolist() == [2.0, 2.0]
        assert instance(x).tolist() == [2.0, 2.0]
    assert plain.__doc__ == "Doubles."
    assert graphs(configured) > 0


class Shapes:
    """Static and class methods, and a property."""

    factor = 3.0

    @staticmethod
    @graphed
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @classmethod
    def make(cls) -> Any:
        return graphed(lambda x: x * cls.factor)


def test_static_and_class_methods() -> None:
    triple = Shapes.make()
    for _ in range(5):
        assert Shapes.double(torch.ones(2)).tolist() == [2.0, 2.0]
        assert Shapes().double(torch.ones(2)).tolist() == [2.0, 2.0]
        assert triple(torch.ones(2)).tolist() == [3.0, 3.0]


class Slotted:
    """An instance that can be neither weakly referenced nor hashed."""

    __slots__ = ("scale",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.scale = 2.0

    def __eq__(self, other: object) -> bool:
        return True

    @graphed
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_method_of_an_unhashable_instance() -> None:
    first, second = Slotted(), Slotted()
    second.scale = 5.0
    for _ in range(5):
        assert first.apply(torch.ones(1)).item() == 2.0
        assert second.apply(torch.ones(1)).item() == 5.0


@dataclass
class EqualByValue:
    """Instances that are equal and hash alike, and are not the same."""

    scale: torch.Tensor = field(compare=False)

    __hash__ = lambda self: 1  # noqa: E731

    @graphed
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_methods_of_equal_instances() -> None:
    first, second = EqualByValue(torch.tensor(2.0)), EqualByValue(torch.tensor(5.0))
    for _ in range(5):
        assert first.apply(torch.ones(1)).item() == 2.0
        assert second.apply(torch.ones(1)).item() == 5.0


def test_engine_eager_changes_nothing() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        return lambda number, x, y: parts.train(x, y)

    report = same(training(make), 5, engine="eager")
    assert report["graph_iterations"] == 0

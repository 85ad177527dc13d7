"""Python in a training step, construct by construct. In a file of its own, for pytest rewrites those with tests."""

import contextlib
import functools
import math
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tests.hazards.programs import MakeStep, Parts, training

STEPS = 12
CONSTRUCTS: dict[str, tuple[MakeStep, dict[str, Any]]] = {}


def construct(make_step: MakeStep | None = None, **options: Any) -> Any:
    """Register a program. `fresh`: its graphs need not serve for two calls; `refusals` are allowed so often."""
    if make_step is None:
        return functools.partial(construct, **options)
    CONSTRUCTS[make_step.__name__] = make_step, options
    return make_step


SCALE = 0.5
COUNTS = {"calls": 0}


@construct
def plain_step(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        return parts.train(x, y)

    return step


@construct
def result_is_a_number(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.train(x, y)
        return loss.item()

    return step


@construct
def assignments(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        a = b = 2
        (c, d), *rest = (a, b), 3, 4
        e: int = c + d
        rest[0], rest[1] = rest[1], rest[0]
        e += len(rest)
        e *= 2
        x = x * (e / 12) + rest[0] - rest[-1]
        return parts.train(x, y), e, rest

    return step


@construct
def conditions(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        if number < 0:
            scale = 3.0
        elif number >= 100 or parts is None:
            scale = 4.0
        else:
            scale = 1.0 if number >= 0 and not False else 2.0
        return parts.train(x * scale, y)

    return step


@construct
def loops(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        total = 0
        for index in range(4):
            if index == 1:
                continue
            if index == 3:
                break
            total += index
        else:
            total = 100
        while total < 10:
            total += 3
        else:
            total += 1
        for i, (a, b) in enumerate(zip([1, 2], (3, 4), strict=True), start=1):
            total += i * a * b
        for key, value in {"a": 1, "b": 2}.items():
            total += value * len(key)
        for item in reversed([1, 2, 3]):
            total -= item
        return parts.train(x * (total / 10), y), total

    return step


@construct
def loop_over_a_tensor(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        rows = [row * 2 for row in x]
        return parts.train(torch.stack(rows), y)

    return step


@construct
def comprehensions(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        squares = [i * i for i in range(5) if i % 2 == 0]
        table = {i: j for i in range(2) for j in range(i + 1)}
        unique = {i % 2 for i in squares}
        total = sum(i for i in squares) + len(table) + len(unique) + max(squares)
        nested = [[a + b for a in (1, 2)] for b in (3, 4)]
        ok = any(i > 3 for i in squares) and all(i >= 0 for i in squares)
        return parts.train(x * (total / 30), y), nested, ok

    return step


@construct
def functions(parts: Parts) -> Callable[..., Any]:
    def outer(scale, *extra, shift=0.0, **named):
        def inner(value):
            return value * scale + shift + sum(extra) + named.get("more", 0.0)

        return inner

    twice = lambda value, n=2: value * n  # noqa: E731

    def step(number, x, y):
        add = lambda a, b=1: a + b  # noqa: E731
        made = outer(0.5, 0.25, 0.25, shift=0.125, more=0.5)
        arguments, keywords = (0.5,), {"shift": 1.0}
        x = outer(*arguments, **keywords)(twice(made(x)))
        return parts.train(x * add(1), y)

    return step


@construct
def recursion(parts: Parts) -> Callable[..., Any]:
    def power(value, n):
        return value if n == 0 else power(value * 0.9, n - 1)

    def step(number, x, y):
        return parts.train(power(x, 3), y)

    return step


@construct
def early_return(parts: Parts) -> Callable[..., Any]:
    def choose(n):
        for index in range(10):
            if index == n:
                return index
        return None

    def step(number, x, y):
        if choose(20) is not None:
            return 0.0
        return parts.train(x * choose(2), y)

    return step


@construct
def global_and_nonlocal(parts: Parts) -> Callable[..., Any]:
    COUNTS["calls"] = 0
    seen = 0

    def step(number, x, y):
        nonlocal seen
        global LATEST
        seen += 1
        LATEST = seen * 2
        COUNTS["calls"] += 1
        parts.seen["counts"] = (seen, LATEST, COUNTS["calls"])
        return parts.train(x * SCALE, y)

    return step


LATEST = 0


class Averages:
    """A plain class of the program."""

    def __init__(self) -> None:
        self.count = 0
        self.values: list[float] = []
        self._mean = 0.0

    @property
    def mean(self) -> float:
        return self._mean

    @mean.setter
    def mean(self, value: float) -> None:
        self._mean = value

    @staticmethod
    def half(value: float) -> float:
        return value / 2

    @classmethod
    def make(cls) -> "Averages":
        return cls()

    def add(self, value: float) -> None:
        self.count += 1
        self.values.append(value)
        self.mean = self.mean + self.half(value - self.mean)

    def __call__(self, value: float) -> None:
        self.add(value)

    def __len__(self) -> int:
        return self.count


@construct
def objects_of_the_program(parts: Parts) -> Callable[..., Any]:
    averages = parts.seen["averages"] = Averages()

    def step(number, x, y):
        loss = parts.loss(x, y)
        averages(loss.item())
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        local = Averages.make()
        local.add(1.0)
        return loss.detach(), local.count, len(averages)

    return step


@construct
def appended_list(parts: Parts) -> Callable[..., Any]:
    history = parts.seen["history"] = []

    def step(number, x, y):
        loss = parts.train(x, y)
        history.append(loss.item())
        history.extend([1.0, 2.0])
        return len(history)

    return step


@construct
def list_read_after_append(parts: Parts) -> Callable[..., Any]:
    history = parts.seen["history"] = []

    def step(number, x, y):
        loss = parts.loss(x, y)
        history.append(loss.item())
        mean = sum(history[-3:]) / 3 if False else history[-1]
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        parts.seen["latest"] = mean
        return mean

    return step


@construct
def dictionaries_outside(parts: Parts) -> Callable[..., Any]:
    counts = parts.seen["counts"] = {"steps": 0, "table": {}}

    def step(number, x, y):
        counts["steps"] += 1
        counts["table"]["last"] = counts["steps"] * 2
        if "missing" in counts:
            return None
        return parts.train(x, y), counts.get("missing", 5), counts["table"].get("last")

    return step


Pair = namedtuple("Pair", "left right")


class Row(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    names: list[str] = field(default_factory=list)
    weight: float = 1.0

    def scaled(self) -> "Batch":
        return Batch(self.x * self.weight, self.y, weight=self.weight / 2)


@construct
def values_made_by_the_call(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        batch = Batch(x, y).scaled()
        pair = Pair(batch.x, right=batch.y)
        row = Row(*pair)
        batch.names.append("one")
        table = {"x": row.x, "y": row.y}
        left, right = table["x"], table["y"]
        loss = parts.train(left, right)
        return {"loss": loss, "names": batch.names, "weight": batch.weight}, Pair(1, [2, 3]), batch

    return step


@construct
def text_and_print(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.loss(x, y)
        value = loss.item()
        print(f"loss {value:.3f} {value!r:>10} of {'all':<5}", number, end="|\n")
        print("loss", value, [1, value], sep=", ")
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return "%.2f" % value, f"{value:.1f}", str(round(value, 2))  # noqa: UP031

    return step


@construct
def print_of_a_tensor(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.loss(x, y)
        print(loss)
        print(f"{loss:.3f}")
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return loss

    return step


@construct
def no_grad_and_autocast(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        with torch.no_grad():
            mean = x.mean()
        with torch.autocast("cpu", enabled=False), contextlib.nullcontext() as nothing:
            x = x - mean
        assert nothing is None
        return parts.train(x, y)

    return step


@construct
def asserts_and_exceptions_not_taken(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        assert x.dim() == 2, "two dimensions"
        if x.size(0) != y.size(0):
            raise ValueError("sizes differ")
        try:
            scale = {"a": 0.5}["a"]
            x = x * scale
        except KeyError:
            x = x * 2
        else:
            x = x + 1
        finally:
            x = x - 1
        try:
            [][0]
        except IndexError:
            x = x * 1.5
        return parts.train(x, y)

    return step


@construct
def tensor_predicate(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.loss(x, y)
        if loss.isnan():
            return None
        if loss > 1e6 or bool(torch.isinf(loss)):
            loss = loss * 0
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return loss

    return step


@construct
def counters_steer(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.step = 0
    state.best = math.inf

    def step(number, x, y):
        state.step += 1
        loss = parts.loss(x, y)
        value = float(loss)
        state.best = min(state.best, value)
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        if state.step % 100 == 0:
            print("hundred")
        return state.best

    return step


@construct
def numpy_statistics(parts: Parts) -> Callable[..., Any]:
    class State:
        mean = np.zeros(3)
        history = np.zeros(5)

    state = parts.seen["state"] = State()
    state.mean = np.zeros(3)
    state.history = np.zeros(5)

    def step(number, x, y):
        loss = parts.loss(x, y)
        value = loss.item()
        state.mean += (np.array([value, value * 2, 1.0]) - state.mean) * 0.1
        state.history[1] = value
        state.total = float(np.sum(state.mean) + state.history.max())
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return state.total

    return step


@construct
def state_carried_as_an_attribute(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.hidden = torch.zeros(6, 4)
    state.pair = (torch.zeros(6, 4), torch.zeros(6, 4))

    def step(number, x, y):
        hidden = torch.tanh(x + state.hidden * 0.5 + state.pair[0])
        loss = parts.train(hidden, y)
        state.hidden = hidden.detach()
        state.pair = (state.pair[1], hidden.detach() * 0.1)
        return loss.detach()

    return step


@construct
def aliases(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    first = parts.seen["first"] = State()
    second = parts.seen["second"] = State()
    first.items = second.items = [0, 0]
    first.other = second
    second.count = 1

    def step(number, x, y):
        first.items[0] = second.items[0] + 1
        second.items[1] = first.items[0] * 2
        first.other.count = second.count + 1
        return parts.train(x, y), second.count, first.items[1]

    return step


@construct
def clipped_gradients(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        parts.optimizer.zero_grad(set_to_none=True)
        loss = parts.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 0.5)
        parts.optimizer.step()
        return loss.detach(), norm

    return step


@construct
def weights_summed(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.loss(x, y) + 1e-3 * sum(p.pow(2).sum() for p in parts.model.parameters())
        parts.optimizer.zero_grad()
        loss.backward()
        parts.optimizer.step()
        return loss

    return step


@construct
def gradients_by_hand(parts: Parts) -> Callable[..., Any]:
    parameters = list(parts.model.parameters())

    def step(number, x, y):
        loss = parts.loss(x, y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
        return loss.detach()

    return step


@construct
def deque_and_partial(parts: Parts) -> Callable[..., Any]:
    recent = parts.seen["recent"] = deque(maxlen=3)
    scaled = functools.partial(torch.mul, other=0.5)

    def step(number, x, y):
        loss = parts.train(scaled(x), y)
        recent.append(float(loss))
        return loss

    return step


class Deep(nn.Module):
    """Containers of modules, a buffer, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.heads = nn.ModuleDict({"out": nn.Linear(4, 3)})
        self.norm = nn.BatchNorm1d(4)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for index, layer in enumerate(self.layers):
            x = torch.relu(layer(x)) * self.scales[0] if index else layer(x)
        if self.training:
            self.seen += 1
        x = self.norm(x) + self.layers[-1].bias
        return self.heads["out"](x)


@construct(model=Deep)
def module_containers(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        return parts.train(x, y)

    return step


@construct
def learning_rate_schedule(parts: Parts) -> Callable[..., Any]:
    schedule = parts.seen["schedule"] = torch.optim.lr_scheduler.StepLR(parts.optimizer, 50, 0.5)

    def step(number, x, y):
        loss = parts.train(x, y)
        schedule.step()
        return loss, schedule.get_last_lr()

    return step


@construct
def exponential_average_of_weights(parts: Parts) -> Callable[..., Any]:
    average = parts.seen["average"] = [p.detach().clone() for p in parts.model.parameters()]

    def step(number, x, y):
        loss = parts.train(x, y)
        with torch.no_grad():
            for mean, parameter in zip(average, parts.model.parameters(), strict=True):
                mean.mul_(0.9).add_(parameter, alpha=0.1)
        return loss.detach().clone()

    return step


@construct
def annealed_loss_weight(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.weight = 1.0

    def step(number, x, y):
        state.weight *= 0.95
        parts.optimizer.zero_grad()
        loss = parts.loss(x, y) * state.weight
        loss.backward()
        parts.optimizer.step()
        return loss

    return step


@construct
def tensors_from_python(parts: Parts) -> Callable[..., Any]:
    table = [0.5, 1.5, 1.0, 2.0]

    def step(number, x, y):
        weights = torch.tensor(table)
        return parts.train(x * weights, y)

    return step


@construct
def decisions_after_the_step(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.best = math.inf
    state.high = 0

    def step(number, x, y):
        loss = parts.train(x, y)
        if loss.item() > 0.0:
            state.high += 1
        if torch.isfinite(loss):
            state.finite = True
        return loss

    return step


@construct
def weights_read_after_the_step(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.train(x, y)
        norms = [p.detach().norm().item() for p in parts.model.parameters()]
        copies = [p.detach().clone() for p in parts.model.parameters()]
        return loss.detach(), norms, copies, parts.model[0].weight.T.sum()

    return step


class Shared:
    total = 0
    half = 0.5


@construct
def attributes_of_functions_and_classes(parts: Parts) -> Callable[..., Any]:
    Shared.total = 0

    def counted(x, by=[1.0]):  # noqa: B006 - that calls share it is the point
        counted.calls += 1
        by[0] = counted.calls * 0.5
        return x * by[0]

    counted.calls = 0
    shared = Shared()

    def step(number, x, y):
        Shared.total += 2
        return parts.train(counted(x) / (counted.calls + 1), y), shared.total, shared.half, Shared.total

    return step


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@construct(model=with_buffers)
def one_model_is_given_the_state_of_another(parts: Parts) -> Callable[..., Any]:
    target = with_buffers()
    parts.seen["target"] = list(target.parameters())

    def step(number, x, y):
        with torch.no_grad():
            for theirs, own in zip(target.parameters(), parts.model.parameters(), strict=True):
                theirs.mul_(0.75).add_(own, alpha=0.25)
        state = target.state_dict()
        found = parts.model.load_state_dict(state)
        return parts.train(x, y), found.missing_keys, list(state), state._metadata["1"]["version"]

    return step


@construct
def attributes_of_an_ordered_dictionary(parts: Parts) -> Callable[..., Any]:
    def step(number, x, y):
        loss = parts.train(x, y)
        made = OrderedDict(loss=loss.detach(), number=number)
        made.note = [number]
        before = parts.seen.get("made", made)
        parts.seen["made"] = made
        made.later = number + 1
        made.note.append(2)
        is_kept = hasattr(made, "later"), hasattr(made, "nothing"), hasattr(made.copy(), "note")
        return before.note, before.later, is_kept, getattr({}, "later", 7)

    return step


@construct
def a_number_is_chosen(parts: Parts) -> Callable[..., Any]:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.low, state.high, state.total = 1.0, 2.5, 0.0

    def step(number, x, y):
        state.total += state.high if number % 3 else -state.low
        weight = 3 if number % 2 else number
        return parts.train(x, y), weight, "odd" if number < 100 else "even"

    return step


def factory(name: str) -> Any:
    make_step, options = CONSTRUCTS[name]
    return training(make_step, **{k: v for k, v in options.items() if k in ("model", "optimizer", "between", "sizes")})

"""Random imperative training programs, as source text: what users write, small, deterministic, and of one type a name.

`programs()` is a strategy of `Source`s. A program has a module with state, a plain object with a count, a list, a dict
and a vector, global names, helper functions, and a step that works on them: control flow over Python values and
tensors, mutation, aliasing, in-place writes, closures, early returns, exceptions, printing, and often a step of an
optimizer. The batches vary in length. A program that raises is as good as one that does not: what it raised is
compared too. Each statement grows from a number of its own, so that a failing program shrinks by whole statements.
"""

import importlib.util
import random
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st

from benchmarks.programs import Program
from tests.properties.phrases import DEFINITIONS, KINDS, filled

CALLS = 8
WIDTH = 3
MODULE = "random_program"

PREAMBLE = """\
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

TOTAL = 0
LOG = []


class Holder:
    def __init__(self):
        self.count = 0
        self.items = [1, 2]
        self.table = {"a": 0.5}
        self.vector = torch.ones(3)
        self.generator = np.random.default_rng(len(self.items))

    @property
    def doubled(self):
        return 2 * self.count

    def bump(self, *numbers, by=1):
        self.count += by
        return sum(numbers) % 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("running", torch.zeros(3))
        self.calls = 0
        self.state = None

    def forward(self, t):
        self.calls += 1
        if self.training:
            return torch.tanh(self.linear(t)) * self.scale
        return self.linear(t)


def scaled(t, by=2.0, *, shift=0):
    return t * by + shift


def first_positive(ts, otherwise):
    for t in ts:
        if t.sum() > 0:
            return t
    return otherwise


model = Net()
holder = Holder()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
"""

STEP = """

def twice(t):
    return {twice}


def step(number, x, flag):
    global TOTAL
    n = 1
    parts = [x, x * 0.5]
"""

DEEPEST = 4
INDENT = "    "
PURE_CALLS = ("torch.tanh({})", "F.relu({})", "{}.sigmoid()", "{}.abs()", "{}.clone()", "{}.neg()", "({})[:1]")
MODEL_CALLS = ("model({})", "model.linear({})", "scaled({})", "scaled({}, shift=n)", "twice({})")


@dataclass(frozen=True)
class Source:
    """A program's text, and the lengths of the batches it is called with."""

    text: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.text}\n# lengths of the batches: {self.lengths}"


class Writer:
    """Writes the body of one step; `tensors`, `numbers` and `lists` are the names that are bound for certain."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.lines: list[str] = []
        self.depth = 1
        self.made = 0
        self.tensors = ["x"]
        self.numbers = ["n", "number"]
        self.lists = ["parts"]
        self.returned = "{}.detach(), n"
        """What the step returns early: the form of it, for a tensor."""

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def write(self, line: str) -> None:
        self.lines.append(INDENT * self.depth + line)

    def new_name(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    # ---- expressions ---------------------------------------------------------------------------------------

    def tensor(self, depth: int = 2) -> str:
        """An expression whose value is f32[rows, 3], f32[1, 3] or f32[3]."""
        if depth == 0:
            return self.choose(*self.tensors[-4:], "holder.vector", "model.running")
        inner = self.tensor(depth - 1)
        kind = self.choose("name", "pure", "pure", "model", "binary", "number", "choice", "where", "sum", "random")
        match kind:
            case "name":
                return inner
            case "pure":
                return self.choose(*PURE_CALLS).format(inner)
            case "model":
                return self.choose(*MODEL_CALLS).format(inner)
            case "binary":
                return f"({inner} {self.choose('+', '-', '*')} {self.tensor(depth - 1)})"
            case "number":
                return f"({inner} * {self.choose(self.number(), '0.5', 'holder.table[' + repr('a') + ']')})"
            case "choice":
                return f"({inner} if {self.condition()} else {self.tensor(depth - 1)})"
            case "where":
                return f"torch.where({inner} > 0, {inner}, {self.tensor(0)})"
            case "sum":
                return f"sum([{self.tensor(0)} * k for k in range({self.choose(1, 2, 3)})], {inner})"
            case _:
                noise = self.choose(
                    "random.random()",
                    "float(holder.generator.normal())",
                    "torch.rand(3)",
                    "F.dropout(torch.ones(3), 0.5)",
                )
                return f"({inner} + {noise})"

    def vector(self) -> str:
        """An expression whose value is f32[3] without history, so that it may outlive the call."""
        return f"({self.tensor()}).detach().reshape(-1, 3).{self.choose('mean(0)', 'sum(0)', 'amax(0)')}"

    def scalar(self) -> str:
        return f"{self.tensor(1)}.{self.choose('mean()', 'sum()', 'max()')}"

    def number(self) -> str:
        """An expression whose value is a small int."""
        return self.choose(
            self.choose(*self.numbers), "1", "2", "len(holder.items)", "x.shape[0]", "holder.count % 4",
            "model.calls % 3", "random.randint(1, 2)", "int(np.random.randint(3))", "random.choice((1, 2))",
            f"({self.choose(*self.numbers)} + 1) % 5", "TOTAL % 3", "len(parts)",
        )  # fmt: skip

    def condition(self) -> str:
        python = (
            f"{self.number()} % 2 == 0", f"{self.number()} > {self.choose(1, 2, 3)}", "flag", "not flag", "len(x) > 2",
            "model.training", "model.state is None", "holder.count > 3 and flag", "'b' in holder.table", "number < 4",
            "random.random() < 0.5", "np.random.rand() < 0.7", "holder.generator.random() < 0.6",
        )  # fmt: skip
        tensors = (f"{self.scalar()} > 0", f"{self.scalar()}.item() > 0.3", f"bool(({self.tensor(0)} > 0).all())")
        return self.choose(*self.choose(python, python, tensors))

    # ---- statements ----------------------------------------------------------------------------------------

    def block(self, size: int) -> None:
        """Some statements; what they bind is not relied on after them."""
        self.depth += 1
        bound = list(self.tensors), list(self.numbers), list(self.lists)
        for _ in range(self.random.randint(1, size)):
            self.statement()
        self.tensors, self.numbers, self.lists = bound
        self.depth -= 1

    def statement(self) -> None:
        kinds: list[Callable[[], None]] = [
            self.write_assign, self.write_assign, self.write_rebind, self.write_number, self.write_unpack,
            self.write_heap, self.write_heap, self.write_list, self.write_list, self.write_in_place,
            self.write_alias, self.write_alias, self.write_print, self.write_closure, *[self.write_phrase] * 8,
        ]  # fmt: skip
        if self.depth < DEEPEST:
            kinds += [self.write_branch, self.write_branch, self.write_loop, self.write_loop, self.write_block]
        if self.depth > 1:
            kinds.append(self.write_leave)
        self.choose(*kinds)()

    def write_assign(self) -> None:
        expression = self.tensor()
        name = self.new_name("t")
        self.write(f"{name} = {expression}")
        self.tensors.append(name)

    def write_rebind(self) -> None:
        name = self.choose(*self.tensors[-3:])
        self.write(f"{name} = {self.tensor()}")

    def write_number(self) -> None:
        self.write(self.choose(f"n = {self.number()}", f"n += {self.number()}", "n = int(flag) + n % 3", "n //= 2"))

    def write_unpack(self) -> None:
        first, second = self.tensor(1), self.tensor(1)
        a, b = self.new_name("t"), self.new_name("t")
        self.write(self.choose(f"{a}, {b} = {first}, {second}", f"{a}, *{b} = [{first}, {second}]; {b} = {b}[0]"))
        self.tensors += [a, b]
        if self.choose(True, False):
            self.write(f"{a}, {b} = {b}, {a}")

    def write_heap(self) -> None:
        self.write(
            self.choose(
                "holder.count += 1",
                f"holder.count = {self.number()}",
                f"holder.items.append({self.number()})",
                f"holder.items[0] = {self.number()}",
                "holder.items = holder.items[-3:]",
                "holder.items.pop() if len(holder.items) > 3 else None",
                "same = holder; same.count += 2; n = holder.count % 5",
                "items = holder.items; items.append(7); n = len(holder.items) % 4",
                f"holder.table['a'] = 0.5 * holder.table['a'] + {self.choose('0.25', self.scalar() + '.item()')}",
                "holder.table['b'] = holder.table.get('b', 0) + 1",
                f"holder.vector = {self.vector()}",
                f"model.state = {self.vector()}",
                "model.running.mul_(0.5)",
                f"model.running.add_({self.vector()}, alpha=0.1)",
                f"model.running = {self.vector()}",
                "model.train(not model.training)",
                "TOTAL += 1",
                f"LOG.append({self.choose('TOTAL', 'n', f'{self.scalar()}.item()', self.vector())})",
                "del LOG[:-4]",
                "random.shuffle(parts)",
                "holder.table['a'] = random.uniform(0.0, 1.0)",
                "setattr(holder, 'extra', getattr(holder, 'extra', 0) + 1)",
            )
        )

    def write_list(self) -> None:
        self.write(
            self.choose(
                f"parts.append({self.tensor(1)})",
                f"parts[0] = {self.tensor(1)}",
                "parts = parts + [x]",
                "other = parts; other.append(x * 2)",
                "parts = [p * 2 for p in parts if p.dim() > 0]",
                "parts.reverse()",
                "parts = [*parts[1:], parts[0]]",
                "parts = list(map(lambda p: p + n, parts))",
                "parts = list({k: p for k, p in enumerate(parts)}.values())",
                "parts.insert(0, sum(p.mean() for p in parts) + x)",
                "parts.append(first_positive(parts, x))",
                "n = holder.bump(n, *range(n % 3), by=2)",
                "n = holder.doubled % 5",
                "parts[:] = parts[-3:]",
                "n = max((m := len(parts)), n) % 5",
            )
        )

    def write_in_place(self) -> None:
        name = self.new_name("t")
        self.write(f"{name} = {self.tensor()}.clone()")
        view = self.choose(name, f"{name}[..., 0]", f"{name}[..., :2]", f"{name}.detach()", f"{name}.unsqueeze(0)")
        if view != name:
            self.write(f"view = {view}")
        target = name if view == name else "view"
        self.write(
            self.choose(f"{target} += {self.number()}", f"{target} *= 0.5", f"{target}.add_(1)", f"{name}[..., 1] = n")
        )
        self.tensors.append(name)

    def write_alias(self) -> None:
        """Change what has two names, or belongs to the program, by one of them."""
        vector = self.vector()
        self.write(
            self.choose(
                "v = holder.vector; v.mul_(0.5)",
                "v = holder.vector; holder.vector = v + 1; v.zero_()",
                f"model.state = holder.vector; model.state += {vector}",
                "holder.vector += 1",
                "holder.items += [n]",
                "model.calls -= 1",
                "parts[0] += 1",
                "parts[-1] *= 0.5",
                "first, second = parts[0], parts[-1]; first.add_(second.detach())",
                f"LOG.append(holder.vector); holder.vector.add_({vector})",
                "x = x.clone(); parts.append(x); x.add_(1)",
                "rows = x.unbind(); n = len(rows); rows[0].detach().mul_(2)",
                "n = int(parts[0] is x) + int(model.state is holder.vector)",
                "n = int(any(p is x for p in parts))",
                "box = {'t': x, 'n': n}; same = box; same['t'] = x * 2; parts.append(box['t'])",
                "bag = [parts, holder.items]; bag[0].append(x); bag[1].append(n)",
            )
        )

    def write_phrase(self) -> None:
        for line in filled(self.choose(*self.choose(*KINDS)), lambda place: getattr(self, place)()):
            self.write(line)

    def write_print(self) -> None:
        self.write(
            self.choose(
                "print('n', n, flag)", "print(f'{holder.count=} {TOTAL:>3}')", f"print({self.scalar()}.item() > 0)",
                "print(len(parts), tuple(x.shape), holder.items)", f"print(round({self.scalar()}.item(), 2))",
            )
        )  # fmt: skip

    def write_branch(self) -> None:
        self.write(f"if {self.condition()}:")
        self.block(2)
        if self.choose(True, False):
            if self.choose(True, False):
                self.write(f"elif {self.condition()}:")
                self.block(1)
            self.write("else:")
            self.block(2)

    def write_loop(self) -> None:
        header = self.choose(
            f"for k in range(({self.number()}) % 4):", "for k, p in enumerate(parts):", "for row in x:",
            "for key, value in list(holder.table.items()):", "for p, q in zip(parts, reversed(parts)):",
            "for k in holder.items[:3]:", "while n > 1 and",
        )  # fmt: skip
        if header.startswith("while"):
            rounds = self.new_name("k")
            self.write(f"{rounds} = 0")
            self.write(f"{header} {rounds} < 4:")
            self.write(f"{INDENT}{rounds} += 1")
            self.write(f"{INDENT}n -= 1")
        else:
            self.write(header)
        if "parts" in header:
            self.write(f"{INDENT}if k > 3:" if " k," in header else f"{INDENT}if len(parts) > 9:")
            self.write(f"{INDENT * 2}break")
        outer = list(self.tensors), list(self.numbers)
        self.tensors += [name for name in ("row", "p", "q") if f" {name} " in header or f" {name}," in header]
        self.numbers += ["k"] if " k " in header or " k," in header else []
        self.block(2)
        if self.choose(True, False):
            self.write(f"{INDENT}if {self.condition()}:")
            self.write(f"{INDENT * 2}{self.choose('break', 'continue')}")
            self.write(f"{INDENT}{self.choose('n += 1', 'parts.append(x)', 'holder.count += 1')}")
        self.tensors, self.numbers = outer
        if self.choose(True, False, False):
            self.write("else:")
            self.block(1)

    def write_block(self) -> None:
        kind = self.choose("with torch.no_grad():", "try:", "try:")
        self.write(kind)
        self.block(2)
        if kind == "try:":
            if self.choose(True, False):
                self.write(f"{INDENT}{self.choose('[][n + 9]', 'holder.missing', 'torch.ones(2) @ torch.ones(5)')}")
            self.write("except (IndexError, AttributeError, RuntimeError) as error:")
            self.write(f"{INDENT}print(type(error).__name__)")
            if self.choose(True, False):
                self.write("finally:")
                self.write(f"{INDENT}holder.count += 1")

    def write_leave(self) -> None:
        self.write(f"if {self.condition()}:")
        what = self.choose("return", "return", "raise", "assert")
        match what:
            case "return":
                self.write(f"{INDENT}return {self.returned.format(self.tensor(1))}")
            case "raise":
                self.write(f"{INDENT}raise ValueError(f'call {{number}}')")
            case _:
                self.write(f"{INDENT}assert {self.condition()}, 'as was said'")

    def write_closure(self) -> None:
        name = self.new_name("f")
        if self.choose(True, False):
            self.write(f"{name} = lambda t, k={self.number()}: t * k + {self.tensor(0)}")
        else:
            self.write(f"def {name}(t):")
            self.write(f"{INDENT}nonlocal n")
            self.write(f"{INDENT}n += 1")
            self.write(f"{INDENT}return t + {self.tensor(0)}")
        result = self.new_name("t")
        self.write(f"{result} = {name}({self.tensor(1)})")
        self.tensors.append(result)


NUMBERS = st.integers(0, 2**32 - 1)


@st.composite
def programs(draw: st.DrawFn, statements: int = 7) -> Source:
    """Draw a program whose step has up to so many statements at its top."""
    writer = Writer()
    for number in draw(st.lists(NUMBERS, min_size=1, max_size=statements)):
        writer.random.seed(number)
        writer.statement()
    writer.random.seed(draw(NUMBERS))
    if writer.choose(True, False):
        writer.write(f"loss = ({writer.tensor()}).square().mean() + model(x).sum() * 0.1")
        writer.write("optimizer.zero_grad()")
        writer.write("loss.backward()")
        writer.write("optimizer.step()")
        returned = writer.choose("loss.detach(), n", "{'loss': loss.item(), 'n': n}", "loss")
    else:
        returned = writer.choose(f"{writer.tensor(1)}, n", f"[{writer.tensor(0)}.detach(), holder.count]")
    writer.write(f"return {returned}")
    twice = writer.choose("t * 2", "t + t", "model.linear(t) if t.dim() > 1 else t", "scaled(t, by=0.5)")
    text = PREAMBLE + DEFINITIONS + STEP.format(twice=twice) + "\n".join(writer.lines) + "\n"
    usual = draw(st.integers(2, 4))
    unusual = draw(st.frozensets(st.integers(0, CALLS - 1), max_size=3))
    return Source(text, tuple(usual - 1 if number in unusual else usual for number in range(CALLS)))


@contextmanager
def written(source: Source, folder: Path) -> Generator[Path, None, None]:
    """Write the program to a file of its own, where Python and its tools find its source."""
    path = folder / f"{MODULE}_{sha256(source.text.encode()).hexdigest()[:12]}.py"
    path.write_text(source.text)
    yield path
    path.unlink()
    sys.modules.pop(MODULE, None)


def load(path: Path) -> ModuleType:
    """Run the file as a new module: new functions, new globals."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def build(source: Source, path: Path) -> Program:
    """Load the program anew, with its batches: new tensors at every call, of the lengths that it was drawn with."""
    module = load(path)
    pool = [torch.randn(length, WIDTH) for length in source.lengths]
    flags = [random.random() < 0.7 for _ in source.lengths]

    def batches(number: int) -> tuple[int, torch.Tensor, bool]:
        return number, pool[number % CALLS].clone(), flags[number % CALLS]

    class Globals:
        """What the program's global names are bound to, whenever it is looked at."""

        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            names = ("TOTAL", "LOG", "holder", "derived", "point", "RECENT", "COUNTS", "CACHE", "schedule")
            return {name: getattr(module, name) for name in names}

    observed = {"globals": Globals()}
    return Program(module.step, batches, {"model": module.model}, {"optimizer": module.optimizer}, observed)

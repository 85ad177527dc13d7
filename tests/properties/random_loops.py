"""Random whole programs: loops of training, inference and evaluation, with all that stands around them, as source text.

`loops()` is a strategy of `Source`s whose `main(part)` is what a script does: loops over a data loader, a list, a
generator or numbers, in epochs or not, with one optimizer, with several, with none; evaluation between; `break`,
`continue`, exceptions that the program catches or does not. The bodies are the statements of `random_programs`.
"""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.programs import Program
from tests.properties.random_programs import INDENT, NUMBERS, PREAMBLE, Source, Writer, load

PARTS = 2
"""How often a program's `main` is called: whole loops after one another."""

SETUP = """
from torch.utils.data import DataLoader, TensorDataset

critic = Net()
optimizers = {optimizers}
optimizer, critic_optimizer = optimizers
samples = TensorDataset(torch.randn({samples}, 3), torch.randn({samples}, 3))
loader = DataLoader(samples, batch_size=4, shuffle={shuffle}, drop_last={drop_last})
judged = DataLoader(TensorDataset(torch.randn(14, 3), torch.randn(14, 3)), batch_size=4)
pool = [batch for batch in DataLoader(samples, batch_size=4)]


def stream(count):
    for k in range(count):
        yield torch.randn(4, 3), pool[k % len(pool)][1][:1]


def twice(t):
    return {twice}

"""
MAIN = """

def main(part):
    global TOTAL
    n, number = 1, 0
    x = y = torch.ones(4, 3)
    parts = [x, x * 0.5]
    total, losses, state, flag, loss, output = 0.0, [], torch.zeros(3), True, torch.zeros(()), torch.ones(4, 3)
"""
STEP = """

def step(number, x, flag):
    global TOTAL
    n = 1
    parts = [x, x * 0.5]
"""
OPTIMIZERS = (
    "torch.optim.SGD({}.parameters(), lr=0.1, momentum=0.5)",
    "torch.optim.SGD({}.parameters(), lr=0.05)",
    "torch.optim.Adam({}.parameters(), lr=0.01)",
    "torch.optim.AdamW({}.parameters(), lr=0.01, foreach=True)",
)


class LoopWriter(Writer):
    """Writes `main`; the body of a loop stands in it, or in a function `step` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.has_step = False
        self.tensors = ["x", "y"]
        self.lists = []

    def indented(self, *lines: str) -> None:
        for line in lines:
            self.write(line)

    def write_leave(self) -> None:
        """Leave the iteration: within `step` by returning, within a loop by its statements."""
        if self.has_step:
            super().write_leave()
            return
        self.write(f"if {self.condition()}:")
        self.write(INDENT + self.choose("continue", "continue", "break", "raise ValueError(f'iteration {number}')"))

    # ---- loops ---------------------------------------------------------------------------------------------

    def write_part(self, body: list[int]) -> None:
        """One loop, or epochs of one, with what follows it."""
        epochs = self.choose(0, 0, 2, 3)
        if epochs:
            self.write(f"for epoch in range({epochs}):")
            self.depth += 1
            self.write(self.choose("model.train()", "pass", "total = 0.0"))
        guarded = self.choose(False, False, True)
        if guarded:
            self.write("try:")
            self.depth += 1
        self.write_one_loop(body, 10 if epochs else 24)
        if guarded:
            self.depth -= 1
            self.write("except (ValueError, AssertionError, RuntimeError) as error:")
            self.write(f"{INDENT}print('left', type(error).__name__)")
        for _ in range(self.choose(0, 1, 1, 2)):
            self.write_between()
        if epochs:
            self.depth -= 1

    def write_one_loop(self, body: list[int], count: int) -> None:
        kind = self.choose("loader", "loader", "loader", "numbers", "pool", "while", "next", "stream")
        ends = ""
        match kind:
            case "loader":
                self.write("for number, (x, y) in enumerate(loader):")
            case "numbers":
                self.write(f"for number in range({count}):")
                self.write(f"{INDENT}x, y = torch.randn(4, 3), torch.randn(3)")
            case "pool":
                self.write(f"for number in range({count}):")
                self.write(f"{INDENT}x, y = pool[number % {self.choose(1, 2, 3)}]")
                self.write(f"{INDENT}{self.choose('x = x.clone()', 'pass')}")
            case "while":
                self.write("number = 0")
                self.write(f"while number < {count}:")
                self.write(f"{INDENT}number += 1")
                self.write(f"{INDENT}x, y = torch.rand(4, 3), pool[0][1]")
            case "next":
                self.write("batches, number = iter(loader), 0")
                self.write("while True:")
                self.write(f"{INDENT}try:")
                self.write(f"{INDENT * 2}x, y = next(batches)")
                self.write(f"{INDENT}except StopIteration:")
                self.write(f"{INDENT * 2}break")
                self.write(f"{INDENT}number += 1")
            case _:
                self.write(f"for number, (x, y) in enumerate(stream({count})):")
                ends = self.choose("", "else:")
        self.depth += 1
        self.write_iteration(body)
        self.depth -= 1
        if ends:
            self.write(ends)
            self.write(f"{INDENT}print('all', number)")

    def write_iteration(self, body: list[int]) -> None:
        known = list(self.tensors), list(self.numbers), list(self.lists)
        self.write(f"flag = {self.choose('True', 'random.random() < 0.8', 'number % 4 != 3', 'bool(y.sum() > 0)')}")
        caught = self.choose(True, False, False)
        if caught:
            self.write("try:")
            self.depth += 1
        if self.has_step:
            self.write(self.choose("output = step(number, x, flag)", "output = step(number, x * 1, flag)"))
            self.tensors.append("output")
        else:
            self.write("n = 1")
            self.write("parts = [x, x * 0.5]")
            self.lists.append("parts")
            for number in body:
                self.random.seed(number)
                self.statement()
        self.write_training()
        for _ in range(self.choose(0, 1, 2, 3)):
            self.write_after()
        self.write(self.choose("pass", "pass", "loss = output = None"))
        self.tensors, self.numbers, self.lists = known
        if caught:
            self.depth -= 1
            self.write("except (ValueError, AssertionError, RuntimeError) as error:")
            self.write(f"{INDENT}print(number, type(error).__name__)")
            self.write(f"{INDENT}{self.choose('continue', 'pass', 'holder.count += 1', 'break')}")

    # ---- what an iteration does ----------------------------------------------------------------------------

    def write_training(self) -> None:
        """Compute `output` and `loss`; step, or not."""
        output = self.choose("model(x)", "model(x)", f"model({self.tensor(1)})", f"model(x) + {self.tensor(1)}")
        loss = self.choose("F.mse_loss(output.mean().expand(3), y.mean().expand(3))", "output.square().mean()")
        kind = self.choose(
            "one", "one", "one", "one", "late zero", "accumulate", "turns", "both", "one backward", "own", "own",
            "inference", "inference", "metric", "grad", "closure",
        )  # fmt: skip
        forward = [f"output = {output}", f"loss = {loss}"]
        match kind:
            case "one":
                clip = self.choose([], [], ["nn.utils.clip_grad_norm_(model.parameters(), 1.0)"])
                self.indented("optimizer.zero_grad()", *forward, "loss.backward()", *clip, "optimizer.step()")
            case "late zero":
                self.indented(*forward, "loss.backward()", "optimizer.step()")
                self.write(f"optimizer.zero_grad(set_to_none={self.choose(True, False)})")
            case "accumulate":
                self.indented(*forward, "(loss / 2).backward()", "if number % 2 == 1:")
                self.indented(f"{INDENT}optimizer.step()", f"{INDENT}optimizer.zero_grad()")
            case "turns":
                self.indented("optimizer.zero_grad()", *forward, "loss.backward()", "optimizer.step()")
                self.indented("critic_optimizer.zero_grad()", f"output = critic({self.choose('x', 'output.detach()')})")
                self.indented("loss = output.abs().mean()", "loss.backward()", "critic_optimizer.step()")
            case "both":
                self.indented(*forward, "optimizer.zero_grad()", "critic_optimizer.zero_grad()")
                self.indented("hidden = critic(output)", "loss.backward(retain_graph=True)", "optimizer.step()")
                self.indented(
                    "loss = hidden.detach().mean() + critic(x).mean()", "loss.backward()", "critic_optimizer.step()"
                )
            case "one backward":
                self.indented("output = critic(model(x))", f"loss = {loss}", "loss.backward()")
                self.indented("for each in optimizers:", f"{INDENT}each.step()", f"{INDENT}each.zero_grad()")
            case "own":
                self.indented(*forward, "loss.backward()", "with torch.no_grad():")
                self.indented(f"{INDENT}for p in model.parameters():", f"{INDENT * 2}if p.grad is not None:")
                self.indented(f"{INDENT * 3}p -= 0.1 * p.grad")
                self.write(INDENT * 3 + self.choose("p.grad = None", "p.grad.zero_()"))
            case "inference":
                self.write(self.choose("with torch.no_grad():", "with torch.inference_mode():"))
                self.indented(*(INDENT + line for line in forward))
            case "metric":
                self.indented("with torch.no_grad():", *(INDENT + line for line in forward))
                self.write("total += loss.item()")
            case "grad":
                self.indented(*forward, "gradient = torch.autograd.grad(loss, model.linear.weight)[0]")
                self.write("losses.append(gradient.abs().sum())")
            case _:
                self.indented("def closure():", f"{INDENT}optimizer.zero_grad()")
                self.indented(*(INDENT + line for line in forward), f"{INDENT}loss.backward()", f"{INDENT}return loss")
                self.write("optimizer.step(closure)")

    def write_after(self) -> None:
        """One of the things that stand behind a step."""
        value = self.choose("loss", "output.sum()", "(loss * 2)", "y.sum()")
        self.write(
            self.choose(
                f"total += {value}.item()",
                f"losses.append({value}.detach())",
                f"losses.append({value}.item())",
                "losses.append(loss)",
                "losses.append(output.detach()[0])",
                "del losses[:-3]",
                f"print(number, round({value}.item(), 3))",
                f"if number % 5 == 4: print('at', number, {value}.detach())",
                f"if {value}.item() > {self.choose(0.5, 2.0)}: break",
                f"if {self.condition()}: break",
                f"if {self.condition()}: continue",
                "if number == 7: model.eval()",
                "optimizer.param_groups[0]['lr'] *= 0.95",
                "if number == 12: optimizer.param_groups[0]['lr'] = 0.01",
                "state = state * 0.9 + output.detach().mean(0)",
                "state += output.detach().mean(0)",
                f"holder.vector = {self.vector()}",
                f"model.state = {self.vector()}",
                "model.running.mul_(0.9).add_(output.detach().mean(0), alpha=0.1)",
                "holder.count += 1; TOTAL += 1",
                "LOG.append(number); del LOG[:-4]",
                "total += random.random() + float(np.random.rand())",
                "state = state + torch.rand(3)",
                "loss, output = loss.detach(), output.detach()",
                "for p in model.parameters(): total += 0 if p.grad is None else p.grad.norm().item()",
                "model.calls = 0",
                "if number == 9: raise ValueError('nine')",
            )
        )

    def write_between(self) -> None:
        """What stands behind a loop, or between two epochs."""
        kind = self.choose("evaluate", "evaluate", "evaluate", "print", "rate", "mode", "keep", "state", "work")
        match kind:
            case "evaluate":
                self.write(self.choose("model.eval()", "model.eval()", "pass"))
                self.write(
                    self.choose("with torch.no_grad():", "with torch.inference_mode():", "with torch.no_grad():")
                )
                source = self.choose("for a, b in judged:", "for a, b in pool[:3]:", "for a, b in list(judged):")
                total = self.choose("total += (model(a) - b).abs().mean().item()", "state = state + model(a).mean(0)")
                if self.choose(True, True, True, False):
                    self.indented(INDENT + source, f"{INDENT * 2}{total}")
                else:
                    self.write(f"{INDENT}total += (model(pool[0][0]) > 0).float().mean().item()")
                self.write("model.train()")
                self.write("print(round(total, 3))")
            case "print":
                self.write("print(round(total, 4), len(losses), [p.sum().item() for p in model.parameters()][0])")
            case "rate":
                self.write("for group in optimizer.param_groups: group['lr'] *= 0.5")
            case "mode":
                self.write("model.train(not model.training)")
            case "keep":
                self.write("LOG.append({k: v.clone() for k, v in model.state_dict().items()}); del LOG[:-2]")
            case "state":
                self.write(f"state = {self.choose('torch.zeros(3)', 'state.clone()', 'model.scale.detach() * 2')}")
            case _:
                self.write(f"y = {self.tensor(1)}.detach()")


@st.composite
def loops(draw: st.DrawFn, statements: int = 4) -> Source:
    """Draw a program with up to so many random statements in the body of a loop."""
    body = draw(st.lists(NUMBERS, max_size=statements))
    seeds = draw(st.lists(NUMBERS, min_size=1, max_size=2))
    writer = LoopWriter()
    writer.random.seed(draw(NUMBERS))
    made = tuple(f"{writer.choose(*OPTIMIZERS).format(name)}, " for name in ("model", "critic"))
    setup = SETUP.format(
        optimizers=f"({''.join(made)})",
        samples=writer.choose(40, 38, 41),
        shuffle=writer.choose(False, False, True),
        drop_last=writer.choose(False, True),
        twice=writer.choose("t * 2", "t + t", "model.linear(t) if t.dim() > 1 else t", "scaled(t, by=0.5)"),
    )
    text = PREAMBLE + setup
    if writer.choose(True, False):
        text += STEP + step_lines(body)
        writer.has_step = True
    for seed in seeds:
        writer.random.seed(seed)
        writer.write_part(body)
    writer.write("return total, losses, state.clone(), n")
    return Source(text + MAIN + "\n".join(writer.lines) + "\n", ())


def step_lines(body: list[int]) -> str:
    """The statements of a body as those of a function, which returns a tensor."""
    writer = Writer()
    writer.returned = "{}.detach()"
    for number in body:
        writer.random.seed(number)
        writer.statement()
    writer.write(f"return {writer.tensor(1)}")
    return "\n".join(writer.lines) + "\n"


def build(source: Source, path: Path) -> Program:
    """Load the program anew. Its `main` is the step of the harness: what one call does is whole loops."""
    module = load(path)

    class Globals:
        """What the program's global names are bound to, whenever it is looked at."""

        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            return {name: getattr(module, name) for name in ("TOTAL", "LOG", "holder", "pool")}

    return Program(
        module.main,
        lambda number: (number,),
        {"model": module.model, "critic": module.critic},
        {"optimizer": module.optimizer, "critic": module.critic_optimizer},
        {"globals": Globals()},
    )

"""Loss by step, eager and under Twofold, from the same seed: whether a program learns the same.

    python -m benchmarks.convergence [--steps N] [--engine E] [--numerics N] [--png PATH] [--json PATH] [programs…]

With `--numerics exact` the two curves are one. With fused kernels they part by rounding, and how far is printed.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import SEED, seed_everything
from benchmarks.environment import describe_environment, describe_options
from benchmarks.programs import PROGRAMS, Size
from benchmarks.steps import check_programs

DEFAULT_PROGRAMS = ("resnet50", "lm", "tree_lstm", "adversarial")
Curve = list[tuple[int, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    twofold_options = {"engine": options.engine, "numerics": options.numerics}
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "options": describe_options(options, "png"),
        "curves": {},
    }
    device = torch.device(options.device)
    for name in options.programs or DEFAULT_PROGRAMS:
        curves = {
            "eager": train(name, options.size, device, options.steps, {"engine": "eager"}),
            "twofold": train(name, options.size, device, options.steps, twofold_options),
        }
        document["curves"][name] = curves
        print(describe(name, curves), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(document, indent=1))
    if options.png:
        draw(document["curves"], Path(options.png))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.convergence")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["full", "small"], default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--engine", choices=["auto", "speculation", "coexecution"], default="speculation")
    parser.add_argument("--numerics", choices=["fused", "exact"], default="fused")
    parser.add_argument("--png", help="draw the curves into this file; needs matplotlib")
    parser.add_argument("--json", help="write machine, versions, options and all losses to this file")
    parser.add_argument("programs", nargs="*", metavar="program", help=f"default: {' '.join(DEFAULT_PROGRAMS)}")
    options = parser.parse_args(arguments)
    check_programs(parser, options.programs)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install matplotlib, or ask for --json alone")
    return options


def train(name: str, size: Size, device: torch.device, steps: int, twofold_options: dict[str, str]) -> Curve:
    """Return the number and the loss of each step that has one: a step that evaluates counts, and has none."""
    import twofold

    seed_everything(SEED)
    program = PROGRAMS[name](size, device)
    step = twofold.function(program.step, **twofold_options)
    seed_everything(SEED + 1)
    losses = [(number, loss_of(step(*program.batches(number)))) for number in range(steps)]
    return [(number, loss) for number, loss in losses if loss is not None]


def loss_of(result: Any) -> float | None:
    """Return the loss in what a step returned: a number, or the first of several, or a mean of numbers."""
    if isinstance(result, torch.Tensor):
        return result.item() if result.is_floating_point() else None
    if isinstance(result, float):
        return result
    if isinstance(result, list):
        return math.fsum(result) / len(result)
    return loss_of(next(iter(result.values())) if isinstance(result, dict) else result[0])


def describe(name: str, curves: dict[str, Curve]) -> str:
    """One line: where the curves begin, end, and are farthest apart."""
    eager, twofold = curves["eager"], curves["twofold"]
    gaps = [abs(first - second) for (_, first), (_, second) in zip(eager, twofold, strict=True)]
    return (
        f"{name:<14} eager {eager[0][1]:9.4f} -> {eager[-1][1]:9.4f}   "
        f"twofold {twofold[0][1]:9.4f} -> {twofold[-1][1]:9.4f}   farthest apart {max(gaps):.2e}"
    )


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """Draw a panel a program, eager broad beneath Twofold thin, so that both are seen where they agree."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel, (name, by_contender) in zip(panels.flat, curves.items(), strict=False):
        for (contender, curve), width in zip(by_contender.items(), (4.0, 1.2), strict=True):
            panel.plot(*zip(*curve, strict=True), label=contender, linewidth=width)
        panel.set(title=name, xlabel="step", ylabel="loss")
        panel.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

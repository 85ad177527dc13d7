"""Microseconds a matched call: what Python pays for each call that it walks over, eager and as a graph.

    python -m benchmarks.skeleton [--device cpu|cuda] [--calls N] [--rounds N] [--json PATH]

A unit makes many equal calls on tiny tensors and takes the time between its first line and its last. As a graph the
unit has no fetch, so that within this time nothing is launched: it is the skeleton alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.environment import describe_environment, describe_options

WIDTH = 8
WARM_UP_UNITS = 10


def make_units(device: torch.device) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return one call of each kind: a C function, an operator, a Python function of PyTorch, leaf modules."""
    linear, norm = nn.Linear(WIDTH, WIDTH).to(device), nn.LayerNorm(WIDTH).to(device)
    return {
        "torch.add": torch.add,
        "x + y": lambda x, y: x + y,
        "functional.layer_norm": lambda x, y: functional.layer_norm(x, (WIDTH,)),
        "nn.Linear": lambda x, y: linear(x),
        "nn.LayerNorm": lambda x, y: norm(x),
    }


def repeat(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], calls: int, times: list[float]) -> Any:
    """Return a function that makes `calls` calls in a row and appends the microseconds that one took."""

    def unit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        for _ in range(calls):
            x = call(x, y)
        times.append((time.perf_counter() - begin) * 1e6 / calls)
        return x

    return unit


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.skeleton")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json")
    options = parser.parse_args()

    import twofold

    device = torch.device(options.device)
    backend = "cuda_graph" if device.type == "cuda" else "replay"
    x, y = torch.zeros(1, WIDTH, device=device), torch.ones(1, WIDTH, device=device)
    results: dict[str, dict[str, float]] = {}
    for name, call in make_units(device).items():
        eager_times: list[float] = []
        graph_times: list[float] = []
        eager = repeat(call, options.calls, eager_times)
        graphed = twofold.function(
            repeat(call, options.calls, graph_times),
            engine="coexecution", backend=backend, numerics="exact", background=False,
        )  # fmt: skip
        with torch.no_grad():
            for _ in range(WARM_UP_UNITS + options.rounds):
                eager(x, y)
                graphed(x, y)
        report = twofold.report(graphed).to_dict()
        results[name] = {
            "eager_us": statistics.median(eager_times[WARM_UP_UNITS:]),
            "skeleton_us": statistics.median(graph_times[WARM_UP_UNITS:]),
            "graph_units": report["graph_iterations"],
            "units": report["iterations"],
        }
        row = results[name]
        print(
            f"{name:24} eager {row['eager_us']:7.3f} us   skeleton {row['skeleton_us']:7.3f} us   "
            f"graphs {row['graph_units']} of {row['units']} units"
        )
    if options.json:
        document = {"environment": describe_environment(), "options": describe_options(options), "results": results}
        Path(options.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

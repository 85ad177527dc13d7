"""Microseconds a matched call: a unit of many cheap, equal calls, eager and as a graph.

    python -m benchmarks.skeleton [--device cpu|cuda] [--calls N] [--rounds N] [--json PATH]

The tensors are so small that the calls' arithmetic is nothing: what is left is what Python pays for each
call that it walks over, and what a replay pays for each kernel.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe_environment, synchronize

WIDTH = 8
WARM_UP_UNITS = 10


def make_unit(calls: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function that adds `calls` times."""

    def unit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(calls):
            x = torch.add(x, y)
        return x

    return unit


def time_unit(unit: Callable[..., Any], device: torch.device, calls: int, rounds: int) -> float:
    """Return the median microseconds a call."""
    x, y = torch.zeros(WIDTH, device=device), torch.ones(WIDTH, device=device)
    for _ in range(WARM_UP_UNITS):
        unit(x, y)
    measured = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        unit(x, y)
        synchronize()
        measured.append((time.perf_counter() - begin) * 1e6 / calls)
    return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.skeleton")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json")
    options = parser.parse_args()

    import twofold

    device = torch.device(options.device)
    backend = "cuda_graph" if device.type == "cuda" else "replay"
    unit = make_unit(options.calls)
    graphed = twofold.function(unit, engine="coexecution", backend=backend, numerics="exact", background=False)
    results: dict[str, Any] = {
        "eager_us": time_unit(unit, device, options.calls, options.rounds),
        "twofold_us": time_unit(graphed, device, options.calls, options.rounds),
    }
    report = results["report"] = twofold.report(graphed).to_dict()
    print(f"eager    {results['eager_us']:8.3f} us a call")
    print(f"twofold  {results['twofold_us']:8.3f} us a call")
    print(f"units run as graphs: {report['graph_iterations']} of {report['iterations']}")
    if options.json:
        document = {"environment": describe_environment(), "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""Does memory grow? Host and device memory of a small program after 1,000 steps with all its kernels, and after 10,000.

python -m benchmarks.memory [--device cpu|cuda] [--steps N] [--json PATH] [program]
"""

import argparse
import gc
import json
import os
from pathlib import Path

import torch

from benchmarks.environment import describe_environment, describe_options, synchronize
from benchmarks.programs import NAMES, PROGRAMS

SETTLED_AFTER = 1_000


def measure_memory() -> dict[str, int]:
    """Return bytes in use now, garbage aside."""
    gc.collect()
    synchronize()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    bytes_by_kind = {"host_resident": resident_pages * os.sysconf("SC_PAGE_SIZE")}
    if torch.cuda.is_available():
        bytes_by_kind["device_allocated"] = torch.cuda.memory_allocated()
        bytes_by_kind["device_reserved"] = torch.cuda.memory_reserved()
    return bytes_by_kind


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json")
    parser.add_argument("program", nargs="?", choices=NAMES, default="mlp")
    options = parser.parse_args()

    import twofold

    torch.manual_seed(0)
    program = PROGRAMS[options.program]("small", torch.device(options.device))
    step = twofold.function(program.step)
    settled: dict[str, int] = {}
    for index in range(SETTLED_AFTER):
        step(*program.batches(index))
    twofold.wait_for_compilation(step)
    for index in range(options.steps):
        step(*program.batches(index))
        if index + 1 == SETTLED_AFTER:
            settled = measure_memory()
    end = measure_memory()
    for kind, size in end.items():
        before = settled.get(kind, 0)
        growth = (size - before) / 2**20
        print(f"{kind:<18}{before / 2**20:10.1f} MiB {size / 2**20:10.1f} MiB {growth:+9.2f} MiB")
    if options.json:
        results = {"settled_bytes": settled, "end_bytes": end}
        document = {"environment": describe_environment(), "options": describe_options(options), "results": results}
        Path(options.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

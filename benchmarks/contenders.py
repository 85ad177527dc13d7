"""The ways to run one and the same program that `benchmarks.steps` and `benchmarks.speculation` compare.

A contender owns a fresh build: its own model, optimizer and data, from equal seeds. Programs whose
Python is cached by code object (Dynamo's recompilation limit counts per code object) get a fresh copy
of their code too, so that one contender cannot use up another's limit.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.programs import PROGRAMS, CompileModel, Program, Size, identity

SEED = 0

# Programs whose whole step, data aside, is one fixed sequence of kernels with no host work between.
CAPTURABLE = ("mlp", "lenet", "resnet18", "lstm_loop", "bert", "gpt")
CAPTURE_WARM_UP = 3
COMPILED = ("compile", "compile_reduce_overhead")
"""The contenders of torch.compile. On a CPU both modes are one: what the second adds are CUDA graphs."""

COMPILE_SECONDS = 90.0
"""How long Twofold's background compiler is waited for; what is not there by then is measured without."""


ABLATION: dict[str, dict[str, str]] = {
    "ablation_skeleton": {"engine": "coexecution", "numerics": "exact", "backend": "lowest"},
    "ablation_specialised": {"engine": "speculation", "numerics": "exact", "backend": "lowest"},
    "ablation_batched": {"engine": "speculation", "numerics": "fused", "backend": "lowest"},
    "ablation_compiled": {"engine": "speculation", "numerics": "fused", "backend": "auto"},
}
"""One more means in each: eager's kernels beside the skeleton, which unrolls loops and inlines calls by recording them;
no skeleton, since values are assumed; products, sums and optimizer updates made at once; kernels compiled."""
LOWEST_BACKEND = {"cpu": "replay", "cuda": "cuda_graph"}


@dataclass
class Contender:
    """`run(i)` is step number i; `prepare(seconds)` waits until no better code is under way, and says whether so."""

    run: Callable[[int], Any]
    prepare: Callable[[float], bool] = lambda _: True
    report: Callable[[], dict[str, Any] | None] = lambda: None
    """Twofold's own report, as a dict; nobody else has one."""


def contender_names(program: str, device: torch.device) -> list[str]:
    """Return the contenders that make sense for this program on this device, eager first."""
    names = ["eager", *compiled_names(device), "twofold_exact", "twofold_fused"]
    if device.type == "cuda" and program in CAPTURABLE:
        names.append("cuda_graph_by_hand")
    return names


def compiled_names(device: torch.device) -> tuple[str, ...]:
    """Return the contenders of torch.compile that differ on this device."""
    return COMPILED if device.type == "cuda" else COMPILED[:1]


def make_contender(contender: str, program: str, size: Size, device: torch.device) -> Contender:
    """Build the program anew and wrap its step."""
    build = partial(_build_anew, program, size, device)
    match contender:
        case "eager":
            return _calling(build())
        case "compile":
            return _calling(build(partial(_compile, "default")))
        case "compile_reduce_overhead":
            return _calling(build(partial(_compile, "reduce-overhead")))
        case "twofold_exact" | "twofold_fused":
            return _twofold(build(), numerics=contender.removeprefix("twofold_"))
        case "twofold_coexecution" | "twofold_speculation":
            return _twofold(build(), engine=contender.removeprefix("twofold_"))
        case _ if contender in ABLATION:
            options = {"lowest": LOWEST_BACKEND[device.type]}
            return _twofold(build(), **{key: options.get(value, value) for key, value in ABLATION[contender].items()})
        case "cuda_graph_by_hand":
            return Contender(CapturedStep(build()))
        case _:
            raise ValueError(f"unknown contender {contender!r}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _build_anew(name: str, size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    sys.modules.pop(f"benchmarks.programs.{name}", None)
    seed_everything(SEED)
    return PROGRAMS[name](size, device, compile_model)


def _compile(mode: str, model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, mode=mode)
    return compiled


def _calling(program: Program) -> Contender:
    return Contender(lambda index: program.step(*program.batches(index)))


def _twofold(program: Program, **options: str) -> Contender:
    import twofold

    step = twofold.function(program.step, **options)

    def prepare(seconds: float) -> bool:
        return twofold.wait_for_compilation(step, timeout=seconds)

    def report() -> dict[str, Any]:
        return twofold.report(step).to_dict()

    return Contender(lambda index: step(*program.batches(index)), prepare, report)


class CapturedStep:
    """One CUDA graph of eager's kernels for the whole step, as an expert writes it by hand.

    The first call warms up on a side stream and captures; that time is part of the contender's start.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.inputs = tuple(argument.clone() for argument in program.batches(0))
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, index: int) -> None:
        if self.graph is None:
            self.graph = self._capture()
        for static, argument in zip(self.inputs, self.program.batches(index), strict=True):
            static.copy_(argument)
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        for optimizer in self.program.optimizers.values():
            for group in optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = True
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARM_UP):
                self.program.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.program.step(*self.inputs)
        return graph

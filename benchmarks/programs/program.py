"""What a program of the corpus is, and the few lines every one of them would repeat."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import Adam, Optimizer

Size = Literal["small", "full"]
CompileModel = Callable[[nn.Module], nn.Module]
Batches = Callable[[int], tuple[Any, ...]]

BATCHES_IN_POOL = 8


@dataclass
class Program:
    """One training program, ready to run; two builds after equal seeding do the same for ever.

    `step(*batches(i))` is step number i, as a user writes it. The arguments are made beforehand and
    lie on the device. `observed` holds the user's other objects: their attributes are part of what
    the program does.
    """

    step: Callable[..., Any]
    batches: Batches
    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    observed: dict[str, Any] = field(default_factory=dict)
    unit: str = "step"


class Build(Protocol):
    """Make a program; draws from the global random streams and seeds none of them."""

    def __call__(
        self, size: Size, device: torch.device, compile_model: CompileModel = ..., **options: Any
    ) -> Program: ...


def identity(model: nn.Module) -> nn.Module:
    """Leave the model as it is: eager execution."""
    return model


def load(name: str) -> Build:
    """Return a builder that imports `benchmarks.programs.<name>` when it is first called."""

    def build(size: Size, device: torch.device, compile_model: CompileModel = identity, **options: Any) -> Program:
        module = importlib.import_module(f"benchmarks.programs.{name}")
        return module.build(size, device, compile_model, **options)

    return build


def adam(
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Adam:
    """Return Adam, fused into one kernel on CUDA."""
    return Adam(parameters, lr=lr, betas=betas, fused=True if device.type == "cuda" else None)


def pool(make_batch: Callable[[], tuple[Any, ...]], count: int = BATCHES_IN_POOL) -> Batches:
    """Make `count` batches now and hand them out in turn."""
    batches = [make_batch() for _ in range(count)]
    return lambda index: batches[index % count]


def classified_images(
    batch: int, shape: tuple[int, ...], classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f32[batch, *shape] of noise and i64[batch] of labels."""
    images = torch.randn(batch, *shape, device=device)
    return images, torch.randint(classes, (batch,), device=device)

"""Python that is alive: norms fetched and logged mid-forward, attributes mutated, NumPy statistics."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# layers, width, batch, layers between two logs
SIZES = {"small": (4, 16, 8, 2), "full": (12, 256, 64, 4)}


class RunningMean:
    """The mean of everything seen so far, kept by NumPy."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(1)

    def update(self, value: float) -> None:
        self.count += 1
        self.mean += (np.array([value]) - self.mean) / self.count


class LoggingNet(nn.Module):
    """Linear layers that write down the norm of every few activations while they compute."""

    def __init__(self, layers: int, width: int, log_every: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.log_every = log_every
        self.norms: list[float] = []
        self.calls = 0
        self.largest_norm = 0.0
        self.statistics = RunningMean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for index, layer in enumerate(self.layers, start=1):
            x = torch.tanh(layer(x)) + x
            if index % self.log_every == 0:
                norm = float(x.detach().norm())
                self.norms.append(norm)
                self.largest_norm = max(self.largest_norm, norm)
                self.statistics.update(norm)
        return x


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    layers, width, batch, log_every = SIZES[size]
    model = LoggingNet(layers, width, log_every).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(run_model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def noise() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, width, device=device), torch.randn(batch, width, device=device)

    observed = {"norms": model.norms, "statistics": model.statistics}
    return Program(step, pool(noise), {"model": model}, {"adam": optimizer}, observed)

"""Paths that alternate: every fifth batch is smaller, and the optimizer steps on every second call."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity

# width, batch, last batch
SIZES = {"small": (16, 8, 3), "full": (256, 64, 17)}
CLASSES = 10
BATCHES_IN_EPOCH = 5


class Network(nn.Module):
    """Normalised over the batch, so that a batch that was padded would show."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(x))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    width, batch, last_batch = SIZES[size]
    model = Network(width).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)
    progress = {"calls": 0, "updates": 0}

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        progress["calls"] += 1
        loss = F.cross_entropy(run_model(x), y)
        loss.backward()
        if progress["calls"] % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
            progress["updates"] += 1
        return loss.detach()

    sizes = [batch] * (BATCHES_IN_EPOCH - 1) + [last_batch]
    epoch = [classified_images(count, (width,), CLASSES, device) for count in sizes]
    return Program(
        step,
        lambda index: epoch[index % BATCHES_IN_EPOCH],
        {"model": model},
        {"adam": optimizer},
        {"progress": progress},
    )

"""Branches that Python chooses: a residual network, each of whose blocks is dropped by a coin."""

import random

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity, pool

# blocks, channels, image side, batch
SIZES = {"small": (3, 4, 6, 4), "full": (16, 64, 16, 16)}
CLASSES = 10
DROP_PROBABILITY = 0.3


class Block(nn.Module):
    """Two normalised convolutions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class StochasticDepth(nn.Module):
    """A residual network that leaves out each block with probability `DROP_PROBABILITY`."""

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.classifier = nn.Linear(channels, CLASSES)
        self.dropped = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if random.random() < DROP_PROBABILITY:
                self.dropped += 1
                continue
            x = block(x)
        return self.classifier(F.relu(x).mean(dim=(2, 3)))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    blocks, channels, side, batch = SIZES[size]
    model = StochasticDepth(blocks, channels).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(run_model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    batches = pool(lambda: classified_images(batch, (3, side, side), CLASSES, device))
    return Program(step, batches, {"model": model}, {"adam": optimizer})

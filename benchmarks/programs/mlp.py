"""Small tensors: a multilayer perceptron whose step is all dispatch and no arithmetic."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, classified_images, identity, pool

SIZES = {"small": (3, 16, 8), "full": (8, 64, 32)}
CLASSES = 10


class Perceptron(nn.Module):
    """`layers` blocks of Linear, LayerNorm and GELU, then a linear classifier."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(layers):
            blocks += [nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(x))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    layers, width, batch = SIZES[size]
    model = Perceptron(layers, width).to(device)
    run_model = compile_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(run_model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    batches = pool(lambda: classified_images(batch, (width,), CLASSES, device))
    return Program(step, batches, {"model": model}, {"sgd": optimizer})

"""Gradients summed over several calls: the optimizer steps, and gradients are cleared, every fourth one."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity, pool

# layers, width, batch
SIZES = {"small": (2, 16, 4), "full": (8, 512, 32)}
CLASSES = 10
MICRO_BATCHES = 4


class Trainer:
    """A training loop's state as users keep it: the model, the optimizer and where in the window it is."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, set_to_none: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self.set_to_none = set_to_none
        self.micro_step = 0
        self.updates = 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.micro_step == 0:
            self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = F.cross_entropy(self.model(x), y) / MICRO_BATCHES
        loss.backward()
        self.micro_step += 1
        if self.micro_step == MICRO_BATCHES:
            self.optimizer.step()
            self.micro_step = 0
            self.updates += 1
        return loss.detach()


def make_model(layers: int, width: int) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


def build(
    size: Size, device: torch.device, compile_model: CompileModel = identity, *, set_to_none: bool = True
) -> Program:
    layers, width, batch = SIZES[size]
    model = make_model(layers, width).to(device)
    optimizer = adam(model.parameters(), device)
    trainer = Trainer(compile_model(model), optimizer, set_to_none)
    batches = pool(lambda: classified_images(batch, (width,), CLASSES, device))
    return Program(trainer.step, batches, {"model": model}, {"adam": optimizer}, {"trainer": trainer})

"""A learning rate that is another Python number every step: SGD with momentum under a cosine schedule."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.programs.program import CompileModel, Program, Size, classified_images, identity, pool

# layers, width, batch, steps of the schedule
SIZES = {"small": (2, 16, 8, 7), "full": (6, 256, 64, 1000)}
CLASSES = 10


def make_model(layers: int, width: int) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    layers, width, batch, schedule_steps = SIZES[size]
    model = make_model(layers, width).to(device)
    run_model = compile_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, T_max=schedule_steps)

    def step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
        optimizer.zero_grad()
        loss = F.cross_entropy(run_model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach(), float(schedule.get_last_lr()[0])

    batches = pool(lambda: classified_images(batch, (width,), CLASSES, device))
    return Program(step, batches, {"model": model}, {"sgd": optimizer}, {"schedule": schedule})

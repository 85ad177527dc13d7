"""Automatic mixed precision: bf16 on the CPU; f16 with a loss scale that may skip steps on CUDA."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity, pool

# channels, image side, linear width, batch
SIZES = {"small": (4, 8, 16, 4), "full": (64, 32, 1024, 128)}
CLASSES = 10


class ConvNet(nn.Module):
    """Convolutions, which autocast narrows, and a normalisation and a loss, which it does not."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x)).mean(dim=(2, 3))
        return self.fc2(F.relu(self.fc1(self.norm(x))))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    channels, side, width, batch = SIZES[size]
    model = ConvNet(channels, width).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)
    on_cuda = device.type == "cuda"
    low_precision = torch.float16 if on_cuda else torch.bfloat16
    # The first scale overflows f16 and is halved until it does not: the first steps are skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24, growth_interval=5, enabled=on_cuda)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=low_precision):
            loss = F.cross_entropy(run_model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    batches = pool(lambda: classified_images(batch, (3, side, side), CLASSES, device))
    return Program(step, batches, {"model": model}, {"adam": optimizer}, {"scaler": scaler})

"""A small convolutional network: convolution, pooling, view, Adam.

No dynamic features but the one that every training step has, the impure step of the optimizer.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity, pool

SIZES = {"small": 4, "full": 128}
CLASSES = 10


class LeNet(nn.Module):
    """LeNet-5 with rectifiers and maximum pooling, for f32[batch, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    batch = SIZES[size]
    model = LeNet().to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(run_model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = pool(lambda: classified_images(batch, (1, 28, 28), CLASSES, device))
    return Program(step, batches, {"model": model}, {"adam": optimizer})

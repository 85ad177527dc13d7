"""Batch normalisation and residual connections: ResNet-18 on 32x32 images, buffers updated in place."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity, pool

# stage widths, blocks a stage, image side, batch
SIZES = {"small": ((4, 8), 1, 8, 4), "full": ((64, 128, 256, 512), 2, 32, 128)}
CLASSES = 10


def convolution(inputs: int, outputs: int, side: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """The stem of He et al. (2016), one stage a width (each but the first halves the image), a linear classifier."""

    def __init__(self, widths: tuple[int, ...], blocks_a_stage: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            convolution(3, widths[0], 7, 2), nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        )
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks_a_stage):
                blocks.append(BasicBlock(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(x.mean(dim=(2, 3)))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    widths, blocks_a_stage, side, batch = SIZES[size]
    model = ResNet(widths, blocks_a_stage).to(device)
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

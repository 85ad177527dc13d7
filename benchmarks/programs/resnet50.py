"""ResNet-50 (He et al. 2016): an epoch of training steps with a smaller last batch, then a look at held-out images.

Dynamic control flow: one step function trains or evaluates, and every normalisation asks which of the two it is.
Dynamic types: the last batch of an epoch is smaller. Impure functions: running means, counters of the trainer.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.data import digits
from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity
from benchmarks.programs.resnet18 import convolution

# width of the stem, blocks a stage, image side, batch, last batch of an epoch
SIZES = {"small": (4, (1, 1, 1), 16, 6, 3), "full": (64, (3, 4, 6, 3), 224, 64, 32)}
CLASSES = {"small": 10, "full": 1000}
BATCHES_IN_EPOCH = 4
EXPANSION = 4


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1, beside a shortcut that is projected where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.norm1 = convolution(inputs, width, 1, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = convolution(width, outputs, 1, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """Return logits, f32[batch, classes]."""

    def __init__(self, width: int, blocks_a_stage: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = convolution(3, width, 7, 2), nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        inputs = width
        for stage, blocks in enumerate(blocks_a_stage):
            layers: list[nn.Module] = []
            for block in range(blocks):
                layers.append(Bottleneck(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = EXPANSION * width
            self.stages.append(nn.Sequential(*layers))
            width *= 2
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean(dim=(2, 3)))


class Trainer:
    """The loop's state: how many images were seen, and how many of the held-out ones were recognised."""

    def __init__(self, model: nn.Module, run_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.run_model = run_model
        self.optimizer = optimizer
        self.images_seen = 0
        self.correct: list[torch.Tensor] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor, train: bool) -> torch.Tensor:
        """Train on a batch, or count how many of it are recognised."""
        if not train:
            self.model.eval()
            with torch.no_grad():
                correct = (self.run_model(images).argmax(dim=1) == labels).sum()
            self.correct = [*self.correct[-9:], correct]
            return correct
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.run_model(images), labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()
        self.images_seen += len(images)
        return loss.detach()


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    width, blocks_a_stage, side, batch, last_batch = SIZES[size]
    model = ResNet(width, blocks_a_stage, CLASSES[size]).to(device)
    optimizer = adam(model.parameters(), device)
    trainer = Trainer(model, compile_model(model), optimizer)
    counts = [batch] * (BATCHES_IN_EPOCH - 1) + [last_batch, batch]
    if size == "small":
        images, labels = digits(side)
        images = images.expand(-1, 3, -1, -1)[: sum(counts)].contiguous().to(device)
        epoch = list(zip(images.split(counts), labels[: sum(counts)].to(device).split(counts), strict=True))
    else:
        epoch = [classified_images(count, (3, side, side), CLASSES[size], device) for count in counts]

    def batches(index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        number = index % len(epoch)
        return *epoch[number], number < BATCHES_IN_EPOCH

    return Program(trainer.step, batches, {"model": model}, {"adam": optimizer}, {"trainer": trainer})

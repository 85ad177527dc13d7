"""Inception-v3 (Szegedy et al. 2016): branches of convolutions side by side, and a second classifier while training.

Dynamic control flow: the second classifier runs only while training; every few batches are held out and evaluated.
Dynamic types: the model returns one tensor or two. Impure functions: running means, a history of losses and counts.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.data import digits
from benchmarks.programs.program import CompileModel, Program, Size, adam, classified_images, identity

# channels are divided by, blocks of each of the three resolutions, image side, batch, classes
SIZES: dict[Size, tuple[int, tuple[int, int, int], int, int, int]] = {
    "small": (16, (1, 0, 0), 75, 2, 10),
    "full": (1, (3, 4, 2), 299, 64, 1000),
}
# The second classifier's window, its stride, and the side of what it sees then: of a middle grid of 3 and of 17.
SECOND: dict[Size, tuple[int, int, int]] = {"small": (1, 1, 3), "full": (5, 3, 5)}
BATCHES = 5
HELD_OUT = 4
"""The last batch of five is only looked at."""
SECOND_WEIGHT = 0.4
Sides = int | tuple[int, int]


class Convolution(nn.Module):
    """Convolution, normalisation, rectifier."""

    def __init__(self, inputs: int, outputs: int, sides: Sides, stride: int = 1, padding: Sides = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, sides, stride=stride, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


def chain(inputs: int, *layers: tuple[int, Sides]) -> nn.Sequential:
    """Return convolutions (outputs, sides) one after another that keep the image's size."""
    built: list[nn.Module] = []
    for outputs, sides in layers:
        padding = sides // 2 if isinstance(sides, int) else (sides[0] // 2, sides[1] // 2)
        built.append(Convolution(inputs, outputs, sides, padding=padding))
        inputs = outputs
    return nn.Sequential(*built)


class Mixed(nn.Module):
    """Branches side by side, and one behind an average pool; the results lie one after another in the channels."""

    def __init__(self, inputs: int, branches: list[list[tuple[int, Sides]]], pooled: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(chain(inputs, *layers) for layers in branches)
        self.pooled = Convolution(inputs, pooled, 1)
        self.outputs = sum(layers[-1][0] for layers in branches) + pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [branch(x) for branch in self.branches]
        results.append(self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1)))
        return torch.cat(results, dim=1)


class Reduction(nn.Module):
    """Halve the image: branches that end in a stride of two, and a maximum pool."""

    def __init__(self, inputs: int, branches: list[tuple[list[tuple[int, Sides]], int]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for layers, outputs in branches:
            width = layers[-1][0] if layers else inputs
            self.branches.append(nn.Sequential(chain(inputs, *layers), Convolution(width, outputs, 3, stride=2)))
        self.outputs = inputs + sum(outputs for _, outputs in branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([*(branch(x) for branch in self.branches), F.max_pool2d(x, 3, stride=2)], dim=1)


class Expanded(nn.Module):
    """The blocks of the lowest resolution: two branches fork once more, into a row and a column."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.single = Convolution(inputs, 5 * width, 1)
        self.stems = nn.ModuleList([chain(inputs, (6 * width, 1)), chain(inputs, (7 * width, 1), (6 * width, 3))])
        self.rows = nn.ModuleList(chain(6 * width, (6 * width, (1, 3))) for _ in self.stems)
        self.columns = nn.ModuleList(chain(6 * width, (6 * width, (3, 1))) for _ in self.stems)
        self.pooled = Convolution(inputs, 3 * width, 1)
        self.outputs = 32 * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [self.single(x)]
        for stem, row, column in zip(self.stems, self.rows, self.columns, strict=True):
            forked = stem(x)
            results += [row(forked), column(forked)]
        results.append(self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1)))
        return torch.cat(results, dim=1)


class SecondClassifier(nn.Module):
    """Asked for the label half way through, so that gradients reach the lower layers."""

    def __init__(self, inputs: int, divisor: int, classes: int, window: int, stride: int, side: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(window, stride)
        self.conv1 = Convolution(inputs, 128 // divisor, 1)
        self.conv2 = Convolution(128 // divisor, 768 // divisor, side)
        self.classify = nn.Linear(768 // divisor, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.conv2(self.conv1(self.pool(x))).flatten(1))


class Inception(nn.Module):
    """Return logits, and while training also those of the second classifier."""

    def __init__(self, divisor: int, blocks: tuple[int, int, int], classes: int, second: tuple[int, int, int]) -> None:
        super().__init__()

        def c(channels: int) -> int:
            return channels // divisor

        self.stem = nn.Sequential(
            Convolution(3, c(32), 3, stride=2), Convolution(c(32), c(32), 3), Convolution(c(32), c(64), 3, padding=1),
            nn.MaxPool2d(3, stride=2), Convolution(c(64), c(80), 1), Convolution(c(80), c(192), 3),
            nn.MaxPool2d(3, stride=2),
        )  # fmt: skip
        layers: list[nn.Module] = []
        inputs = c(192)
        for block in range(blocks[0]):
            branches = [[(c(64), 1)], [(c(48), 1), (c(64), 5)], [(c(64), 1), (c(96), 3), (c(96), 3)]]
            layers.append(mixed := Mixed(inputs, branches, c(32 if block == 0 else 64)))
            inputs = mixed.outputs
        layers.append(reduction := Reduction(inputs, [([], c(384)), ([(c(64), 1), (c(96), 3)], c(96))]))
        inputs = reduction.outputs
        for block in range(blocks[1]):
            w, row, column = c((128, 160, 160, 192)[block]), (1, 7), (7, 1)
            branches = [[(c(192), 1)], [(w, 1), (w, row), (c(192), column)]]
            branches.append([(w, 1), (w, column), (w, row), (w, column), (c(192), row)])
            layers.append(mixed := Mixed(inputs, branches, c(192)))
            inputs = mixed.outputs
        self.lower = nn.Sequential(*layers)
        self.second = SecondClassifier(inputs, divisor, classes, *second)
        separable: list[tuple[int, Sides]] = [(c(192), 1), (c(192), (1, 7)), (c(192), (7, 1))]
        reduction = Reduction(inputs, [([(c(192), 1)], c(320)), (separable, c(192))])
        layers, inputs = [reduction], reduction.outputs
        for _ in range(blocks[2]):
            layers.append(expanded := Expanded(inputs, c(64)))
            inputs = expanded.outputs
        self.upper = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.5)
        self.classify = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.lower(self.stem(x))
        second = self.second(x) if self.training else None
        logits = self.classify(self.dropout(self.upper(x).mean(dim=(2, 3))))
        return logits if second is None else (logits, second)


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    divisor, blocks, side, batch, classes = SIZES[size]
    model = Inception(divisor, blocks, classes, SECOND[size]).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)
    history: dict[str, list[torch.Tensor]] = {"losses": [], "correct": []}

    def step(images: torch.Tensor, labels: torch.Tensor, train: bool) -> torch.Tensor:
        model.train(train)
        with torch.set_grad_enabled(train):
            result = run_model(images)
        if isinstance(result, tuple):
            logits, second = result
            loss = F.cross_entropy(logits, labels) + SECOND_WEIGHT * F.cross_entropy(second, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history["losses"] = [*history["losses"][-9:], loss.detach()]
            return loss.detach()
        correct = (result.argmax(dim=1) == labels).sum()
        history["correct"] = [*history["correct"][-9:], correct]
        return correct

    if size == "small":
        images, labels = digits(side)
        images = images[: BATCHES * batch].expand(-1, 3, -1, -1).contiguous().to(device)
        labels = labels[: BATCHES * batch].to(device)
        data = list(zip(images.split(batch), labels.split(batch), strict=True))
    else:
        data = [classified_images(batch, (3, side, side), classes, device) for _ in range(BATCHES)]

    def batches(index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        return *data[index % BATCHES], index % BATCHES != HELD_OUT

    return Program(step, batches, {"model": model}, {"adam": optimizer}, {"history": history})

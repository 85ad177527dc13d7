"""Image to image (Isola et al. 2017): a U-Net that paints facades from plans, and a discriminator of patches.

Dynamic control flow: a coin decides whether the discriminator sees the new painting or an old one. Dynamic types: a
list of skip connections grows on the way down and shrinks on the way up. Impure functions: the pool of old paintings is
changed in place, and Python's random stream is drawn from.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# width, halvings of the U-Net, of the discriminator, image side, paintings kept
SIZES = {"small": (4, 3, 1, 16, 3), "full": (64, 8, 3, 256, 50)}
COLOURS = 3
NEAR = 100.0
"""Weight of the distance from the right picture."""
WIDEST = 8
"""In units of the width of the outermost layer."""


class UNet(nn.Module):
    """Halve the image to a point and double it again, with what was seen on the way down beside it."""

    def __init__(self, width: int, halvings: int) -> None:
        super().__init__()
        widths = [min(2**level, WIDEST) * width for level in range(halvings)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs = COLOURS
        for level, outputs in enumerate(widths):
            normalised = 0 < level < halvings - 1
            self.down.append(self.block(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), outputs, normalised))
            inputs = outputs
        for level in reversed(range(1, halvings)):
            outputs = widths[level - 1]
            doubling = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
            self.up.append(self.block(doubling, outputs, True))
            inputs = 2 * outputs
        self.paint = nn.ConvTranspose2d(inputs, COLOURS, 4, stride=2, padding=1)

    def block(self, convolution: nn.Module, outputs: int, normalised: bool) -> nn.Sequential:
        return nn.Sequential(convolution, *([nn.BatchNorm2d(outputs)] if normalised else []))

    def forward(self, plan: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        x = plan
        for level, block in enumerate(self.down):
            x = block(F.leaky_relu(x, 0.2) if level else x)
            skips.append(x)
        x = skips.pop()
        for level, block in enumerate(self.up):
            x = block(F.relu(x))
            if level < len(self.up) // 2:
                x = F.dropout(x, 0.5, self.training)
            x = torch.cat((x, skips.pop()), dim=1)
        return torch.tanh(self.paint(F.relu(x)))


def make_discriminator(width: int, halvings: int) -> nn.Sequential:
    """From plan and picture, side by side in the channels, to one logit a patch."""
    layers: list[nn.Module] = [nn.Conv2d(2 * COLOURS, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for level in range(1, halvings + 1):
        outputs = min(2**level, WIDEST) * width
        stride = 2 if level < halvings else 1
        layers += [
            nn.Conv2d(layers[-2 if level == 1 else -3].out_channels, outputs, 4, stride=stride, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(outputs, 1, 4, padding=1))


class Pool:
    """Old paintings: once it is full, half of the time one of them is handed out and the new one kept instead."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.paintings: list[torch.Tensor] = []

    def exchange(self, painting: torch.Tensor) -> torch.Tensor:
        if len(self.paintings) < self.size:
            self.paintings.append(painting)
            return painting
        if random.random() < 0.5:
            return painting
        place = random.randrange(self.size)
        old, self.paintings[place] = self.paintings[place], painting
        return old


def facade(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a plan and its picture, f32[1, 3, side, side] in -1...1: walls, windows in a grid, a door."""
    plan = torch.full((1, COLOURS, side, side), -1.0)
    wall, window, door = torch.rand(3, COLOURS, 1, 1) * 2 - 1
    picture = wall.expand(1, COLOURS, side, side).clone()
    pitch = random.choice((side // 4, side // 2))
    for top in range(pitch // 4, side - pitch // 2, pitch):
        for left in range(pitch // 4, side - pitch // 2, pitch):
            rows, columns = slice(top, top + pitch // 2), slice(left, left + pitch // 2)
            plan[:, 0, rows, columns], picture[:, :, rows, columns] = 1.0, window
    left = random.randrange(side // 2)
    rows, columns = slice(3 * side // 4, side), slice(left, left + side // 4)
    plan[:, 1, rows, columns], picture[:, :, rows, columns] = 1.0, door
    return plan.to(device), picture.to(device)


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    width, halvings, patch_halvings, side, kept = SIZES[size]
    generator = UNet(width, halvings).to(device)
    discriminator = make_discriminator(width, patch_halvings).to(device)
    paint, discriminate = compile_model(generator), compile_model(discriminator)
    generator_optimizer = adam(generator.parameters(), device, lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer = adam(discriminator.parameters(), device, lr=2e-4, betas=(0.5, 0.999))
    old_paintings = Pool(kept)

    def judge(plan: torch.Tensor, picture: torch.Tensor, real: bool) -> torch.Tensor:
        logits = discriminate(torch.cat((plan, picture), dim=1))
        wanted = torch.ones_like(logits) if real else torch.zeros_like(logits)
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def step(plan: torch.Tensor, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        painting = paint(plan)
        shown = old_paintings.exchange(painting.detach())
        loss = 0.5 * (judge(plan, picture, True) + judge(plan, shown, False))
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()
        generator_loss = judge(plan, painting, True) + NEAR * F.l1_loss(painting, picture)
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        return loss.detach(), generator_loss.detach()

    modules: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": generator_optimizer,
        "discriminator": discriminator_optimizer,
    }
    return Program(step, pool(lambda: facade(side, device)), modules, optimizers, {"old paintings": old_paintings})

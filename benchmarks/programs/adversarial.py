"""An adversarial network (Goodfellow et al. 2014) of two perceptrons on handwritten digits.

Dynamic control flow: who learns depends on the losses: the one that is far ahead waits. Impure functions: counters, and
running means of both losses as plain numbers.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.data import digits
from benchmarks.programs.program import CompileModel, Program, Size, adam, identity

# noise, hidden width, image side, batch
SIZES = {"small": (4, 16, 8, 8), "full": (100, 256, 28, 128)}
BATCHES = 8
FAR_AHEAD = 0.45
"""A player whose loss is lower than this (a tie is at 0.69) waits for the other one."""
FORGET = 0.1


def make_generator(noise: int, hidden: int, points: int) -> nn.Sequential:
    """From f32[batch, noise] to images, f32[batch, points] in 0...1."""
    return nn.Sequential(
        nn.Linear(noise, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
        nn.Linear(hidden, points), nn.Sigmoid(),
    )  # fmt: skip


def make_discriminator(points: int, hidden: int) -> nn.Sequential:
    """From images to one logit each."""
    return nn.Sequential(nn.Linear(points, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(hidden, 1))


class Game:
    """Two players, their optimizers, and how the game stands."""

    def __init__(
        self, noise: int, generator: nn.Module, discriminator: nn.Module, optimizers: dict[str, torch.optim.Adam]
    ):
        self.noise = noise
        self.generator, self.discriminator = generator, discriminator
        self.optimizers = optimizers
        self.means = {"generator": 0.69, "discriminator": 0.69}
        self.waited = {"generator": 0, "discriminator": 0}

    def learn(self, player: str, loss: torch.Tensor) -> None:
        """Improve a player, unless it is far ahead."""
        mean = self.means[player]
        self.means[player] = mean + FORGET * (loss.item() - mean)
        if self.means[player] < FAR_AHEAD:
            self.waited[player] += 1
            return
        self.optimizers[player].zero_grad()
        loss.backward()
        self.optimizers[player].step()

    def step(self, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One move of each player; return their losses."""
        fake = self.generator(torch.randn(len(real), self.noise, device=real.device))
        on_real, on_fake = self.discriminator(real), self.discriminator(fake.detach())
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        self.learn("discriminator", 0.5 * loss)
        generator_loss = F.softplus(-self.discriminator(fake)).mean()
        self.learn("generator", generator_loss)
        return loss.detach(), generator_loss.detach()


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    noise, hidden, side, batch = SIZES[size]
    modules: dict[str, nn.Module] = {
        "generator": make_generator(noise, hidden, side * side).to(device),
        "discriminator": make_discriminator(side * side, hidden).to(device),
    }
    optimizers = {name: adam(module.parameters(), device, lr=2e-3) for name, module in modules.items()}
    game = Game(noise, compile_model(modules["generator"]), compile_model(modules["discriminator"]), optimizers)
    images = digits(side)[0][: BATCHES * batch].flatten(1).to(device).split(batch)
    observed = {"means": game.means, "waited": game.waited}
    return Program(game.step, lambda index: (images[index % BATCHES],), modules, {**optimizers}, observed)

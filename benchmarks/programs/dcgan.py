"""Two models and two optimizers in one step: a generator and a discriminator, trained against each other."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# noise channels, width, times the image doubles from 4x4, batch
SIZES = {"small": (8, 4, 2, 4), "full": (100, 64, 4, 64)}
COLOURS = 3


def make_generator(noise: int, width: int, doublings: int) -> nn.Sequential:
    """From f32[batch, noise, 1, 1] to images in -1…1."""
    channels = width * 2 ** (doublings - 1)
    layers: list[nn.Module] = [nn.ConvTranspose2d(noise, channels, 4, bias=False)]
    for _ in range(doublings - 1):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1, bias=False))
        channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    layers += [nn.ConvTranspose2d(channels, COLOURS, 4, stride=2, padding=1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def make_discriminator(width: int, doublings: int) -> nn.Sequential:
    """From images to one logit each."""
    layers: list[nn.Module] = [nn.Conv2d(COLOURS, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    channels = width
    for _ in range(doublings - 1):
        layers += [
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        channels *= 2
    layers += [nn.Conv2d(channels, 1, 4), nn.Flatten(0)]
    return nn.Sequential(*layers)


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    noise_channels, width, doublings, batch = SIZES[size]
    generator = make_generator(noise_channels, width, doublings).to(device)
    discriminator = make_discriminator(width, doublings).to(device)
    generate, discriminate = compile_model(generator), compile_model(discriminator)
    generator_optimizer = adam(generator.parameters(), device, lr=2e-4, betas=(0.5, 0.999))
    discriminator_optimizer = adam(discriminator.parameters(), device, lr=2e-4, betas=(0.5, 0.999))

    def step(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(real.size(0), device=real.device)
        zeros = torch.zeros_like(ones)
        fake = generate(torch.randn(real.size(0), noise_channels, 1, 1, device=real.device))

        discriminator_optimizer.zero_grad()
        real_loss = F.binary_cross_entropy_with_logits(discriminate(real), ones)
        real_loss.backward()
        fake_loss = F.binary_cross_entropy_with_logits(discriminate(fake.detach()), zeros)
        fake_loss.backward()
        discriminator_optimizer.step()

        generator_optimizer.zero_grad()
        generator_loss = F.binary_cross_entropy_with_logits(discriminate(fake), ones)
        generator_loss.backward()
        generator_optimizer.step()
        return (real_loss + fake_loss).detach(), generator_loss.detach()

    side = 4 * 2**doublings
    batches = pool(lambda: (torch.rand(batch, COLOURS, side, side, device=device) * 2 - 1,))
    modules: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": generator_optimizer,
        "discriminator": discriminator_optimizer,
    }
    return Program(step, batches, modules, optimizers)

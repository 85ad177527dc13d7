"""Random numbers inside the model: a variational autoencoder that draws with randn_like."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# pixels, hidden width, latent width, batch
SIZES = {"small": (36, 16, 4, 4), "full": (784, 400, 20, 128)}


class Autoencoder(nn.Module):
    """Return the reconstruction's logits, and mean and log variance of the code."""

    def __init__(self, pixels: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, hidden)
        self.mean = nn.Linear(hidden, latent)
        self.log_variance = nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def sample(self, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        """Draw from the code's distribution so that gradients reach its parameters."""
        deviation = torch.exp(0.5 * log_variance)
        return mean + torch.randn_like(deviation) * deviation

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.encoder(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(self.sample(mean, log_variance)), mean, log_variance


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    pixels, hidden, latent, batch = SIZES[size]
    model = Autoencoder(pixels, hidden, latent).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(images: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        logits, mean, log_variance = run_model(images)
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
        divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        loss = reconstruction + divergence
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "divergence": divergence.detach()}

    batches = pool(lambda: (torch.rand(batch, pixels, device=device),))
    return Program(step, batches, {"model": model}, {"adam": optimizer})

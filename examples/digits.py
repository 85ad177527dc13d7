"""Train a small convolutional network on the handwritten digits that come with scikit-learn.

python examples/digits.py --epochs 20
"""

import argparse
import json
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first_norm(self.first(images))), 2)
        x = functional.max_pool2d(functional.relu(self.second_norm(self.second(x))), 2)
        x = self.dropout(x.flatten(1))
        return self.output(functional.relu(self.hidden(x)))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those held out for testing; images are f32[n, 1, 8, 8]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    return images[360:], labels[360:], images[:360], labels[:360]


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    network.eval()
    correct = (network(images).argmax(dim=1) == labels).float().mean().item()
    network.train()
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a convolutional network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="stop after the epoch in which this time has passed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=100, help="steps between two printed losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write metrics here, and parameters beside it (.pt)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = load()
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.98)

    seconds: list[float] = []
    loss = torch.zeros(())
    start = time.perf_counter()
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(labels)).split(options.batch_size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            if len(seconds) % options.log_every == 0:
                print(f"step {len(seconds):6d}  loss {loss.item():.4f}")
        schedule.step()
        print(f"epoch {epoch + 1:3d}  accuracy {accuracy(network, test_images, test_labels):.4f}")
        if options.seconds and seconds[-1] > options.seconds:
            break

    if options.out:
        metrics = {"epochs": epoch + 1, "steps": len(seconds), "seconds": seconds, "loss": loss.item()}
        options.out.write_text(json.dumps(metrics))
        torch.save(network.state_dict(), options.out.with_suffix(".pt"))


if __name__ == "__main__":
    main()

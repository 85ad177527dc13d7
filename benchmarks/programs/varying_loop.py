"""A loop whose trip count changes: an LSTM cell run over sequences of varying length."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# hidden width, batch, lengths in the order they come
SIZES: dict[Size, tuple[int, int, list[int]]] = {
    "small": (16, 4, [2, 4, 3, 3, 2, 4]),
    "full": (256, 20, [10 + 7 * index % 26 for index in range(26)]),
}
CLASSES = 10


class SequenceClassifier(nn.Module):
    """Classify f32[batch, length, hidden] by the cell's last state."""

    def __init__(self, hidden: int, compile_model: CompileModel) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(hidden, hidden)
        self.classifier = nn.Linear(hidden, CLASSES)
        # In a tuple so that a compiled cell is not a second submodule.
        self.run_cell = (compile_model(self.cell),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = x.new_zeros(x.size(0), x.size(2))
        state = zeros, zeros
        for position in range(x.size(1)):
            state = self.run_cell[0](x[:, position], state)
        return self.classifier(state[0])


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    hidden, batch, lengths = SIZES[size]
    model = SequenceClassifier(hidden, compile_model).to(device)
    optimizer = adam(model.parameters(), device)
    remaining = iter(lengths)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    def sequences() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(batch, next(remaining), hidden, device=device)
        return x, torch.randint(CLASSES, (batch,), device=device)

    return Program(step, pool(sequences, len(lengths)), {"model": model}, {"adam": optimizer})

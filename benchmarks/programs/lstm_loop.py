"""A Python loop over time: a language model of two LSTM cells, unrolled by the interpreter."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# batch, time steps, hidden width, vocabulary
SIZES = {"small": (4, 5, 16, 50), "full": (20, 35, 650, 10_000)}
LAYERS = 2
State = list[tuple[torch.Tensor, torch.Tensor]]


class LanguageModel(nn.Module):
    """Predict the next token at every position of i64[batch, steps]."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(LAYERS))
        self.decoder = nn.Linear(hidden, vocabulary)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros for every layer's hidden and cell state."""
        zeros = [torch.zeros(batch, self.hidden, device=device) for _ in range(2 * LAYERS)]
        return list(zip(zeros[::2], zeros[1::2], strict=True))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = self.initial_state(tokens.size(0), tokens.device)
        embedded = self.embedding(tokens)
        outputs = []
        for position in range(tokens.size(1)):
            x = embedded[:, position]
            for layer, cell in enumerate(self.cells):
                state[layer] = cell(x, state[layer])
                x = state[layer][0]
            outputs.append(x)
        return self.decoder(torch.stack(outputs, dim=1))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    batch, steps, hidden, vocabulary = SIZES[size]
    model = LanguageModel(vocabulary, hidden).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        logits = run_model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss

    batches = pool(lambda: (torch.randint(vocabulary, (batch, steps + 1), device=device),))
    return Program(step, batches, {"model": model}, {"adam": optimizer})

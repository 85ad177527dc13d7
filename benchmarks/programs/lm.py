"""A large language model of its time (Jozefowicz et al. 2016): two projected LSTM layers and a sampled softmax.

Dynamic control flow: loops over time and layers; the state is cleared where a document begins. Dynamic types: the state
is a list that is empty at first. Impure functions: the state and the counts are attributes; every tenth loss is logged.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.data import text
from benchmarks.programs.program import CompileModel, Program, Size, adam, identity

# batch, time steps, hidden width, projected width, vocabulary, words sampled
SIZES = {"small": (3, 4, 12, 6, 50, 10), "full": (256, 20, 2048, 512, 8_000, 2_048)}
LAYERS = 2
SEQUENCES = 10
SEQUENCES_IN_DOCUMENT = 5
LOG_EVERY = 10


class Layer(nn.Module):
    """An LSTM cell whose output is projected to a smaller width."""

    def __init__(self, hidden: int, projected: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(projected, hidden)
        self.project = nn.Linear(hidden, projected, bias=False)

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        state = self.cell(x, state)
        return self.project(state[0]), state


class LanguageModel(nn.Module):
    """Return f32[batch * steps, projected] for i64[batch, steps]; `state` is where the last sequence ended."""

    def __init__(self, vocabulary: int, hidden: int, projected: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocabulary, projected)
        self.layers = nn.ModuleList(Layer(hidden, projected) for _ in range(LAYERS))
        self.output = nn.Embedding(vocabulary, projected)
        self.state: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(tokens)
        if not self.state:
            zeros = embedded.new_zeros(tokens.size(0), self.hidden)
            self.state = [(zeros, zeros) for _ in self.layers]
        outputs = []
        for position in range(tokens.size(1)):
            x = embedded[:, position]
            for number, layer in enumerate(self.layers):
                x, self.state[number] = layer(x, self.state[number])
            outputs.append(x)
        for number, (h, c) in enumerate(self.state):
            self.state[number] = h.detach(), c.detach()
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def sampled_loss(self, hidden: torch.Tensor, targets: torch.Tensor, samples: int) -> torch.Tensor:
        """Tell the right word, the first of the logits, from words drawn at random."""
        drawn = torch.randint(self.output.num_embeddings, (samples,), device=hidden.device)
        right = (hidden * self.output(targets)).sum(dim=1, keepdim=True)
        others = hidden @ self.output(drawn).t()
        others = others.masked_fill(drawn == targets.unsqueeze(1), float("-inf"))
        logits = torch.cat((right, others), dim=1)
        return F.cross_entropy(logits, torch.zeros_like(targets))


class Trainer:
    """A loop's counts and log."""

    def __init__(self, model: LanguageModel, run_model: nn.Module, optimizer: torch.optim.Optimizer, samples: int):
        self.model = model
        self.run_model = run_model
        self.optimizer = optimizer
        self.samples = samples
        self.updates = 0
        self.words = 0
        self.log: list[tuple[int, float]] = []

    def step(self, tokens: torch.Tensor, targets: torch.Tensor, document_begins: bool) -> torch.Tensor:
        if document_begins:
            self.model.state.clear()
        hidden = self.run_model(tokens)
        loss = self.model.sampled_loss(hidden, targets.flatten(), self.samples)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.words += tokens.numel()
        if self.updates % LOG_EVERY == 0:
            self.log.append((self.words, loss.item()))
        return loss.detach()


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    batch, steps, hidden, projected, vocabulary, samples = SIZES[size]
    model = LanguageModel(vocabulary, hidden, projected).to(device)
    optimizer = adam(model.parameters(), device)
    trainer = Trainer(model, compile_model(model), optimizer, samples)
    columns = text(vocabulary)[: batch * (SEQUENCES * steps + 1)].view(batch, -1).to(device)
    tokens = columns[:, :-1].split(steps, dim=1)
    targets = columns[:, 1:].split(steps, dim=1)

    def batches(index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        number = index % SEQUENCES
        return tokens[number], targets[number], number % SEQUENCES_IN_DOCUMENT == 0

    return Program(trainer.step, batches, {"model": model}, {"adam": optimizer}, {"trainer": trainer})

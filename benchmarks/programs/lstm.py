"""An LSTM language model over continuous text: the state is an attribute from which the next sequence goes on.

Dynamic control flow: a Python loop over time; the state is made where there is none. Dynamic types: the state is None
or two tensors, and sequences vary in length. Impure functions: the state is read and written by the forward.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.data import text
from benchmarks.programs.program import CompileModel, Program, Size, identity

# batch, hidden width, vocabulary, lengths of the sequences in the order they come
SIZES: dict[Size, tuple[int, int, int, list[int]]] = {
    "small": (4, 12, 40, [5, 5, 3, 5, 4, 5]),
    "full": (20, 650, 4_000, [35, 35, 30, 35, 35, 35, 40, 35]),
}
LARGEST_GRADIENT = 0.25
RATE = 1.0


class LSTM(nn.Module):
    """One layer with its gates written out: logits of the next word at every position of i64[batch, steps]."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.gates = nn.Linear(2 * hidden, 4 * hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.state is None:
            h = c = self.decoder.weight.new_zeros(tokens.size(0), self.decoder.in_features)
        else:
            h, c = self.state
        outputs = []
        for x in self.embedding(tokens).unbind(dim=1):
            i, f, g, o = self.gates(torch.cat((x, h), dim=1)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        self.state = h.detach(), c.detach()
        return self.decoder(torch.stack(outputs, dim=1))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    batch, hidden, vocabulary, lengths = SIZES[size]
    model = LSTM(vocabulary, hidden).to(device)
    run_model = compile_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(run_model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        return loss.detach()

    columns = text(vocabulary)[: batch * (sum(lengths) + 1)].view(batch, -1).to(device)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    sequences = [
        (columns[:, end - length : end], columns[:, end - length + 1 : end + 1])
        for length, end in zip(lengths, ends, strict=True)
    ]
    return Program(step, lambda index: sequences[index % len(sequences)], {"model": model}, {"sgd": optimizer})

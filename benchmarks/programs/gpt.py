"""A decoder-only transformer in GPT-2's form: scaled_dot_product_attention and tied embeddings."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

# layers, heads, width, vocabulary, batch, positions
SIZES = {"small": (2, 2, 16, 50, 2, 8), "full": (12, 12, 768, 50_257, 4, 256)}


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.attention_in(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.perceptron(self.norm2(x))


class GPT(nn.Module):
    """Logits of the next token at every position of i64[batch, length]."""

    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    layers, heads, width, vocabulary, batch, positions = SIZES[size]
    model = GPT(layers, heads, width, vocabulary, positions).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = run_model(tokens)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def text() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(vocabulary, (batch, positions + 1), device=device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Program(step, pool(text), {"model": model}, {"adam": optimizer})

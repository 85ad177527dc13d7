"""A library's model: transformers' BertForSequenceClassification, with dropout and a dict-like output."""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity, pool

CLASSES = 2
CONFIGS: dict[Size, dict[str, Any]] = {
    "small": {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    },
    "full": {},
}
# batch, length
SHAPES: dict[Size, tuple[int, int]] = {"small": (2, 8), "full": (16, 128)}


def make_model(config: BertConfig) -> nn.Module:
    """Random weights, and dropout on."""
    return BertForSequenceClassification(config).train()


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    config = BertConfig(**CONFIGS[size], num_labels=CLASSES)  # pyright: ignore[reportCallIssue]
    model = make_model(config).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)

    def step(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        output = run_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        output.loss.backward()
        optimizer.step()
        return {"loss": output.loss, "logits": output.logits}

    batch, length = SHAPES[size]

    def sentences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        input_ids = torch.randint(config.vocab_size, (batch, length), device=device)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, length - length // 4 :] = 0
        return input_ids, attention_mask, torch.randint(CLASSES, (batch,), device=device)

    return Program(step, pool(sentences), {"model": model}, {"adam": optimizer})

"""Proximal policy optimisation (Schulman et al. 2017) on Gymnasium's Acrobot, or another environment by `environment=`.

The step learns from moves that were played just before it, outside. Dynamic control flow: passes over shuffled parts of
the moves, given up where the policy has moved too far. Dynamic types: the last part is smaller. Impure functions: the
Python generator that shuffles, a learning rate that falls, the trainer's log.
"""

import random
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity

# environments side by side, moves of each, passes, moves in a part, hidden width
SIZES = {"small": (2, 4, 2, 5, 8), "full": (8, 31, 4, 64, 64)}
DISCOUNT = 0.99
TRACE = 0.95
"""Lambda of generalised advantage estimation (Schulman et al. 2016)."""
CLIP = 0.2
FARTHEST = 0.02
"""Mean divergence from the policy that played beyond which a step stops learning from its moves."""
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01
LARGEST_GRADIENT = 0.5
RATE = 2.5e-3


class ActorCritic(nn.Module):
    """Two networks beside each other: logits of the actions, and the value of observations, f32[batch, numbers]."""

    def __init__(self, numbers: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(numbers, hidden), nn.Tanh(), nn.Linear(hidden, actions))
        self.critic = nn.Sequential(nn.Linear(numbers, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)


@dataclass(frozen=True)
class Moves:
    """What was played: a row a move, in the order (move, environment)."""

    observations: torch.Tensor
    actions: torch.Tensor
    log_probabilities: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor


class Player:
    """Environments side by side; an episode that ends is begun anew."""

    def __init__(self, name: str, count: int, device: torch.device) -> None:
        self.environment: Any = gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync")
        self.observations, _ = self.environment.reset(seed=int(np.random.randint(2**31)))
        self.device = device

    @torch.no_grad()
    def play(self, model: ActorCritic, moves: int) -> Moves:
        """Play so many moves, and judge each by what came of it."""
        played: list[tuple[torch.Tensor, ...]] = []
        rewards, ends = [], []
        for _ in range(moves):
            observations = torch.from_numpy(self.observations).to(self.device)
            logits, values = model(observations)
            policy = Categorical(logits=logits)
            actions = policy.sample()
            played.append((observations, actions, policy.log_prob(actions), values))
            self.observations, reward, terminated, truncated, _ = self.environment.step(actions.cpu().numpy())
            rewards.append(reward.astype(np.float32))
            ends.append(np.logical_or(terminated, truncated))
        following = model(torch.from_numpy(self.observations).to(self.device))[1].cpu().numpy()
        advantage, advantages = np.zeros_like(following), []
        for (*_, values), reward, ended in zip(reversed(played), reversed(rewards), reversed(ends), strict=True):
            value = values.cpu().numpy()
            going_on = 1 - ended.astype(np.float32)
            surprise = reward + DISCOUNT * following * going_on - value
            advantage = surprise + DISCOUNT * TRACE * going_on * advantage
            advantages.append(torch.from_numpy(advantage))
            following = value
        columns = [torch.cat(column) for column in zip(*played, strict=True)]
        return Moves(*columns, torch.cat(advantages[::-1]).to(self.device))


class Trainer:
    """Learns from moves; keeps the rate and a log."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, passes: int, part: int) -> None:
        self.model = model
        self.optimizer = optimizer
        self.passes = passes
        self.part = part
        self.updates = 0
        self.given_up = 0

    def loss(self, moves: Moves, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss over some rows, and how far the policy has moved from the one that played them."""
        logits, values = self.model(moves.observations[rows])
        policy = Categorical(logits=logits)
        advantages, then = moves.advantages[rows], moves.values[rows]
        log_ratio = policy.log_prob(moves.actions[rows]) - moves.log_probabilities[rows]
        ratio = log_ratio.exp()
        scaled = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        gain = torch.min(ratio * scaled, ratio.clamp(1 - CLIP, 1 + CLIP) * scaled).mean()
        loss = VALUE_WEIGHT * F.mse_loss(values, advantages + then) - gain - ENTROPY_WEIGHT * policy.entropy().mean()
        return loss, (ratio - 1 - log_ratio).mean().detach()

    def step(self, moves: Moves) -> list[float]:
        """Return the losses of the passes."""
        self.optimizer.param_groups[0]["lr"] = RATE / (1 + 0.01 * self.updates)
        rows = list(range(len(moves.actions)))
        losses: list[float] = []
        for _ in range(self.passes):
            random.shuffle(rows)
            for start in range(0, len(rows), self.part):
                part = torch.tensor(rows[start : start + self.part], device=moves.actions.device)
                loss, moved = self.loss(moves, part)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
                self.optimizer.step()
            losses.append(loss.item())
            if moved > FARTHEST:
                self.given_up += 1
                break
        self.updates += 1
        return losses


def build(
    size: Size,
    device: torch.device,
    compile_model: CompileModel = identity,
    *,
    environment: str = "Acrobot-v1",
) -> Program:
    count, length, passes, part, hidden = SIZES[size]
    player = Player(environment, count, device)
    actions = int(player.environment.single_action_space.n)
    model = ActorCritic(player.observations.shape[1], actions, hidden).to(device)
    optimizer = adam(model.parameters(), device, lr=RATE)
    trainer = Trainer(compile_model(model), optimizer, passes, part)

    def batches(_: int) -> tuple[Moves]:
        return (player.play(model, length),)

    return Program(trainer.step, batches, {"model": model}, {"adam": optimizer}, {"trainer": trainer})

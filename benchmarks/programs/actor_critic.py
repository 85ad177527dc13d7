"""Reinforcement learning: actions are sampled, fetched as a list, and given to a NumPy environment."""

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity

# environments, moves a step, hidden width
SIZES = {"small": (4, 3, 16), "full": (32, 16, 256)}
DISCOUNT = 0.95
ACTIONS = 3


class Pendulums:
    """Inverted pendulums that are pushed left, not at all or right; one that falls starts again."""

    def __init__(self, count: int) -> None:
        self.angles = np.random.uniform(-0.1, 0.1, count)
        self.speeds = np.zeros(count)
        self.falls = 0

    def observe(self) -> np.ndarray:
        return np.stack([np.sin(self.angles), np.cos(self.angles), self.speeds], axis=1).astype(np.float32)

    def move(self, actions: list[int]) -> np.ndarray:
        """Advance one tick and return the rewards, f32[count]."""
        pushes = np.array(actions) - 1
        self.speeds += 0.05 * (9.8 * np.sin(self.angles) + 5.0 * pushes)
        self.angles += 0.05 * self.speeds
        fallen = np.abs(self.angles) > 0.5
        for index in np.flatnonzero(fallen):
            self.angles[index], self.speeds[index] = np.random.uniform(-0.1, 0.1), 0.0
            self.falls += 1
        return np.where(fallen, -1.0, 1.0 - np.abs(self.angles)).astype(np.float32)


class ActorCritic(nn.Module):
    """Return logits of the actions and the value of f32[batch, 3] observations."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.actor = nn.Linear(hidden, ACTIONS)
        self.critic = nn.Linear(hidden, 1)

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(observation)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def build(size: Size, device: torch.device, compile_model: CompileModel = identity) -> Program:
    count, moves, hidden = SIZES[size]
    model = ActorCritic(hidden).to(device)
    run_model = compile_model(model)
    optimizer = adam(model.parameters(), device)
    environment = Pendulums(count)
    mean_rewards: list[float] = []

    def step() -> float:
        log_probabilities, values, rewards = [], [], []
        for _ in range(moves):
            logits, value = run_model(torch.from_numpy(environment.observe()).to(device))
            policy = Categorical(logits=logits)
            action = policy.sample()
            log_probabilities.append(policy.log_prob(action))
            values.append(value)
            rewards.append(environment.move(action.tolist()))
        returns, following = [], np.zeros(count, dtype=np.float32)
        for reward in reversed(rewards):
            following = reward + np.float32(DISCOUNT) * following
            returns.insert(0, torch.from_numpy(following).to(device))
        expected, value = torch.stack(returns), torch.stack(values)
        advantage = (expected - value).detach()
        loss = F.mse_loss(value, expected) - (torch.stack(log_probabilities) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_rewards.append(float(np.mean(rewards)))
        return loss.item()

    observed = {"environment": environment, "mean_rewards": mean_rewards}
    return Program(step, lambda _: (), {"model": model}, {"adam": optimizer}, observed)

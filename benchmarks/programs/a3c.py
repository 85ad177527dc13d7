"""Actor-critic with several workers (Mnih et al. 2016) on Gymnasium's CartPole, taking turns in one thread.

Dynamic control flow: a worker plays until its episode ends or its twenty moves are over. Dynamic types: so a loss is
over one to twenty moves. Impure functions: the environment, the worker's observation, and a list of episodes.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

from benchmarks.programs.program import CompileModel, Program, Size, adam, identity

# workers, moves a step at most, hidden width
SIZES = {"small": (2, 3, 8), "full": (4, 20, 128)}
DISCOUNT = 0.99
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01
LARGEST_GRADIENT = 0.5


class ActorCritic(nn.Module):
    """Return logits of the actions and the value of one observation, f32[numbers]."""

    def __init__(self, numbers: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Linear(numbers, hidden)
        self.actor = nn.Linear(hidden, actions)
        self.critic = nn.Linear(hidden, 1)

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.body(observation))
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class Worker:
    """An environment with a copy of the shared model, which is brought up to date before each step."""

    def __init__(self, environment_name: str, moves: int, hidden: int, device: torch.device) -> None:
        self.environment: Any = gymnasium.make(environment_name)
        self.observation, _ = self.environment.reset(seed=int(np.random.randint(2**31)))
        self.moves = moves
        self.device = device
        self.model = ActorCritic(len(self.observation), int(self.environment.action_space.n), hidden).to(device)
        self.episode_reward = 0.0
        self.episodes: list[float] = []

    def move(self, action: int) -> tuple[float, bool]:
        """Return the reward, and whether the episode has ended; the next one is begun."""
        self.observation, reward, terminated, truncated, _ = self.environment.step(action)
        self.episode_reward += float(reward)
        done = terminated or truncated
        if done:
            self.episodes.append(self.episode_reward)
            self.episode_reward = 0.0
            self.observation, _ = self.environment.reset()
        return float(reward), done

    def loss(self, run_model: nn.Module) -> torch.Tensor:
        """Play, and return how wrong the values were and how unwise the actions."""
        values, log_probabilities, entropies, rewards = [], [], [], []
        done = False
        while not done and len(rewards) < self.moves:
            logits, value = run_model(torch.from_numpy(self.observation).to(self.device))
            policy = Categorical(logits=logits)
            action = policy.sample()
            reward, done = self.move(action.item())
            values.append(value)
            log_probabilities.append(policy.log_prob(action))
            entropies.append(policy.entropy())
            rewards.append(reward)
        following = 0.0
        if not done:
            with torch.no_grad():
                following = run_model(torch.from_numpy(self.observation).to(self.device))[1].item()
        returns: list[float] = []
        for reward in reversed(rewards):
            following = reward + DISCOUNT * following
            returns.insert(0, following)
        advantage = torch.tensor(returns, device=self.device) - torch.stack(values)
        actor_loss = -torch.stack(log_probabilities) * advantage.detach()
        loss = actor_loss + VALUE_WEIGHT * advantage.square() - ENTROPY_WEIGHT * torch.stack(entropies)
        return loss.mean()


def build(
    size: Size,
    device: torch.device,
    compile_model: CompileModel = identity,
    *,
    environment: str = "CartPole-v1",
) -> Program:
    count, moves, hidden = SIZES[size]
    workers = [Worker(environment, moves, hidden, device) for _ in range(count)]
    compiled = [compile_model(worker.model) for worker in workers]
    shared = ActorCritic(workers[0].model.body.in_features, workers[0].model.actor.out_features, hidden).to(device)
    optimizer = adam(shared.parameters(), device)

    def step(number: int) -> torch.Tensor:
        worker = workers[number]
        worker.model.load_state_dict(shared.state_dict())
        worker.model.zero_grad()
        loss = worker.loss(compiled[number])
        loss.backward()
        nn.utils.clip_grad_norm_(worker.model.parameters(), LARGEST_GRADIENT)
        for theirs, own in zip(shared.parameters(), worker.model.parameters(), strict=True):
            theirs.grad = own.grad
        optimizer.step()
        return loss.detach()

    modules: dict[str, nn.Module] = {f"worker {number}": worker.model for number, worker in enumerate(workers)}
    observed = {"episodes": [worker.episodes for worker in workers]}
    return Program(step, lambda index: (index % count,), {"shared": shared, **modules}, {"adam": optimizer}, observed)

"""What the recursive programs share: trees of the standard library's syntax in batches, and the step."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.programs.program import Program, Size

F = TypeVar("F", bound=Callable[..., Any])

FUNCTIONS: dict[Size, int] = {"small": 30, "full": 400}
BATCH: dict[Size, int] = {"small": 3, "full": 25}
# Width of the embedding, width of the state.
WIDTHS: dict[Size, tuple[int, int]] = {"small": (6, 5), "full": (300, 168)}


class Decorate(Protocol):
    """Takes the place of a decorator on a recursive function: the identity, or `twofold.subgraph`."""

    def __call__(self, function: F, /) -> F: ...


def undecorated(function: F) -> F:
    """Leave the function as it is: plain Python recursion."""
    return function


def training(
    model: nn.Module, loss_of: Callable[[list[Any]], Tensor], trees: list[Any], size: Size, lr: float = 0.02
) -> Program:
    """Train `model` on batches of `trees`, in their order, by SGD on the mean loss of a tree."""
    batch = BATCH[size]
    batches = [trees[start : start + batch] for start in range(0, len(trees) - batch + 1, batch)]
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)

    def step(batch: list[Any]) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(batch) / len(batch)
        loss.backward()
        optimizer.step()
        return loss

    return Program(step, lambda index: (batches[index % len(batches)],), {"model": model}, {"sgd": optimizer})

"""What Twofold must not be: a recorder that takes one call for all calls.

`plain_replay` runs the first call eagerly, records the tensor operations of the second, and from then on runs these
operations alone: on the new call's tensors and the program's own, with no Python between them. A program without
dynamic features is the same under it as in eager execution; what it gets wrong is what a test of such features must
catch.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.programs import Program
from tests.differential import Step

Operation = tuple[Callable[..., Any], Any, Any, Any]
"""Function, positional arguments, keyword arguments, result."""


class Recorder(TorchDispatchMode):
    """Keeps every operation, those of a backward included, and through them every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


@dataclass
class Recording:
    """The operations of one call, what it was called with, and what it left."""

    operations: list[Operation]
    arguments: tuple[Any, ...]
    result: Any
    gradients: list[tuple[torch.Tensor, torch.Tensor | None]]
    """Each parameter with its gradient after the call."""

    def replay(self, arguments: tuple[Any, ...]) -> Any:
        """Run the operations on new arguments; every number and every decision is the recorded one."""
        tensors: dict[int, Any] = dict(zip(map(id, tree_leaves(self.arguments)), tree_leaves(arguments), strict=True))

        def current(value: Any) -> Any:
            return tensors.get(id(value), value) if isinstance(value, torch.Tensor) else value

        with torch.no_grad():
            for function, positional, keywords, recorded in self.operations:
                result = function(*tree_map(current, positional), **tree_map(current, keywords))
                tensors.update(zip(map(id, tree_leaves(recorded)), tree_leaves(result), strict=True))
            for parameter, gradient in self.gradients:
                parameter.grad = current(gradient)
        return tree_map(current, self.result)


@contextmanager
def plain_replay(program: Program) -> Generator[Step, None, None]:
    """A `Runner`: eager once, recorded once, then replayed."""
    calls = 0
    recording: Recording | None = None

    def step(*arguments: Any) -> Any:
        nonlocal calls, recording
        calls += 1
        if calls == 1:
            return program.step(*arguments)
        if recording is None:
            with Recorder() as recorder:
                result = program.step(*arguments)
            parameters = [parameter for module in program.modules.values() for parameter in module.parameters()]
            gradients = [(parameter, parameter.grad) for parameter in parameters]
            recording = Recording(recorder.operations, arguments, result, gradients)
            return result
        return recording.replay(arguments)

    yield step

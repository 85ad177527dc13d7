"""The ways to run one and the same binary TreeLSTM that `benchmarks.trees` compares.

Each contender has its own copy of equal parameters. A batch is a range of the trees that all of them hold.
"""

import contextlib
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import twofold
from benchmarks.environment import synchronize
from benchmarks.programs.tree_lstm import Encode, TreeLSTM, recursion
from benchmarks.trees.data import BinaryNode
from benchmarks.trees.level_batched import Plan, loss_by_autograd, loss_by_hand, make_plan

Kind = Literal["forward", "train"]
KINDS: tuple[Kind, ...] = ("forward", "train")
NAMES = (
    "plain",
    "compiled_cell",
    "dynet",
    "level_autograd",
    "level_by_hand",
    "level_by_hand_cached",
    "twofold",
    "twofold_function",
)

LEARNING_RATE = 1e-4
"""Small, because losses are summed over all nodes, and rounds of measurement train on and on."""

Trees = list[BinaryNode]


class Skipped(Exception):
    """A contender cannot run here; the text says why."""


class Contender(Protocol):
    version: str
    """Of the library that computes."""

    def seconds(self, kind: Kind, batches: list[range], passes: int = 1) -> float:
        """Run the batches `passes` times over and return the seconds: "train" is a whole step of SGD."""
        ...

    def gradients(self, batch: range) -> tuple[float, dict[str, Tensor]]:
        """Return the loss summed over all nodes and the gradient of each parameter that is trained."""
        ...


@contextlib.contextmanager
def open_contender(
    name: str, model: TreeLSTM, trees: Trees, dynet_python: str | None = None
) -> Generator[Contender, None, None]:
    """Make a contender from a copy of `model`. Raises `Skipped` where it cannot run."""
    model = copy.deepcopy(model)
    if name == "dynet":
        with tempfile.TemporaryDirectory() as folder, DyNet(model, trees, Path(folder), dynet_python) as contender:
            yield contender
    else:
        yield Torch(model, _loss_function(name, model), trees, twofold.function if name == "twofold_function" else None)


class Torch:
    """A contender in this process, given by its loss of a batch: f32[] summed over all nodes."""

    def __init__(self, model: TreeLSTM, loss: Callable[[Trees], Tensor], trees: Trees, decorate: Any = None) -> None:
        """`decorate`: what stands before the step and the forward pass, whose source stays as it is."""
        self.version = f"torch {torch.__version__}"
        self.loss = loss
        self.trees = trees
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=LEARNING_RATE)
        self.batches: dict[range, Trees] = {}
        self.train, self.forward = self._train, self._forward
        if decorate is not None:
            self.train, self.forward = decorate(self._train), decorate(self._forward)

    def seconds(self, kind: Kind, batches: list[range], passes: int = 1) -> float:
        chosen = [self._batch(batch) for batch in batches]
        run = self.train if kind == "train" else self.forward
        synchronize()
        begin = time.perf_counter()
        for _ in range(passes):
            for batch in chosen:
                run(batch)
        synchronize()
        return time.perf_counter() - begin

    def gradients(self, batch: range) -> tuple[float, dict[str, Tensor]]:
        self.optimizer.zero_grad()
        loss = self.loss(self._batch(batch))
        loss.backward()
        return loss.item(), {name: parameter.grad.clone() for name, parameter in self.parameters.items()}

    def _batch(self, batch: range) -> Trees:
        """Return the same list each time: what a contender caches belongs to it."""
        return self.batches.setdefault(batch, self.trees[batch.start : batch.stop])

    def _train(self, batch: Trees) -> None:
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()

    def _forward(self, batch: Trees) -> Any:
        with torch.no_grad():
            loss = self.loss(batch)
        return loss.item()  # a lazy contender has to have computed it; all wait alike


def _loss_function(name: str, model: TreeLSTM) -> Callable[[Trees], Tensor]:
    device = model.embedding.weight.device
    match name:
        case "plain" | "twofold_function":
            return _summed(recursion(model))
        case "compiled_cell":
            torch.compiler.reset()  # Dynamo's limit on recompilation counts what earlier models compiled
            return _summed(compiled_recursion(model))
        case "level_autograd":
            return lambda batch: loss_by_autograd(model, make_plan(batch, device))
        case "level_by_hand":
            return lambda batch: loss_by_hand(model, make_plan(batch, device))
        case "level_by_hand_cached":
            plans: dict[int, Plan] = {}

            def loss(batch: Trees) -> Tensor:
                if id(batch) not in plans:
                    plans[id(batch)] = make_plan(batch, device)
                return loss_by_hand(model, plans[id(batch)])

            return loss
        case "twofold":
            subgraph = getattr(twofold, "subgraph", None)
            if subgraph is None:
                raise Skipped("this version of twofold has no subgraph")
            return _summed(recursion(model, decorate=subgraph))
        case _:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join(NAMES)}")


def _summed(encode: Encode) -> Callable[[Trees], Tensor]:
    return lambda batch: sum(encode(tree)[2] for tree in batch)


def compiled_recursion(model: TreeLSTM) -> Encode:
    """Return the recursion over two cells under `torch.compile`, which sees one shape of each."""

    def leaf_cell(word: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, o, u = model.leaf(word).chunk(3, 1)
        return classified(o, i.sigmoid() * u.tanh(), label)

    def inner_cell(hl: Tensor, cl: Tensor, hr: Tensor, cr: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, o, fl, fr, u = model.inner(torch.cat((hl, hr), 1)).chunk(5, 1)
        return classified(o, i.sigmoid() * u.tanh() + fl.sigmoid() * cl + fr.sigmoid() * cr, label)

    def classified(o: Tensor, c: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = o.sigmoid() * c.tanh()
        return h, c, F.cross_entropy(model.classify(h), label)

    leaf: Any = torch.compile(leaf_cell, dynamic=False)
    inner: Any = torch.compile(inner_cell, dynamic=False)
    device = model.embedding.weight.device

    def encode(node: BinaryNode) -> tuple[Tensor, Tensor, Any]:
        label = torch.tensor([node.label], device=device)
        if node.left is None or node.right is None:
            return leaf(model.embedding.weight[node.word].unsqueeze(0), label)
        hl, cl, loss_left = encode(node.left)
        hr, cr, loss_right = encode(node.right)
        h, c, loss = inner(hl, cl, hr, cr, label)
        return h, c, loss + loss_left + loss_right

    return encode


class DyNet:
    """DyNet with automatic batching, on the CPU, in a process of the interpreter that has it."""

    def __init__(self, model: TreeLSTM, trees: Trees, folder: Path, python: str | None) -> None:
        if model.embedding.weight.device.type != "cpu":
            raise Skipped("DyNet's wheels are for the CPU alone")
        if python is None and importlib.util.find_spec("dynet") is None:
            raise Skipped("DyNet is not installed: pip install dyNET38, or give --dynet-python")
        self.folder = folder
        arrays = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        np.savez(folder / "parameters.npz", **arrays)
        (folder / "trees.json").write_text(json.dumps([_as_lists(tree) for tree in trees]))
        worker = Path(__file__).with_name("dynet_worker.py")
        self.process = subprocess.Popen(
            [python or sys.executable, str(worker), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "DyNet":
        self.version: str = self._call("version")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def seconds(self, kind: Kind, batches: list[range], passes: int = 1) -> float:
        bounds = [(batch.start, batch.stop) for batch in batches]
        return self._call("seconds", kind=kind, batches=bounds, passes=passes, lr=LEARNING_RATE)

    def gradients(self, batch: range) -> tuple[float, dict[str, Tensor]]:
        loss = self._call("gradients", first=batch.start, last=batch.stop)
        with np.load(self.folder / "gradients.npz") as arrays:
            return loss, {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}

    def _call(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the DyNet worker ended with status {self.process.wait()}")
        return json.loads(answer)


def _as_lists(tree: BinaryNode) -> list[Any]:
    if tree.left is None or tree.right is None:
        return [tree.label, tree.word]
    return [tree.label, _as_lists(tree.left), _as_lists(tree.right)]

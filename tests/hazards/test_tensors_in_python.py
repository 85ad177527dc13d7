"""Tensors in Python's own hands: values fetched, printed, compared, hashed, indexed with, made from data."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.hazards.programs import MODES, Mode, Parts, accounted, runs_as_graph, same, training

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda t: t.mean().item(),
    "float": lambda t: float(t.mean()),
    "int": lambda t: int(t.sum() * 10),
    "bool": lambda t: bool(t.sum() > 0),
    "not": lambda t: not (t.sum() > 0),
    "and": lambda t: (t.sum() > 0) and "yes",
    "complex": lambda t: complex(t.mean()),
    "round": lambda t: round(t.mean().item(), 2),
    "tolist": lambda t: t.tolist(),
    "list": lambda t: [float(v) for v in t.flatten()],
    "unpacked": lambda t: [float(a + b) for a, b, _ in t],
    "numpy": lambda t: t.detach().numpy().copy(),
    "asarray": lambda t: np.asarray(t.detach()).sum(),
    "array": lambda t: np.array(t.detach()),
    "np.mean": lambda t: np.mean(t.detach().numpy()),
    "np on tensor": lambda t: np.sqrt(t.detach().abs()).sum(),
    "numpy of a copy": lambda t: t.detach().cpu().numpy().copy(),
    "math": lambda t: math.exp(t.mean()),
    "str": lambda t: str(t),
    "repr": lambda t: repr(t.detach()),
    "format": lambda t: f"{t.mean():.3f} {t.mean().item():.2e}",
    "f-string": lambda t: f"{t.mean()} {t.detach()}",
    "percent": lambda t: "%.3f" % t.mean(),  # noqa: UP031
    "shape": lambda t: (t.shape, t.size(0), t.ndim, t.numel(), len(t), t.dtype, str(t.device), t.stride()),
    "flags": lambda t: (t.requires_grad, t.is_leaf, t.is_contiguous(), t.is_cuda),
    "grad_fn": lambda t: (t.grad_fn is None, type(t.grad_fn).__name__),
    "grad_fn name": lambda t: t.grad_fn.name(),
    "version": lambda t: t._version,
    "type": lambda t: (type(t).__name__, isinstance(t, torch.Tensor), t.type(), torch.is_tensor(t)),
    "identity": lambda t: (t is t, t is t.detach(), t.data is t.data, t.T is t),
    "hash": lambda t: (len({t, t, t * 1}), {t: 3}[t], hash(t) == id(t)),
    "in": lambda t: (t[0, 0] in t, 99.0 in t),
    "in list": lambda t: any(t is other for other in [t.detach(), t]),
    "equal": lambda t: (torch.equal(t, t), torch.allclose(t, t + 1e-9), (t == t).all().item()),
    "max of two": lambda t: max(t[0, 0], t[0, 1]).item(),
    "sorted": lambda t: [v.item() for v in sorted(t[0])],
    "sum": lambda t: sum(t[0]).item(),
    "index": lambda t: ["a", "b", "c"][t[0].argmax()],
    "range": lambda t: list(range(t[0].argmax() + 1)),
    "slice": lambda t: [1, 2, 3][: t[0].argmax()],
    "iterated": lambda t: [row.sum().item() for row in t],
    "reversed": lambda t: [row.sum().item() for row in reversed(t)],
    "copy": lambda t: copy.copy(t.detach()),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "pickle": lambda t: pickle.loads(pickle.dumps(t.detach())),
    "save": lambda t: _saved(t.detach()),
    "storage": lambda t: t.detach().untyped_storage().nbytes(),
    "data_ptr": lambda t: t.data_ptr() == t.detach().data_ptr(),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).sum().item(),
    "new tensor": lambda t: torch.tensor(t.tolist()),
    "tensor of tensor": lambda t: torch.tensor([t[0, 0].item(), 1.0]),
    "tensor of tensors": lambda t: torch.tensor([t[0, 0], t[0, 1]]),
    "tensor copy": lambda t: torch.as_tensor(t.detach()),
    "unique": lambda t: (t > 0).unique(),
    "nonzero": lambda t: (t > 0).nonzero(),
    "mask": lambda t: t.detach()[t.detach() > 0],
    "masked_select": lambda t: torch.masked_select(t, t > 0).detach().sum(),
    "where": lambda t: torch.where(t > 0),
    "mask write": lambda t: t.detach().clone().masked_fill_(t > 0, 1.0),
    "mask assignment": lambda t: _mask_assigned(t.detach().clone()),
    "bincount": lambda t: torch.bincount(t.argmax(1), minlength=3),
    "topk": lambda t: t.topk(2).values.detach(),
    "sort": lambda t: t.detach().sort(stable=True),
    "histogram": lambda t: torch.histc(t.detach(), 4),
    "attribute": lambda t: _with_attribute(t),
    "repeat_interleave": lambda t: t.detach()[0].repeat_interleave(t[0].argmax() + 1),
    "split sizes": lambda t: [len(part) for part in t.split([1, 2, 3])],
    "dir": lambda t: "item" in dir(t),
    "is_same_size": lambda t: t.is_same_size(t),
    "element": lambda t: t[1, 2].item() if t.numel() > 5 else None,
    "ellipsis": lambda t: t[..., None, 0].detach(),
    "fancy": lambda t: t.detach()[[0, 2], [1, 1]],
    "numpy index": lambda t: t.detach()[np.array([0, 2])],
}


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _mask_assigned(tensor: torch.Tensor) -> torch.Tensor:
    tensor[tensor > 0] = 0.5
    return tensor


def _with_attribute(tensor: Any) -> Any:
    tensor.note = "mine"
    tensor.detach().other = 1
    return tensor.note, hasattr(tensor, "other"), sorted(vars(tensor))


OF_THE_CPU = {"numpy", "asarray", "array", "np.mean", "np on tensor"}
"""Arrays that show a tensor's memory, which eager execution refuses elsewhere."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.cpu) if name in OF_THE_CPU else name for name in READS]
)
def test_read_of_an_intermediate_tensor(name: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            value = READS[name](output)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()
            return value, loss.detach()

        return step

    for mode in MODES:
        accounted(training(make), 8, mode)


@pytest.mark.parametrize("name", READS)
def test_read_of_an_input_a_parameter_and_a_result(name: str) -> None:
    if name == "grad_fn name":
        return

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            early = READS[name](y), READS[name](parts.model[0].weight[:, :3])
            parts.train(x, y)
            with torch.no_grad():
                output = parts.model(x)
            return early, READS[name](output), READS[name](parts.model[0].weight[:, :3])

        return step

    same(training(make), 6)


READS_AS_GRAPH = [
    "item", "float", "int", "bool", "tolist", "numpy", "str", "format", "shape", "flags", "hash", "identity",
    "equal", "iterated", "index", "copy", "topk", "mask write", "type", "attribute", "fancy",
]  # fmt: skip


@pytest.mark.parametrize("name", READS_AS_GRAPH)
def test_read_keeps_the_graph(name: str) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            READS[name](output)
            loss = F.mse_loss(output, y)
            loss.backward()
            parts.optimizer.step()

        return step

    accounted(training(make), 8)


@pytest.mark.parametrize("mode", MODES)
def test_print_inside_and_outside(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            loss = F.mse_loss(output, y)
            print("before", loss, output[0], parts.model[0].bias)
            loss.backward()
            print("gradient", parts.model[0].bias.grad, loss)
            parts.optimizer.step()
            print("after", loss, loss.detach(), parts.model[0].bias, f"{loss:.4f}")
            return loss

        return step

    runs_as_graph(training(make), 8, mode)


@pytest.mark.parametrize("mode", MODES)
def test_print_of_a_returned_loss(mode: Mode) -> None:
    lines: list[str] = []

    def between(number: int, parts: Parts) -> None:
        if "loss" in parts.seen:
            lines.append(f"{parts.seen['loss']} {parts.seen['loss']:.3f}")
            parts.seen["lines"] = lines[-1]

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["loss"] = parts.train(x, y)

        return step

    runs_as_graph(training(make, between=between), 8, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_branch_on_a_fetched_value(place: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            if place == "forward" and output.sum() > 0:
                output = output.tanh() * 2
            loss = F.mse_loss(output, y)
            if place == "backward" and loss.item() > 0.8:
                loss = loss * 0.1
            loss.backward()
            if place == "step" and parts.model[0].weight.grad.abs().max() > 0.1:
                parts.model[0].weight.grad.mul_(0.5)
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make), 20, mode)


def test_fetched_value_enters_arithmetic() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            output = parts.model(x)
            scale = output.abs().mean().item()
            loss = F.mse_loss(output / scale, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    for mode in MODES:
        same(training(make), 12, mode)


def test_fetched_value_picks_a_layer() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            hidden = parts.model[0](x)
            activation = [torch.tanh, torch.relu, torch.sigmoid][int(hidden[0, :3].argmax())]
            loss = F.mse_loss(parts.model[2](activation(hidden)), y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    runs_as_graph(training(make), 20)


def test_loop_until_a_value_is_small() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            hidden = x * (1 + number % 3)
            rounds = 0
            while hidden.norm() > 2.5:
                hidden = hidden * 0.7
                rounds += 1
            loss = parts.loss(hidden, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach(), rounds

        return step

    for mode in MODES:
        runs_as_graph(training(make), 24, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["from_numpy", "tensor", "as_tensor", "as_tensor of array", "asarray", "float array"])
def test_data_from_the_host(way: str, mode: Mode) -> None:
    ways: dict[str, Callable[[np.ndarray], torch.Tensor]] = {
        "from_numpy": torch.from_numpy,
        "tensor": lambda a: torch.tensor(a.tolist()),
        "as_tensor": lambda a: torch.as_tensor(a.tolist()),
        "as_tensor of array": torch.as_tensor,
        "asarray": torch.asarray,
        "float array": lambda a: torch.Tensor(a.tolist()),
    }

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            made = ways[way](np.random.rand(6, 4).astype(np.float32))
            return parts.train(made if made.device == x.device else made.to(x.device), y).detach()

        return step

    runs_as_graph(training(make), 10, mode)


@pytest.mark.cpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["outside", "before forward", "after forward", "after backward", "after step"])
def test_array_behind_a_tensor_is_changed(place: str, mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        array = parts.seen["array"] = np.random.rand(6, 4).astype(np.float32)
        shared = torch.from_numpy(array)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            def change(here: str) -> None:
                if here == place:
                    array[:] = array * 0.9 + number

            parts.optimizer.zero_grad()
            change("before forward")
            output = parts.model(shared) + torch.from_numpy(array).mean()
            change("after forward")
            loss = F.mse_loss(output, y)
            loss.backward()
            change("after backward")
            parts.optimizer.step()
            change("after step")
            return loss.detach(), shared

        return step

    def between(number: int, parts: Parts) -> None:
        if place == "outside":
            parts.seen["array"] += 1

    accounted(training(make, between=between), 10, mode)


@pytest.mark.cpu
@pytest.mark.parametrize("mode", MODES)
def test_one_buffer_is_filled_twice_in_a_unit(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        array = np.zeros((6, 4), dtype=np.float32)
        shared = torch.from_numpy(array)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.optimizer.zero_grad()
            array[:] = number
            first = parts.model(shared * 1)
            array[:] = -number
            second = parts.model(shared * 1)
            loss = F.mse_loss(first, y) + F.mse_loss(second, y)
            loss.backward()
            parts.optimizer.step()
            return loss.detach()

        return step

    accounted(training(make), 8, mode)


def test_unit_writes_to_memory_of_an_array() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        array = parts.seen["array"] = np.zeros(4, dtype=np.float32)
        shared = torch.from_numpy(array)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = parts.train(x, y)
            shared.add_(x.mean(0))
            return loss.detach(), array.sum(), shared

        return step

    for mode in MODES:
        accounted(training(make), 8, mode)


def test_constants_made_inside() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            weights = torch.tensor([1.0, 2.0, 0.5])
            scale = torch.full((), float(number % 2))
            steps = torch.arange(4) / 4 + torch.zeros(4) + torch.eye(4)[0]
            return parts.train(x * steps + scale, y * weights).detach()

        return step

    for mode in MODES:
        runs_as_graph(training(make), 14, mode)


def test_named_results_and_unpacking() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            best = x.max(dim=1)
            values, indices = x.sort(dim=1)
            q, r = torch.linalg.qr(x)
            mean_and_std = torch.std_mean(x, 0)
            loss = parts.train(values + best.values[:, None] + mean_and_std[0], y)
            return loss.detach(), best, best.indices, indices, q, r, type(best).__name__

        return step

    for mode in MODES:
        runs_as_graph(training(make), 8, mode)


def test_tensor_subclass_and_parameter_results() -> None:
    class Mine(torch.Tensor):
        pass

    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            mine = x.as_subclass(Mine)
            doubled = mine * 2
            loss = parts.train(doubled.as_subclass(torch.Tensor), y)
            return loss.detach(), type(doubled).__name__, doubled

        return step

    accounted(training(make), 6)


def test_complex_and_boolean_arithmetic() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            spectrum = torch.fft.rfft(x)
            power = spectrum.abs().square() + (spectrum * spectrum.conj()).real
            mask = (x > 0) & ~(x > 1) | (x < -1)
            return parts.train(x * mask + power.sum(1, keepdim=True), y).detach(), spectrum, mask

        return step

    runs_as_graph(training(make), 8)


def test_set_item_and_in_place_operators() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            work = torch.zeros(6, 4)
            work[:, 1] = x[:, 0]
            work[number % 3] = 1.0
            work += x
            work *= 2
            work[work.argmax(1) > 1, 0] = -1.0
            alias = work
            work -= 1
            assert alias is work
            work = work + 1
            assert alias is not work
            return parts.train(work, y).detach(), alias, work

        return step

    accounted(training(make), 12)


def test_out_argument() -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        kept = parts.seen["kept"] = torch.zeros(6, 4)

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            torch.mul(x, 2, out=kept)
            fresh = torch.empty(0)
            torch.add(kept, 1, out=fresh)
            return parts.train(fresh, y).detach(), fresh

        return step

    accounted(training(make), 8)


@pytest.mark.parametrize("engine", ["coexecution", "speculation"])
@pytest.mark.parametrize("read", [str, lambda t: copy.deepcopy(t).requires_grad], ids=["str", "deepcopy"])
def test_result_of_the_unit_before_is_detached_and_read(read: Callable[[torch.Tensor], Any], engine: str) -> None:
    """It is fed as it is, history and all, where nothing can write to it meanwhile; what is detached has none."""

    def make(parts: Parts) -> Callable[..., Any]:
        parts.seen["last"] = torch.zeros(())

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            parts.seen["read"] = read(parts.seen["last"].detach())
            parts.seen["last"] = loss = parts.train(x, y)
            return loss

        return step

    runs_as_graph(training(make), 20, engine=engine)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_are_set(mode: Mode) -> None:
    """PyTorch makes a tensor of such a number, on the CPU also where it is set on a device."""

    def make(parts: Parts) -> Callable[..., Any]:
        rows = torch.tensor([0, 2])

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            work, counts = x * 2, torch.zeros(6, 4, dtype=torch.long)
            work[0] = 1.0
            work[1:, ::2] = -0.5
            work[rows] = 2
            work[:, rows] = float("-inf")
            work[..., 1] = True
            work[3, 3] = 1 / 3
            counts[rows, 1] = -100
            counts[4] = 7
            return parts.train(work.clamp(-2, 2) + counts / 100, y).detach(), work, counts

        return step

    runs_as_graph(training(make), 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_number_is_set_through_a_mask(mode: Mode) -> None:
    def make(parts: Parts) -> Callable[..., Any]:
        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            work = x * 2
            work[x > 0] = 0.25
            return parts.train(work, y).detach(), work

        return step

    accounted(training(make), 10, mode)

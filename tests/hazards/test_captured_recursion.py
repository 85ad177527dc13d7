"""Batches of recursive calls in captured memory, which the next batch overwrites: each case against plain Python.

A stand-in for CUDA graphs does the captured work anew and writes its results where they were the last time.
"""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.programs.tree_lstm import TreeLSTM, recursion
from tests.equivalence.recursive_programs import (
    HIDDEN,
    LABELS,
    PROGRAMS,
    WORDS,
    Decorate,
    Recursion,
    Tree,
    plain,
    strict,
)
from twofold.backends.cuda_graph import CaptureFailed
from twofold.run.recursion import captured, captures, rooms, schedule
from twofold.run.recursion.schedule import Named, Use


@contextmanager
def repeating(warm_up: Callable[[], object]) -> Generator[Any]:
    """Stand in for `recording`: what is captured computes nothing before it is repeated."""
    warm_up()

    def record(work: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        made = work()
        assert tensors_in(made), "PyTorch warns of a graph with nothing in it"
        for kept in tensors_in(made):
            kept.fill_(float("nan") if kept.is_floating_point() else 0)

        def repeat() -> None:
            for kept, new in zip(tensors_in(made), tensors_in(work()), strict=True):
                kept.copy_(new)

        return repeat, made

    yield record


def tensors_in(made: Any) -> Sequence[Tensor]:
    return list(made.values()) if isinstance(made, dict) else made


@pytest.fixture(scope="module", autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(captures, "recording_on", lambda device: repeating)
    monkeypatch.setattr(captures, "PATIENCE", 1)


def random_tree(numbers: random.Random, depth: int = 4) -> Tree:
    children = [random_tree(numbers, depth - 1) for _ in range(numbers.randrange(3) if depth else 0)]
    return Tree(numbers.randrange(WORDS), numbers.randrange(LABELS), numbers.uniform(0.5, 1.5), children)


def binary_tree(numbers: random.Random, depth: int = 4) -> Tree:
    inner = depth and numbers.random() < 0.7
    children = [binary_tree(numbers, depth - 1) for _ in range(2)] if inner else []
    return Tree(numbers.randrange(WORDS), numbers.randrange(LABELS), 1.0, children)


def batches(count: int, size: int, tree: Callable[[random.Random], Tree] = binary_tree) -> list[list[Tree]]:
    numbers = random.Random(count + size)
    return [[tree(numbers) for _ in range(size)] for _ in range(count)]


def loss_of(recursion: Recursion, batch: list[Tree]) -> Any:
    return sum(weight * recursion.call(tree) for weight, tree in enumerate(batch, 1))


def gradients(recursion: Recursion) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in recursion.parameters]


def clear(recursion: Recursion) -> None:
    for parameter in recursion.parameters:
        parameter.grad = None


Case = Callable[[Recursion], list[Any]]


def one_after_the_other(recursion: Recursion) -> list[Any]:
    """Steps of an optimizer; what came of each batch is looked at in the end."""
    optimizer = torch.optim.SGD(recursion.parameters, lr=0.05)
    seen: list[Any] = []
    for batch in batches(8, 3):
        optimizer.zero_grad()
        loss = loss_of(recursion, batch)
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), *(p.grad for p in recursion.parameters)]
    return seen


def gradients_asked_for(recursion: Recursion) -> list[Any]:
    seen: list[Any] = []
    for batch in batches(8, 3):
        seen += torch.autograd.grad(loss_of(recursion, batch), recursion.parameters, allow_unused=True)
    return seen


def two_before_a_backward(recursion: Recursion) -> list[Any]:
    """Two batches of the same trees, so that one room is the best for both."""
    seen: list[Any] = []
    for batch in batches(8, 3):
        clear(recursion)
        one = loss_of(recursion, batch)
        seen.append(one.item())
        other = loss_of(recursion, batch[::-1])
        seen.append(other.item())
        one.backward()
        seen += gradients(recursion)
        other.backward()
        seen += gradients(recursion)
    return seen


def the_later_backward_first(recursion: Recursion) -> list[Any]:
    seen: list[Any] = []
    for first, second in zip(*[iter(batches(8, 3))] * 2, strict=True):
        clear(recursion)
        one = loss_of(recursion, first)
        one.item()
        other = loss_of(recursion, second)
        other.backward()
        seen += gradients(recursion)
        one.backward()
        seen += gradients(recursion)
    return seen


def retained(recursion: Recursion) -> list[Any]:
    seen: list[Any] = []
    for first, second in zip(*[iter(batches(8, 3))] * 2, strict=True):
        clear(recursion)
        loss = loss_of(recursion, first)
        loss.backward(retain_graph=True)
        seen += gradients(recursion)
        loss_of(recursion, second).backward()
        loss.backward()
        seen += gradients(recursion)
    return seen


def accumulated(recursion: Recursion) -> list[Any]:
    seen: list[Any] = []
    for number, batch in enumerate(batches(9, 3)):
        if number % 3 == 0:
            clear(recursion)
        loss_of(recursion, batch).backward()
        seen += gradients(recursion)
    return seen


def evaluated_between(recursion: Recursion) -> list[Any]:
    seen: list[Any] = []
    for first, second in zip(*[iter(batches(8, 3))] * 2, strict=True):
        clear(recursion)
        loss = loss_of(recursion, first)
        loss.item()
        with torch.no_grad():
            other = loss_of(recursion, second)
            other.item()
        loss.backward()
        seen += [loss.detach(), other, *gradients(recursion)]
    return seen


def results_kept(recursion: Recursion) -> list[Any]:
    """Results of all batches, without a backward, looked at when all are there."""
    seen: list[Any] = []
    for batch in batches(6, 3):
        with torch.no_grad():
            held = [recursion.call(tree) for tree in batch]
            held[0].item()
        seen += held
    return seen


def of_several_sizes(recursion: Recursion) -> list[Any]:
    """Batches that leave most of a room to padding, and of several numbers of results."""
    seen: list[Any] = []
    numbers = random.Random(2)
    for size in (7, 1, 4, 2, 6, 3, 7, 1):
        clear(recursion)
        loss = loss_of(recursion, [binary_tree(numbers) for _ in range(size)])
        loss.backward()
        seen += [loss.detach(), *gradients(recursion)]
    return seen


def fewer_results(recursion: Recursion) -> list[Any]:
    """Every other batch is half of the one before, with half its results, and takes the same room."""
    seen: list[Any] = []
    whole = [Tree(1, 1), *batches(1, 5)[0]]
    for batch in (whole, whole, *(whole[:3], whole) * 3):
        clear(recursion)
        loss = loss_of(recursion, batch)
        loss.backward()
        seen += [loss.detach(), *gradients(recursion)]
    return seen


CASES: list[Case] = [
    fewer_results,
    one_after_the_other,
    gradients_asked_for,
    two_before_a_backward,
    the_later_backward_first,
    retained,
    accumulated,
    evaluated_between,
    results_kept,
    of_several_sizes,
]


def both(name: str, case: Case) -> dict[str, int]:
    """Check that a case gives the same decorated as not; return what became of its batches.

    It is made twice, so that there are rooms for its batches.
    """
    return equal(PROGRAMS[name](strict), PROGRAMS[name](plain), case)


def equal(decorated: Recursion, undecorated: Recursion, case: Case) -> dict[str, int]:
    for _ in range(2):
        for got, expected in zip(case(decorated), case(undecorated), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert decorated.encode.unbatched == {}
    return decorated.encode.captured


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_python(case: Case) -> None:
    counts = both("binary_tree_lstm", case)
    assert counts["replayed"] >= 8, counts


def on_a_gpu(decorate: Decorate) -> Recursion:
    torch.manual_seed(0)
    model = TreeLSTM(WORDS, LABELS, 8, 16).cuda()
    encode = recursion(model, decorate=decorate)
    return Recursion(encode, lambda tree: encode(tree)[2], [p for p in model.parameters() if p.requires_grad])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_python_on_a_gpu(case: Case) -> None:
    counts = equal(on_a_gpu(strict), on_a_gpu(plain), case)
    assert counts["replayed"] >= 8, counts


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_equals_plain_python(name: str) -> None:
    """Trees with any number of children, of which some are captured and some are not."""

    def case(recursion: Recursion) -> list[Any]:
        seen: list[Any] = []
        for batch in [*batches(3, 3, random_tree), *batches(1, 2, random_tree), *batches(3, 3, random_tree)]:
            clear(recursion)
            loss = loss_of(recursion, batch)
            loss.backward()
            seen += [loss.detach(), *gradients(recursion)]
        return seen

    counts = both(name, case)
    assert sum(counts.values()) - counts.get("captured", 0) >= 6


def memory_of_another_batch(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    monkeypatch.setattr(captured.Captured, "free", True)
    return "binary_tree_lstm", two_before_a_backward


def results_that_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    def compute(self: Any, counts: Sequence[int]) -> list[Tensor]:
        self._forward()
        return [result[:count] for count, result in zip(counts, self._results, strict=True)]

    monkeypatch.setattr(captured.Captured, "compute", compute)
    monkeypatch.setattr(torch, "unbind_copy", torch.unbind)
    return "binary_tree_lstm", results_kept


def gradients_that_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    original = captured.Captured.differentiate

    def differentiate(self: Any, gradients: Any) -> dict[int, Tensor]:
        original(self, gradients)
        return dict(self._gradients)

    monkeypatch.setattr(captured.Captured, "differentiate", differentiate)
    return "binary_tree_lstm", gradients_asked_for


def gradients_of_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    monkeypatch.setattr(captured, "_overwrite", lambda whole, rows: whole[: len(rows)].copy_(rows))
    return "sums_used_inside", fewer_results


def padding_among_the_results(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    original = rooms.Padding._spread
    monkeypatch.setattr(rooms.Padding, "_spread", lambda self, number, held, spare: original(self, number, held, 0))
    return "binary_tree_lstm", of_several_sizes


def rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    def numbers(self: Any, number: int, places: tuple[int, ...]) -> Any:
        return self._batch.groups[number].child_rows[list(places)].T

    monkeypatch.setattr(rooms.Padding, "_children", numbers)
    return "binary_tree_lstm", of_several_sizes


def gradients_from_padding(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    monkeypatch.setattr(rooms.Furnished, "owed", schedule.Schedule.owed)
    return "binary_tree_lstm", of_several_sizes


FAULTS = [
    gradients_from_padding,
    memory_of_another_batch,
    results_that_are_not_copied,
    gradients_that_are_not_copied,
    gradients_of_the_last_batch,
    padding_among_the_results,
    rows_of_the_batch,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_caught(plant: Callable[..., tuple[str, Case]], monkeypatch: pytest.MonkeyPatch) -> None:
    name, case = plant(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        both(name, case)


def normalised(decorate: Decorate) -> Recursion:
    """A function that makes infinite numbers of rows that are zero."""
    torch.manual_seed(0)
    embedding = nn.Embedding(WORDS, HIDDEN)
    linear = nn.Linear(HIDDEN, HIDDEN)

    @decorate
    def encode(node: Any) -> Any:
        state = embedding.weight[node.word] if node.left is None else linear(encode(node.left) * encode(node.right))
        return (state + 0.1) / state.pow(2).sum().sqrt()

    def call(tree: Tree) -> Any:
        return encode(tree).sum()

    return Recursion(encode, call, [*embedding.parameters(), *linear.parameters()])


def test_padding_makes_no_numbers_that_a_batch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROGRAMS, "normalised", normalised)
    assert both("normalised", of_several_sizes)["replayed"] >= 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory left"), CaptureFailed("an operation waits")])
def test_what_cannot_be_captured_is_launched_and_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing(warm_up: Callable[[], object]) -> Generator[Any]:
        warm_up()

        def record(work: Callable[[], Any]) -> Any:
            work()
            raise error

        yield record

    monkeypatch.setattr(captures, "recording_on", lambda device: failing)
    counts = both("binary_tree_lstm", of_several_sizes)
    assert counts[f"not captured: {type(error).__name__}: {error}"] == 1
    assert counts["launched: these blocks cannot be captured"] >= 7
    assert "replayed" not in counts


def test_parameters_that_lie_elsewhere_are_read_there() -> None:
    def case(recursion: Recursion) -> list[Any]:
        seen: list[Any] = []
        for number, batch in enumerate(batches(8, 3)):
            if number == 4:
                for parameter in recursion.parameters:
                    parameter.data = parameter.data * 2
            clear(recursion)
            loss_of(recursion, batch).backward()
            seen += gradients(recursion)
        return seen

    assert both("binary_tree_lstm", case)["captured"] >= 2


def test_no_more_rooms_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "MOST", 1)
    decorated = PROGRAMS["binary_tree_lstm"](strict)
    two_before_a_backward(decorated)
    program = decorated.encode._programs[-1][1]
    assert decorated.encode.captured["captured"] > 1
    assert len(program.captures._held) <= 2  # one that a batch has, and one for the next


def test_rooms_are_captured_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A room that never holds the next batch is captured after 1, 2, 4, 8 batches, and no more often."""
    monkeypatch.setattr(rooms.Room, "fits", lambda self, batch: False)
    decorated = PROGRAMS["binary_tree_lstm"](strict)
    with torch.no_grad():
        for _ in range(18):
            loss_of(decorated, [Tree(1, 1, 1.0, [Tree(), Tree()])]).item()
    assert decorated.encode.captured["captured"] == 4


def test_a_furnished_room_has_the_children_of_each_invocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the indices of a room, each invocation finds the results of those that it made in the batch's own schedule."""
    seen: list[int] = []
    original = rooms.Padding.__init__

    def check(self: Any, batch: Any, taken: Any, room: Any, furnished: Any) -> None:
        original(self, batch, taken, room, furnished)
        for group in batch.groups:
            for place in range(len(group.child_rows)):
                padded = self.numbers(Named(Use.CHILDREN, (place,), group.number))
                callee = group.block.callees[place]
                expected = self._moved[callee][group.child_rows[place]]
                assert padded[self._places[group.number]].tolist() == expected.tolist()
                seen.append(len(padded))

    monkeypatch.setattr(rooms.Padding, "__init__", check)
    both("binary_tree_lstm", of_several_sizes)
    assert seen

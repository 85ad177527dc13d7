"""Results of `twofold.subgraph` as objects of Python, and code of others that meets them before they have values."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twofold
from tests.hazards.plain_recursion_programs import WIDTH, Doubled, Tree, tree


def folding(decorate: Callable[[Any], Any], helper: Any = torch.tanh) -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH)

    @decorate
    def fold(node: Tree) -> Tensor:
        if node.left is None or node.right is None:
            return torch.full((1, WIDTH), node.word / 8)
        return helper(linear(fold(node.left) + fold(node.right)))

    return fold, linear


def keeping(decorate: Callable[[Any], Any]) -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH)

    @decorate
    def fold(node: Any, states: list[Tensor]) -> Tensor:
        if node.left is None:
            h = torch.full((1, WIDTH), node.word / 8)
        else:
            h = linear(fold(node.left, states) + fold(node.right, states)).tanh()
        states.append(h)
        return h

    return fold, linear


def plain(function: Any) -> Any:
    return function


def test_a_custom_autograd_function_is_given_values() -> None:
    gradients = []
    for decorate in (plain, twofold.subgraph):
        fold, linear = folding(decorate)
        for _ in range(3):
            linear.zero_grad()
            Doubled.apply(fold(tree(3))).sum().backward()
        gradients.append(linear.weight.grad)
    torch.testing.assert_close(*gradients)


def test_out_is_written() -> None:
    fold, _ = folding(twofold.subgraph)
    out = torch.full((2, 1, WIDTH), 7.0)
    with torch.no_grad():
        assert torch.stack([fold(tree(2)), fold(tree(3))], out=out) is out
    assert not (out == 7).any()


def test_making_blocks_draws_no_random_numbers() -> None:
    fold, _ = folding(twofold.subgraph)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for _ in range(3):
        fold(tree(3)).sum().backward()
    assert fold.programs[0].computed["together"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_before_backward_is_heard() -> None:
    fold, linear = folding(twofold.subgraph)
    fold(tree(2)).sum().backward()
    calls: list[int] = []
    linear.register_full_backward_pre_hook(lambda *_: calls.append(1))
    fold(tree(2)).sum().backward()
    assert len(calls) == 3
    assert fold.refusal.code == "module_hook"


def scaled(function: Any) -> Any:
    @functools.wraps(function)
    def call(x: Any) -> Any:
        return function(x) * 1.5

    return call


@scaled
def shrunk(x: Tensor) -> Tensor:
    return x / 2


def test_what_wraps_a_helper_is_called() -> None:
    results = [folding(decorate, shrunk)[0](tree(3)) + 0 for decorate in (plain, twofold.subgraph)]
    torch.testing.assert_close(*results)


def test_what_wraps_the_function_is_called() -> None:
    results = [folding(lambda f, d=decorate: d(scaled(f)))[0](tree(3)) + 0 for decorate in (plain, twofold.subgraph)]
    torch.testing.assert_close(*results)


def test_a_result_that_is_kept_is_one_object() -> None:
    fold, _ = keeping(twofold.subgraph)
    for _ in range(3):
        states: list[Tensor] = []
        result = fold(tree(3), states)
        assert [state is result for state in states].count(True) == 1
        assert states[-1] is result
        result.sum().backward()
        assert states[-1] is result


def test_what_was_kept_before_an_exception_has_values() -> None:
    kept = []
    for decorate in (plain, twofold.subgraph):
        fold, _ = keeping(decorate)
        for _ in range(2):
            fold(tree(3), []).sum().backward()
        broken: Any = tree(2)
        broken.right.right = "no tree"
        states: list[Tensor] = []
        with pytest.raises(AttributeError, match="left"):
            fold(broken, states)
        kept.append([state + 0 for state in states])
    assert len(kept[0]) == 4
    torch.testing.assert_close(*kept)


def detaching(decorate: Callable[[Any], Any]) -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH)

    @decorate
    def fold(node: Any, scores: list[Tensor]) -> Any:
        if node.left is None:
            return torch.full((1, WIDTH), node.word / 8), torch.zeros(1)
        left, right = fold(node.left, scores), fold(node.right, scores)
        h = linear(left[0] + right[0] * right[1]).tanh()
        scores.append(h.detach())
        return h, h.detach().sum(1)

    return fold, linear


def test_gradients_flow_through_the_same_results_as_in_plain_python() -> None:
    found: list[Any] = []
    for decorate in (plain, twofold.subgraph):
        fold, linear = detaching(decorate)
        seen: list[Any] = []
        for _ in range(3):
            scores: list[Tensor] = []
            results = [fold(tree(depth), scores) for depth in (0, 2, 3)]
            seen += [[h.requires_grad, score.requires_grad, score.cpu().numpy().copy()] for h, score in results]
            seen += [[score.requires_grad, score.cpu().numpy().copy()] for score in scores]
            sum(h.sum() for h, _ in results).backward()
        found.append([*seen, linear.weight.grad])
    torch.testing.assert_close(*found)


def turning(decorate: Callable[[Any], Any]) -> tuple[Any, nn.Parameter]:
    angle = nn.Parameter(torch.full((WIDTH,), 0.3))

    @decorate
    def turn(node: Any) -> Any:
        h = torch.complex(angle * node.word, angle.cos())
        if node.left is not None:
            h = h * turn(node.left) + turn(node.right)
        return h / (1 + h.abs())

    return turn, angle


def test_complex_results_carry_gradients() -> None:
    gradients = []
    for decorate in (plain, twofold.subgraph):
        turn, angle = turning(decorate)
        for _ in range(3):
            (turn(tree(3)).abs().sum() + turn(tree(2)).real.sum()).backward()
        gradients.append(angle.grad)
    torch.testing.assert_close(*gradients)

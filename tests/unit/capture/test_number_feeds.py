"""Arithmetic with a number fed as a tensor: the bits, the types and the names of eager's arithmetic with the number."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.capture.number_feeds import ARITHMETIC, fits, number_as_tensor, number_tensor

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.int64]
SHAPES = [(), (1,), (37,), (5, 7), (3, 0)]

numbers = st.one_of(
    st.floats(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats().map(np.float64),
    st.floats(width=32).map(np.float32),
    st.integers(-100, 100).map(np.int64),
    st.sampled_from([-0.0, 1e-46, 1e-310, 1e300, 2**53, 2**24 + 1, 16777217.0, 3.4028236e38]),
)
functions = st.sampled_from(sorted(ARITHMETIC, key=lambda f: (f.__qualname__, f.__name__)))


def outcome(function: Any, operand: torch.Tensor, number: Any) -> Any:
    """All that can be told of a result and of its gradient, in bits."""
    leaf = operand.clone().requires_grad_(operand.is_floating_point())
    try:
        result = function(leaf.clone(), number)
    except RuntimeError as error:
        return type(error)
    seen = [result.dtype, result.shape, result.stride(), type(result.grad_fn).__name__, bits(result)]
    if result.requires_grad:
        seen.append(bits(torch.autograd.grad(result, leaf, torch.full_like(result, 0.7))[0]))
    return seen


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def operand_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    operand = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    if operand.numel() > 4 and dtype.is_floating_point:
        operand.view(-1)[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan], dtype=dtype)
    return operand


@given(functions, st.sampled_from(DTYPES), st.sampled_from(SHAPES), numbers)
def test_a_fed_number_changes_no_bit(function: Any, dtype: torch.dtype, shape: tuple[int, ...], number: Any):
    operand = operand_of(dtype, shape)
    fed = number_as_tensor(function, (operand, number), {})
    assert (fed is not None) == fits(number, dtype)
    if fed is not None:
        assert fed.shape == ()
        assert outcome(function, operand, fed) == outcome(function, operand, number)


@pytest.mark.parametrize("function", sorted(ARITHMETIC, key=repr), ids=lambda f: f.__qualname__)
def test_each_function_is_exact(function: Any):
    for dtype in DTYPES:
        for number in (3, -7) if dtype is torch.int64 else (0.1, 1 / 3, -7, 1e300):
            operand = operand_of(dtype, (5, 7))
            fed = number_tensor(number, dtype, CPU)
            assert outcome(function, operand, fed) == outcome(function, operand, number)


def test_what_is_left_out_would_differ():
    operand = operand_of(torch.float32, (5, 7))
    half = operand_of(torch.float64, (500,)).bfloat16()
    fed = number_tensor(0.1, torch.float32, CPU)
    assert outcome(torch.Tensor.__rsub__, operand, fed) != outcome(torch.Tensor.__rsub__, operand, 0.1)
    assert outcome(torch.Tensor.mul, half, fed.bfloat16()) != outcome(torch.Tensor.mul, half, 0.1)
    assert number_as_tensor(torch.Tensor.__rsub__, (operand, 0.1), {}) is None
    assert number_as_tensor(torch.Tensor.mul, (half, 0.1), {}) is None


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((torch.ones(2),), {"other": 2.0}),
        ((torch.ones(2), 2.0), {"alpha": 3}),
        ((2.0, torch.ones(2)), {}),
        ((torch.ones(2), True), {}),
        ((torch.ones(2), 1j), {}),
        ((torch.ones(2, dtype=torch.int64), 0.5), {}),
        ((torch.ones(2, dtype=torch.int32), 1), {}),
        ((torch.ones(2), torch.ones(2)), {}),
        ((torch.ones(2), 2**53 + 1), {}),
    ],
)
def test_other_arguments_stay_what_they_are(arguments: Any, keywords: Any):
    assert number_as_tensor(torch.Tensor.add, arguments, keywords) is None

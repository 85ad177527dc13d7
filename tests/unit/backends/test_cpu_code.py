"""C++ that is compiled beside the program."""

import ctypes

import pytest

from twofold.backends import cpu_code


def text(number: int) -> str:
    """A function that writes a number to where its fifth argument points."""
    return (
        "#include <cstdint>\n"
        'extern "C" void run(const void*, int64_t, int64_t, int64_t, int64_t* out, const void*, const void*)\n'
        f"{{ *out = {number}; }}\n"
    )


def result(order: cpu_code._Order) -> int:
    assert not isinstance(order.outcome, str), order.outcome
    out = ctypes.c_int64(0)
    order.outcome(None, 0, 0, 0, ctypes.addressof(out), None, None)
    return out.value


@pytest.mark.skipif(cpu_code.lacks() is not None, reason=str(cpu_code.lacks()))
def test_code_that_comes_later_leaves_loaded_code_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files named by the identity of an order that was gone were written over while they were mapped."""
    monkeypatch.setattr(cpu_code, "id", lambda _: 7, raising=False)
    orders = [cpu_code._Order(text(number)) for number in (1, 2)]
    for order in orders:
        order.compile()
    assert [result(order) for order in orders] == [1, 2]

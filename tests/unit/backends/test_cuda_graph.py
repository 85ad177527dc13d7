"""Captures that fail leave allocations, random draws and later captures as they were."""

from collections.abc import Callable

import pytest
import torch

from twofold.backends.cuda_graph import CaptureFailed, recording

FAILURES: dict[str, Callable[[], object]] = {
    "an error of the program's": lambda: torch.ones(2, device="cuda") @ torch.ones(3, device="cuda"),
    "a value is read": lambda: torch.ones(2, device="cuda").sum().item(),
    "the device is waited for": torch.cuda.synchronize,
    "a draw, and then an error": lambda: torch.rand(2, device="cuda").sum().item(),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAILURES)
def test_nothing_is_left_of_a_capture_that_fails(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    with recording(lambda: None) as record, pytest.raises(CaptureFailed):
        record(FAILURES[name])
    with recording(lambda: None) as record:
        repeat, drawn = record(lambda: torch.rand(4, device="cuda"))
    repeat()
    assert torch.equal(drawn, expected)
    assert not torch.equal(torch.rand(4, device="cuda"), expected)
    assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20

"""Every test starts from the same seeds and one thread; tests marked ``gpu`` run where there is one.

`pytest --device cuda` makes the tensors of all other tests there too, so that hazards and random programs are seen on
an accelerator: a difference from eager is a defect wherever it comes from. Those marked ``cpu`` are left out then.
"""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from twofold.options import Options

# The suite tries the same examples each time; `pytest --hypothesis-profile=explore` tries new ones.
settings.register_profile("steady", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tensors are made by default")


def pytest_configure(config: pytest.Config) -> None:
    # Two processes of two threads each on two cores wait for one another: 126 s became 307, and 42 s of work 84.
    torch.set_num_threads(1)
    # Nor do programs that tests start: beside two others, one of two threads took 15 to 40 s of the processor for 12.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # cuDNN's fastest backward kernels add up in any order: eager would differ from eager.
    torch.backends.cudnn.deterministic = True
    if config.getoption("device") == "cuda":
        # Not torch.set_default_device, which is a function mode: programs would run under it.
        torch.set_default_tensor_type("torch.cuda.FloatTensor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unfit = set() if torch.cuda.is_available() else {"gpu"}
    unfit |= {"cpu"} if config.getoption("device") == "cuda" else set()
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unfit)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run a test on two threads, as PyTorch does by default on two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have graphs made at once under all options: how many units are eager before would depend on the clock."""
    monkeypatch.setattr(Options, "is_paced", False)

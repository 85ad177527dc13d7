"""Warnings that PyTorch gives in a unit: the same ones as eagerly, once for each line of the program's."""

import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import twofold
from tests.hazards.programs import MODES, Mode

OPTIONS: dict[str, Any] = {"numerics": "exact", "backend": "replay", "background": False}


def functional(out: torch.Tensor) -> Any:
    return F.mse_loss(out, out[:, :1].detach()) + F.mse_loss(
        out.exp(),
        out[:, :1].detach(),
    )


def modules(out: torch.Tensor) -> Any:
    return nn.MSELoss()(out, out[:, :1].detach()) + nn.HuberLoss()(out.exp(), out[:, :1].detach()) + functional(out)


def native(out: torch.Tensor) -> Any:
    loss = out.sum()
    return loss * 0 if float(loss) > 1e6 else loss


@pytest.fixture(autouse=True)
def _warn_always() -> Generator[None]:
    """PyTorch's own code warns of many things once a process."""
    was_on = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(was_on)


def warned(loss_of: Callable[[torch.Tensor], Any], mode: Mode | None) -> list[tuple[Any, ...]]:
    """Return what eight steps show under Python's own filter; `mode` None is eager."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()

    run: Any = twofold.function(step, **OPTIONS) if mode == "function" else step
    around: AbstractContextManager[Any] = twofold.program(**OPTIONS) if mode == "program" else nullcontext(run)
    vars(sys.modules[__name__]).pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        with around as reported:
            for _ in range(8):
                run(torch.randn(5, 4))
    if mode is not None:
        assert twofold.report(reported).to_dict()["graph_iterations"] >= 4
    return [(one.category, str(one.message)[:40], one.filename, one.lineno) for one in shown]


@pytest.mark.cpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_of", [functional, modules, native])
def test_warnings_name_the_line_of_the_program(loss_of: Callable[[torch.Tensor], Any], mode: Mode) -> None:
    wanted = warned(loss_of, None)
    assert wanted, "nothing was warned of"
    assert warned(loss_of, mode) == wanted

"""Tensors large enough for eager's kernels to share them out over two threads."""

import pytest
import torch
from torch import nn

from tests.hazards.programs import MODES, Mode, runs_as_graph, training

pytestmark = pytest.mark.usefixtures("two_threads")
WIDTH = 256


class Wide(nn.Module):
    """Products, a convolution, reductions and elementwise operations of more than 32,768 elements each."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(4, WIDTH)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.narrow = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.gelu(self.widen(x)).repeat(32, 1)
        image = (rows.t() @ rows)[None, None]
        return self.narrow(self.norm(self.conv(image)).relu().mean(dim=(2, 3))).expand(x.shape[0], 3)


@pytest.mark.parametrize("mode", MODES)
def test_work_that_is_shared_out_is_exact(mode: Mode) -> None:
    runs_as_graph(training(lambda parts: lambda _, x, y: parts.train(x, y), model=Wide), mode=mode, at_least=3)

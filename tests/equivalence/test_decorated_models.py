"""Every program of the corpus with its model alone decorated: forward as graphs, backward and optimizer outside."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from benchmarks.programs import NAMES, PROGRAMS
from tests.differential import EXACT, compare, eager, run

# These two keep the model on an object that the harness looks into, and so differ by the wrapper.
KEEP_THE_WRAPPER = {"grad_accumulation", "varying_loop"}
STEPS = {"coin_flip": 30, "multi_path": 30, "lstm": 24}
DEFAULT_STEPS = 12


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KEEP_THE_WRAPPER])
def test_model_runs_as_graphs_and_is_exact(name: str) -> None:
    models: list[Any] = []

    def decorate(model: nn.Module) -> Any:
        models.append(twofold.function(model, numerics="exact", backend="replay", background=False))
        return models[-1]

    build, steps = partial(PROGRAMS[name], "small", torch.device("cpu")), STEPS.get(name, DEFAULT_STEPS)
    reference = run(build, steps, eager)
    candidate = run(partial(build, compile_model=decorate), steps, eager)
    differences = compare(reference, candidate, EXACT)
    assert not differences, "\n".join(differences[:5])
    for model in models:
        report = twofold.report(model).to_dict()
        assert report["graph_iterations"] > report["iterations"] / 2, report

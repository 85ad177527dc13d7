"""A file that changes while the program runs: what was loaded from it is what runs, not what stands there by now."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import twofold


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("edited", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("engine", ["auto", "coexecution", "speculation"])
def test_a_module_is_edited_and_loaded_again(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edited.py"
    for text in ("print('before')", "n = 1"):
        path.write_text(f"def step(x):\n    {text}\n    return x + 1\n")
        step = twofold.function(load(path).step, engine=engine, backend="replay", numerics="exact", background=False)
        for _ in range(6):
            assert step(torch.ones(1)).item() == 2.0
    assert capsys.readouterr().out == "before\n" * 6

"""The examples are ordinary PyTorch, and run under Twofold as they run without it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import twofold

EXAMPLES = Path(__file__).parents[1] / "examples"
EXACT = ["-m", "twofold", "run", "--backend", "replay", "--numerics", "exact", "--timeline", "timeline.json"]


def run(arguments: list[str], folder: Path) -> str:
    """Run Python on `arguments` and return what it printed; it must succeed and complain of nothing."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_training_script_does_not_mention_twofold():
    assert not re.search("twofold", (EXAMPLES / "digits.py").read_text(), re.IGNORECASE)


@pytest.mark.slow
def test_digits_are_bit_for_bit_eager(tmp_path: Path):
    script = [str(EXAMPLES / "digits.py"), "--epochs", "2", "--log-every", "7", "--out"]
    eager = run([*script, "eager.json"], tmp_path)
    under = run([*EXACT, *script, "twofold.json"], tmp_path)
    assert under == eager
    expected, got = torch.load(tmp_path / "eager.pt"), torch.load(tmp_path / "twofold.pt")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    steps = json.loads((tmp_path / "twofold.json").read_text())["steps"]
    spans = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    graphs = [span for span in spans if span["ph"] == "X" and span["name"] == "replay"]
    assert len(graphs) > steps // 2  # equal because the graph is right, not because it never ran


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(twofold, "subgraph"), reason="this version of twofold has no subgraph")
def test_trees_are_learnt(tmp_path: Path):
    printed = run([str(EXAMPLES / "trees.py"), "--functions", "50", "--epochs", "4"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]

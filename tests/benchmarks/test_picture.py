"""`python -m benchmarks.picture`: ratios are of the best of each kind, the last file counts, bad files are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.picture import main, speedups


def document(**milliseconds: float) -> dict[str, Any]:
    return {"programs": {"mlp": {name: {"median_ms": value} for name, value in milliseconds.items()}}}


def test_the_best_of_each_kind_over_eager_from_the_last_file() -> None:
    first = document(eager=8.0, twofold_exact=1.0)
    last = document(eager=6.0, compile=3.0, compile_reduce_overhead=2.0, twofold_exact=4.0, twofold_fused=1.5)
    rows = speedups([first, last])
    assert rows == {"mlp": {"torch.compile, best mode": 3.0, "Twofold, better numerics": 4.0}}


def test_what_was_not_measured_has_no_bar() -> None:
    results = document(eager=6.0)
    results["programs"]["mlp"]["compile"] = {"error": "RuntimeError: no"}
    assert speedups([results]) == {"mlp": {}}


def test_a_file_that_is_none_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "results.json"
    broken.write_text(json.dumps({"programs": {}})[:-1])
    with pytest.raises(SystemExit) as left:
        main([str(broken), "--out", str(tmp_path / "picture.svg")])
    assert left.value.code == 2
    assert "not a file of results" in capsys.readouterr().err

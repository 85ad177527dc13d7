"""`python -m benchmarks.trees`: what it prints and writes; bad arguments are one clear error."""

import json
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from benchmarks.trees import __main__ as command
from benchmarks.trees import measure
from benchmarks.trees.data import SST_VARIABLE

QUICK = ["--contenders", "plain", "level_by_hand", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.001)
    monkeypatch.setattr(command, "SAMPLE", 4)
    monkeypatch.setattr(command, "WIDTH", 4)
    monkeypatch.setattr(command, "HIDDEN", 4)
    monkeypatch.delenv(SST_VARIABLE, raising=False)
    threads, depth = torch.get_num_threads(), sys.getrecursionlimit()
    yield
    torch.set_num_threads(threads)
    sys.setrecursionlimit(depth)


def test_results_name_the_machine_and_hold_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    command.main([*QUICK, "--batch", "2", "--json", str(path)])
    document = json.loads(path.read_text())
    assert document["environment"]["torch"] == torch.__version__
    rows = document["corpora"]["syntax"]["results"]
    assert [(row["batch"], row["kind"]) for row in rows] == [(2, "forward"), (2, "train")]
    assert len(rows[0]["contenders"]["level_by_hand"]["rounds_ms"]) == 1
    assert "level_by_hand" in capsys.readouterr().out


@pytest.mark.parametrize("by_environment", [False, True])
def test_the_treebanks_folder_is_read_and_not_written_down(
    by_environment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "treebank"
    folder.mkdir()
    (folder / "train.txt").write_text("(3 (2 a) (4 (3 lovely) (2 film)))\n" * 4)
    path = tmp_path / "results.json"
    arguments = [*QUICK, "--batch", "1", "--json", str(path)]
    if by_environment:
        monkeypatch.setenv(SST_VARIABLE, str(folder))
    else:
        arguments += ["--sst", str(folder)]
    monkeypatch.setattr(sys, "argv", ["trees", *arguments])
    command.main(arguments)
    assert json.loads(path.read_text())["corpora"]["sst"]["nodes_a_tree"] == 5
    assert str(folder) not in path.read_text()


def test_shapes_show_growth_by_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "SHAPED_LEAVES", (3, 6))
    command.main([*QUICK, "--shapes"])
    *_, growth = capsys.readouterr().out.partition("milliseconds a tree by leaves")
    header, *rows = growth.strip().splitlines()
    assert header.split() == ["3", "6"]
    assert [row.split()[:3] for row in rows][:2] == [
        ["forward", "balanced", "level_by_hand"],
        ["forward", "balanced", "plain"],
    ]
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "there are 4 trees: no batches of 0"),
        (["--batch", "2", "5"], "there are 4 trees: no batches of 5"),
        (["--sst", "nowhere"], "give --sst or TWOFOLD_SST the folder"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments_are_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert message in f"{end.value} {capsys.readouterr().err}"

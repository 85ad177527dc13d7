"""`python -m benchmarks.speculation` and `benchmarks.convergence`: what they print and write; one clear error each."""

import importlib.util
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import convergence, host_time, speculation, steps
from benchmarks.contenders import ABLATION, Contender
from benchmarks.convergence import loss_of
from benchmarks.programs import JANUS_NAMES
from benchmarks.speculation import contenders_of, format_summary, format_table, summarise
from twofold.backends.replay import ReplayExecutable


def row(milliseconds: float, report: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"median_ms": milliseconds, "quartiles_ms": [milliseconds, milliseconds], "host_us": None, "report": report}


REPORT = {
    "engine": "coexecution", "iterations": 8, "graph_iterations": 6, "fallbacks": [],
    "refusals": [{"count": 1, "code": "generator", "reason": "a generator", "origin": "train.py:7"}],
}  # fmt: skip
RESULTS = {
    "eager": row(4.0),
    "compile": row(3.0),
    "compile_reduce_overhead": {"error": "RuntimeError: no"},
    "twofold_coexecution": row(2.0, REPORT),
    "twofold_speculation": row(1.0, REPORT),
}


def test_a_programs_table_shows_ratios_shares_errors_and_reasons() -> None:
    lines = {line.split()[0]: line for line in format_table("lenet", RESULTS).splitlines() if line}
    assert lines["twofold_speculation"].split()[1:] == ["1.000", "1.000-1.000", "4.00", "3.00", "75.0%", "coexecution"]
    assert lines["compile_reduce_overhead"].endswith("RuntimeError: no")
    assert "1 x generator: a generator (train.py:7)" in lines["twofold_speculation,"]


def test_means_are_geometric_and_over_what_was_measured() -> None:
    without_compile = {"eager": row(9.0), "twofold_speculation": row(1.0)}
    summary = summarise({"lenet": RESULTS, "mlp": without_compile})
    assert summary["twofold_speculation"]["x eager"] == pytest.approx(6.0)
    assert summary["twofold_speculation"]["x compile"] == pytest.approx(3.0)
    assert "6.00 x eager, 3.00 x compile over 2 programs" in format_summary(summary, {})


def test_only_fixed_steps_are_captured_by_hand() -> None:
    assert "cuda_graph_by_hand" in contenders_of("lenet", "cuda")
    assert "cuda_graph_by_hand" not in contenders_of("lenet", "cpu")
    assert "cuda_graph_by_hand" not in contenders_of("tree_lstm", "cuda")


def test_results_hold_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "ROUND_STEPS", (1, 1))
    monkeypatch.setattr(steps, "SETTLE_ROUNDS", 1)
    monkeypatch.setattr(steps, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(steps, "SETTLE_MOST", 0.0)
    monkeypatch.setattr(speculation, "measure_in_child", steps.measure_program)
    monkeypatch.setattr(speculation, "compiled_names", lambda _: ())
    path = tmp_path / "results.json"
    speculation.main(["adversarial", "--size", "small", "--rounds", "2", "--json", str(path)])
    results = json.loads(path.read_text())["programs"]["adversarial"]
    assert list(results) == ["eager", "twofold_coexecution", "twofold_speculation"]
    for name, result in results.items():
        assert len(result["rounds_ms"]) == 2
        assert (result["report"] is None) == (name == "eager") == (result["host_us"] is None)
    assert "geometric mean" in capsys.readouterr().out


def test_what_is_not_ready_within_its_bound_is_left_out_and_what_has_not_settled_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler is ended with its processes: cut in this one, it would leave anomaly detection on."""

    def make(contender: str, *_: Any) -> Contender:
        return Contender(lambda _: None, prepare=lambda _: contender != "compiling")

    real_command = steps.run_within
    monkeypatch.setattr(
        steps,
        "run_within",
        lambda _, seconds: real_command([sys.executable, "-c", "import time; time.sleep(60)"], seconds),
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.setattr(steps, "ROUND_STEPS", (1, 1))
    monkeypatch.setattr(steps, "make_contender", make)
    options = SimpleNamespace(
        device="cpu",
        size="small",
        rounds=2,
        seconds=4.0,
        json=tmp_path / "results.json",
        contenders=["eager", "compile", "compiling"],
    )
    kept: list[list[str]] = []
    began = time.perf_counter()
    results = steps.measure_program("mlp", options, lambda results: kept.append(list(results)))
    assert time.perf_counter() - began < 30
    assert results["compile"]["error"].startswith("TimeoutError: not ready after")
    assert (results["eager"]["settled"], results["compiling"]["settled"]) == (True, False)
    table = steps.format_table("mlp", results)
    assert [line.split()[0] for line in table.splitlines() if line.endswith("not settled")] == ["compiling"]
    assert kept[:3] == [["eager"], ["eager", "compile"], ["eager", "compile", "compiling"]]


def test_a_contender_has_not_settled_while_kernels_are_awaited_that_its_last_round_ordered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BERT-base on a GPU was measured without the kernels that the verdict on its first graphs ordered."""
    runs, waits = 0, 0
    ordered = False

    def run(_: int) -> None:
        nonlocal runs, ordered
        runs += 1
        ordered = ordered or runs == steps.SETTLE_ROUNDS

    def prepare(seconds: float) -> bool:
        nonlocal waits, ordered
        waits += ordered and seconds > 0
        ordered = ordered and not seconds
        return not ordered

    kinds = ("iterations", "graph_iterations", "traced_iterations", "compared_iterations")
    monkeypatch.setattr(steps, "SETTLE_SECONDS", 0.0)
    contender = Contender(run, prepare, lambda: dict.fromkeys(kinds[:2], runs) | dict.fromkeys(kinds[2:], 0))
    assert steps._settle(contender, steps=1, until=None)
    assert waits == 1


def test_results_of_a_process_that_is_ended_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(command: list[str], **options: Any) -> None:
        steps.keep(Path(command[command.index("--json") + 1]), {"eager": row(4.0)})
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(steps.subprocess, "run", cut)
    options = SimpleNamespace(device="cpu", size="small", rounds=2, seconds=30.0, timeout=1200, contenders=None)
    results = steps.measure_in_child("mlp", options)  # type: ignore[arg-type]
    assert results == {"eager": row(4.0), "all": {"error": "timed out after 60 s"}}


def test_programs_are_added_to_those_that_a_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speculation, "measure_in_child", lambda *_: RESULTS)
    path = tmp_path / "results.json"
    for name in ("lenet", "lm"):
        speculation.main([name, "--json", str(path), "--add"])
    assert list(json.loads(path.read_text())["programs"]) == ["lenet", "lm"]
    assert "over 2 programs" in capsys.readouterr().out


def test_programs_slower_than_eager_are_named() -> None:
    programs = {"lenet": RESULTS, "mlp": {"eager": row(1.0), "twofold_speculation": row(2.0, REPORT)}}
    shown = format_summary(summarise(programs), programs)
    assert "twofold_speculation: slower than eager: mlp 0.50" in shown
    assert "lenet" not in shown


def test_ablation_adds_one_means_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[list[str]] = []

    def measure(_name: str, options: Any) -> dict[str, Any]:
        measured.append(options.contenders)
        return {name: row(4.0 / (1 + index)) for index, name in enumerate(options.contenders)}

    monkeypatch.setattr(speculation, "measure_in_child", measure)
    speculation.main(["mlp", "--ablation", "--json", str(tmp_path / "results.json")])
    assert measured == [["eager", *ABLATION]]
    assert "ablation_compiled: geometric mean of 5.00 x eager" in capsys.readouterr().out
    for earlier, later in pairwise(ABLATION.values()):
        assert sum(earlier[key] != later[key] for key in earlier) == 1


def test_host_time_leaves_launches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def run(_: int) -> None:
        spend(2.0)
        ReplayExecutable.launch(None, 0, {})  # type: ignore[arg-type]

    monkeypatch.setattr(host_time, "time", SimpleNamespace(perf_counter=lambda: now, thread_time=lambda: now))
    monkeypatch.setattr(ReplayExecutable, "launch", lambda *_: spend(5.0))
    launch = ReplayExecutable.launch
    cpu = torch.device("cpu")
    assert host_time.host_microseconds(run, cpu, is_twofold=True) == 2e6
    assert host_time.host_microseconds(run, cpu, is_twofold=False) is None
    assert ReplayExecutable.launch is launch


@pytest.mark.parametrize(
    ("result", "loss"),
    [
        (torch.tensor(2.0), 2.0),
        (torch.tensor(3), None),
        (1.5, 1.5),
        ([1.0, 3.0], 2.0),
        ((torch.tensor(4.0), torch.tensor(5.0)), 4.0),
        ({"loss": torch.tensor(6.0)}, 6.0),
    ],
)
def test_the_loss_is_found_in_what_a_step_returns(result: Any, loss: float | None) -> None:
    assert loss_of(result) == loss


def test_curves_are_one_where_numerics_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curves.json"
    arguments = ["lstm", "ppo", "--steps", "4", "--numerics", "exact", "--json", str(path)]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--png", str(tmp_path / "curves.png")]
    convergence.main(arguments)
    for curves in json.loads(path.read_text())["curves"].values():
        assert curves["eager"] == curves["twofold"]
        assert len(curves["eager"]) == 4
    assert "farthest apart 0.00e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (speculation, ["lenett"], "no such program: lenett; there are mlp, lenet"),
        (convergence, ["lenett"], "no such program: lenett; there are mlp, lenet"),
        (convergence, ["--steps", "0"], "--steps must be at least 1, got 0"),
        pytest.param(
            convergence,
            ["--png", "curves.png"],
            "--png needs matplotlib: pip install matplotlib",
            marks=pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="it is installed"),
        ),
    ],
)
def test_bad_arguments_are_one_clear_error(
    command: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_there_are_eleven_programs() -> None:
    assert len(set(JANUS_NAMES)) == 11

"""Speculation against what else there is: eager, the best of torch.compile, co-execution, a whole-step graph by hand.

    python -m benchmarks.speculation [--device cpu|cuda] [--size full|small] [--rounds N] [--seconds N]
                                     [--json PATH [--add]] [--ablation] [programs…]

The programs are those of Jeong et al. (2019), "JANUS"; others of the corpus can be named. Contenders run interleaved,
as in `benchmarks.steps`, which measures them. Below a program's rows is why Twofold did not convert it or ran eagerly.
A program takes about `--seconds` at most, and results are written after each. `--ablation` measures eager and what each
of Twofold's means adds, one after the other (`contenders.ABLATION`).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import ABLATION, CAPTURABLE, COMPILED, compiled_names
from benchmarks.environment import describe_environment, describe_options
from benchmarks.programs import JANUS_NAMES
from benchmarks.steps import NOT_SETTLED, Result, check_programs, keep, measure_in_child

ENGINES = ("twofold_coexecution", "twofold_speculation")
BY_HAND = "cuda_graph_by_hand"
SLOWER = 0.97
"""Speedups below this are listed: medians of few rounds differ by as much where nothing else does."""
SHOWN_REASONS = 3
REASON_CHARACTERS = 150


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    path = Path(options.json) if options.json else None
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "options": describe_options(options, "add"),
        "programs": {},
    }
    if options.add and path is not None and path.exists():
        document["programs"] = json.loads(path.read_text())["programs"]
    for name in options.programs or JANUS_NAMES:
        options.contenders = ["eager", *ABLATION] if options.ablation else contenders_of(name, options.device)
        results = document["programs"][name] = measure_in_child(name, options)
        print(format_table(name, results), flush=True)
        document["summary"] = summarise(document["programs"])
        if path is not None:
            keep(path, document)
    print(format_summary(document["summary"], document["programs"]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speculation")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=75, help="seconds a program takes about, at most")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds after which a program is ended")
    parser.add_argument("--ablation", action="store_true", help="eager, and Twofold's means added one by one")
    parser.add_argument("--json", help="write machine, versions, options and all rounds to this file")
    parser.add_argument("--add", action="store_true", help="keep the programs that the file has, and add to them")
    parser.add_argument("programs", nargs="*", metavar="program", help="default: the programs of the paper")
    options = parser.parse_args(arguments)
    check_programs(parser, options.programs)
    return options


def contenders_of(program: str, device: str) -> list[str]:
    """Return all contenders, the graph captured by hand where a step is one fixed sequence of kernels."""
    by_hand = [BY_HAND] if device == "cuda" and program in CAPTURABLE else []
    return ["eager", *ENGINES, *compiled_names(torch.device(device)), *by_hand]


def summarise(programs: dict[str, dict[str, Result]]) -> dict[str, dict[str, float]]:
    """Return Twofold's geometric means over the programs measured: speedups over eager and the best compile."""
    summary: dict[str, dict[str, float]] = {}
    for engine in (*ENGINES, *ABLATION):
        rows = [speedups(results) for results in programs.values()]
        for baseline in ("eager", "compile"):
            ratios = [row[engine][baseline] for row in rows if baseline in row.get(engine, {})]
            if ratios:
                summary.setdefault(engine, {})[f"x {baseline}"] = math.exp(
                    math.fsum(map(math.log, ratios)) / len(ratios)
                )
                summary[engine][f"programs with {baseline}"] = len(ratios)
    return summary


def speedups(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Return by contender how much faster it is than eager and than the best compile; above 1 is faster."""
    measured = {name: result["median_ms"] for name, result in results.items() if "median_ms" in result}
    compiled = [measured[name] for name in COMPILED if name in measured]
    baselines = {"compile": min(compiled)} if compiled else {}
    if "eager" in measured:
        baselines["eager"] = measured["eager"]
    return {
        name: {baseline: other / milliseconds for baseline, other in baselines.items()}
        for name, milliseconds in measured.items()
    }


def format_table(program: str, results: dict[str, Result]) -> str:
    """One row a contender, and the reasons of Twofold's engines."""
    header = f"{program:<27}{'ms/step':>10}{'quartiles':>18}{'x eager':>9}{'x compile':>11}"
    lines = [f"{header}{'host, us':>10}{'calls in graphs':>17}  engine"]
    ratios = speedups(results)
    for name, result in results.items():
        if name not in ratios:
            lines.append(f"  {name:<25}{result.get('error', 'not measured')}")
            continue
        spread = "{:.3f}-{:.3f}".format(*result["quartiles_ms"])
        over = [
            f"{ratios[name][baseline]:.2f}" if baseline in ratios[name] else "" for baseline in ("eager", "compile")
        ]
        host = "" if result["host_us"] is None else f"{result['host_us']:.0f}"
        lines.append(
            f"  {name:<25}{result['median_ms']:>10.3f}{spread:>18}{over[0]:>9}{over[1]:>11}"
            f"{host:>10}{_share(result['report']):>17}  {result['report']['engine'] if result['report'] else ''}"
            f"{'' if result.get('settled', True) else NOT_SETTLED}"
        )
    for engine in (*ENGINES, *ABLATION):
        lines += _reasons(engine, results.get(engine, {}).get("report"))
    return "\n".join(lines) + "\n"


def _share(report: Result | None) -> str:
    """The share of units, nearly always calls, that ran as graphs."""
    return f"{report['graph_iterations'] / report['iterations']:.1%}" if report and report["iterations"] else ""


def _reasons(engine: str, report: Result | None) -> list[str]:
    if report is None:
        return []
    lines = []
    for kind in ("refusals", "fallbacks"):
        for entry in report[kind][:SHOWN_REASONS]:
            where = f" ({entry['origin']})" if entry["origin"] else ""
            lines.append(
                f"    {engine}, {entry['count']} x {entry['code']}: {entry['reason']}{where}"[:REASON_CHARACTERS]
            )
    return lines


def format_summary(summary: dict[str, dict[str, float]], programs: dict[str, dict[str, Result]]) -> str:
    """One line an engine, and what is slower than eager."""
    lines = [
        f"{engine}: geometric mean of "
        + ", ".join(f"{numbers[f'x {b}']:.2f} x {b}" for b in ("eager", "compile") if f"x {b}" in numbers)
        + f" over {numbers.get('programs with eager', 0):.0f} programs"
        for engine, numbers in summary.items()
    ]
    for engine in summary:
        ratios = {name: speedups(results).get(engine, {}).get("eager", 1.0) for name, results in programs.items()}
        slower = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < SLOWER]
        if slower:
            lines.append(f"{engine}: slower than eager: {', '.join(slower)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Milliseconds a training step, program by program: eager, torch.compile, Twofold, and graphs by hand.

    python -m benchmarks.steps [--device cpu|cuda] [--size full|small] [--rounds N] [--seconds N] [--json PATH]
                               [programs…]

Each program runs in a process of its own, so that one crash or leak spoils one row. In it every contender
has its own build, and rounds are interleaved: round r runs the same steps from the same random states for
each contender in turn, so that a slow minute of the machine falls on all of them. With `--seconds`, a program takes
about so long at most: a contender that is not ready by then is measured as it is and marked, or left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bounds import Budget, run_within
from benchmarks.contenders import COMPILE_SECONDS, COMPILED, Contender, contender_names, make_contender, seed_everything
from benchmarks.environment import describe_environment, describe_options, synchronize
from benchmarks.host_time import HOST_CALLS, host_microseconds
from benchmarks.programs import NAMES, PROGRAMS

FIRST_STEPS = 10
SETTLE_ROUNDS = 3
SETTLE_SECONDS = 3.0
SETTLE_MOST = 40.0
"""Twofold makes its graphs in a third of a program's time at most: those of one path come after a second or two, those
of many paths later: the 26 of `varying_loop` take 35 s on two cores. It is measured when these seconds are over and a
round ran in graphs of which none was on trial, or after so many at most."""
SETTLED_SHARE = 0.95
"""The units of such a round that did."""
FEWEST_ROUNDS = 3
"""Rounds that are made even where the bound of a program is passed."""
TIMEOUT_OF_BOUNDED = 2.0
"""Times its bound that a program may take before its process is ended: what no signal can cut."""
# A round is about this long for eager, within the limits on its steps.
ROUND_SECONDS = 0.3
ROUND_STEPS = (10, 200)
ERROR_CHARACTERS = 300
NOT_SETTLED = "  not settled"
"""At the end of the row of a contender that was measured although more was to come: its kernels, or its graphs."""

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.rehearse:
        _start(options.rehearse, options.programs[0], options, torch.device(options.device))
        return
    if options.child:
        path = Path(options.json)
        measure_program(options.programs[0], options, lambda results: keep(path, results))
        return
    document = {"environment": describe_environment(), "options": describe_options(options), "programs": {}}
    for name in options.programs or NAMES:
        document["programs"][name] = measure_in_child(name, options)
        print(format_table(name, document["programs"][name]), flush=True)
        if options.json:
            keep(Path(options.json), document)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.steps")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="seconds a program takes about, at most; default: no bound")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds after which a program is ended")
    parser.add_argument("--contenders", nargs="+", help="measure these alone; eager always runs")
    parser.add_argument("--json", help="write machine, versions, options and all rounds to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("programs", nargs="*", metavar="program", help="default: all")
    options = parser.parse_args(arguments)
    check_programs(parser, options.programs)
    return options


def check_programs(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """End with one clear error if there is no such program."""
    unknown = set(names) - set(PROGRAMS)
    if unknown:
        parser.error(f"no such program: {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")


def keep(path: Path, document: Any) -> None:
    """Write a document, all or nothing: what is cut while it writes leaves the one before."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(document, indent=1))
    written.replace(path)


def measure_in_child(name: str, options: argparse.Namespace) -> dict[str, Result]:
    """Run `measure_program` in a process; after a crash or a timeout, what was measured until then and its reason."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.steps", name, "--child", "--json", str(path)]
        command += ["--device", options.device, "--size", options.size, "--rounds", str(options.rounds)]
        command += ["--contenders", *options.contenders] if options.contenders else []
        timeout = options.timeout
        if options.seconds is not None:
            command += ["--seconds", str(options.seconds)]
            timeout = min(timeout, TIMEOUT_OF_BOUNDED * options.seconds)
        reason = None
        try:
            subprocess.run(command, check=True, timeout=timeout)
        except subprocess.CalledProcessError as error:
            reason = f"the process ended with status {error.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"timed out after {timeout:.0f} s"
        results: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
        return results if reason is None else results | {"all": {"error": reason}}


def measure_program(
    name: str, options: argparse.Namespace, keep_results: Callable[[dict[str, Result]], object] = lambda _: None
) -> dict[str, Result]:
    """Set every contender up in turn, then measure all of them in interleaved rounds.

    `keep_results` is given the results after each contender and each round.
    """
    device = torch.device(options.device)
    if device.type == "cuda":  # for all contenders: without TF32 the large models wait for nothing but arithmetic
        torch.set_float32_matmul_precision("high")
    budget = Budget(options.seconds)
    results: dict[str, Result] = {}
    contenders: dict[str, Contender] = {}
    steps = 0
    names = options.contenders or contender_names(name, device)
    names = ["eager", *(other for other in names if other != "eager")]
    _warm_up_process(name, options, device)
    for index, contender_name in enumerate(names):
        share = budget.share(len(names) - index)
        began = time.perf_counter()
        result = results[contender_name] = {"rounds_ms": []}
        try:
            if share is not None and contender_name in COMPILED:
                _rehearse(contender_name, name, options, share, Path(options.json).parent)
            contender, result["first_ten_seconds"] = _start(contender_name, name, options, device)
            if not steps:
                steps = _steps_a_round(contender, budget, len(names) * (SETTLE_ROUNDS + options.rounds))
            result["settled"] = _settle(contender, steps, None if share is None else began + share)
            contenders[contender_name] = contender
        except Exception as error:  # noqa: BLE001 whatever a contender raises is its row
            result["error"] = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
        print(f"{name}: {_progress(contender_name, result, time.perf_counter() - began)}", file=sys.stderr, flush=True)
        keep_results(results)
    for round_number in range(options.rounds):
        if budget.is_over() and round_number >= FEWEST_ROUNDS:
            break
        for contender_name, contender in contenders.items():
            milliseconds = _time_round(contender, SETTLE_ROUNDS + round_number, steps)
            results[contender_name]["rounds_ms"].append(milliseconds)
        for contender_name, contender in contenders.items():
            report = contender.report()
            results[contender_name] |= summarise(results[contender_name]["rounds_ms"])
            results[contender_name] |= {"steps_a_round": steps, "host_us": None}
            results[contender_name]["report"] = report and summarise_report(report)
        keep_results(results)
    for contender_name, contender in contenders.items():
        calls = calls_within(results[contender_name]["median_ms"], budget)
        is_twofold = contender.report() is not None
        results[contender_name]["host_us"] = host_microseconds(contender.run, device, is_twofold, calls)
    keep_results(results)
    return results


def _progress(contender: str, result: Result, seconds: float) -> str:
    outcome = result.get("error") or ("settled" if result["settled"] else "not settled")
    return f"{contender} {outcome}, {seconds:.1f} s"


def _rehearse(contender: str, program: str, options: argparse.Namespace, seconds: float, folder: Path) -> None:
    """Set a compiled contender up in a process of its own; raise `TimeoutError` if it is not ready in time.

    A compiler that is cut in this process would leave it in some state: anomaly detection on, workers at work. What it
    has compiled in time comes from its cache when the contender is set up here. The cache is the contender's own, since
    one that is cut leaves parts of files there.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / contender)
    command = [sys.executable, "-m", "benchmarks.steps", program, "--child", "--rehearse", contender]
    command += ["--device", options.device, "--size", options.size]
    if run_within(command, seconds) is None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")


def _settle(contender: Contender, steps: int, until: float | None) -> bool:
    """Run rounds that do not count; return whether these were enough, and all kernels there.

    Waiting for a compiler is no part of their time. `until`: when the contender is measured as it is.
    """
    seconds, number = 0.0, 0
    report = contender.report()
    is_ready = is_steady = in_graphs = report is None
    while number < SETTLE_ROUNDS or (report and seconds < (SETTLE_SECONDS if is_ready and in_graphs else SETTLE_MOST)):
        left = None if until is None else until - time.perf_counter()
        if left is not None and left <= 0:
            return False
        if number:
            contender.prepare(COMPILE_SECONDS if left is None else min(left, COMPILE_SECONDS))
        seconds += _time_round(contender, number % SETTLE_ROUNDS, steps) * steps / 1e3
        number += 1
        is_ready = contender.prepare(0.0)  # a round may order kernels, with the verdict on the tier below
        before, report = report, contender.report()
        is_steady, in_graphs = _how_units_ran(before, report)
    return is_ready and is_steady


def _how_units_ran(before: Result | None, after: Result | None) -> tuple[bool, bool]:
    """Return of the units between two reports whether none was recorded or timed, and nearly all ran as graphs."""
    if before is None or after is None:
        return True, True
    kinds = ("iterations", "graph_iterations", "traced_iterations", "compared_iterations")
    units, in_graphs, traced, compared = (after[kind] - before[kind] for kind in kinds)
    is_steady = not traced and not compared
    return is_steady, is_steady and in_graphs >= SETTLED_SHARE * units


def _warm_up_process(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Load the libraries' kernels, so that the first contender does not pay for them all."""
    try:
        _start("eager", name, options, device)
    except Exception as error:  # noqa: BLE001 it comes again, as the row of the contender eager
        print(f"{name}: warming up failed: {type(error).__name__}", file=sys.stderr)


def _start(
    contender_name: str, program: str, options: argparse.Namespace, device: torch.device
) -> tuple[Contender, float]:
    """Build a contender; return it and the seconds from its first call to the end of its tenth step."""
    contender = make_contender(contender_name, program, options.size, device)
    seed_everything(0)
    synchronize()
    begin = time.perf_counter()
    for index in range(FIRST_STEPS):
        contender.run(index)
    synchronize()
    return contender, time.perf_counter() - begin


def _steps_a_round(contender: Contender, budget: Budget, rounds: int) -> int:
    """Return how many steps a round has, the same for all contenders. `rounds`: of all contenders together."""
    fewest, most = ROUND_STEPS
    left = budget.left()
    milliseconds = _time_round(contender, 0, fewest if left is None else 1)
    if left is not None:
        fewest = max(1, min(fewest, int(left * 1e3 / (rounds * milliseconds))))
    return max(fewest, min(most, round(1e3 * ROUND_SECONDS / milliseconds)))


def calls_within(milliseconds: float, budget: Budget) -> int:
    """Return of how many calls the host time is taken, by what one call takes."""
    if budget.seconds is None:
        return HOST_CALLS
    return max(5, min(HOST_CALLS, round(1e3 * ROUND_SECONDS / milliseconds)))


def _time_round(contender: Contender, number: int, steps: int) -> float:
    """Return milliseconds a step over the steps of round `number`."""
    seed_everything(number)
    synchronize()
    begin = time.perf_counter()
    for index in range(number * steps, (number + 1) * steps):
        contender.run(index)
    synchronize()
    return (time.perf_counter() - begin) * 1e3 / steps


def summarise(rounds_ms: list[float]) -> Result:
    """Median and the quarter of rounds on either side of it."""
    if len(rounds_ms) < 2:
        only = rounds_ms[0]
        return {"median_ms": only, "quartiles_ms": [only, only]}
    first, median, third = statistics.quantiles(rounds_ms, n=4, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [first, third]}


def summarise_report(report: dict[str, Any]) -> Result:
    """Return what a report counts, and its reasons without the folders of the source they name."""
    summary: Result = {name: value for name, value in report.items() if isinstance(value, (int, float, str))}
    for kind in ("fallbacks", "refusals"):
        summary[kind] = [
            {**entry, "origin": entry["origin"] and entry["origin"].rpartition("/")[2]} for entry in report[kind]
        ]
    return summary


def format_table(program: str, results: dict[str, Result]) -> str:
    """One row a contender. Ratios are speedups: above 1 is faster than eager, than the best compile."""
    measured = {name: result["median_ms"] for name, result in results.items() if "median_ms" in result}
    compiled = [milliseconds for name, milliseconds in measured.items() if name.startswith("compile")]
    header = f"{program:<27}{'ms/step':>10}{'quartiles':>18}{'x eager':>9}{'x compile':>11}"
    lines = [f"{header}{'first ten, s':>14}{'in graphs':>11}"]
    for name, result in results.items():
        if name not in measured:
            lines.append(f"  {name:<25}{result.get('error', 'not measured')}")
            continue
        milliseconds = measured[name]
        spread = "{:.3f}-{:.3f}".format(*result["quartiles_ms"])
        over_eager = f"{measured['eager'] / milliseconds:.2f}" if "eager" in measured else ""
        over_compile = f"{min(compiled) / milliseconds:.2f}" if compiled else ""
        fraction = result["report"] and result["report"]["graph_op_fraction"]
        lines.append(
            f"  {name:<25}{milliseconds:>10.3f}{spread:>18}{over_eager:>9}{over_compile:>11}"
            f"{result['first_ten_seconds']:>14.2f}{'' if fraction is None else f'{fraction:.1%}':>11}"
            f"{'' if result.get('settled', True) else NOT_SETTLED}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Trees a second of each contender, on batches of given trees, in interleaved rounds."""

import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.programs.tree_lstm import TreeLSTM
from benchmarks.steps import ERROR_CHARACTERS, summarise
from benchmarks.trees.contenders import KINDS, Contender, Kind, Skipped, Trees, open_contender
from benchmarks.trees.data import count_nodes

ROUND_SECONDS = 0.3
# Trees a round: at least one batch, and of small batches no more than plain recursion takes seconds for.
TREES_IN_POOL = 200
BATCHES_IN_POOL = 50
GRADIENT_TOLERANCE = 0.02
"""Of a gradient's norm; products on a GPU may round to 10 bits (TF32)."""
FIRST_BATCH = 25

Result = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What is run: contenders by name, on copies of `model`, over `trees` in batches of each size.

    Raises ValueError for a batch of no trees, or of more than there are.
    """

    names: Sequence[str]
    model: TreeLSTM
    trees: Trees
    batches: Sequence[int]
    rounds: int
    dynet_python: str | None = None

    def __post_init__(self) -> None:
        wrong = [size for size in self.batches if not 1 <= size <= len(self.trees)]
        if wrong:
            raise ValueError(f"there are {len(self.trees)} trees: no batches of {', '.join(map(str, wrong))}")


def measure(measurement: Measurement) -> dict[str, Any]:
    """Return what the trees are, how each contender started, and for each batch size and kind all rounds and medians.

    A contender that cannot run has {"skipped": why}; one that raises has {"error": what} in place of its figures.
    """
    document: dict[str, Any] = {
        "trees": len(measurement.trees),
        "nodes_a_tree": sum(count_nodes(tree) for tree in measurement.trees) / len(measurement.trees),
        "contenders": {},
        "results": [],
    }
    with ExitStack() as stack:
        contenders = _open_all(measurement, stack, document["contenders"])
        for size in measurement.batches:
            for kind in KINDS:
                pool = _batches(size, len(measurement.trees))
                results = _measure_rounds(contenders, kind, pool, measurement.rounds)
                document["results"].append({"batch": size, "kind": kind, "contenders": results})
    return document


def _open_all(measurement: Measurement, stack: ExitStack, described: dict[str, Result]) -> dict[str, Contender]:
    """Start the contenders one by one and time the first steps of each: conversion and compilation are in it."""
    pool = _batches(min(FIRST_BATCH, len(measurement.trees)), len(measurement.trees))
    trees, model = measurement.trees, measurement.model
    warm = stack.enter_context(open_contender("plain", model, trees))
    for kind in KINDS:  # the libraries' kernels are loaded before anything is timed
        warm.seconds(kind, pool[:1])
    contenders: dict[str, Contender] = {}
    for name in measurement.names:
        try:
            contender = stack.enter_context(open_contender(name, model, trees, measurement.dynet_python))
            first = {kind: contender.seconds(kind, pool[:1]) for kind in KINDS}
            _check_gradients(contender, warm, pool[0])
        except Skipped as reason:
            described[name] = {"skipped": str(reason)}
        except Exception as error:  # noqa: BLE001 whatever a contender raises is its row
            described[name] = _failure(error)
        else:
            described[name] = {"first_call_seconds": first, "version": contender.version}
            contenders[name] = contender
        print(f"  {name}: {described[name]}", file=sys.stderr, flush=True)
    return contenders


def _check_gradients(contender: Contender, plain: Contender, batch: range) -> None:
    """Both have taken the same steps. A contender that leaves out gradients must not be timed."""
    found, expected = contender.gradients(batch)[1], plain.gradients(batch)[1]
    for name, gradient in expected.items():
        error = float((found[name].to(gradient) - gradient).norm() / gradient.norm())
        if not error < GRADIENT_TOLERANCE:
            raise ValueError(f"the gradient of {name} is {error:.0%} off plain recursion's")


def _batches(size: int, trees: int) -> list[range]:
    count = max(1, min(BATCHES_IN_POOL, TREES_IN_POOL // size, trees // size))
    return [range(number * size, (number + 1) * size) for number in range(count)]


def _measure_rounds(contenders: dict[str, Contender], kind: Kind, pool: list[range], rounds: int) -> dict[str, Result]:
    """One pass settles each contender and says how many make a round; then round by round, all in turn."""
    trees = sum(map(len, pool))
    results: dict[str, Result] = {}
    passes: dict[str, int] = {}
    for name, contender in contenders.items():
        try:
            contender.seconds(kind, pool)
            passes[name] = math.ceil(ROUND_SECONDS / contender.seconds(kind, pool))
            results[name] = {"rounds_ms": []}
        except Exception as error:  # noqa: BLE001 whatever a contender raises is its row
            results[name] = _failure(error)
    for _ in range(rounds):
        for name, repeated in passes.items():
            seconds = contenders[name].seconds(kind, pool, repeated)
            results[name]["rounds_ms"].append(seconds * 1e3 / repeated / trees)
    for name in passes:
        results[name] |= summarise(results[name]["rounds_ms"])
        results[name]["trees_per_second"] = 1e3 / results[name]["median_ms"]
    return results


def _failure(error: Exception) -> Result:
    return {"error": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]}


def format_table(title: str, document: dict[str, Any]) -> str:
    """Trees a second, the middle half of the rounds, and how many times plain recursion's speed in the same round."""
    nodes = f"{document['trees']} trees of {document['nodes_a_tree']:.1f} nodes"
    lines = [f"{title}: {nodes}; trees/s (quartiles, times plain recursion)"]
    for kind in KINDS:
        rows = [row for row in document["results"] if row["kind"] == kind]
        columns = "".join(f"batch {row['batch']}".rjust(24) for row in rows)
        lines.append(f"  {kind:<21}{'first step, s':>14}{columns}")
        for name, described in document["contenders"].items():
            if "first_call_seconds" in described:
                cells = "".join(_cell(row["contenders"], name).rjust(24) for row in rows)
                lines.append(f"    {name:<20}{described['first_call_seconds'][kind]:>13.2f}{cells}")
    for name, described in document["contenders"].items():
        if "first_call_seconds" not in described:
            state, reason = next(iter(described.items()))
            lines.append(f"  {name}: {state}: {reason}")
    return "\n".join(lines) + "\n"


def format_growth(corpora: dict[str, dict[str, Any]]) -> str:
    """One row a shape and contender, one column a number of leaves: milliseconds a tree. Names are "shape-leaves"."""
    figures: dict[tuple[Kind, str, str], dict[int, float]] = {}
    for name, document in corpora.items():
        shape, _, leaves = name.rpartition("-")
        for row in document["results"]:
            for contender, result in row["contenders"].items():
                of_contender = figures.setdefault((row["kind"], shape, contender), {})
                of_contender[int(leaves)] = result.get("median_ms", math.nan)
    columns = sorted({leaves for row in figures.values() for leaves in row})
    lines = ["milliseconds a tree by leaves".ljust(42) + "".join(f"{leaves:>10}" for leaves in columns)]
    for (kind, shape, contender), row in sorted(figures.items()):
        cells = "".join(f"{row.get(leaves, math.nan):>10.3f}" for leaves in columns)
        lines.append(f"{kind:<9}{shape:<11}{contender:<22}{cells}")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Result], name: str) -> str:
    result = row[name]
    if "error" in result:
        return "failed"
    slow, fast = (1e3 / milliseconds for milliseconds in reversed(result["quartiles_ms"]))
    figure = f"{result['trees_per_second']:.0f} ({slow:.0f}-{fast:.0f})"
    plain = row.get("plain", {}).get("rounds_ms", [])
    ratios = [theirs / ours for theirs, ours in zip(plain, result["rounds_ms"], strict=False)]
    return f"{figure} {statistics.median(ratios):.2f}x" if ratios else figure

"""One picture of results: how many times faster than eager, program by program, for torch.compile and for Twofold.

    python -m benchmarks.picture RESULTS.json … --out docs/results.svg

Reads what `benchmarks.steps` wrote; of a program in several files, the last counts. Needs matplotlib.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTENDERS = {
    "torch.compile, best mode": ("compile", "compile_reduce_overhead"),
    "Twofold, better numerics": ("twofold_exact", "twofold_fused"),
    "whole step captured by hand": ("cuda_graph_by_hand",),
}
COLOURS = ("#b0b7c3", "#2563eb", "#e2e8f0")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.picture")
    parser.add_argument("results", nargs="+", type=Path, help="files that benchmarks.steps wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg or .png")
    options = parser.parse_args(arguments)
    try:
        documents = [json.loads(path.read_text()) for path in options.results]
    except (OSError, ValueError) as error:
        parser.error(f"not a file of results: {error}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is missing: pip install matplotlib")
    draw(speedups(documents), [document["environment"] for document in documents], options.out)


def speedups(documents: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by program and contender how many times faster than eager it ran; the best of each kind."""
    rows: dict[str, dict[str, float]] = {}
    for document in documents:
        for program, results in document["programs"].items():
            medians = {name: result["median_ms"] for name, result in results.items() if "median_ms" in result}
            rows[program] = {
                kind: medians["eager"] / min(medians[name] for name in names if name in medians)
                for kind, names in CONTENDERS.items()
                if not medians.keys().isdisjoint(names)
            }
    return rows


def draw(rows: dict[str, dict[str, float]], environments: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a group of bars a program, fastest first; the line at 1 is eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(rows, key=lambda program: max(rows[program].values(), default=0.0))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.55 * len(ordered)), layout="constrained")
    height = 0.8 / len(CONTENDERS)
    for index, (kind, colour) in enumerate(zip(CONTENDERS, COLOURS, strict=True)):
        places = [place for place, program in enumerate(ordered) if kind in rows[program]]
        bars = axes.barh(
            [place + (1 - index) * height for place in places],
            [rows[ordered[place]][kind] for place in places],
            height,
            label=kind,
            color=colour,
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), ordered)
    machines = {e["gpu"] or f"{e['threads']} threads of {e['cpu']}" for e in environments}
    versions = {environment["torch"] for environment in environments}
    dates = sorted({environment["date"].partition("T")[0] for environment in environments})
    where, when = f"{', '.join(sorted(machines))}, torch {', '.join(sorted(versions))}", " and ".join(dates)
    axes.set_title(f"Training steps, times faster than eager. {where}, {when}", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()

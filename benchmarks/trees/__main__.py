"""Trees a second of a binary TreeLSTM: plain recursion, its rivals, and Twofold on the plain recursive source.

    python -m benchmarks.trees [--device cpu|cuda] [--sst FOLDER] [--batch N …] [--shapes] [--json PATH]

The trees are those of the standard library's syntax, binarised; with --sst (or the environment variable
TWOFOLD_SST) the training trees of the Stanford Sentiment Treebank. --shapes measures balanced, random and
linear trees of 15 to 511 leaves instead: how cost grows with nodes and with depth.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.contenders import SEED
from benchmarks.environment import describe_environment, describe_options
from benchmarks.programs.tree_lstm import TreeLSTM
from benchmarks.trees.contenders import NAMES
from benchmarks.trees.data import (
    BinaryNode,
    Corpus,
    Shape,
    binary_syntax_trees,
    sentiment_trees,
    shaped_tree,
    sst_folder,
)
from benchmarks.trees.measure import Measurement, format_growth, format_table, measure

SAMPLE = 512
WIDTH, HIDDEN = 300, 168
SHAPED_LEAVES = (15, 31, 63, 127, 255, 511)
SHAPED_BATCH = 10
SHAPED_WORDS, SHAPED_LABELS = 1000, 5


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.device == "cuda":  # for all contenders, as in benchmarks.steps
        torch.set_float32_matmul_precision("high")
    sys.setrecursionlimit(10_000)  # plain recursion over a chain of 511 leaves
    # Where the trees lie is the user's affair; the name of the corpus is in the results.
    settings = describe_options(options, "sst", "dynet_python")
    document: dict[str, Any] = {"environment": describe_environment(), "options": settings, "corpora": {}}
    try:
        corpora = _shaped_corpora() if options.shapes else [_corpus(options.sst)]
        measurements = {corpus.name: _measurement(corpus, options) for corpus in corpora}
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.trees: {error}")
    for name, measurement in measurements.items():
        document["corpora"][name] = measure(measurement)
        print(format_table(name, document["corpora"][name]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(document, indent=1))
    if options.shapes:
        print(format_growth(document["corpora"]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.trees")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sst", help="folder with train.txt of the Stanford Sentiment Treebank, in brackets")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 10, 25, 256], help="trees a step")
    parser.add_argument("--shapes", action="store_true", help="trees of made-up shapes and growing size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--dynet-python", help="an interpreter that has dyNET38, where this one has not")
    parser.add_argument("--json", help="write machine, versions, options and all rounds to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return options


def _corpus(sst: str | None) -> Corpus[BinaryNode]:
    """Return a sample of the chosen corpus, the same each time."""
    folder = sst_folder(sst)
    corpus = sentiment_trees(folder) if folder else binary_syntax_trees()
    trees = random.Random(SEED).sample(corpus.trees, min(SAMPLE, len(corpus.trees)))
    return Corpus(corpus.name, trees, corpus.words, corpus.labels)


def _shaped_corpora() -> list[Corpus[BinaryNode]]:
    shapes: tuple[Shape, ...] = get_args(Shape)
    draw = random.Random(SEED)

    def corpus(shape: Shape, leaves: int) -> Corpus[BinaryNode]:
        trees = [shaped_tree(shape, leaves, SHAPED_WORDS, SHAPED_LABELS, draw) for _ in range(SHAPED_BATCH)]
        return Corpus(f"{shape}-{leaves}", trees, SHAPED_WORDS, SHAPED_LABELS)

    return [corpus(shape, leaves) for shape in shapes for leaves in SHAPED_LEAVES]


def _measurement(corpus: Corpus[BinaryNode], options: argparse.Namespace) -> Measurement:
    batches = [SHAPED_BATCH] if options.shapes else options.batch
    torch.manual_seed(SEED)
    model = TreeLSTM(corpus.words, corpus.labels, WIDTH, HIDDEN).to(options.device)
    return Measurement(options.contenders, model, corpus.trees, batches, options.rounds, options.dynet_python)


if __name__ == "__main__":
    main()

"""Trees as plain Python objects: the standard library's own syntax, the Stanford Sentiment Treebank, made-up shapes.

Two kinds of node. A `Node` has any number of children; a `BinaryNode` has two or none. Labels are at every
node, words at the leaves: a network reads the words and is asked for the label of each node. Of the syntax
trees the label is the kind of syntax (`Call`, `If`, ...): the kinds of all inner nodes are masked.
"""

import ast
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Generic, Literal, TypeVar

SST_VARIABLE = "TWOFOLD_SST"
UNKNOWN = 0
"""The word of an inner node, and of a leaf whose word is not in the vocabulary."""

# Modules of pure Python that every supported version has, of some 500 functions in all.
MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "configparser", "copy", "csv", "dataclasses", "difflib", "enum",
    "fractions", "functools", "gettext", "heapq", "inspect", "mimetypes", "pprint", "random", "shlex", "statistics",
    "string", "textwrap", "tokenize", "traceback", "typing",
)  # fmt: skip
NODES_OF_FUNCTION = (8, 200)
LARGEST_VOCABULARY = 2000

T = TypeVar("T")
Shape = Literal["balanced", "random", "linear"]


@dataclass(eq=False)
class Node:
    """A tree with any number of children; a leaf has none."""

    word: int
    label: int
    children: list["Node"] = field(default_factory=list)


@dataclass(eq=False)
class BinaryNode:
    """A tree whose nodes have two children or, at the leaves, None twice."""

    word: int
    label: int
    left: "BinaryNode | None" = None
    right: "BinaryNode | None" = None


@dataclass(frozen=True)
class Corpus(Generic[T]):
    """Trees, and how many words (`UNKNOWN` among them) and labels there are."""

    name: str
    trees: list[T]
    words: int
    labels: int


def count_nodes(tree: Node | BinaryNode) -> int:
    """Count the nodes of one tree; those that a DAG shares count as often as they are reached."""
    if isinstance(tree, Node):
        return 1 + sum(count_nodes(child) for child in tree.children)
    return 1 + sum(count_nodes(child) for child in (tree.left, tree.right) if child is not None)


# Binary trees from others.


def binarise(tree: Node) -> BinaryNode:
    """Return the tree with at most two children a node.

    An only child takes its parent's place and label; of more than two children all but the last
    are folded to the left, under the label of their parent.
    """
    if not tree.children:
        return BinaryNode(tree.word, tree.label)
    first, *others = [binarise(child) for child in tree.children]
    if not others:
        return BinaryNode(first.word, tree.label, first.left, first.right)
    for other in others:
        first = BinaryNode(UNKNOWN, tree.label, first, other)
    return first


def with_children(tree: BinaryNode) -> Node:
    """Return the same tree, its children in a list."""
    children = [with_children(child) for child in (tree.left, tree.right) if child is not None]
    return Node(tree.word, tree.label, children)


def share_equal_subtrees(tree: Node) -> Node:
    """Return the tree as a DAG: subtrees equal in words, labels and order are one object."""
    known: dict[tuple[int, ...], Node] = {}

    def share(node: Node) -> Node:
        children = [share(child) for child in node.children]
        key = (node.word, node.label, *map(id, children))
        return known.setdefault(key, Node(node.word, node.label, children))

    return share(tree)


# Syntax trees of the standard library.


@cache
def syntax_trees(limit: int | None = None) -> Corpus[Node]:
    """Return functions of the running Python's standard library as trees, in the order of `MODULES`; `limit` is read.

    Operators are leaves, contexts (`Load`, `Store`) are left out, and so is the name of the function itself.
    """
    read = _SyntaxReader()
    trees = [read(function) for function in islice(_functions(), limit)]
    low, high = NODES_OF_FUNCTION
    kept = [tree for tree in trees if low <= count_nodes(tree) <= high]
    return Corpus("syntax", kept, len(read.words), len(read.labels))


@cache
def binary_syntax_trees(limit: int | None = None) -> Corpus[BinaryNode]:
    """Return `syntax_trees`, binarised."""
    corpus = syntax_trees(limit)
    return Corpus(corpus.name, [binarise(tree) for tree in corpus.trees], corpus.words, corpus.labels)


def _functions() -> Iterator[ast.FunctionDef]:
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"the source of the standard library's module {module} is not installed")
        source = Path(spec.origin).read_text(encoding="utf-8")
        yield from (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))


class _SyntaxReader:
    """Makes trees of syntax; numbers words and labels in the order in which they are first seen."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {"": UNKNOWN}
        self.labels: dict[str, int] = {}

    def __call__(self, syntax: ast.AST) -> Node:
        label = self._label(type(syntax).__name__)
        children: list[Node] = []
        text = ""
        for name, value in ast.iter_fields(syntax):
            if name in ("ctx", "kind", "type_comment") or (name == "name" and isinstance(syntax, ast.FunctionDef)):
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.AST):
                    children.append(self(item))
                elif item is not None:
                    text = (repr(item) if isinstance(syntax, ast.Constant) else str(item))[:20]
                    children.append(Node(self._word(text), self._label("text")))
        if text and len(children) == 1:  # a name, a constant
            return Node(self._word(text), label)
        return Node(UNKNOWN, label, children) if children else Node(self._word(type(syntax).__name__), label)

    def _word(self, text: str) -> int:
        if len(self.words) >= LARGEST_VOCABULARY:
            return self.words.get(text, UNKNOWN)
        return self.words.setdefault(text, len(self.words))

    def _label(self, name: str) -> int:
        return self.labels.setdefault(name, len(self.labels))


# The Stanford Sentiment Treebank.


def sentiment_trees(folder: Path, split: str = "train") -> Corpus[BinaryNode]:
    """Read bracketed trees, one a line, as in `(3 (2 a) (4 (3 lovely) (2 film)))`.

    Raises FileNotFoundError where the folder has no such file, ValueError (file and line) on malformed text.
    """
    path = folder / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: give --sst or {SST_VARIABLE} the folder with the treebank's train.txt, dev.txt and test.txt"
        )
    words: dict[str, int] = {"": UNKNOWN}
    trees: list[BinaryNode] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                trees.append(parse_bracketed(line, words))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: not a binary tree in brackets: {error}") from error
    return Corpus("sst", trees, len(words), 5)


def parse_bracketed(text: str, words: dict[str, int]) -> BinaryNode:
    """Parse one tree; words not yet in `words` are numbered there."""
    open_nodes: list[BinaryNode] = []
    children: list[list[BinaryNode]] = [[]]
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            open_nodes.append(BinaryNode(UNKNOWN, -1))
            children.append([])
        elif token == ")":
            node, below = open_nodes.pop(), children.pop()
            if len(below) not in (0, 2) or (not below and node.word == UNKNOWN):
                raise ValueError(f"a node with {len(below)} children and no word")
            node.left, node.right = below or (None, None)
            children[-1].append(node)
        elif open_nodes[-1].label < 0:
            open_nodes[-1].label = int(token)
        else:
            open_nodes[-1].word = words.setdefault(token, len(words))
    (tree,) = children[0]
    if open_nodes:
        raise ValueError("a bracket is not closed")
    return tree


def sst_folder(given: str | None) -> Path | None:
    """Return the treebank's folder: the one given, else that of the environment, else None."""
    named = given or os.environ.get(SST_VARIABLE)
    return Path(named) if named else None


# Made-up shapes.


def shaped_tree(shape: Shape, leaves: int, words: int, labels: int, draw: random.Random) -> BinaryNode:
    """Return a binary tree of that many leaves with random words and labels.

    "balanced" halves at every node, "random" cuts anywhere, "linear" has a leaf to the right of every node.
    """
    cuts: dict[Shape, Callable[[int], int]] = {
        "balanced": lambda count: count // 2,
        "random": lambda count: draw.randint(1, count - 1),
        "linear": lambda count: count - 1,
    }
    cut = cuts[shape]

    def grow(count: int) -> BinaryNode:
        if count == 1:
            return BinaryNode(draw.randrange(1, words), draw.randrange(labels))
        left = cut(count)
        return BinaryNode(UNKNOWN, draw.randrange(labels), grow(left), grow(count - left))

    return grow(leaves)

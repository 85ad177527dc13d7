"""Trees are what their text or source says, and binary trees keep leaves and labels."""

import ast
import random
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.trees.data import (
    UNKNOWN,
    BinaryNode,
    Node,
    Shape,
    _SyntaxReader,
    binarise,
    binary_syntax_trees,
    count_nodes,
    parse_bracketed,
    sentiment_trees,
    shaped_tree,
    share_equal_subtrees,
    syntax_trees,
    with_children,
)

LEAVES = st.builds(Node, st.integers(1, 3), st.integers(0, 2))
TREES = st.recursive(
    LEAVES, lambda trees: st.builds(Node, st.just(UNKNOWN), st.integers(0, 2), st.lists(trees, min_size=1, max_size=4))
)


def words_of(tree: Node) -> list[int]:
    return [word for child in tree.children for word in words_of(child)] if tree.children else [tree.word]


def bracketed(tree: BinaryNode) -> str:
    if tree.left is None or tree.right is None:
        return f"({tree.label} w{tree.word})"
    return f"({tree.label} {bracketed(tree.left)} {bracketed(tree.right)})"


def distinct(graph: Node, seen: set[Node]) -> set[Node]:
    if graph not in seen:
        seen.add(graph)
        for child in graph.children:
            distinct(child, seen)
    return seen


def as_tuple(tree: Node) -> tuple:
    return tree.word, tree.label, *map(as_tuple, tree.children)


@given(TREES)
def test_a_binarised_tree_keeps_its_words_and_the_label_of_its_root(tree: Node) -> None:
    binary = binarise(tree)
    assert words_of(with_children(binary)) == words_of(tree)
    assert binary.label == tree.label
    assert count_nodes(binary) == 2 * len(words_of(tree)) - 1


@given(TREES)
def test_sharing_keeps_the_tree_and_leaves_no_two_equal_nodes(tree: Node) -> None:
    graph = share_equal_subtrees(tree)
    assert as_tuple(graph) == as_tuple(tree)
    nodes = distinct(graph, set())
    assert len({as_tuple(node) for node in nodes}) == len(nodes)


@given(TREES)
def test_brackets_are_read_back(tree: Node) -> None:
    text = bracketed(binarise(tree))
    words = {f"w{number}": number for number in range(4)}
    assert bracketed(parse_bracketed(text, words)) == text


@pytest.mark.parametrize(
    "line", ["", "(2 a", "(2 a))", "(2 (1 a))", "(x a)", "(2 (1 a) (1 b) (1 c))", "(2)", "(2 a) (2 b)"]
)
def test_malformed_brackets_are_refused_with_file_and_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(f"(1 (2 a) (3 b))\n{line or '()'}\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: not a binary tree"):
        sentiment_trees(tmp_path)


def test_a_treebank_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("(3 (2 a) (4 (3 lovely) (2 a)))\n\n(1 dull)\n")
    corpus = sentiment_trees(tmp_path)
    assert [count_nodes(tree) for tree in corpus.trees] == [5, 1]
    assert (corpus.words, corpus.labels) == (4, 5)
    first = corpus.trees[0]
    assert first.right is not None
    assert (first.label, first.right.label, first.left.word, first.right.right.word) == (3, 4, 1, 1)


def test_a_missing_treebank_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give --sst or TWOFOLD_SST the folder"):
        sentiment_trees(tmp_path / "nowhere")


def test_syntax_becomes_a_tree_without_the_functions_own_name() -> None:
    read = _SyntaxReader()
    tree = read(ast.parse("def secret(x):\n    return x.size + 1").body[0])
    labels = {number: name for name, number in read.labels.items()}
    words = {number: name for name, number in read.words.items()}
    assert labels[tree.label] == "FunctionDef"
    assert [words[word] for word in words_of(tree)] == ["x", "x", "size", "Add", "1"]
    assert "secret" not in read.words


def test_syntax_trees_are_the_same_each_time_and_their_numbers_in_range() -> None:
    first, again = syntax_trees(20), syntax_trees.__wrapped__(20)
    assert [as_tuple(tree) for tree in first.trees] == [as_tuple(tree) for tree in again.trees]
    binary = binary_syntax_trees(20)
    assert len(binary.trees) == len(first.trees) > 10
    for tree in first.trees:
        for node in distinct(tree, set()):
            assert 0 <= node.word < first.words
            assert 0 <= node.label < first.labels
            assert (node.word == UNKNOWN) == bool(node.children)


@pytest.mark.parametrize("shape", get_args(Shape))
@pytest.mark.parametrize("leaves", [1, 2, 15, 64])
def test_made_up_trees_have_the_leaves_and_depth_asked_for(shape: Shape, leaves: int) -> None:
    tree = with_children(shaped_tree(shape, leaves, 10, 3, random.Random(0)))
    assert len(words_of(tree)) == leaves

    def depth(node: Node) -> int:
        return 1 + max(map(depth, node.children)) if node.children else 0

    expected = {"balanced": (leaves - 1).bit_length(), "linear": leaves - 1}
    if shape in expected:
        assert depth(tree) == expected[shape]

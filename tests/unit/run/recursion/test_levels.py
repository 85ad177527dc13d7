"""What a level of a recursion runs: few operations, which gather, compute and write in place."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from twofold.run.recursion import factors, rewrite
from twofold.run.recursion.parts import Stage, StageCode

VIEWS = ("slice", "split", "select_int", "unsqueeze", "view", "expand")


@dataclass
class Node:
    number: float
    left: "Node | None" = None
    right: "Node | None" = None


def comb(depth: int) -> Node:
    node = Node(0.5)
    for index in range(depth):
        node = Node(index / depth, node, Node(-0.25))
    return node


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 20)

    @twofold.subgraph(strict=True)
    def encode(self, node: Node) -> Any:
        if node.left is None:
            h = c = torch.tensor([[node.number] * 4])
        else:
            hl, cl = self.encode(node.left)
            hr, cr = self.encode(node.right)
            i, o, fl, fr, u = self.inner(torch.cat((hl, hr), 1)).chunk(5, 1)
            c = i.sigmoid() * u.tanh() + fl.sigmoid() * cl + fr.sigmoid() * cr
            h = o.sigmoid() * c.tanh()
        return h, c


def stages_of_inner_nodes() -> dict[Stage, StageCode]:
    cell = Cell()
    for _ in range(2):
        sum(cell.encode(comb(depth))[0].sum() for depth in (2, 3)).backward()
    assert not cell.encode.unbatched
    blocks = [block for block in cell.encode._programs[0][1].all_blocks() if block.operands]
    return next(iter(blocks[0].staged.values())).stages


def operations(code: StageCode) -> list[str]:
    called = re.findall(r"f_aten_(\w+?)\(|(give)_of_\d+\(", code.text)
    return [name or give for name, give in called if not name.startswith(VIEWS)]


def test_a_level_runs_few_operations() -> None:
    stages = stages_of_inner_nodes()
    forward, backward = operations(stages[Stage.LEVEL]), operations(stages[Stage.BACK])
    assert len(forward) <= 10, forward
    assert len(backward) <= 8, backward


def test_children_are_not_joined_by_copying() -> None:
    assert "cat" not in stages_of_inner_nodes()[Stage.LEVEL].text


def test_a_level_makes_no_views() -> None:
    stages = stages_of_inner_nodes()
    for stage in (Stage.LEVEL, Stage.BACK):
        lines = stages[stage].text.splitlines()
        assert not [line for line in lines if re.search(rf"f_aten_({'|'.join(VIEWS)})|reshape|narrow|\.t\(\)", line)]


def test_gates_are_written_over_the_product_that_they_are_of() -> None:
    level = stages_of_inner_nodes()[Stage.LEVEL]
    (product,) = [kept for kept in level.kept if kept.shape == (20,)]
    assert {view.crossing for view in level.inside.values()} == {product}


def test_what_is_equal_is_computed_once() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(torch.ops.aten.mul.Tensor, (x, number)) for number in (2, 2, 2.0)]
    graph.output(tuple(nodes))
    rewrite.merge_equal(graph)
    assert [node.args[1] for node in graph.nodes if node.op == "call_function"] == [2, 2.0]


def test_without_the_rewrites_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_LINEAR", frozenset())
    assert len(operations(stages_of_inner_nodes()[Stage.BACK])) > 8


@pytest.mark.parametrize("depth", [1, 2, 30])
def test_gradients_equal_plain_pythons(depth: int) -> None:
    cell = Cell()
    plain: Any = Cell.encode.function
    found: list[list[torch.Tensor]] = []
    for call in (cell.encode, lambda node: evaluate(cell, node, plain)):
        for _ in range(3):
            cell.zero_grad()
            h, c = call(comb(depth))
            (h.sum() * 2 + c.square().sum()).backward()
        found.append([parameter.grad.clone() for parameter in cell.parameters()])
    torch.testing.assert_close(*found)


def evaluate(cell: Cell, node: Node, plain: Any) -> Any:
    """Run the undecorated function, which calls itself through an object that has it."""

    class Plain:
        inner = cell.inner

        def encode(self, child: Node) -> Any:
            return plain(self, child)

    return plain(Plain(), node)


class TwoGates(Cell):
    """Two cells, each of which joins the gradients of its gates: names of parts are not those of other joins."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 16)
        self.other = nn.Linear(4, 16)

    @twofold.subgraph(strict=True)
    def encode(self, node: Node) -> Any:
        if node.left is None:
            h = c = torch.tensor([[node.number] * 4])
        else:
            hl, cl = self.encode(node.left)
            hr, cr = self.encode(node.right)
            i, o, f, u = self.inner(hl + hr).chunk(4, 1)
            j, p, g, v = self.other(hl * hr).chunk(4, 1)
            c = i.sigmoid() * u.tanh() + f.sigmoid() * cl + g.sigmoid() * cr
            c = c + j.sigmoid() * v.tanh()
            h = o.sigmoid() * c.tanh() + p.sigmoid() * c
        return h, c


def test_two_joins_of_gradients() -> None:
    cell = TwoGates()
    plain: Any = TwoGates.encode.function
    found: list[list[torch.Tensor]] = []

    class Plain:
        inner, other = cell.inner, cell.other

        def encode(self, child: Node) -> Any:
            return plain(self, child)

    for call in (cell.encode, Plain().encode):
        for _ in range(3):
            cell.zero_grad()
            h, c = call(comb(5))
            (h.sum() * 2 + c.square().sum()).backward()
        found.append([parameter.grad.clone() for parameter in cell.parameters()])
    assert not cell.encode.unbatched
    torch.testing.assert_close(*found)

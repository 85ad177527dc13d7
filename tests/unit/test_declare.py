"""SubGraphs built by hand, against plain recursion in PyTorch; and what is said of mistakes."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import twofold
from tests.unit.graph.test_autodiff_properties import changed, confuse_invocations
from twofold import DeclarationError, DeclaredSubGraph, if_, show, while_
from twofold.errors import DifferentiationError
from twofold.graph import Graph, TensorSpec, equivalent, parse
from twofold.graph.autodiff import Derivative, differentiate

Shape = tuple[list[int], list[int]]


def declared(*inputs: str, outputs: tuple[str, ...] = ("f32[]",), name: str = "f") -> DeclaredSubGraph:
    return DeclaredSubGraph(name, inputs=inputs, outputs=outputs)


def same_gradients(one: Tensor, two: Tensor, leaves: list[Tensor]) -> None:
    assert torch.allclose(one, two, rtol=1e-6)
    pairs = [torch.autograd.grad(result, leaves, allow_unused=True) for result in (one, two)]
    for ours, eager, leaf in zip(*pairs, leaves, strict=True):
        expected = torch.zeros_like(leaf) if eager is None else eager
        assert ours is not None
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_factorial():
    factorial = declared("f64[]", outputs=("f64[]",), name="factorial")

    @factorial.define
    def body(n: Tensor) -> Tensor:
        return if_(n > 1, lambda: n * factorial(n - 1), lambda: torch.ones_like(n))

    assert body is factorial
    n = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    result = factorial(n)
    result.backward()
    assert result == 120
    assert n.grad == 5 * 4 * 3 * 2 * (1 / 5 + 1 / 4 + 1 / 3 + 1 / 2)
    assert equivalent(parse(show(factorial.graph)), factorial.graph)
    assert "invoke factorial" in show(factorial.graph.subgraphs["factorial"])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A random binary tree as arrays of left and right children, -1 at the leaves; node 0 is the root."""
    left, right = [-1], [-1]
    for _ in range(draw(st.integers(0, 8))):
        leaf = draw(st.sampled_from([node for node, child in enumerate(left) if child < 0]))
        left[leaf], right[leaf] = len(left), len(left) + 1
        left += [-1, -1]
        right += [-1, -1]
    return left, right


QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@QUICK
@given(shapes())
def test_tree_sum_over_index_tensors(shape: Shape):
    left, right = map(torch.tensor, shape)
    values = torch.arange(1.0, len(left) + 1).requires_grad_()
    total = declared("i64[]", name="total")

    @total.define
    def _(node: Tensor) -> Tensor:
        return if_(left[node] < 0, lambda: values[node], lambda: values[node] + total(left[node]) + total(right[node]))

    same_gradients(total(torch.tensor(0)), values.sum(), [values])


class TreeLSTM(nn.Module):
    """A binary TreeLSTM, with the same cells called by plain recursion and by SubGraphs."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        self.leaf = nn.Linear(hidden, 3 * hidden)
        self.inner = nn.Linear(2 * hidden, 5 * hidden)
        self.frozen = nn.Parameter(torch.full((hidden,), 0.5), requires_grad=False)

    def leaf_cell(self, word: Tensor) -> tuple[Tensor, Tensor]:
        i, o, u = self.leaf(self.embedding(word)).chunk(3, -1)
        c = i.sigmoid() * u.tanh() * self.frozen
        return o.sigmoid() * c.tanh(), c

    def inner_cell(self, hl: Tensor, cl: Tensor, hr: Tensor, cr: Tensor) -> tuple[Tensor, Tensor]:
        i, o, fl, fr, u = self.inner(torch.cat((hl, hr), -1)).chunk(5, -1)
        c = i.sigmoid() * u.tanh() + fl.sigmoid() * cl + fr.sigmoid() * cr
        return o.sigmoid() * c.tanh(), c

    def plain(self, shape: Shape, words: Tensor, node: int) -> tuple[Tensor, Tensor]:
        left, right = shape[0][node], shape[1][node]
        if left < 0:
            return self.leaf_cell(words[node])
        return self.inner_cell(*self.plain(shape, words, left), *self.plain(shape, words, right))

    def declare(self, hidden: int) -> DeclaredSubGraph:
        """The encoder of a node, given the arrays of the tree."""
        arrays, state = ("i64[?]", "i64[?]", "i64[?]"), f"f32[{hidden}]"
        encode = declared("i64[]", *arrays, outputs=(state, state), name="encode")

        @encode.define
        def _(node: Tensor, left: Tensor, right: Tensor, words: Tensor) -> Any:
            def inner() -> tuple[Tensor, Tensor]:
                children = (encode(side[node], left, right, words) for side in (left, right))
                return self.inner_cell(*(part for child in children for part in child))

            return if_(left[node] < 0, lambda: self.leaf_cell(words[node]), inner)

        return encode


@pytest.fixture(scope="module")
def model() -> tuple[TreeLSTM, DeclaredSubGraph]:
    torch.manual_seed(0)
    network = TreeLSTM(words=5, hidden=4)
    return network, network.declare(4)


@QUICK
@given(shape=shapes())
def test_tree_lstm_over_index_arrays(model: tuple[TreeLSTM, DeclaredSubGraph], shape: Shape):
    network, encode = model
    words = torch.arange(len(shape[0])) % 5
    h, c = encode(torch.tensor(0), torch.tensor(shape[0]), torch.tensor(shape[1]), words)
    h_plain, c_plain = network.plain(shape, words, 0)
    leaves = [parameter for parameter in network.parameters() if parameter.requires_grad]
    same_gradients((h * c).sum(), (h_plain * c_plain).sum(), leaves)


def test_the_oracle_sees_residuals_of_the_wrong_invocation(monkeypatch: pytest.MonkeyPatch):
    def faulty(graph: Graph, inputs: tuple[int, ...]) -> Derivative:
        derivative = differentiate(graph, inputs)
        return replace(derivative, backward=changed(derivative.backward, confuse_invocations))

    monkeypatch.setattr("twofold.declare.declared.differentiate", faulty)
    torch.manual_seed(0)
    network = TreeLSTM(words=5, hidden=4)
    encode = network.declare(4)
    shape = ([1, -1, 3, -1, -1], [2, -1, 4, -1, -1])
    words = torch.arange(5)
    h, c = encode(torch.tensor(0), *map(torch.tensor, shape), words)
    h_plain, c_plain = network.plain(shape, words, 0)
    leaves = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with pytest.raises(AssertionError):
        same_gradients((h * c).sum(), (h_plain * c_plain).sum(), leaves)


def test_parameters_change_between_calls_and_train(model: tuple[TreeLSTM, DeclaredSubGraph]):
    network, encode = model
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    shape, words = ([1, -1, -1], [2, -1, -1]), torch.tensor([0, 1, 2])
    arrays = [torch.tensor(side) for side in shape]
    losses: list[float] = []
    for _ in range(4):
        optimizer.zero_grad()
        h, _c = encode(torch.tensor(0), *arrays, words)
        assert torch.allclose(h, network.plain(shape, words, 0)[0])
        loss = (h - 0.3).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert network.frozen.grad is None


def test_mutual_recursion():
    even, odd = declared("i64[]", "f32[]", name="even"), declared("i64[]", "f32[]", name="odd")

    @even.define
    def _(n: Tensor, x: Tensor) -> Tensor:
        return if_(n == 0, lambda: x, lambda: odd(n - 1, x) * x)

    @odd.define
    def _(n: Tensor, x: Tensor) -> Tensor:
        return if_(n == 0, lambda: -x, lambda: even(n - 1, x) + x)

    def plain(n: int, x: Tensor, is_even: bool = True) -> Tensor:
        if n == 0:
            return x if is_even else -x
        below = plain(n - 1, x, not is_even)
        return below * x if is_even else below + x

    for n in range(5):
        x = torch.tensor(1.5, requires_grad=True)
        same_gradients(even(torch.tensor(n), x), plain(n, x), [x])
    assert set(even.graph.subgraphs) == {"even", "odd"}


def test_while_with_outer_references_and_sizes_that_change():
    weight = torch.tensor(1.1, requires_grad=True)
    grow = declared("f32[?]", "i64[]", outputs=("f32[?]", "i64[]"))

    @grow.define
    def _(x: Tensor, n: Tensor) -> Any:
        return while_(lambda x, i: i < n, lambda x, i: (torch.cat((x * weight, x)), i + 1), x, torch.zeros_like(n))

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out, count = grow(x, torch.tensor(2))
    expected = x
    for _ in range(2):
        expected = torch.cat((expected * weight, expected))
    assert count == 2
    same_gradients((out**2).sum(), (expected**2).sum(), [x, weight])


def test_a_size_that_grows_from_a_known_one_becomes_unknown():
    repeat = declared("i64[]", outputs=("f32[?]",))
    repeat.define(lambda n: while_(lambda x: x.sum() < n, lambda x: torch.cat((x, x)), torch.ones(1)))
    assert repeat(torch.tensor(5)).shape == (8,)


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        (lambda x: x[:3], "f32[?,4]"),
        (lambda x: x[:1], "f32[?,4]"),
        (lambda x: x[:, :3], "f32[?,3]"),
        (lambda x: x.topk(2, dim=0).values, "f32[2,4]"),
        (lambda x: x.topk(2, dim=0).values[:2], "f32[2,4]"),
        (lambda x: torch.cat((x, x)).flatten(), "f32[?]"),
        (lambda x: x.max(0).values, "f32[4]"),
        (lambda x: x @ x.t(), "f32[?,?]"),
        (lambda x: x.unfold(0, 5, 1), "f32[?,4,5]"),
    ],
)
def test_sizes_of_results_are_claimed_only_where_they_are_sure(body: Callable[[Tensor], Tensor], spec: str):
    function = declared("f32[?,4]", outputs=(spec,))
    function.define(body)
    (result,) = function.graph.subgraphs["f"].outputs
    assert str(TensorSpec(result.spec.shape, result.spec.dtype)) == spec
    for rows in (5, 7):
        x = torch.randn(rows, 4)
        assert torch.equal(function(x), body(x))


def test_a_rank_that_depends_on_a_size_is_refused():
    squeezed = declared("f32[?,4]", outputs=("f32[?,4]",))
    squeezed.define(lambda x: x.squeeze())
    with pytest.raises(DeclarationError, match="squeeze asks for a value or size that is known only"):
        _ = squeezed.graph


def test_without_gradients_no_history_is_kept():
    weight = torch.ones(3, requires_grad=True)
    double = declared("f32[3]", outputs=("f32[3]",))
    double.define(lambda x: x * weight)
    with torch.no_grad():
        assert not double(torch.ones(3)).requires_grad
    assert double(torch.ones(3)).requires_grad


def test_flow_functions_are_ordinary_python_outside_a_body():
    assert if_(torch.tensor(True), lambda: 1, lambda: 2) == 1
    assert while_(lambda a: a < 10, lambda a: a * 2, torch.tensor(3)) == 12
    assert while_(lambda a, b: a < b, lambda a, b: (a + 1, b), torch.tensor(1), torch.tensor(3)) == (3, 3)


def test_sizes_that_are_known_are_numbers_and_modes_of_the_body_hold():
    part = declared("f32[?,4]", outputs=("f32[?,2]",))

    @part.define
    def _(x: Tensor) -> Tensor:
        assert (x.dim(), x.size(-1), x.dtype, x.device.type) == (2, 4, torch.float32, "cpu")
        with torch.no_grad():
            scale = x.sum()
        return x[:, : x.size(1) // 2] * scale

    x = torch.ones(3, 4, requires_grad=True)
    part(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([12.0, 12.0, 0.0, 0.0]).expand(3, 4))


def test_missing_body():
    missing, caller = declared("f32[]", name="missing"), declared("f32[]", name="caller")
    caller.define(lambda x: missing(x))
    with pytest.raises(DeclarationError, match="SubGraph missing: declared and invoked, but its body was never"):
        caller(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: x.sum(1), r"SubGraph f: result 0: expected f32\[\] as declared, got f32\[\?\]"),
        (lambda x: (x.sum(), x.sum()), "results: expected 1 as declared, got 2"),
        (lambda x: x.sum().double(), r"expected f32\[\] as declared, got f64\[\]"),
        (lambda x: 1.0, "SubGraph f: result 0: expected a tensor, got float"),
        (lambda x: x.sum() if x.sum() > 0 else x.max(), "__bool__ asks for a value or size .* twofold.if_"),
        (lambda x: x.sum() * len(x), "asks for a value or size that is known only when the SubGraph runs"),
        (lambda x: x[x > 0].sum(), "asks for a value or size"),
        (lambda x: if_(x.sum() > 0, lambda: x, lambda: x.sum()), "if_: result 0: expected the same spec either way"),
        (lambda x: if_(x.sum() > 0, lambda: (x, x), lambda: x), "if_: expected the same structure of both branches"),
        (lambda x: if_(x.sum(), lambda: x, lambda: x), "expected a bool tensor of one element as predicate"),
        (lambda x: if_(x > 0, lambda: x, lambda: x), "expected a bool tensor of one element as predicate"),
        (lambda x: while_(lambda y: y.sum() > 0, lambda y: (y, y), x), "expected 1 carried tensors from the body"),
        (lambda x: x.sum() + declared("f32[2]", name="g")(x), r"SubGraph g: argument 0: expected f32\[2\]"),
        (lambda x: x.sum() + declared("f32[?,4]", name="f")(x), "SubGraph f: two of that name are invoked"),
    ],
)
def test_mistakes_in_a_body(body: Callable[[Tensor], Any], message: str):
    mistaken = declared("f32[?,4]")
    mistaken.define(body)
    with pytest.raises(DeclarationError, match=message):
        _ = mistaken.graph


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([torch.ones(2)], r"SubGraph f: argument 0: expected f32\[3\] as declared, got f32\[2\]"),
        ([torch.ones(3).double()], r"expected f32\[3\] as declared, got f64\[3\]"),
        ([], "SubGraph f: arguments: expected 1 as declared, got 0"),
        ([1.0], "SubGraph f: argument 0: expected a tensor, got float"),
    ],
)
def test_mistakes_in_a_call(arguments: list[Any], message: str):
    function = declared("f32[3]", outputs=("f32[3]",))
    function.define(lambda x: x)
    with pytest.raises(DeclarationError, match=message):
        function(*arguments)


def test_mistakes_in_a_declaration():
    for spec in ("f32", "object", "f32[2]@nowhere", 3):
        with pytest.raises(DeclarationError, match="SubGraph f: input 0: "):
            DeclaredSubGraph("f", inputs=[spec], outputs=["f32[]"])  # type: ignore[list-item]
    with pytest.raises(DeclarationError, match="expected a name without spaces"):
        declared("f32[]", name="two words")
    once = declared("f32[]")
    once.define(lambda x: x)
    with pytest.raises(DeclarationError, match="defined twice"):
        once.define(lambda x: x)


def test_symbolic_tensors_do_not_leave_their_body():
    leaked: list[Tensor] = []
    leaky, other = declared("f32[]", name="leaky"), declared("f32[]", name="other")

    @leaky.define
    def _(x: Tensor) -> Tensor:
        leaked.append(x)
        return if_(x > 0, lambda: leaked.append(x * 2) or x, lambda: x) + 1

    other.define(lambda x: x + leaked[0])
    assert leaky(torch.tensor(1.0)) == 2
    with pytest.raises(DeclarationError, match="a symbolic tensor has no value"):
        leaked[0] + 1
    with pytest.raises(DeclarationError, match="belongs to the body leaky, which is not being built here"):
        other(torch.tensor(1.0))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def test_custom_functions_are_refused():
    weight = torch.ones(2, requires_grad=True)
    for body in (lambda x: Doubled.apply(x), lambda x: x + Doubled.apply(x * weight).exp()):
        custom = declared("f32[2]", outputs=("f32[2]",))
        custom.define(body)
        with pytest.raises(DeclarationError, match=r"custom autograd.Function, DoubledBackward"):
            custom(torch.ones(2))


def test_modules_and_random_draws_are_eagers():
    torch.manual_seed(0)
    cell, dropout, norm = nn.LSTMCell(4, 4), nn.Dropout(0.3), nn.LayerNorm(4)

    def plain(x: Tensor) -> Tensor:
        h, c = cell(norm(x), (x, x))
        states = torch.stack((dropout(h), c))
        return nn.functional.scaled_dot_product_attention(states, states, states)[0]

    graph = declared("f32[?,4]", outputs=("f32[?,4]",))
    graph.define(plain)
    x = torch.randn(3, 4, requires_grad=True)
    results = []
    for function in (graph, plain):
        torch.manual_seed(1)
        results.append(function(x).sum())
    same_gradients(*results, [x, *cell.parameters(), *norm.parameters()])


def test_tensors_with_history_are_no_outer_references():
    scaled = torch.ones(2, requires_grad=True) * 2
    stale = declared("f32[2]", outputs=("f32[2]",))
    stale.define(lambda x: x * scaled)
    with pytest.raises(DeclarationError, match="with autograd history is used in the body f"):
        stale(torch.ones(2))


def test_writes_run_and_are_refused_where_gradients_are_wanted():
    def write(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 5
        y += 1
        return y

    graph = declared("f32[2]", outputs=("f32[2]",))
    graph.define(write)
    assert torch.equal(graph(torch.ones(2)), write(torch.ones(2)))
    with pytest.raises(
        DifferentiationError, match=r"__setitem__ .*test_declare.py:\d+.*expected an operation that neither"
    ):
        graph(torch.ones(2, requires_grad=True))


def test_public_names():
    assert {"DeclaredSubGraph", "if_", "while_", "TensorSpec", "DeclarationError", "show"} <= set(twofold.__all__)


@pytest.mark.slow
def test_the_example_learns():
    example = Path(__file__).parents[2] / "examples" / "explicit_recursion.py"
    command = [sys.executable, str(example), "--steps", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *_, right = done.stdout.split()
    assert float(right) > 0.7

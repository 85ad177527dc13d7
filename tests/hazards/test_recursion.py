"""What could go wrong unseen where calls of recursive functions are deferred: each case against plain Python."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import twofold
from tests.equivalence.recursive_programs import (
    HIDDEN,
    PROGRAMS,
    Decorate,
    Tree,
    binary_tree_lstm,
    child_sum,
    memoised,
    plain,
    strict,
)
from tests.hazards.programs import runs_as_graph, same, summary, training
from twofold.run.recursion import Deferred


def balanced(depth: int, word: int = 0) -> Tree:
    children = [balanced(depth - 1, word + 1), balanced(depth - 1, word + 2)] if depth else []
    return Tree(word % 7, word % 4, 1.0, children)


def chain(length: int) -> Tree:
    tree = Tree()
    for _ in range(length):
        tree = Tree(1, 1, 1.0, [tree])
    return tree


def sum_of_words(decorate: Decorate) -> tuple[Any, nn.Embedding]:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, HIDDEN)

    @decorate
    def encode(node: Any) -> Any:
        state = embedding.weight[node.word]
        for child in node.children:
            state = torch.tanh(state + encode(child))
        return state

    return encode, embedding


def both(run: Any) -> None:
    """Check that `run(decorate)` gives the same with and without."""
    for got, expected in zip(run(strict), run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_an_optimizer_step_between_call_and_use_does_not_change_the_result() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        encode, embedding = sum_of_words(decorate)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
        results = []
        for _ in range(3):
            waiting = encode(balanced(2))
            encode(balanced(2)).sum().backward()
            later = encode(balanced(3))
            optimizer.step()
            results += [waiting.detach(), later.detach(), embedding.weight.detach().clone()]
        return results

    both(run)


def test_a_write_that_cannot_be_seen_coming_is_an_error_and_no_wrong_result() -> None:
    encode, embedding = sum_of_words(strict)
    waiting = encode(balanced(2))
    with torch.no_grad():
        embedding.weight.add_(1.0)
    with pytest.raises(twofold.TwofoldError, match="written to between a call of encode"):
        waiting.sum().item()
    assert torch.isfinite(encode(balanced(2)).sum())


def test_changes_of_the_tree_after_the_call_do_not_matter() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        encode, _ = sum_of_words(decorate)
        results = []
        for _ in range(3):
            tree = balanced(2)
            waiting = encode(tree)
            tree.word = 6
            tree.children.clear()
            results.append(waiting.detach())
        return results

    both(run)


@pytest.mark.parametrize("accumulate", ["sum", "in_place", "stack", "mean", "start_with_tensor"])
def test_arithmetic_on_results(accumulate: str) -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        encode, embedding = sum_of_words(decorate)
        results = []
        for _ in range(3):
            embedding.weight.grad = None
            states = [encode(balanced(depth)) for depth in (0, 2, 1)]
            match accumulate:
                case "sum":
                    loss = sum(states)
                case "in_place":
                    loss = 0.0
                    for state in states:
                        loss += state
                case "stack":
                    loss = torch.stack(states).sum(0) / 3
                case "mean":
                    loss = (states[0] - 2.0 * states[1]).mean() + states[2]
                case _:
                    loss = torch.zeros(HIDDEN)
                    for state in states:
                        loss = loss + state
            loss.sum().backward()
            results += [loss.detach(), embedding.weight.grad]
        return results

    both(run)


def test_without_gradients_nothing_is_kept() -> None:
    encode, _ = sum_of_words(strict)
    for _ in range(3):
        with torch.no_grad():
            state = encode(balanced(2))
        assert not state.requires_grad
        assert state.grad_fn is None
    assert encode(balanced(2)).requires_grad


def test_a_second_backward_is_refused_as_in_eager_unless_the_graph_is_kept() -> None:
    encode, embedding = sum_of_words(strict)
    for _ in range(3):
        embedding.weight.grad = None
        loss = encode(balanced(2)).sum()
        loss.backward(retain_graph=True)
        once = embedding.weight.grad.clone()
        loss.backward()
        torch.testing.assert_close(embedding.weight.grad, 2 * once)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_results_are_ordinary_tensors_after_use() -> None:
    encode, _ = sum_of_words(strict)
    for _ in range(3):
        state = encode(balanced(1))
        assert isinstance(state, torch.Tensor)
        assert state.shape == (HIDDEN,)
        assert type(state) is torch.Tensor
        assert state.is_contiguous()


def test_freezing_and_unfreezing() -> None:
    def run(decorate: Decorate) -> list[Any]:
        recursion = binary_tree_lstm(decorate)
        results: list[Any] = []
        for step in range(6):
            frozen = recursion.parameters[0]
            frozen.requires_grad_(step % 2 == 0)
            for parameter in recursion.parameters:
                parameter.grad = None
            recursion.call(balanced(2)).backward()
            results += [torch.zeros(1) if p.grad is None else p.grad for p in recursion.parameters]
        return results

    both(run)


def test_a_parameter_replaced_and_a_number_changed() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        layer = nn.Linear(HIDDEN, HIDDEN)
        nn.init.constant_(layer.weight, 0.1)
        nn.init.constant_(layer.bias, 0.1)
        scale = 1.0

        @decorate
        def encode(node: Any) -> Any:
            state = layer(torch.full((1, HIDDEN), 0.5))
            for child in node.children:
                state = state + scale * encode(child)
            return state

        results = []
        for step in range(6):
            scale = 1.0 + step
            if step == 3:
                layer.weight = nn.Parameter(torch.full((HIDDEN, HIDDEN), 0.2))
            results.append(encode(balanced(2)).detach())
        return results

    both(run)


def test_tensors_kept_at_nodes_are_in_plain_order() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(HIDDEN, HIDDEN)
        states: list[Any] = []

        @decorate
        def encode(node: Any) -> Any:
            total = torch.full((HIDDEN,), 0.1) * node.word
            for child in node.children:
                total = total + encode(child)
            state = layer(total)
            states.append(state)
            node.state = state
            return state

        results = []
        for _ in range(3):
            tree = balanced(2)
            states.clear()
            layer.zero_grad()
            encode(tree)
            torch.stack(states).pow(2).sum().backward()
            results += [*[state.detach() for state in states], tree.children[0].state.detach(), layer.weight.grad]
        return results

    both(run)


def test_an_exception_of_the_host_leaves_nothing_half_done() -> None:
    encode, _ = sum_of_words(strict)
    expected = encode(balanced(1)).detach().clone()
    for _ in range(3):
        broken = balanced(2)
        broken.children[1].children[0].children = 3  # type: ignore[assignment]
        before = encode(balanced(1))
        with pytest.raises(TypeError, match="not iterable"):
            encode(broken)
        torch.testing.assert_close(before.detach(), expected)
        torch.testing.assert_close(encode(balanced(1)).detach(), expected)


@pytest.mark.cpu
def test_an_error_of_an_operation_names_the_line() -> None:
    encode, _ = sum_of_words(strict)
    for _ in range(3):
        broken = balanced(2)
        broken.children[0].word = 100
        waiting = encode(broken)
        with pytest.raises(IndexError, match="out of bounds") as raised:
            waiting.sum().item()
        assert "state = embedding.weight[node.word]" in raised.value.__notes__[0]
        with pytest.raises(twofold.TwofoldError, match="raised an exception"):
            print(waiting)
        assert encode(balanced(1)).shape == (HIDDEN,)


def test_a_cyclic_structure_and_one_without_an_end() -> None:
    encode, _ = sum_of_words(strict)
    tree = balanced(1)
    tree.children[0].children = [tree]
    with pytest.raises(RecursionError, match=r"encode: the structure is cyclic.*2 levels above"):
        encode(tree)
    assert encode(balanced(1)).shape == (HIDDEN,)


@pytest.mark.slow
def test_a_deep_chain_forward_and_backward() -> None:
    encode, embedding = sum_of_words(strict)
    for length in (3, 3, 20_000):
        embedding.weight.grad = None
        encode(chain(length)).sum().backward()
        assert embedding.weight.grad.isfinite().all()


def test_trees_that_share_nodes_count_them_as_often_as_plain_python() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        results = []
        for maker in (binary_tree_lstm, child_sum, memoised):
            recursion = maker(decorate)
            shared = balanced(1)
            tree = Tree(1, 1, 1.0, [shared, Tree(2, 2, 1.0, [shared, shared])])
            for _ in range(3):
                for parameter in recursion.parameters:
                    parameter.grad = None
                loss = recursion.call(tree)
                loss.backward()
                results += [loss.detach(), *(p.grad for p in recursion.parameters)]
        return results

    both(run)


def test_under_autocast_calls_are_plain() -> None:
    encode, _ = sum_of_words(strict)
    expected = encode(balanced(2)).detach()
    with torch.autocast("cpu"):
        result = encode(balanced(2))
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result.detach(), expected)


class Training:
    """A loop of training steps: some recursive, some not."""

    def __init__(self, decorate: Decorate) -> None:
        self.encode, self.embedding = sum_of_words(decorate)
        self.head = nn.Linear(HIDDEN, 1)
        nn.init.constant_(self.head.weight, 0.3)
        nn.init.constant_(self.head.bias, 0.1)
        self.optimizer = torch.optim.SGD([*self.embedding.parameters(), *self.head.parameters()], lr=0.1)
        self.waited: list[bool] = []
        self.losses: list[torch.Tensor] = []

    def step(self, trees: list[Tree]) -> None:
        self.optimizer.zero_grad()
        loss = self.head(torch.full((HIDDEN,), 0.5)).sum()
        for tree in trees:
            state = self.encode(tree)
            self.waited.append(isinstance(state, Deferred))
            loss = loss + self.head(state).sum()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def state(self) -> list[torch.Tensor]:
        return [*self.losses, *(p.detach() for p in (self.embedding.weight, *self.head.parameters()))]


BATCHES = [[balanced(2), balanced(1)] if number % 3 else [] for number in range(12)]


def as_function(training: Training) -> dict[str, Any]:
    step = twofold.function(training.step, background=False, backend="replay")
    for trees in BATCHES:
        step(trees)
    return twofold.report(step).to_dict()


def as_program(training: Training) -> dict[str, Any]:
    with twofold.program(background=False, backend="replay") as program:
        for trees in BATCHES:
            training.step(trees)
    return twofold.report(program).to_dict()


@pytest.mark.parametrize("way", [as_function, as_program])
def test_recursion_runs_batched_in_units_which_then_are_eager(way: Any) -> None:
    plainly, decorated = Training(plain), Training(strict)
    for trees in BATCHES:
        plainly.step(trees)
    report = way(decorated)
    torch.testing.assert_close(decorated.state(), plainly.state())
    assert all(decorated.waited)
    assert {"recursion"} <= {fallback["code"] for fallback in report["fallbacks"]}
    assert report["iterations"] >= len(BATCHES)


def test_a_waiting_result_is_given_to_a_unit_that_runs_as_a_graph() -> None:
    encode, _ = sum_of_words(strict)
    step = twofold.function(lambda state: (state * 2.0).tanh(), background=False, backend="replay")
    for number in range(6):
        tree = balanced(number % 3)
        expected = (encode(tree).detach().clone() * 2.0).tanh()
        torch.testing.assert_close(step(encode(tree).detach() if number % 2 else encode(tree)).detach(), expected)
    assert twofold.report(step).to_dict()["graph_iterations"] > 0


@pytest.mark.parametrize("way", [as_function, as_program])
def test_an_exception_in_a_unit_with_recursion(way: Any) -> None:
    training = Training(strict)
    broken = balanced(1)
    broken.children = 3  # type: ignore[assignment]
    for _ in range(3):
        with pytest.raises(TypeError, match="not iterable"):
            training.step([balanced(1), broken])
        step = twofold.function(training.step, background=False, backend="replay")
        with pytest.raises(TypeError, match="not iterable"):
            step([balanced(1), broken])
        step([balanced(1)])
    way(training)
    assert all(torch.isfinite(loss) for loss in training.losses)


@pytest.mark.parametrize("name", PROGRAMS)
def test_map_is_the_calls_together(name: str) -> None:
    if name in ("memoised", "tensors_at_nodes"):
        pytest.skip("takes more arguments than a tree")
    recursion = PROGRAMS[name](strict)
    trees = [balanced(depth) for depth in (0, 1, 2)]
    for _ in range(2):
        for mapped, tree in zip(recursion.encode.map(trees), trees, strict=True):
            torch.testing.assert_close(mapped, recursion.encode(tree))


def test_a_value_asked_for_by_the_host_in_the_middle_of_a_call() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        encode, embedding = sum_of_words(decorate)

        class Asking(Tree):
            @property
            def asked(self) -> float:
                return float(self.other.sum().item())

        @decorate
        def outer(node: Any) -> Any:
            state = embedding.weight[node.word]
            for child in node.children:
                state = state + outer(child)
            return state * node.asked

        results = []
        for _ in range(3):
            embedding.weight.grad = None
            tree = Asking(1, 1, 1.0, [Asking(2, 1), Asking(3, 1)])
            for node in (tree, *tree.children):
                node.other = encode(balanced(1))
            before = encode(balanced(2))
            loss = outer(tree).sum() + before.sum()
            loss.backward()
            results += [loss.detach(), embedding.weight.grad]
        return results

    both(run)


def test_a_waiting_result_of_the_same_function_asked_for_in_the_middle() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        torch.manual_seed(0)
        embedding = nn.Embedding(7, HIDDEN)
        waiting: list[Any] = []

        def asked(node: Any) -> float:
            try:
                return float(waiting[-1].sum().item()) if node.word == 2 else 1.0
            finally:
                pass

        @decorate
        def encode(node: Any) -> Any:
            state = embedding.weight[node.word]
            for child in node.children:
                state = torch.tanh(state + encode(child))
            return state * asked(node)

        results = []
        for _ in range(4):
            embedding.weight.grad = None
            waiting[:] = [encode(Tree(1, 0, 1.0, [Tree(3)]))]
            loss = encode(balanced(3)).sum() + waiting[0].sum()
            loss.backward()
            results += [loss.detach(), embedding.weight.grad]
        return results

    both(run)


def test_the_host_computes_with_kept_results() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        torch.manual_seed(0)
        embedding = nn.Embedding(7, HIDDEN)

        @decorate
        def encode(node: Any, states: Any) -> Any:
            if node in states:
                return states[node] * 0.5
            state = embedding.weight[node.word]
            for child in node.children:
                state = torch.tanh(state + encode(child, states))
            states[node] = state
            return state

        results = []
        for _ in range(4):
            embedding.weight.grad = None
            shared = balanced(1)
            states: Any = {}
            first = encode(shared, states)
            states[shared] = first + 1.0
            loss = encode(Tree(1, 1, 1.0, [shared, Tree(2, 1, 1.0, [shared])]), states).sum()
            loss.backward()
            results += [loss.detach(), embedding.weight.grad]
        return results

    both(run)


class Scorer:
    """No module: an object whose method is recursive."""

    def __init__(self) -> None:
        self.weight = torch.linspace(-1.0, 1.0, HIDDEN).requires_grad_()

    def score(self, node: Any) -> torch.Tensor:
        inner = sum([self.score(child) for child in node.children], torch.zeros(HIDDEN))
        return torch.tanh(inner + self.weight) * node.word


def test_methods_of_plain_objects_in_comprehensions() -> None:
    class Decorated(Scorer):
        score = twofold.subgraph(strict=True)(Scorer.score)

    found: list[list[torch.Tensor]] = []
    for scorer in (Decorated(), Scorer()):
        results: list[torch.Tensor] = []
        for _ in range(3):
            scorer.weight.grad = None
            result = scorer.score(balanced(2))
            result.sum().backward()
            results += [result.detach(), scorer.weight.grad]
        found.append(results)
    torch.testing.assert_close(*found)


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOLD_ENGINE", "eager")
    encode, _ = sum_of_words(strict)
    assert type(encode(balanced(1))) is torch.Tensor


def test_calls_in_another_thread_are_plain() -> None:
    encode, _ = sum_of_words(strict)
    waiting = encode(balanced(1))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(encode(balanced(1))))
    thread.start()
    thread.join()
    assert type(found[0]) is torch.Tensor
    torch.testing.assert_close(found[0], waiting)


@pytest.mark.parametrize("converts", [True, False])
def test_a_recursive_call_is_never_left_out_where_calls_run_without_their_python(converts: bool) -> None:
    """Speculated on is the side of a branch that has no recursion; `converts`: whether the recursion runs batched."""
    kept: list[list[Tree]] = []

    def make(parts: Any) -> Any:
        visited = parts.seen["visited"] = []
        kept.append(visited)

        @twofold.subgraph
        def encode(node: Any) -> torch.Tensor:
            visited.append(node.word)
            if not converts:
                import math  # noqa: F401 - which no graph has
            state = parts.model[0].weight.sum() * node.word
            for child in node.children:
                state = state + encode(child)
            return state

        def step(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
            if number % 7 == 6:
                return parts.train(x, y), encode(balanced(1, number)).detach() * 1.0
            return parts.train(x, y), None

        return step

    report = same(training(make), 42, engine="speculation")
    assert report["speculated_iterations"] >= 12, summary(report)
    assert [len(visited) for visited in kept] == [18, 18]


def test_units_run_as_graphs_beside_recursion() -> None:
    """What waits is computed before optimizers step, by no hook that would count as the program's own."""
    factory = training(lambda parts: lambda number, x, y: parts.train(x, y))

    @twofold.subgraph
    def total(node: Any) -> torch.Tensor:
        return torch.ones(1) if node is None else total(node.left) + total(node.right)

    tree = SimpleNamespace(left=None, right=SimpleNamespace(left=None, right=None))
    assert float(total(tree)) == 3
    runs_as_graph(factory, at_least=4)


def shapes(decorate: Any) -> Any:
    @decorate
    def shaped(node: Any) -> torch.Tensor:
        total = torch.full((1, 4), float(node.size))
        for child in node.children:
            total = total + shaped(child).reshape(1, 4)
        return total.reshape([child.size for child in node.children] or [1, 4])

    return shaped


def test_an_operation_is_given_a_list_that_python_made() -> None:
    def tree(size: int, *children: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(size=size, children=list(children))

    decorated, plain = shapes(twofold.subgraph), shapes(lambda function: function)
    for one in [tree(1, tree(2), tree(2)), tree(3, tree(4), tree(1))] * 3:
        assert torch.equal(decorated(one) + 0, plain(one))
    assert decorated.refusal is None


def test_a_label_to_be_ignored_is_as_in_plain_python() -> None:
    def run(decorate: Decorate) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 4)

        @decorate
        def losses(node: Any) -> Any:
            own = torch.nn.functional.cross_entropy(layer(torch.ones(1, 3)), torch.tensor([node.label]))
            for child in node.children:
                own = own + losses(child)
            return own

        found: list[torch.Tensor] = []
        for label in (1, 1, -100, 2):
            layer.zero_grad()
            total = losses(Tree(0, label, 1.0, [Tree(0, 2, 1.0, [])]))
            total.backward()
            found += [total.detach(), layer.weight.grad.clone()]
        assert found[4].isnan()
        return [torch.nan_to_num(tensor, 7.0) for tensor in found]

    both(run)

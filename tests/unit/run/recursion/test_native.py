"""Native code of recursion: functions of elements, whole programs against plain Python, and where it is not used."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import twofold
from benchmarks.programs import tree_lstm
from benchmarks.trees.data import binary_syntax_trees
from twofold.backends import cpu_code
from twofold.run.recursion import batch, native_run, native_text, parts

pytestmark = pytest.mark.skipif(cpu_code.lacks() is not None, reason=str(cpu_code.lacks()))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have native code compiled when it is first wanted, and wanted from the first batch on."""
    monkeypatch.setattr(parts, "PATIENCE", 0)
    monkeypatch.setattr(cpu_code, "start", lambda order: order.compile())


def counted(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(holder, name)

    def count(*arguments: Any) -> Any:
        calls.append(arguments[0])
        return original(*arguments)

    monkeypatch.setattr(holder, name, count)
    return calls


def elementwise(name: str, x: Tensor, at_once: None) -> Tensor:
    text = native_text.PRELUDE + (
        'extern "C" void run(const float* x, int64_t n, int64_t, int64_t, float* y, const void*, Gemm)\n'
        f"{{ for (int64_t i = 0; i < n; i++) y[i] = {name}(x[i]); }}\n"
    )
    function, y = cpu_code.ordered(text), torch.empty_like(x)
    assert not isinstance(function, str)
    function(x.data_ptr(), len(x), 0, 0, y.data_ptr(), None, None)
    return y


@pytest.mark.parametrize(("name", "exact"), [("sigmoid", torch.sigmoid), ("tangent", torch.tanh)])
def test_functions_of_elements(name: str, exact: Any, at_once: None) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-40, 88.8, -88.8, 104.0, -104.0])
    x = torch.cat([torch.linspace(-110, 110, 200_001), torch.linspace(-2, 2, 200_001), special])
    found, expected = elementwise(name, x, at_once), exact(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=1e-37, equal_nan=True)
    assert torch.equal(torch.signbit(found), torch.signbit(exact(x)))


def lstm_gradients(decorate: Any, use: Callable[[Any, list[Any]], Tensor], rounds: int = 2) -> list[Tensor]:
    corpus = binary_syntax_trees(30)
    torch.manual_seed(0)
    model = tree_lstm.TreeLSTM(corpus.words, corpus.labels, 20, 24)
    encode = tree_lstm.recursion(model, decorate=decorate)
    found: list[Tensor] = []
    for number in range(rounds):
        model.zero_grad()
        loss = use(encode, corpus.trees[number * 10 : number * 10 + 10])
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


def summed(encode: Any, trees: list[Any]) -> Tensor:
    return sum(encode(tree)[2] for tree in trees)  # type: ignore[return-value]


def plain(function: Any) -> Any:
    return function


def test_levels_and_passes_equal_plain_python(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    levels = counted(monkeypatch, native_run.Native, "run")
    passes = counted(monkeypatch, native_run.OnePass, "__call__")
    found = lstm_gradients(twofold.subgraph, summed)
    assert len(levels) >= 2
    assert len(passes) >= 2
    torch.testing.assert_close(found, lstm_gradients(plain, summed), rtol=1e-4, atol=1e-5)


def test_the_default_dtype_changes_nothing(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    passes = counted(monkeypatch, native_run.OnePass, "__call__")

    def use(encode: Any, trees: list[Any]) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            total = summed(encode, trees)
            return total + 0.0 * total.item()
        finally:
            torch.set_default_dtype(torch.float32)

    found = lstm_gradients(twofold.subgraph, use)
    assert passes
    torch.testing.assert_close(found, lstm_gradients(plain, use), rtol=1e-4, atol=1e-5)


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    target = torch.ops.aten.tanh_backward.default
    monkeypatch.setitem(native_text.EXPRESSIONS, target, "{0} * (1.01f - {1} * {1})")
    found = lstm_gradients(twofold.subgraph, summed)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, lstm_gradients(plain, summed), rtol=1e-4, atol=1e-5)


def test_more_threads_leave_many_rows_to_pytorch(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    code = parts.NativeCode("", [], widest=1000)
    monkeypatch.setattr(cpu_code, "ordered", lambda text: print)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu = torch.device("cpu")
    assert native_run.native_function(code, 10, cpu) is print
    assert "threads" in native_run.native_function(code, 100, cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert native_run.native_function(code, 100, cpu) is print
    assert native_run.native_function(code, 100, torch.device("cuda")) == "the values are on cuda"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert "fewer bits" in native_run.native_function(code, 10, cpu)


def ways(function: Any, way: str) -> dict[str, int]:
    """Return what the levels of all blocks of a function ran as, and in how many batches, by its report."""
    found: Counter[str] = Counter()
    for block in twofold.report(function).to_dict()["recursions"][0]["blocks"]:
        found.update(block[f"levels_{way}"])
    return dict(found)


def decorated(into: list[Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        into.append(twofold.subgraph(function))
        return into[-1]

    return decorate


def test_a_compiler_that_fails_costs_only_its_code(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(cpu_code, "_functions", {})
    monkeypatch.setattr(cpu_code, "cpp_compiler", lambda: "false")
    levels, functions = counted(monkeypatch, native_run.Native, "run"), list[Any]()
    found = lstm_gradients(decorated(functions), summed, rounds=3)
    assert not levels
    torch.testing.assert_close(found, lstm_gradients(plain, summed, rounds=3), rtol=1e-4, atol=1e-5)
    assert ways(functions[0], "forward") == {"the C++ compiler failed with status 1": 2}
    assert ways(functions[0], "backward") == {"the C++ compiler failed with status 1": 2}


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(cpu_code, "_functions", {})
    monkeypatch.setattr(cpu_code, "has_cpp_compiler", lambda: False)
    cpu_code.lacks.cache_clear()
    try:
        functions: list[Any] = []
        lstm_gradients(decorated(functions), summed)
        assert [*ways(functions[0], "forward")] == [cpu_code.lacks()]
        assert "there is no C++ compiler" in str(twofold.report(functions[0]))
    finally:
        monkeypatch.undo()
        cpu_code.lacks.cache_clear()


def test_the_report_says_what_levels_ran_as(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_code, "_functions", {})
    monkeypatch.setattr(cpu_code, "start", lambda order: None)
    functions: list[Any] = []
    lstm_gradients(decorated(functions), summed, rounds=3)
    assert ways(functions[0], "forward") == {f"no {parts.PATIENCE} batches had run": 2}  # the first ran one by one

    monkeypatch.setattr(parts, "PATIENCE", 0)
    lstm_gradients(decorated(functions), summed)
    assert ways(functions[1], "backward") == {"it is being compiled": 1}

    monkeypatch.setattr(cpu_code, "_functions", {})
    monkeypatch.setattr(cpu_code, "start", lambda order: order.compile())
    lstm_gradients(decorated(functions), summed, rounds=3)
    assert ways(functions[2], "forward") == {parts.NATIVE: 2}
    assert "levels backward, 2 batches: native code" in str(twofold.report(functions[2]))
    assert "1 batch: ATen calls, since it is being compiled" in str(twofold.report(functions[1]))


@pytest.mark.parametrize(
    ("operation", "dtype", "reason"),
    [
        (torch.sin, torch.float32, "aten.sin.default has no native form"),
        (torch.tanh, torch.float64, "native code has no values of torch.float64 on cpu"),
    ],
)
def test_the_report_says_what_has_no_native_form(operation: Any, dtype: Any, reason: str, at_once: None) -> None:
    weight = torch.full((3,), 0.5, dtype=dtype, requires_grad=True)

    @twofold.subgraph(strict=True)
    def fold(depth: int) -> Tensor:
        if depth == 0:
            return weight * 2.0
        return operation(fold(depth - 1) * weight)

    for _ in range(2):
        fold(3).sum().backward()
    assert any(reason in how for how in ways(fold, "forward")), ways(fold, "forward")


def sums_given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    given: list[bool] = []
    original = batch.Batch.flush

    def flush(self: Any, sums: Any = ()) -> None:
        original(self, sums)
        given.extend(total.together is not None for total in sums)

    monkeypatch.setattr(batch.Batch, "flush", flush)
    return given


def test_a_sum_of_losses_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    given = sums_given(monkeypatch)
    found = lstm_gradients(twofold.subgraph, summed, rounds=3)
    assert given == [False, True, True]  # what results are like is not known at first
    torch.testing.assert_close(found, lstm_gradients(plain, summed, rounds=3), rtol=1e-4, atol=1e-5)


def held_elsewhere(encode: Any, trees: list[Any]) -> Tensor:
    losses = [encode(tree)[2] for tree in trees]
    total: Any = sum(losses)
    return total + losses[3] * losses[4]


def two_results(encode: Any, trees: list[Any]) -> Tensor:
    first: Any = sum(encode(tree)[2] for tree in trees[:5])
    second: Any = sum(encode(tree)[0].sum() for tree in trees[5:])
    third: Any = sum(encode(tree)[2] for tree in trees[5:])
    return first * 2.0 + second + third


@pytest.mark.parametrize("use", [held_elsewhere, two_results])
def test_terms_that_are_used_otherwise(use: Any) -> None:
    found = lstm_gradients(twofold.subgraph, use, rounds=3)
    torch.testing.assert_close(found, lstm_gradients(plain, use, rounds=3), rtol=1e-4, atol=1e-5)

"""Generated functions against the reference interpreter, and both against the program's own order."""

import operator
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.convert.speculation.generate import generate
from twofold.convert.speculation.schedule import schedule
from twofold.convert.speculation.speculation import give, read, tensor
from twofold.graph import AssertionFailed, Constant, Graph, GraphBuilder, Value, interpret

NAMES = ("a", "b", "c")
BINARY = (operator.add, operator.sub, operator.mul, operator.truediv, min, max)
COMPARISONS = (operator.lt, operator.ge, operator.is_not, operator.ne)


class FakeUnit:
    """Answers reads with numbers, and writes down in which order it was asked."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers
        self.log: list[Any] = []
        self.failed_at: int | None = None

    def failed(self, index: int) -> str:
        self.failed_at = index
        return "failed"

    def give(self, index: int, given: Any) -> None:
        self.log.append(("give", index, given))

    def read(self, event: int, function: Any, *rest: Any) -> Any:
        return function(self.numbers[event % len(self.numbers)], *rest)

    def tensor(self, slot: int) -> torch.Tensor:
        return torch.full((), float(slot))

    def launch(self, undoable: bool) -> None:
        self.log.append(("launch", undoable))

    def commit(self) -> None:
        self.log.append("commit")


def outside(log: list[Any]) -> types.SimpleNamespace:
    return types.SimpleNamespace(a=1, b=2.5, c=-3, log=log)


@st.composite
def host_graphs(draw: st.DrawFn) -> Graph:
    """Straight-line Python work: all reads of the heap, then arithmetic, checks, fetches, feeds and effects."""
    builder = GraphBuilder("step")
    unit, arguments, _ = (builder.input(name, None) for name in ("unit", "arguments", "keywords"))
    root = builder.input("self", None)
    values: list[Value] = [builder.node("get_attr", None, (root, name), results=(None,))[0] for name in NAMES]
    values += [builder.node("get_item", None, (arguments, index), results=(None,))[0] for index in range(2)]
    (log,) = builder.node("get_attr", None, (root, "log"), results=(None,))
    checks = 0
    for index in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(("binary", "compare", "read", "give", "write", "append", "tensor", "constant")))
        operands = draw(st.tuples(st.sampled_from(values), st.sampled_from([*values, 2, 0.5])))
        if kind == "binary":
            values.append(builder.call(draw(st.sampled_from(BINARY)), *operands, result=None))
        elif kind == "constant":
            values.append(builder.call(operator.add, operands[0], Constant(1.25), result=None))
        elif kind == "compare":
            truth = builder.call(draw(st.sampled_from(COMPARISONS)), *operands, result=None)
            builder.node("assert", None, (truth,), {"message": str(checks)})
            checks += 1
        elif kind == "read":
            values.append(builder.call(read, unit, index, Constant(float), result=None))
        elif kind == "give":
            builder.call(give, unit, index, operands[0])
        elif kind == "write":
            builder.node("set_attr", None, (root, draw(st.sampled_from(("a", "b", "x"))), operands[0]))
        elif kind == "append":
            builder.call(list.append, log, (operands[0], [operands[1]]))
        else:
            builder.call(list.append, log, builder.call(tensor, unit, index, result=None))
    return builder.finish([(values[-1], {"last": values[draw(st.integers(0, len(values) - 1))]})])


def outcome(run: Any, numbers: list[float]) -> tuple[Any, ...]:
    """Run in one of the three ways; return what came back, what was raised, the heap, and what the unit was told."""
    log: list[Any] = []
    unit, root = FakeUnit(numbers), outside(log)
    result, failed_at, raised = None, None, None
    try:
        result = run(unit, (3, 0.5), {}, root)
    except AssertionFailed as failure:
        failed_at = int(failure.message)
    except ArithmeticError as error:
        raised = type(error)
    if unit.failed_at is not None:
        result, failed_at = None, unit.failed_at
    return repr(result), failed_at, raised, repr(root), unit.log


@settings(max_examples=150, deadline=None)
@given(host_graphs(), st.lists(st.sampled_from([0.0, 1.0, -2.5, 7.25]), min_size=1, max_size=4))
def test_generated_function_does_what_the_interpreter_does(graph: Graph, numbers: list[float]) -> None:
    scheduled = schedule(graph)

    def generated(unit: Any, arguments: Any, keywords: Any, root: Any) -> Any:
        return generate(scheduled, {graph.inputs[3]: root}).call(unit, arguments, keywords)

    def interpreted(*inputs: Any) -> Any:
        return interpret(scheduled, inputs).outputs[0]

    assert outcome(generated, numbers) == outcome(interpreted, numbers)


@settings(max_examples=150, deadline=None)
@given(host_graphs(), st.lists(st.sampled_from([0.0, 1.0, -2.5, 7.25]), min_size=1, max_size=4))
def test_schedule_keeps_the_order_that_the_program_can_see(graph: Graph, numbers: list[float]) -> None:
    """Where all checks hold, results and heap are those of the program's order; where not, nothing is written."""

    def in_order(*inputs: Any) -> Any:
        return interpret(graph, inputs).outputs[0]

    def scheduled(*inputs: Any) -> Any:
        return interpret(schedule(graph), inputs).outputs[0]

    result, failed_at, raised, heap, told = outcome(in_order, numbers)
    ours = outcome(scheduled, numbers)
    if failed_at is None and raised is None:
        assert ours[:4] == (result, None, None, heap)
        gives = [entry for entry in ours[4] if entry[0] == "give"]
        assert sorted(gives, key=lambda entry: entry[1]) == told  # feeds are told apart by index, not by order
        assert ours[4][-1] == "commit"
    else:
        assert (ours[1] is not None) or (ours[2] is not None)
        if failed_at is not None:  # what raises and may notice an effect before it comes after the launch (limits.md)
            assert "commit" not in ours[4]
            assert ours[3] == repr(outside([]))


def test_oracle_sees_a_value_computed_too_late() -> None:
    """A planted fault: an expression that waits for its reader behind a write to what it reads."""
    builder = GraphBuilder("step")
    for name in ("unit", "arguments", "keywords"):
        builder.input(name, None)
    root = builder.input("self", None)
    (before,) = builder.node("get_attr", None, (root, "a"), results=(None,))
    builder.node("set_attr", None, (root, "a", 10))
    graph = builder.finish([before])
    text = generate(graph, {root: outside([])}).text
    assert text.index("v0 =") < text.index("= 10")
    swapped = Graph(graph.name, graph.inputs, graph.nodes[::-1], graph.outputs)
    assert (
        interpret(graph, (None, (), {}, outside([]))).outputs != interpret(swapped, (None, (), {}, outside([]))).outputs
    )


def test_operations_on_what_the_unit_hands_out_run_under_their_own_modes() -> None:
    from twofold.graph import Ambient

    builder = GraphBuilder("step")
    unit, _, _ = (builder.input(name, None) for name in ("unit", "arguments", "keywords"))
    handed = builder.call(tensor, unit, 0, result=None)
    made = builder.call(torch.mul, handed, Constant(torch.ones((), requires_grad=True)), result=None)
    free = builder.call(
        torch.mul, handed, Constant(torch.ones((), requires_grad=True)), result=None, ambient=Ambient(grad=False)
    )
    graph = builder.finish([(made, free)])
    result = generate(schedule(graph), {}).call(FakeUnit([1.0]), (), {})
    assert [one.requires_grad for one in result] == [True, False]


def test_operations_under_the_modes_of_all_calls_set_none() -> None:
    from twofold.graph import Ambient

    builder = GraphBuilder("step")
    unit, _, _ = (builder.input(name, None) for name in ("unit", "arguments", "keywords"))
    made = builder.call(torch.neg, builder.call(tensor, unit, 0, result=None), result=None, ambient=Ambient(grad=False))
    graph = schedule(builder.finish([made]))
    assert "with" not in generate(graph, {}, Ambient(grad=False)).text
    assert "with" in generate(graph, {}, Ambient()).text


class Altered(torch.nn.Module):
    """Its tables are not where a module has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = 1

    @property
    def _buffers(self) -> dict[str, Any]:  # type: ignore[override]
        return {"other": 2}

    @_buffers.setter
    def _buffers(self, value: Any) -> None:
        self.__dict__["_buffers"] = value


@pytest.mark.parametrize(
    ("module", "name", "is_read_there"),
    [
        (torch.nn.Conv1d(1, 1, 1), "stride", True),
        (torch.nn.Conv1d(1, 1, 1), "_parameters", True),
        (Altered(), "_modules", True),
        (Altered(), "stride", False),
        (Altered(), "_buffers", False),
    ],
)
def test_guards_read_a_module_where_its_class_does(module: torch.nn.Module, name: str, is_read_there: bool) -> None:
    builder = GraphBuilder("step")
    for one in ("unit", "arguments", "keywords"):
        builder.input(one, None)
    root = builder.input("module", None)
    builder.node("assert", None, (builder.call(operator.is_, root, Constant(module), result=None),), {"message": "0"})
    (found,) = builder.node("get_attr", None, (root, name), results=(None,))
    builder.node("assert", None, (builder.call(operator.is_, found, found, result=None),), {"message": "1"})
    made = generate(schedule(builder.finish([found])), {root: module})
    assert ("__dict__" in made.text) is is_read_there
    assert made.call(FakeUnit([1.0]), (), {}) == getattr(module, name)


def test_nodes_with_bodies_are_refused() -> None:
    builder = GraphBuilder("step")
    values = [builder.input(name, None) for name in ("unit", "arguments", "keywords")]
    body = builder.body("body")
    body.input(None, None)
    builder.node("loop", None, (3,), results=(), subgraphs=(body.finish(()),))
    with pytest.raises(ValueError, match="straight-line"):
        generate(builder.finish([values[0]]), {})

"""Conversion leaves no trace, and what it makes reads like the program."""

import sys
from typing import Any

import pytest
import torch

import twofold
from tests.hazards.programs import Parts, training
from tests.unit.convert.speculation.executing import EXACT
from tests.unit.convert.test_from_traces import block, text
from twofold.convert.refusals import Refused
from twofold.convert.speculation.convert import speculate
from twofold.convert.speculation.speculation import Speculation


def recorded(make_step: Any, calls: int = 6) -> tuple[Any, Any]:
    """Run a program beside its graph; return it and its TraceGraph."""
    torch.manual_seed(0)
    program = training(make_step)()
    function = twofold.function(program.step, **EXACT)
    for number in range(calls):
        function(*program.batches(number))
    return program, function._driver.graph


def converted(make_step: Any) -> Speculation:
    program, graph = recorded(make_step)
    return speculate(program.step, program.batches(6), {}, graph, graph.signature())


def lines(speculation: Speculation, *parts: str) -> str:
    """The nodes of a host graph that name one of `parts`, without their module paths."""
    shown = text(speculation.host).replace("twofold.convert.speculation.speculation:", "")
    return "".join(f"{line.strip()}\n" for line in shown.splitlines() if any(part in line for part in parts))


def counted(parts: Parts) -> Any:
    class State:
        pass

    state = parts.seen["state"] = State()
    state.calls = 0

    def step(number, x, y):
        state.calls += 1
        loss = parts.train(x, y)
        print(f"{loss.item():.2f}")
        return loss

    return step


def test_feeds_writes_and_effects_are_all_that_is_left_of_the_program():
    speculation = converted(counted)
    parts = (
        "give(",
        "set_attr",
        "print(",
        " tensor(",
        "read(",
        '"calls"',
        "operator.add",
        "return",
        "format",
        ".item(",
    )
    assert lines(speculation, *parts) == block("""
        %11: object = get_attr(%9, "calls")
        %14: object = call operator.add(%11, 1)
        set_attr(%9, "calls", %14)
        call give(%unit, 2, %5)
        call give(%unit, 5, %6)
        %66: object = call tensor(%unit, 3)
        %67: object = call torch.Tensor.item(%66)
        %68: object = call builtins:format(%67, ".2f")
        call builtins:print(%69)
        return %66
    """)


def test_every_assumption_names_what_the_program_would_write():
    subjects = {assumption.subject for assumption in converted(counted).assumptions}
    assert {
        "state",
        "state.calls",
        "parts",
        "parts.model",
        "parts.optimizer",
        "parts.model[2].weight",
        "the number of arguments",
    } <= subjects


def observed(program: Any, graph: Any) -> dict[str, Any]:
    """All that a conversion could leave behind."""
    parameters = list(program.modules["net"].parameters())
    return {
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "parameters": [p.tolist() for p in parameters],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "state": dict(vars(program.observed["seen"]["state"])),
        "paths": [(path.seen, path.units, path.stale) for path in graph.paths],
    }


def references(graph: Any) -> list[int]:
    return [sys.getrefcount(placeholder) for placeholder, _ in graph.placeholders.values()]


@pytest.mark.parametrize("fails", [False, True], ids=["converted", "refused"])
def test_conversion_leaves_no_trace(fails: bool, capsys: pytest.CaptureFixture[str]) -> None:
    program, graph = recorded(counted)
    arguments = program.batches(6)
    if fails:
        arguments = (*arguments[:2], arguments[2][:3])  # shapes that fit no path
    before, counts = observed(program, graph), references(graph)
    capsys.readouterr()
    try:
        speculate(program.step, arguments, {}, graph, graph.signature())
    except Refused:
        assert fails
    else:
        assert not fails
    assert capsys.readouterr().out == ""
    assert references(graph)[: len(counts)] == counts
    assert observed(program, graph) == before


def test_a_bug_of_the_converter_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    program, graph = recorded(counted)
    monkeypatch.setattr("twofold.convert.speculation.host.Host.give", lambda *_: 1 / 0)
    with pytest.raises(Refused, match="converter_failed: ZeroDivisionError"):
        speculate(program.step, program.batches(6), {}, graph, graph.signature())

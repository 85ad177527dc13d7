"""Record one program and merge it, with nothing of `run` in between: what the tests of single layers share."""

from collections.abc import Callable
from typing import Any

import torch

from twofold.capture.intercept import NOT_ANSWERED, Interception, unheard
from twofold.capture.recorder import Recorder
from twofold.capture.trace import Trace
from twofold.capture.trace_graph import Path, TraceGraph
from twofold.graph import Origin


class Heard:
    """A listener that hands all it hears to one recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.call = recorder.call
        self.operation = recorder.operation
        self.before_step = recorder.before_step
        self.after_step = recorder.after_step
        self.zero_grad = recorder.zero_grad
        self.host_work = recorder.random_state_changes

    def leaf_module(self, *_: Any) -> Any:
        return NOT_ANSWERED

    def foreign_call(self, code: str, what: str) -> None:
        self._recorder.refuse(code, what, None)


def record(
    program: Callable[[], Any],
    host_sites: frozenset[tuple[Any, Origin | None]] = frozenset(),
    host_device_only: bool = False,
    number_sites: frozenset[tuple[Any, Origin | None]] = frozenset(),
    with_history: bool = False,
) -> Trace:
    """Run `program` as one unit; what it returns is what Python still holds when the unit ends.

    `with_history`: record the derivative of what it returns too.
    """
    recorder = Recorder(host_device_only, host_sites, number_sites)
    interception = Interception(Heard(recorder))
    interception.start()
    try:
        held = program()
        if with_history:
            with torch._C.DisableTorchFunction():
                recorder.record_history(())
    finally:
        interception.stop()
    with unheard():
        trace = recorder.finish()
    del held
    return trace


def merge(graph: TraceGraph, program: Callable[[], Any]) -> Path | None:
    """Record `program` as a driver would and merge the trace."""
    signature = graph.signature()
    return graph.merge(record(program, graph.host_sites, number_sites=graph.number_sites), signature)


def merged(graph: TraceGraph, program: Callable[[], Any]) -> Path:
    """Merge a program that has a path at once."""
    path = merge(graph, program)
    assert path is not None
    return path


def recorded_path(program: Callable[[], Any], graph: TraceGraph | None = None) -> Path:
    """Run `program` until its path is known: once more where it first taught something, or made optimizer state."""
    graph = graph or TraceGraph()
    for _ in range(3):
        path = merge(graph, program)
    assert path is not None
    assert path.trace.refusal is None, path.trace.refusal
    return path


def event_names(trace: Trace) -> list[str]:
    """The functions that Python called, `kind:` in front where it is not a plain call."""
    return [event.name if event.kind == "call" else event.kind for event in trace.events]


def operation_names(trace: Trace) -> list[list[str]]:
    """The ATen operations beneath each event."""
    return [[str(op.target).removeprefix("aten.") for op in event.operations] for event in trace.events]


class Linear:
    """One linear layer without bias, trained by plain SGD unless told otherwise."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(2, 3))
        make = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False))
        self.optimizer = make([self.weight])

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = torch.nn.functional.linear(x, self.weight).sum()
        loss.backward()
        self.optimizer.step()
        return loss

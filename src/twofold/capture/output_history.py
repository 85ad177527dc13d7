"""Recording the derivative of what a unit hands out, for a backward that the program runs later.

It is one real run over the history that eager execution made, so its operations join the trace as all others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .gradients import DROPS
from .history import Layout, Reach, Watch, differentiate, example_tangents, fits_outputs, layout_of, reach
from .intercept import unheard
from .trace import Backward, History, Trace
from .trace_writer import TraceWriter

DIFFERENTIATE = frozenset({torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward})
"""Functions that run PyTorch's engine."""

_NOT_FORWARD = DIFFERENTIATE | DROPS


def live_outputs(writer: TraceWriter) -> dict[int, torch.Tensor]:
    """Return what a unit hands out with its history, by slot: nothing if it is more than a forward."""
    return writer.live_outputs() if _is_forward(writer.trace) else {}


def _is_forward(trace: Trace) -> bool:
    return trace.refusal is None and all(
        event.kind in ("call", "fetch") and event.function not in _NOT_FORWARD for event in trace.events
    )


def record_history(
    writer: TraceWriter, layouts: Iterable[Layout], run: Callable[[Callable[..., Any], tuple[Any, ...]], Any]
) -> Watch | None:
    """Record the derivative of the live outputs, for backwards that come in these layouts.

    `run` calls a function such that its operations are heard. Returns what hears the backward that comes later; None
    if there is no history, or none that can be recorded.
    """
    trace = writer.trace
    live = live_outputs(writer)
    if not live:
        return None
    outputs = list(live.values())
    reached = reach(outputs, trace.externals)
    given = [trace.externals[i] for i in set(reached.edges.values()) if not trace.externals[i].is_leaf]
    if reached.foreign or any(tensor._backward_hooks or tensor.retains_grad for tensor in given):
        reason = reached.foreign or "a tensor that the unit is given has a gradient hook"
        writer.refuse("history_escapes", f"a later backward cannot be recorded: {reason}")
        return None
    wanted = [layout for layout in layouts if fits_outputs(layout, outputs)] or [layout_of(outputs)]
    backwards = {layout: _record_backward(writer, outputs, reached, layout, run) for layout in wanted}
    trace.history = History(tuple(live), tuple(reached.edges.values()), backwards)
    return Watch(outputs)


def _record_backward(
    writer: TraceWriter,
    outputs: list[torch.Tensor],
    reached: Reach,
    layout: Layout,
    run: Callable[[Callable[..., Any], tuple[Any, ...]], Any],
) -> Backward:
    trace = writer.trace
    known, drawn = len(trace.hidden), trace.first_random
    with unheard():
        tangents = example_tangents(layout, outputs)
        numbers = tuple(None if tangent is None else writer.number(tangent) for tangent in tangents)
    try:
        found = run(differentiate, (outputs, tangents, trace.externals))
    except RuntimeError as error:  # what eager execution would raise, if the program asked
        writer.refuse("history_escapes", f"a later backward cannot be recorded: {str(error)[:200]}")
        return Backward(numbers, (), ())
    operations = writer.take_operations()
    made = tuple(writer.number_if_known(found.get(edge)) for edge in reached.edges)
    if -1 in made or len(trace.hidden) > known or trace.first_random != drawn:
        writer.refuse("history_escapes", "a later backward reads what the unit did not make")
    return Backward(numbers, made, operations)

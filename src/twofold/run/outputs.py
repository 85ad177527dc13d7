"""The tensors that a unit hands to the program when it has run: fresh objects, with the history that eager's have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from twofold.capture.history import Layout
from twofold.capture.trace_graph import MAX_LAYOUTS, Path, TraceGraph
from twofold.convert.histories import HistoryPlan

from .account import Account
from .graph_runner import GraphRunner
from .history import History, with_history
from .placeholders import with_freed_history

LearnLayout = Callable[[Path, Layout | None], None]


def outputs_of(
    path: Path, run: GraphRunner, slots: Collection[int], learn: LearnLayout, bare: Collection[int] = ()
) -> dict[int, torch.Tensor]:
    """Return the tensors of some slots of a unit that has run.

    `learn` is told of a later backward that comes in a way for which there is no graph. Where eager's history is freed,
    those in `bare` are left without.
    """
    known = {} if path.program.history is None else _with_history(path, run, slots, learn)
    return {slot: known[slot] if slot in known else _output_of(path, run, slot, slot in bare) for slot in slots}


def _output_of(path: Path, run: GraphRunner, slot: int, is_bare: bool) -> torch.Tensor:
    made, value = path.made_in(slot), run.owned_value(path.program.escapes[slot])
    if not made.requires_grad or (is_bare and made.grad_function):
        return value
    if made.grad_function:
        return with_freed_history(value, made.grad_function)
    return value.requires_grad_()


def give_gradients(path: Path, run: GraphRunner, outputs: Mapping[int, torch.Tensor]) -> None:
    """Set the gradients of those outputs, by slot, that are leaves; one that is an output too is that object."""
    for slot, (value, its_slot) in path.program.leaf_gradients.items():
        if slot in outputs:
            gradient = None if its_slot is None else outputs.get(its_slot)
            outputs[slot].grad = run.owned_value(value) if gradient is None else gradient


def _with_history(path: Path, run: GraphRunner, slots: Collection[int], learn: LearnLayout) -> dict[int, torch.Tensor]:
    """Return the outputs that a backward outside the unit may differentiate, all of them at once."""
    plan: HistoryPlan = path.program.history
    if set(plan.outputs).isdisjoint(slots):
        return {}
    with torch.no_grad():
        outputs = [run.owned_value(path.program.escapes[slot]) for slot in plan.outputs]
    names = [str(path.made_in(slot).grad_function) for slot in plan.outputs]
    history = History(path, run, learn)
    return dict(zip(plan.outputs, with_history(history, run, outputs, names), strict=True))


def learn_layout(graph: TraceGraph, account: Account, path: Path, layout: Layout | None) -> None:
    """A backward came in a way that the graph of its unit does not know: learn it, or give up."""
    if layout is None:
        graph.differentiated_twice = True
        path.blocked, path.executable = "double_backward", None
        account.fallback("double_backward", "gradients of gradients, or sparse ones, are taken of an output")
    elif len(graph.layouts) >= MAX_LAYOUTS:
        path.blocked, path.executable = "history_escapes", None
        account.fallback("history_escapes", f"backward came in more than {MAX_LAYOUTS} ways")
    else:
        path.stale = True
        graph.layouts[layout] = None
        account.fallback("new_path", "backward reached the outputs of a unit in a way not seen before")

"""The recorder: what it records and what it refuses."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Heard, Linear, event_names, operation_names, record
from twofold.capture.intercept import Interception
from twofold.capture.recorder import MAX_STEPS, Recorder
from twofold.capture.trace import Slot


def test_a_training_step_is_recorded_in_two_layers():
    net = Linear()
    batch = torch.ones(4, 3)
    trace = record(lambda: net.step(batch))
    assert event_names(trace) == ["zero_grad", "linear", "sum", "backward", "optimizer"]
    assert operation_names(trace) == [
        [],
        ["t.default", "mm.default"],
        ["sum.default"],
        ["ones_like.default", "expand.default", "t.default", "mm.default", "t.default", "t.default", "detach.default"],
        ["add_.Tensor"],
    ]
    assert trace.refusal is None
    assert trace.first_random is None
    assert not trace.makes_state


def test_origin_and_modes_are_those_of_the_call():
    x = torch.ones(2)

    def program() -> None:
        with torch.no_grad():
            x + 1
        with torch.autocast("cpu", torch.bfloat16):
            x + 1

    first, second = record(program).events
    assert first.origin is not None
    assert (first.origin.file, first.origin.function) == (__file__, "program")
    assert first.ambient.grad is False
    assert second.ambient.autocast == (("cpu", torch.bfloat16),)


def test_fetches_metadata_and_host_data():
    x = torch.ones(2)

    def program() -> None:
        assert x.shape == (2,)
        (x + 1).sum().item()
        torch.tensor([1.0])

    trace = record(program)
    assert event_names(trace) == ["add", "sum", "fetch"]
    assert trace.events[2].arguments == (Slot(1),)
    assert trace.events[2].outcome is None


def test_random_numbers_and_new_state_are_noted():
    assert record(lambda: torch.rand(2)).first_random == 0
    net = Linear(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    batch = torch.ones(4, 3)
    assert record(lambda: net.step(batch)).makes_state
    assert not record(lambda: net.step(batch)).makes_state


def test_an_exception_leaves_no_event():
    x = torch.ones(2)

    def program() -> None:
        with pytest.raises(RuntimeError):
            x @ torch.ones(3)
        x + 1

    trace = record(program)
    assert trace.refusal is None
    assert [len(event.operations) for event in trace.events] == [1, 1]  # torch.ones, and the addition


# ---- refusals --------------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


class Subclass(torch.Tensor):
    pass


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x + 1


X = torch.tensor([1.0, 0.0, -1.0])
LEAF = torch.ones(3, requires_grad=True)
NET = Linear()


def _step_with_hook() -> None:
    hook = NET.optimizer.register_step_pre_hook(lambda *_: None)
    NET.optimizer.step()
    hook.remove()


def _seed_in_the_middle() -> None:
    X + 1
    torch.rand(2)
    torch.manual_seed(0)


def _saved_tensor_hooks() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        LEAF * 2


def _thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


REFUSALS: dict[str, tuple[str, Callable[[], Any]]] = {
    "hook on an intermediate": ("tensor_hook", lambda: (LEAF * 2).register_hook(lambda gradient: gradient)),
    "retain_grad": ("tensor_hook", lambda: (LEAF * 2).retain_grad()),
    "hooks on saved tensors": ("tensor_hook", _saved_tensor_hooks),
    "hooks on a step": ("tensor_hook", _step_with_hook),
    "out=": ("unsupported_call", lambda: torch.add(X, 1, out=torch.empty(3))),
    "sparse": ("unsupported_call", lambda: (X * 2).to_sparse()),
    "custom autograd.Function": ("autograd_function", lambda: Double.apply(LEAF)),
    "boolean mask": ("data_dependent_shape", lambda: X[X > 0]),
    "nonzero": ("data_dependent_shape", lambda: torch.nonzero(X)),
    "unique": ("data_dependent_shape", lambda: torch.unique(X)),
    "generator": ("unsupported_call", lambda: torch.rand(2, generator=torch.Generator())),
    "memory address": ("unsupported_call", lambda: (X * 2).data_ptr()),
    "shape of an intermediate": ("unsupported_call", lambda: (X * 2).unsqueeze_(0)),
    "grad_fn of an intermediate": ("unsupported_call", lambda: (LEAF * 2).grad_fn),
    "new parameter": ("unsupported_call", lambda: torch.nn.Parameter(X * 2)),
    "closure": ("unsupported_call", lambda: NET.optimizer.step(lambda: NET.weight.sum())),
    "tensor subclass": ("unsupported_call", lambda: X.as_subclass(Subclass) + 1),
    "function transform": ("unsupported_call", lambda: torch.func.vmap(torch.sin)(X)),
    "seed": ("unsupported_call", _seed_in_the_middle),
    "thread": ("thread", _thread),
    "scripted function": ("foreign_operation", lambda: scripted(X * 2)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str):
    code, program = REFUSALS[name]
    refusal = record(program).refusal
    assert refusal is not None
    assert refusal.code == code


def test_a_parameter_with_a_hook_is_refused():
    leaf = torch.ones(3, requires_grad=True)
    leaf.register_hook(lambda gradient: gradient * 2)
    trace = record(lambda: (leaf * 2).sum().backward())
    assert trace.refusal is not None
    assert trace.refusal.code == "tensor_hook"
    assert torch.equal(leaf.grad, torch.full((3,), 4.0))


def test_history_from_before_the_unit_is_refused():
    before = LEAF.exp()
    refusal = record(lambda: before.sum().backward()).refusal
    assert refusal is not None
    assert refusal.code == "history_escapes"


def test_history_kept_across_many_steps_is_refused():
    recorder = Recorder(False, frozenset())
    heard = Heard(recorder)
    answers: list[bool] = []

    def after_step(optimizer: torch.optim.Optimizer) -> None:
        recorder.after_step(optimizer)
        answers.append(recorder.goes_on_after_step())

    heard.after_step = after_step
    interception = Interception(heard)
    interception.start()
    try:
        kept = NET.weight.exp()
        for _ in range(MAX_STEPS):
            NET.optimizer.step()
        del kept
    finally:
        interception.stop()
    assert answers == [True] * (MAX_STEPS - 1) + [False]
    assert recorder.trace.refusal is not None
    assert recorder.trace.refusal.code == "history_escapes"


def test_a_refused_unit_still_runs_to_its_end():
    results: list[Any] = []

    def program() -> None:
        results.append(torch.nonzero(X).tolist())
        results.append((X + 1).tolist())

    trace = record(program)
    assert trace.refusal is not None
    assert trace.refusal.origin is not None
    assert trace.refusal.origin.file == __file__
    assert results == [[[0], [2]], [2.0, 1.0, 0.0]]

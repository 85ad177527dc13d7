"""The trace writer: names of tensors, and that it keeps nothing of the program's alive."""

import weakref

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.unit.capture.recording import Linear, record
from twofold.capture.intercept import unheard
from twofold.capture.trace import External, Slot
from twofold.capture.trace_writer import TraceWriter
from twofold.graph import Ambient


def test_references_gradients_and_escapes():
    net = Linear()
    batch = torch.ones(4, 3)
    trace = record(lambda: net.step(batch))
    _, linear, total, backward, step = trace.events
    assert linear.arguments == (External(0), External(1))
    assert trace.externals[0] is batch
    assert trace.externals[1] is net.weight
    assert (total.arguments, backward.arguments) == ((Slot(0),), (Slot(1),))
    assert step.arguments == (net.optimizer,)
    assert trace.escapes == {1: "freed"}
    (gradient,) = trace.gradients
    assert gradient.leaf is net.weight
    assert gradient.entry is None
    assert trace.specs[gradient.exit].shape == (2, 3)
    assert [made.grad_function for event in trace.events for made in event.made] == ["MmBackward0", "SumBackward0"]


def test_an_operation_in_place_makes_no_new_value():
    x = torch.ones(3)

    def program() -> torch.Tensor:
        y = x * 2
        y.add_(1)
        return y.view(3)

    trace = record(program)
    assert trace.slot_numbers == [1, 1]
    assert [event.outcome for event in trace.events] == [Slot(0), Slot(0), Slot(1)]
    assert list(trace.events[1].operations[0].writes()) == [1]
    assert not trace.written_storages()


def test_written_storages_are_those_the_unit_was_given():
    x = torch.zeros(3)
    assert record(lambda: x.add_(1)).written_storages().keys() == {x.untyped_storage()._cdata}


def test_running_statistics_count_as_written():
    norm = torch.nn.BatchNorm1d(2)
    trace = record(lambda: norm(torch.randn(4, 2)).detach())
    storages = trace.written_storages()
    assert norm.running_mean.untyped_storage()._cdata in storages
    assert norm.running_var.untyped_storage()._cdata in storages


def test_what_was_written_to_by_no_event_of_the_unit_is_forgotten():
    """As a counter on the CPU is in a program of an accelerator: it is written to beside the unit."""
    writer, counter = TraceWriter(), torch.zeros(3)
    arguments = writer.templates((counter,), {})[0]
    writer.add_operation(torch.ops.aten.add_.Scalar, (counter, 1), {}, [counter], [counter])
    writer.forget_externals(0)
    writer.take_operations()
    assert arguments == (External(0),)
    result = torch.ones(2)
    writer.number(result)
    writer.append("call", torch.ones, ((2,), {}), result, Ambient(), None, ())
    (event,) = writer.trace.events
    assert event.remade == ()


def test_histories_of_what_escapes():
    weight = torch.ones(2, requires_grad=True)

    def program() -> list[torch.Tensor]:
        freed, live = weight.exp().sum(), weight.exp()
        freed.backward()
        return [freed, live, live.detach()]

    assert record(program).escapes == {1: "freed", 2: "live", 3: "none"}


def test_intermediate_tensors_die_when_eager_would_free_them():
    x = torch.ones(8)

    def program() -> torch.Tensor:
        hidden = x * 2
        tensor = weakref.ref(hidden)
        with unheard():
            storage = StorageWeakRef(hidden.untyped_storage())
        total = hidden.sum()
        assert not storage.expired()
        del hidden
        assert tensor() is None
        assert storage.expired()
        return total

    trace = record(program)
    assert trace.refusal is None
    assert trace.escapes == {1: "none"}


def test_memory_used_again_by_the_allocator_is_a_new_value():
    x = torch.ones(1024)

    def program() -> None:
        for _ in range(8):
            x * 2

    trace = record(program)
    assert len(set(trace.slot_numbers)) == 8


def test_a_numpy_array_changed_within_the_unit_is_refused():
    array = np.ones(3, dtype=np.float32)
    x = torch.from_numpy(array)

    def program() -> torch.Tensor:
        y = x * 2
        array[0] = 5
        return y

    refusal = record(program).refusal
    assert refusal is not None
    assert refusal.code == "mutated_outside"

"""One unit run segment by segment: what it leaves behind when it is kept, and that nothing is left when it is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, merge
from twofold.backends.replay import ReplayExecutable
from twofold.capture.trace_graph import TraceGraph
from twofold.convert.from_traces import build_program
from twofold.run.graph_runner import GraphRunner, RandomState, feed_copy
from twofold.run.installed import Installed, example_environment


def install(step: Callable[[torch.Tensor], Any], given: list[torch.Tensor], exact: bool = True) -> Installed:
    graph = TraceGraph()
    for batch in given:
        path = merge(graph, lambda b=batch: step(b))
    assert path is not None
    program = build_program(path, exact)
    return Installed(program, ReplayExecutable(program))


def start(installed: Installed, batch: torch.Tensor) -> GraphRunner:
    (index,) = installed.program.feeds.values()
    return GraphRunner(installed, {index: batch}, {index: batch}, {})


def launch(runner: GraphRunner, count: int) -> None:
    with torch.no_grad():
        runner.launch_through(count)


class Stateful:
    """A step that writes to a buffer and draws random numbers, waits for a value, and then does so again."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(3)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(3)
        self.buffer.add_(x * noise)
        self.buffer.sum().item()
        self.buffer.mul_(2)
        return self.buffer + torch.rand(3)


BATCHES = [torch.full((3,), float(number)) for number in range(1, 5)]


def test_a_unit_that_is_kept_equals_eager():
    ours, eager = Stateful(), Stateful()
    installed = install(ours.step, BATCHES[:2])
    eager.buffer.copy_(ours.buffer)
    torch.manual_seed(5)
    runner = start(installed, BATCHES[2])
    launch(runner, 2)
    (escaped,) = installed.program.escapes.values()
    result = runner.owned_value(escaped)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(eager.step(BATCHES[2]), result)
    assert torch.equal(eager.buffer, ours.buffer)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("launched", [0, 1, 2])
def test_discard_restores_statics_and_random_state(launched: int):
    net = Stateful()
    installed = install(net.step, BATCHES[:2])
    before = net.buffer.clone()
    memory = net.buffer.data_ptr()
    random = torch.get_rng_state()
    runner = start(installed, BATCHES[2])
    launch(runner, launched)
    assert torch.equal(net.buffer, before) is (launched == 0)
    runner.discard()
    assert torch.equal(net.buffer, before)
    assert net.buffer.data_ptr() == memory
    assert torch.equal(torch.get_rng_state(), random)


def test_a_unit_after_a_discarded_one_is_as_if_it_had_not_been():
    net = Stateful()
    installed = install(net.step, BATCHES[:2])
    buffer, random = net.buffer.clone(), torch.get_rng_state()
    results: list[torch.Tensor] = []
    for is_discarded in (True, False):
        runner = start(installed, BATCHES[2])
        launch(runner, 2)
        results.append(next(runner.value(v).clone() for v in installed.program.escapes.values()))
        if is_discarded:
            runner.discard()
            assert torch.equal(net.buffer, buffer)
            assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(*results)


def test_launches_are_counted_and_not_repeated():
    net = Stateful()
    runner = start(install(net.step, BATCHES[:2]), BATCHES[2])
    launch(runner, 1)
    after_first = net.buffer.clone()
    launch(runner, 1)
    assert torch.equal(net.buffer, after_first)
    assert runner.launched == 1


def test_gradients_are_committed_and_the_step_is_done():
    nets = [Linear(), Linear()]
    given = [torch.randn(4, 3) for _ in range(4)]
    installed = install(nets[0].step, given[:3])
    for batch in given[:3]:
        nets[1].step(batch)
    runner = start(installed, given[3])
    launch(runner, len(installed.program.segments))
    old = nets[0].weight.grad
    runner.commit_gradients()
    assert nets[0].weight.grad is not old
    nets[1].step(given[3])
    assert torch.equal(nets[0].weight.grad, nets[1].weight.grad)
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_a_step_outside_the_graph_is_undone():
    net = Linear(lambda parameters: torch.optim.RMSprop(parameters, lr=0.1))
    given = [torch.randn(4, 3) for _ in range(4)]
    installed = install(net.step, given[:3])
    ((event, plan),) = installed.program.optimizers.items()
    state = net.optimizer.state[net.weight]
    before = [net.weight.detach().clone(), state["square_avg"].clone(), state["step"].clone()]
    gradient, square = net.weight.grad, state["square_avg"]
    runner = start(installed, given[3])
    launch(runner, installed.program.positions[event])
    with torch.no_grad():
        runner.prepare_step(plan, event, is_last=False)
    net.optimizer.step()
    assert not torch.equal(net.weight, before[0])
    with torch.no_grad():
        runner.discard()
    assert net.weight.grad is gradient
    assert state["square_avg"] is square
    for now, then in zip([net.weight, state["square_avg"], state["step"]], before, strict=True):
        assert torch.equal(now, then)


def test_views_that_no_segment_hands_out_are_made_again():
    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x.exp()
        hidden[0].item()
        return hidden * 2

    installed = install(step, BATCHES[:2])
    runner = start(installed, BATCHES[2])
    launch(runner, 1)
    ((fetched,),) = installed.program.fetches.values()
    assert torch.equal(runner.value(fetched), BATCHES[2].exp()[0])


def test_a_view_of_a_feed_is_a_view_of_the_programs_own_tensor():
    installed = install(lambda x: (x[:2], x + 1)[0], BATCHES[:2])
    runner = GraphRunner(installed, {0: BATCHES[2].clone()}, {0: BATCHES[2]}, {})
    launch(runner, 1)
    (escaped,) = installed.program.escapes.values()
    view = runner.owned_value(escaped)
    assert view.data_ptr() == BATCHES[2].data_ptr()
    assert view.shape == (2,)


# ---- what must hold before a unit ------------------------------------------------------------------------------


def test_installed_notes_memory_that_changed():
    net = Linear()
    installed = install(net.step, [torch.randn(4, 3) for _ in range(3)])
    assert installed.placement.is_kept()
    net.weight.data = net.weight.data.clone()
    assert not installed.placement.is_kept()


def test_save_written_puts_back_what_a_unit_writes():
    net = Stateful()
    installed = install(net.step, BATCHES[:2])
    before = net.buffer.clone()
    restore = installed.save_written()
    launch(start(installed, BATCHES[2]), 2)
    assert not torch.equal(net.buffer, before)
    restore()
    assert torch.equal(net.buffer, before)


def test_example_environment_covers_all_inputs_with_the_right_specs():
    net = Linear()
    installed = install(net.step, [torch.randn(3, 4).t() for _ in range(3)], exact=False)
    given = example_environment(installed.program)
    assert set(installed.program.graph.inputs) | set(installed.program.feeds) == set(given)
    (feed,) = installed.program.feeds
    assert given[feed].stride() == (1, 4)
    launched = dict(given)
    with torch.no_grad():
        installed.executable.launch(0, launched)
    assert set(installed.program.segments[0].outputs) <= set(launched)


def test_random_state_is_taken_and_restored():
    state = RandomState.take(on_accelerator=False)
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_a_feed_is_safe_from_later_changes():
    batch = torch.ones(3)
    copy = feed_copy(batch)
    batch.zero_()
    assert torch.equal(copy, torch.ones(3))


@pytest.mark.cpu
@pytest.mark.parametrize(
    "feed",
    [
        torch.arange(12.0).view(3, 4),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(123.0).view(3, 41)[:, 8:12],
        torch.arange(60.0).view(12, 5)[6:],
        torch.arange(60.0).view(3, 4, 5)[:, 1::2, ::3],
        torch.arange(3.0).view(3, 1).expand(3, 4),
        torch.arange(9.0).unfold(0, 4, 2),
        torch.arange(8.0)[::2].view(4, 1),
        torch.tensor(3.0),
        torch.empty(0, 4),
    ],
    ids=[
        "whole",
        "transposed",
        "columns",
        "later rows",
        "parts",
        "expanded",
        "overlapping",
        "single column",
        "number",
        "empty",
    ],
)
def test_a_feed_is_copied_as_it_is_laid_out(feed: torch.Tensor) -> None:
    """Compiled kernels take nothing else: what was recorded were columns, and a clone of columns is dense.

    Products of what begins elsewhere than memory does are summed in another order.
    """
    copy = feed_copy(feed)
    assert torch.equal(copy, feed)
    assert copy.stride() == feed.stride()
    assert copy.data_ptr() % 64 == feed.data_ptr() % 64
    assert copy.untyped_storage().data_ptr() != feed.untyped_storage().data_ptr() or not feed.numel()

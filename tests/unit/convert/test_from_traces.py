"""From a recorded path to the graph of a unit: as text, in segments, and against eager execution."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, merge, record, recorded_path
from twofold.capture.trace_graph import Path, TraceGraph
from twofold.convert.from_traces import Program, UnsupportedPath, build_program
from twofold.graph import Graph, Outcome, SubGraph, interpret, same, show

Build = Callable[[Any], torch.optim.Optimizer]


def text(graph: SubGraph) -> str:
    """A graph's text without the lines that its nodes come from."""
    return show(replace(graph, nodes=tuple(replace(node, origin=None) for node in graph.nodes)))


def block(expected: str) -> str:
    return textwrap.dedent(expected).lstrip()


def batches(*numbers: float) -> list[torch.Tensor]:
    return [torch.full((4, 3), float(number)) for number in numbers]


def known_path(step: Callable[[torch.Tensor], Any], given: Sequence[torch.Tensor]) -> Path:
    """Record `step` on each batch in turn; its batch is a feed if there are two."""
    graph = TraceGraph()
    for batch in given:
        path = merge(graph, lambda b=batch: step(b))
    assert path is not None
    return path


# ---- text ------------------------------------------------------------------------------------------------------


def test_the_graph_of_a_linear_layer_and_sgd():
    net = Linear()
    program = build_program(known_path(net.step, batches(1, 2, 3)), exact=True)
    assert text(program.graph) == block("""
        graph unit(%static0: f32[2,3]):
          %feed0: f32[4,3] = feed(name="feed0")
          %2: f32[3,2]{1,3} = call aten.t.default(%static0) {no_grad}
          %3: f32[4,2] = call aten.mm.default(%feed0, %2) {no_grad}
          %4: f32[] = call aten.sum.default(%3) {no_grad}
          %5: f32[] = call aten.ones_like.default(%4, pin_memory=False, memory_format=torch.preserve_format) {no_grad}
          %6: f32[4,2]{0,0} = call aten.expand.default(%5, [4, 2]) {no_grad}
          %7: f32[2,4]{0,0} = call aten.t.default(%6) {no_grad}
          %8: f32[2,3] = call aten.mm.default(%7, %feed0) {no_grad}
          %1_8: f32[2,3] = call aten.add_.Tensor(%static0, %8, alpha=-0.1) {no_grad}
          return %8, %4
        """)
    (static,) = program.statics.values()
    assert static is net.weight
    assert list(program.feeds.values()) == [0]
    (gradient,) = program.gradients
    assert (gradient.leaf, gradient.exit) == (net.weight, program.graph.outputs[0])
    assert program.escapes == {1: program.graph.outputs[1]}


def test_fused_numerics_turn_the_step_into_one_kernel():
    net = Linear()
    program = build_program(known_path(net.step, batches(1, 2, 3)), exact=False)
    assert text(program.graph).splitlines()[-2].strip() == (
        "call torch._fused_sgd_([%static0], [%8], [], weight_decay=0.0, momentum=0.0, lr=%setting0,"
        " dampening=0.0, nesterov=False, maximize=False, is_first_step=False) {no_grad}"
    )
    (setting,) = program.settings.values()
    net.optimizer.param_groups[0]["lr"] = 7.0
    assert setting.read() == 7.0
    (plan,) = program.optimizers.values()
    assert plan.still_holds()
    net.optimizer.param_groups[0]["momentum"] = 0.5
    assert not plan.still_holds()


def test_gradients_that_accumulate_are_inputs():
    net = Linear()

    def step(x: torch.Tensor) -> None:
        torch.nn.functional.linear(x, net.weight).sum().backward()

    program = build_program(known_path(step, batches(1, 2, 3)), exact=True)
    (plan,) = program.gradients
    assert plan.keeps
    assert plan.entry in program.graph.inputs
    accumulate = program.graph.nodes[-1]
    assert str(accumulate.target) == "aten.add_.Tensor"
    assert accumulate.arguments[0] is plan.entry


# ---- segments --------------------------------------------------------------------------------------------------


def test_segments_are_cut_at_a_fetch_and_only_bases_cross():
    weight = torch.ones(3, 2)

    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x @ weight
        turned = hidden.t()
        turned.sum().item()
        return turned * 2 + hidden[0, 0]

    program = build_program(known_path(step, batches(1, 2)), exact=True)
    first, second = program.segments
    assert text(first.graph) == block("""
        graph segment0(%feed0: f32[4,3], %static0: f32[3,2]):
          %2: f32[4,2] = call aten.mm.default(%feed0, %static0) {no_grad}
          %3: f32[2,4]{1,2} = call aten.t.default(%2) {no_grad}
          %4: f32[] = call aten.sum.default(%3) {no_grad}
          return %2, %4
        """)
    assert text(second.graph) == block("""
        graph segment1(%2: f32[4,2]):
          %3: f32[2,4]{1,2} = call aten.t.default(%2) {no_grad}
          %5: f32[2,4]{1,2} = call aten.mul.Tensor(%3, 2) {no_grad}
          %6: f32[2] = call aten.select.int(%2, 0, 0) {no_grad}
          %7: f32[] = call aten.select.int(%6, 0, 0) {no_grad}
          %8: f32[2,4]{1,2} = call aten.add_.Tensor(%5, %7) {no_grad}
          return %8
        """)
    ((event, values),) = program.fetches.items()
    assert [value.name for value in values] == ["4"]
    assert program.positions[event] == 1


def test_a_view_that_alone_is_read_crosses_by_itself():
    x = torch.ones(4, 3)

    def step() -> torch.Tensor:
        turned = x.exp().t()
        turned.sum().item()
        return turned * 2

    program = build_program(recorded_path(step), exact=True)
    first, second = program.segments
    (crossing,) = second.inputs
    assert crossing in first.outputs
    assert crossing.spec is not None
    assert crossing.spec.shape == (3, 4)
    assert crossing not in program.views


def test_a_view_that_is_fetched_is_made_from_its_base():
    x = torch.ones(4, 3)

    def step() -> torch.Tensor:
        hidden = x.exp()
        hidden[0].tolist()
        return hidden + 1

    program = build_program(recorded_path(step), exact=True)
    assert [value.name for value in program.segments[0].outputs] == ["1"]
    ((fetched,),) = program.fetches.values()
    assert fetched in program.views


def test_an_optimizer_that_steps_by_itself_ends_a_segment():
    net = Linear(lambda parameters: torch.optim.RMSprop(parameters, lr=0.1))
    program = build_program(known_path(net.step, batches(1, 2, 3)), exact=False)
    ((event, plan),) = program.optimizers.items()
    assert plan.outside
    assert program.fetches[event] == (program.gradients[0].exit,)
    assert not [node for node in program.segments[-1].graph.nodes if "add_" in str(node.target)]


# ---- what cannot be a graph ------------------------------------------------------------------------------------


def refusal_of(path: Path | None) -> str:
    assert path is not None
    with pytest.raises(UnsupportedPath) as refused:
        build_program(path, exact=True)
    return refused.value.code


def test_a_refused_trace_has_no_graph():
    x = torch.ones(3)
    assert refusal_of(Path((), record(lambda: torch.nonzero(x)))) == "data_dependent_shape"


def test_a_unit_without_operations_has_no_graph():
    assert refusal_of(Path((), record(lambda: None))) == "no_tensor_calls"


def test_a_step_that_makes_state_has_no_graph():
    net = Linear(lambda parameters: torch.optim.Adam(parameters))
    assert refusal_of(merge(TraceGraph(), lambda: net.step(torch.ones(4, 3)))) == "new_path"


def test_live_history_has_no_graph():
    weight = torch.ones(3, requires_grad=True)
    assert refusal_of(merge(TraceGraph(), lambda: weight.exp())) == "history_escapes"


def test_a_feed_changed_in_place_has_no_graph():
    assert refusal_of(known_path(lambda x: x.add_(1), batches(1, 2))) == "unsupported_call"


# ---- against eager execution -----------------------------------------------------------------------------------


class Net:
    """Layers of different kinds with an optimizer; two of them start equal."""

    def __init__(self, optimizer: Build) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Conv1d(3, 4, 1),
            torch.nn.BatchNorm1d(4),
            torch.nn.GELU(),
            torch.nn.Dropout(0.5),
            torch.nn.Flatten(),
            torch.nn.Linear(20, 2),
        )
        self.optimizer = optimizer(self.model.parameters())

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        hidden = self.model(x)
        scale = hidden.detach().abs().mean()
        scale.item()
        loss = torch.nn.functional.cross_entropy(hidden / scale, torch.arange(len(x)) % 2)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


BUILDS: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def run_reference(program: Program, feeds: dict[int, torch.Tensor], graph: Graph | None = None) -> Outcome:
    """Interpret a program's graph on its own statics, as a unit would run it."""
    values: dict[Any, Any] = {value: tensor.detach() for value, tensor in program.statics.items()}
    values |= {value: setting.read() for value, setting in program.settings.items()}
    values |= {plan.entry: plan.leaf.grad for plan in program.gradients if plan.entry is not None}
    graph = graph or program.graph
    read = {value.name: feeds[number] for value, number in program.feeds.items()}
    return interpret(graph, [values[value] for value in graph.inputs], read_feed=read)


def agrees_with_eager(build: Build, exact: bool, without: str | None = None) -> bool:
    """Whether the graph of a step does what eager execution does, once the node that calls `without` is left out."""
    torch.manual_seed(1)
    given = [torch.randn(6, 3, 5) for _ in range(4)]
    eager, recorded = Net(build), Net(build)
    for net in (eager, recorded):
        torch.manual_seed(2)
        for _ in range(2):
            net.step(given[0])
    torch.manual_seed(3)
    path = known_path(recorded.step, given[1:3])
    assert path.trace.refusal is None, path.trace.refusal
    program = build_program(path, exact)
    torch.manual_seed(3)
    eager.step(given[1])
    eager.step(given[2])

    random = torch.get_rng_state()
    loss = eager.step(given[3])
    torch.set_rng_state(random)
    kept = tuple(node for node in program.graph.nodes if without is None or without not in str(node.target))
    assert (len(kept) == len(program.graph.nodes)) is (without is None)
    feeds = {next(iter(program.feeds.values())): given[3]}
    outcome = run_reference(program, feeds, replace(program.graph, nodes=kept))
    values = dict(zip(program.graph.outputs, outcome.outputs, strict=True))
    results = {plan.leaf: values[plan.exit] for plan in program.gradients}
    compare = same if exact else close
    return (
        compare([values[v] for v in program.escapes.values()], [loss])
        and compare([results[p] for p in recorded.model.parameters()], [p.grad for p in eager.model.parameters()])
        and compare(_contents(recorded), _contents(eager))
        and any(effect.kind == "random_state" for effect in outcome.effects)
    )


def close(left: Any, right: Any) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


def _contents(net: Net) -> list[torch.Tensor]:
    state = [v for s in net.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [tensor.detach() for tensor in (*net.model.parameters(), *net.model.buffers(), *state)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", BUILDS)
def test_the_interpreted_graph_is_what_eager_execution_does(name: str, exact: bool):
    assert agrees_with_eager(BUILDS[name], exact)


def test_dropped_nodes_are_seen():
    assert not agrees_with_eager(BUILDS["fused adamw"], True, without="_fused_adamw_")
    assert not agrees_with_eager(BUILDS["sgd foreach"], True, without="_foreach_mul_")


def test_effects_of_the_interpreted_graph():
    net = Linear()
    given = batches(1, 2, 3)
    program = build_program(known_path(net.step, given), exact=True)
    before = net.weight.detach().clone()
    outcome = run_reference(program, {0: given[0]})
    (effect,) = outcome.effects
    assert effect.kind == "mutation"
    path, contents = effect.values
    assert path == "%static0"
    assert same(contents, before.add_(outcome.outputs[0], alpha=-0.1))

    faulty = replace(program.graph, nodes=tuple(n for n in program.graph.nodes if "add_" not in str(n.target)))
    assert run_reference(program, {0: given[0]}, faulty).effects == ()


# ---- histories -------------------------------------------------------------------------------------------------


def path_with_history(unit: Callable[[], Any]) -> Path:
    """The path of a forward whose derivative was recorded with it."""
    trace = record(unit, with_history=True)
    graph = TraceGraph()
    path = graph.merge(trace, graph.signature())
    assert path is not None
    return path


def test_a_backward_is_a_segment_behind_those_of_the_unit():
    weight, x = torch.randn(3, requires_grad=True), torch.randn(3)
    program = build_program(path_with_history(lambda: (x * weight).tanh()), exact=True)
    assert (len(program.segments), program.unit_segments) == (2, 1)
    history = program.history
    assert history is not None
    (plan,) = history.backwards.values()
    assert plan.segment == 1
    assert [history.externals[index] is weight for index in history.inputs] == [True]
    targets = [str(node.target) for node in program.segments[1].graph.nodes]
    assert targets == ["aten.tanh_backward.default", "aten.mul.Tensor"]
    assert set(history.residuals) <= {*program.segments[0].outputs, *program.statics, *program.feeds}
    assert not {tangent for tangent in plan.tangents if tangent} & set(history.residuals)


def test_running_statistics_are_no_residuals():
    norm = torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    program = build_program(path_with_history(lambda: norm(x)), exact=True)
    assert program.history is not None
    kept = [program.statics.get(value) for value in program.history.residuals]
    assert not any(tensor is norm.running_mean or tensor is norm.running_var for tensor in kept)


@pytest.mark.parametrize("unit", ["two views", "detached", "of the input"])
def test_outputs_that_share_memory_have_no_graph(unit: str):
    weight = torch.randn(4, requires_grad=True)

    def run() -> Any:
        if unit == "of the input":
            return weight.view(2, 2)
        hidden = weight.exp()
        return hidden.chunk(2) if unit == "two views" else (hidden, hidden.detach())

    assert refusal_of(path_with_history(run)) == "history_escapes"


# ---- numbers set on a device -----------------------------------------------------------------------------------


def as_on_a_device(path: Path) -> Path:
    """Make of a recording what it is on a device: all tensors there, but those that PyTorch made of numbers."""
    specs, hidden = path.trace.specs, path.trace.hidden
    device = torch.device("cuda", 0)
    specs[:] = [spec if index in hidden else replace(spec, device=device) for index, spec in enumerate(specs)]
    return path


def test_numbers_set_on_a_device_are_made_there():
    x, rows = torch.ones(4, 3), torch.tensor([0, 2])

    def step() -> torch.Tensor:
        work = x.exp()
        work[0] = 2.5
        work[rows] = -1
        work[1, 2] = True
        return work

    graph = build_program(as_on_a_device(recorded_path(step)), exact=True).graph
    made = [node for node in graph.nodes if str(node.target) == "aten.full.default"]
    assert [node.arguments for node in made] == [([], 2.5), ([], -1.0), ([], 1.0)]
    assert {str(node.results[0].spec) for node in made} == {"f32[]@cuda:0"}
    read = {value for node in graph.nodes for value in node.operands}
    assert all(node.results[0] in read for node in made)
    assert [value.spec.shape for value in graph.inputs if value.spec is not None] == [(4, 3), (2,)]


@pytest.mark.parametrize("kind", ["a mask", "a tensor"])
def test_what_else_is_set_from_the_cpu_has_no_graph(kind: str):
    x, number = torch.ones(4, 3), torch.tensor(2.0)

    def step() -> torch.Tensor:
        work = x.exp()
        if kind == "a mask":
            work[work > 1] = 2.0
        else:
            work[0] = number
        return work

    path = as_on_a_device(recorded_path(step))
    external = path.trace.external_numbers[-1]
    if kind == "a tensor":
        path.trace.specs[external] = replace(path.trace.specs[external], device=torch.device("cpu"))
    assert refusal_of(path) == "unsupported_call"

"""Graphs lowered to `fx`, replayed, and prepared for Inductor: the same results as the reference interpreter's."""

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.capture.recording import Linear, merge, recorded_path
from twofold.backends import inductor, pieces
from twofold.backends.compilation import compiler
from twofold.backends.executable import lower_to_function, lower_to_fx
from twofold.backends.inductor import InductorExecutable, piece_key, piece_texts, rewrite_for_inductor
from twofold.backends.pieces import is_left_alone, split_pieces
from twofold.backends.replay import ReplayExecutable
from twofold.capture.trace_graph import TraceGraph
from twofold.convert.from_traces import Program, build_program
from twofold.graph import Graph, TensorSpec, Value, interpret, parse, same, show, verify


def block(text: str) -> str:
    return textwrap.dedent(text).lstrip()


def example(value: Value) -> torch.Tensor:
    spec: Any = value.spec
    if spec.dtype == torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool)
    tensor = torch.empty_strided(spec.shape, spec.stride) if spec.stride else torch.empty(spec.shape)
    return tensor.copy_(torch.rand(spec.shape) + 0.1)


def assert_lowering_is_right(graph: Graph) -> None:
    verify(graph)
    inputs = [example(value) for value in graph.inputs]
    copies = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        torch.manual_seed(0)
        expected = interpret(graph, copies)
        for lower in (lower_to_fx, lower_to_function):
            given = [tensor.clone() for tensor in inputs]
            torch.manual_seed(0)
            assert same(tuple(lower(graph)(*given)), expected.outputs)
            assert same(given, copies)


MASKED = """
    graph g(%gradient: f32[1,2,4], %x: f32[1,3,4], %w: f32[2,3,1]):
      {results} = call aten.convolution_backward.default(%gradient, %x, %w, [2], [1], [0], [1], False, [0], 1, {mask})
      return {returned}
    """
MASKS = {
    (True, True, True): "%a: f32[1,3,4], %b: f32[2,3,1], %c: f32[2]",
    (False, True, True): "%b: f32[2,3,1], %c: f32[2]",
    (False, True, False): "%b: f32[2,3,1]",
    (True, False, True): "%a: f32[1,3,4], %c: f32[2]",
}


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_results_follow_the_output_mask(mask: tuple[bool, ...]):
    results = MASKS[mask]
    returned = ", ".join(part.split(":")[0] for part in results.split(", "))
    text = MASKED.format(results=results, mask=list(mask), returned=returned)
    graph = parse(text)
    assert len(graph.outputs) == sum(mask)
    assert_lowering_is_right(graph)


LOWERED = {
    "one result": """
        graph g(%x: f32[2,3]):
          %0: f32[2,3] = call aten.exp.default(%x)
          return %0
        """,
    "tuple": """
        graph g(%x: f32[2,3]):
          %0: f32[2], %1: i64[2] = call aten.max.dim(%x, 1)
          return %1, %0
        """,
    "list": """
        graph g(%x: f32[4,2]):
          %0: f32[2,2], %1: f32[2,2] = call aten.split.Tensor(%x, 2)
          return %1, %0
        """,
    "list of lists' operation": """
        graph g(%x: f32[3], %y: f32[2]):
          %0: f32[3], %1: f32[2] = call aten._foreach_exp.default([%x, %y])
          return %1, %0
        """,
    "in place": """
        graph g(%x: f32[3]):
          %0: f32[3] = call aten.add_.Tensor(%x, 1, alpha=2)
          %1: f32[3] = call aten.mul.Tensor(%x, 2)
          return %1
        """,
    "no result": """
        graph g(%x: f32[3], %y: f32[2]):
          call aten._foreach_add_.Scalar([%x, %y], 1)
          return
        """,
    "the first results of many": """
        graph g(%x: f32[4,3], %w: f32[3], %b: f32[3]):
          %0: f32[4,3], %1: f32[4,1], %2: f32[4,1] = call aten.native_layer_norm.default(%x, [3], %w, %b, 1e-05)
          return %2, %0
        """,
    "a mask given to layer norm": """
        graph g(%g: f32[4,3], %x: f32[4,3], %m: f32[4,1], %r: f32[4,1], %w: f32[3], %b: f32[3]):
          %0: f32[3] = call aten.native_layer_norm_backward.default(%g, %x, [3], %m, %r, %w, %b, [False, False, True])
          return %0
        """,
    "kernels of an optimizer": """
        graph g(%p: f32[3], %g: f32[3], %m: f32[3]):
          call torch._fused_sgd_([%p], [%g], [%m], weight_decay=0.1, momentum=0.9, lr=0.5, dampening=0.0, \
nesterov=True, maximize=False, is_first_step=False)
          return
        """,
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowered_graphs_do_what_the_interpreter_does(name: str):
    assert_lowering_is_right(parse(LOWERED[name]))


# ---- replay ----------------------------------------------------------------------------------------------------


def program_of(step: Callable[[], Any], exact: bool = True) -> Program:
    return build_program(recorded_path(step), exact)


def run_all(program: Program, executable: Any) -> dict[Value, Any]:
    environment: dict[Value, Any] = {value: tensor.detach() for value, tensor in program.statics.items()}
    environment |= {value: setting.read() for value, setting in program.settings.items()}
    with torch.no_grad():
        for index in range(len(program.segments)):
            executable.launch(index, environment)
    return environment


@pytest.mark.parametrize("exact", [True, False])
def test_replay_equals_eager(exact: bool):
    batch = torch.randn(4, 3)
    nets = [Linear(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) for _ in range(2)]

    def step(net: Linear) -> torch.Tensor:
        loss = net.step(batch)
        loss.item()
        return loss

    program = program_of(lambda: step(nets[0]), exact)
    for _ in range(3):
        step(nets[1])
    assert len(program.segments) == 2
    environment = run_all(program, ReplayExecutable(program))
    loss = step(nets[1])
    (escaped,) = program.escapes.values()
    compare = torch.equal if exact else torch.allclose
    assert torch.equal(environment[escaped], loss)
    assert compare(nets[0].weight, nets[1].weight)
    buffers = [net.optimizer.state[net.weight]["momentum_buffer"] for net in nets]
    assert compare(*buffers)
    (plan,) = program.gradients
    assert torch.equal(environment[plan.exit], nets[1].weight.grad)


def test_replay_draws_eagers_random_numbers():
    x = torch.ones(100)
    program = program_of(lambda: torch.nn.functional.dropout(x, 0.5))
    assert program.uses_random
    torch.manual_seed(7)
    environment = run_all(program, ReplayExecutable(program))
    torch.manual_seed(7)
    (escaped,) = program.escapes.values()
    assert torch.equal(environment[escaped], torch.nn.functional.dropout(x, 0.5))


# ---- Inductor, as far as no compiler is needed -----------------------------------------------------------------

NORM = """
    graph g(%x: f32[4,2], %w: f32[2], %b: f32[2], %m: f32[2], %v: f32[2]):
      %0: f32[4,2], %1: f32[2], %2: f32[2] = call aten.{target}(%x, %w, %b, %m, %v, True, 0.1, 1e-05)
      return %0, %1, %2
    """


def test_batch_norm_announces_what_it_writes():
    graph = parse(NORM.format(target="native_batch_norm.default"))
    rewritten = rewrite_for_inductor(graph)
    assert show(rewritten) == block(NORM.format(target="_native_batch_norm_legit.default"))
    inputs = [[torch.rand(value.spec.shape) for value in graph.inputs] for _ in range(2)]  # type: ignore[union-attr]
    inputs[1] = [tensor.clone() for tensor in inputs[0]]
    assert interpret(rewritten, inputs[0]).same_as(interpret(graph, inputs[1]))


@pytest.mark.parametrize("change", ["%m, %v, True>%m, %v, False", "%m, %v, True>None, None, True"])
def test_batch_norm_that_writes_nothing_is_kept(change: str):
    old, new = change.split(">")
    graph = parse(NORM.format(target="native_batch_norm.default").replace(old, new))
    assert show(rewrite_for_inductor(graph)) == show(graph)


def test_cudnn_batch_norm_becomes_the_native_one():
    graph = parse("""
        graph g(%x: f32[4,2], %w: f32[2], %b: f32[2], %m: f32[2], %v: f32[2], %g: f32[4,2]):
          %0: f32[4,2], %1: f32[2], %2: f32[2], %3: u8[0] = call aten.cudnn_batch_norm.default(%x, %w, %b, %m, %v, \
True, 0.1, 1e-05)
          %4: f32[4,2], %5: f32[2], %6: f32[2] = call aten.cudnn_batch_norm_backward.default(%x, %g, %w, %m, %v, %1, \
%2, 1e-05, %3)
          return %0, %4, %5, %6
        """)
    assert show(rewrite_for_inductor(graph)) == block("""
        graph g(%x: f32[4,2], %w: f32[2], %b: f32[2], %m: f32[2], %v: f32[2], %g: f32[4,2]):
          %0: f32[4,2], %1: f32[2], %2: f32[2] = call aten._native_batch_norm_legit.default(%x, %w, %b, %m, %v, \
True, 0.1, 1e-05)
          %3: u8[0] = call aten.new_zeros.default(%x, [0], dtype=torch.uint8)
          %4: f32[4,2], %5: f32[2], %6: f32[2] = call aten.native_batch_norm_backward.default(%g, %x, %w, %m, %v, \
%1, %2, True, 1e-05, [True, True, True])
          return %0, %4, %5, %6
        """)


def test_kernels_of_optimizers_stay_out_of_the_compiled_pieces():
    net = Linear(lambda p: torch.optim.Adam(p))
    batch = torch.randn(4, 3)
    program = program_of(lambda: net.step(batch), exact=False)
    ((first, last),) = split_pieces(program)
    assert not any(is_left_alone(node) for node in first.graph.nodes)
    assert first.is_compiled
    assert all(is_left_alone(node) for node in last.graph.nodes)
    assert not last.is_compiled
    assert len(last.graph.nodes) == 2
    texts = piece_texts(program)
    assert len(texts) == 1
    ((key, text),) = texts.items()
    assert key == piece_key(text)
    assert show(parse(text)) == text
    assert "#" not in text


@pytest.mark.slow
def test_dropout_behind_a_norm_is_drawn_before_it_is_read():
    x, norm = torch.randn(2, 8, 32), torch.nn.LayerNorm(32)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            normal = norm(x)
            mask = torch.empty_like(normal).bernoulli_(0.9).div_(0.9)
            return mask, normal * mask

    program = program_of(step, exact=False)
    for key, text in piece_texts(program).items():
        compiler().order(key, text, background=False).result()
    environment = {value: tensor.detach() for value, tensor in program.statics.items()}
    torch.manual_seed(1)
    with torch.no_grad():
        InductorExecutable(program, compiler().artifact).launch(0, environment)
    torch.manual_seed(1)
    escaped = [environment[value] for value in program.escapes.values()]
    torch.testing.assert_close(escaped, list(step()))


def test_a_program_built_again_has_the_same_keys():
    x = torch.ones(3)
    keys = [list(piece_texts(program_of(lambda: x.exp() + 1))) for _ in range(2)]
    assert keys[0] == keys[1]
    assert keys[0] != list(piece_texts(program_of(lambda: x.exp() + 2)))


def test_a_batch_that_becomes_a_feed_changes_no_key():
    graph = TraceGraph()
    scale = torch.ones(3)
    keys: list[list[str]] = []
    for given in ([torch.ones(3)], [torch.zeros(3)]):
        path = merge(graph, lambda given=given: (given[0] * scale).exp())
        assert path is not None
        keys.append(list(piece_texts(build_program(path, exact=True))))
    assert keys[0] == keys[1]


def test_long_runs_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "MAX_PIECE_NODES", 4)
    start = torch.ones(3)

    def step() -> torch.Tensor:
        x = start
        for _ in range(10):
            x = x.t().exp()
        return x

    program = program_of(step)
    (made,) = split_pieces(program)
    assert len(made) > 2
    environment = {value: tensor.detach() for value, tensor in program.statics.items()}
    for piece in made:
        outputs = lower_to_fx(piece.graph)(*[environment[value] for value in piece.inputs])
        environment.update(zip(piece.outputs, outputs, strict=True))
    (escaped,) = program.escapes.values()
    assert torch.equal(environment[escaped], step())


def test_specs_that_travel_keep_strides():
    value = Value("x", TensorSpec((2, 3), torch.float32, stride=(1, 2)))
    assert inductor._empty_like(value).stride() == (1, 2)

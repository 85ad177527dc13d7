"""Loops that Python unrolled: one graph for all their bodies, which computes what the whole does."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.unit.capture.recording import recorded_path
from twofold.backends import pieces as pieces_module
from twofold.backends.compilation import compiler
from twofold.backends.executable import Environment, lower_to_function
from twofold.backends.inductor import InductorExecutable, piece_texts
from twofold.backends.pieces import spent_values, split_pieces
from twofold.backends.replay import ReplayExecutable
from twofold.convert.from_traces import Program, build_program

STEPS = 40
WIDTH = 3

Step = Callable[[], torch.Tensor]


def program_of(step: Step) -> Program:
    return build_program(recorded_path(step), exact=False)


def run_pieces(program: Program) -> Environment:
    """Run all pieces eagerly on copies, each on what earlier ones made; return all values."""
    environment: Environment = {value: tensor.detach().clone() for value, tensor in program.statics.items()}
    environment |= {value: setting.read() for value, setting in program.settings.items()}
    with torch.no_grad():
        for pieces in split_pieces(program):
            for piece in pieces:
                made = lower_to_function(piece.graph)(*[environment[value] for value in piece.inputs])
                environment.update(zip(piece.outputs, made, strict=True))
    return environment


def outputs_of_pieces(program: Program) -> list[torch.Tensor]:
    """Run all pieces and return what escapes."""
    environment = run_pieces(program)
    return [environment[value] for value in program.escapes.values()]


def assert_one_graph_for_all(step: Step, bodies: int) -> None:
    """Assert that `bodies` pieces have one graph, and that together the pieces compute what the unit does."""
    expected = step()
    program = program_of(step)
    (pieces,) = split_pieces(program)
    graphs = [piece.graph for piece in pieces]
    assert max(map(graphs.count, graphs)) >= bodies
    (escaped,) = outputs_of_pieces(program)
    torch.testing.assert_close(escaped, expected)


def test_a_recurrence_over_slices_has_one_body():
    sequence, weight = torch.randn(STEPS, WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)

    def step() -> torch.Tensor:
        state = torch.zeros(WIDTH, WIDTH)
        for index in range(STEPS):
            state = ((state @ weight).tanh() * sequence[index]).sigmoid().cos()
        return state

    assert_one_graph_for_all(step, STEPS - 2)


def test_a_cell_over_time_has_one_body_forward_and_one_backward():
    cell, sequence = nn.LSTMCell(WIDTH, WIDTH), torch.randn(2, STEPS, WIDTH)
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        zeros = torch.zeros(2, WIDTH)
        state = zeros, zeros
        for index in range(STEPS):
            state = cell(sequence[:, index], state)
        loss = state[0].sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    program = program_of(step)
    (pieces,) = split_pieces(program)
    graphs = [piece.graph for piece in pieces]
    repeated = {graph for graph in graphs if graphs.count(graph) > STEPS - 4}
    assert len(repeated) == 2
    assert len(piece_texts(program)) <= 4
    environment = run_pieces(program)  # on copies
    loss = step()
    torch.testing.assert_close([environment[value] for value in program.escapes.values()], [loss])
    for value, tensor in program.statics.items():
        torch.testing.assert_close(environment[value], tensor.detach())


def test_operands_that_are_one_in_the_first_body_are_two_in_all():
    start = torch.randn(WIDTH)

    def step() -> torch.Tensor:
        x = y = start
        for _ in range(STEPS):
            x, y = (x.sin() + y).cos(), (y.exp() * 0.1).tanh()
        return x + y

    assert_one_graph_for_all(step, STEPS - 2)


def test_a_body_that_writes_to_what_it_reads_otherwise_too_is_compiled_apart():
    start = torch.randn(STEPS, WIDTH)

    def step() -> torch.Tensor:
        table = start * 1
        for index in range(STEPS):
            row = table[index]
            row.add_(table.sum(0).sin().cos().tanh())  # the row is part of the table
        return table

    program = program_of(step)
    (escaped,) = outputs_of_pieces(program)
    torch.testing.assert_close(escaped, step())
    for pieces in split_pieces(program):
        graphs = [piece.graph for piece in pieces if piece.is_compiled]
        assert all(graphs.count(graph) == 1 for graph in graphs)


def test_numbers_of_other_types_are_other_bodies():
    start = torch.randn(WIDTH)

    def step() -> torch.Tensor:
        x = start
        for index in range(STEPS):
            x = (x.sin().cos().tanh() * (1 if index % 20 == 7 else 1.0)).exp().sigmoid()
        return x

    program = program_of(step)
    (escaped,) = outputs_of_pieces(program)
    torch.testing.assert_close(escaped, step())
    (pieces,) = split_pieces(program)
    assert len({piece.graph for piece in pieces}) > 1


def test_what_a_later_step_reads_of_a_body_is_handed_out():
    start = torch.randn(WIDTH)

    def step() -> torch.Tensor:
        x = start
        kept: list[torch.Tensor] = []
        for index in range(STEPS):
            y = x.sin().cos()
            x = y.tanh().exp().sigmoid() * 2
            if index in (5, 20):
                kept.append(y)
            if index in (9, 30):  # of a view that only a later step reads, bodies of their own
                kept.append(y.view(1, WIDTH).view(-1))
        return torch.cat(kept).sum() + x

    assert_one_graph_for_all(step, STEPS - 4)


def test_graphs_without_loops_and_short_ones_are_one_piece():
    start = torch.randn(WIDTH)

    def step() -> torch.Tensor:
        x = start
        for _ in range(2):
            x = x.sin().cos().tanh()
        return x

    ((piece,),) = split_pieces(program_of(step))
    assert piece.is_compiled


def test_programs_of_other_lengths_have_the_same_bodies():
    cell, sequence = nn.LSTMCell(WIDTH, WIDTH), torch.randn(2, STEPS, WIDTH)

    def keys(steps: int) -> set[str]:
        def step() -> torch.Tensor:
            state = torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)
            for index in range(steps):
                state = cell(sequence[:, index], state)
            return state[0]

        with torch.no_grad():
            return set(piece_texts(program_of(step)))

    assert keys(30) == keys(STEPS)


def test_a_body_beyond_the_longest_piece_is_cut_like_the_rest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces_module, "MAX_PIECE_NODES", 4)
    start = torch.randn(WIDTH)

    def step() -> torch.Tensor:
        x = start
        for _ in range(STEPS):
            x = x.sin().cos().tanh().exp().sigmoid()
        return x

    program = program_of(step)
    (pieces,) = split_pieces(program)
    assert all(len(piece.graph.nodes) <= 4 for piece in pieces)
    (escaped,) = outputs_of_pieces(program)
    torch.testing.assert_close(escaped, step())


def fetching_step() -> Step:
    """Two loops over the slices of one sequence, with a number read between them, and a loss behind both."""
    sequence, weight = torch.randn(STEPS, WIDTH), torch.randn(WIDTH, requires_grad=True)

    def step() -> torch.Tensor:
        weight.grad = None
        state = torch.zeros(WIDTH)
        for _ in range(2):
            for index in range(STEPS):
                state = ((state * weight).tanh() + sequence[index].exp()).sigmoid().cos()
            state.sum().item()
        state.sum().backward()
        return state.detach()

    return step


def test_pieces_of_later_segments_run_too_on_what_segments_hand_on():
    step = fetching_step()
    program = program_of(step)
    segments = split_pieces(program)
    assert len(segments) == 3
    for segment, pieces in zip(program.segments, segments, strict=True):
        known = set(segment.inputs)
        for piece in pieces:
            assert known >= {*piece.inputs}
            known |= {*piece.outputs}
        assert known >= {*segment.outputs}
    graphs = [piece.graph for pieces in segments for piece in pieces]
    assert max(map(graphs.count, graphs)) >= STEPS - 2
    environment = run_pieces(program)
    torch.testing.assert_close([environment[value] for value in program.escapes.values()], [step()])


def test_what_no_later_reader_needs_is_spent_and_nothing_else():
    program = program_of(fetching_step())
    segments = split_pieces(program)
    kept = {value for segment in program.segments for value in segment.outputs}
    pieces = [piece for pieces in segments for piece in pieces]
    spent = spent_values(segments, kept)
    for index, values in enumerate(spent):
        read_later = {value for piece in pieces[index + 1 :] for value in piece.inputs}
        assert read_later.isdisjoint(values)
        assert kept.isdisjoint(values)
    made = {value for piece in pieces for value in piece.outputs}
    assert {value for values in spent for value in values} == made - kept


@pytest.mark.slow
def test_compiled_bodies_hold_no_more_than_replay_does():
    step = fetching_step()
    program = program_of(step)
    texts = piece_texts(program)
    for key, text in texts.items():
        compiler().order(key, text, background=False).result()
    alive: list[int] = []
    for executable in (ReplayExecutable(program), InductorExecutable(program, compiler().artifact)):
        environment: Environment = {value: tensor.detach().clone() for value, tensor in program.statics.items()}
        with torch.no_grad():
            for index in range(len(program.segments)):
                executable.launch(index, environment)
        torch.testing.assert_close([environment[value] for value in program.escapes.values()], [step()])
        alive.append(len(environment))
    assert alive[0] == alive[1]

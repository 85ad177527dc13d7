"""Derivatives of single graphs: each rule where it is delicate, depth, and what is refused."""

import pytest
import torch

from twofold.errors import DifferentiationError
from twofold.graph import Graph, GraphBuilder, TensorSpec, equivalent, interpret, parse, same, show
from twofold.graph.autodiff import differentiate
from twofold.graph.autodiff_calls import Residuals, constant

SCALAR = TensorSpec((), torch.float64)


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64)


def gradients(graph: Graph, inputs: list[object], *given: torch.Tensor) -> list[object]:
    """The gradients that the backward graph returns, after a check that the joint graph agrees."""
    derivative = differentiate(graph)
    *outputs, residuals = interpret(derivative.forward, inputs).outputs
    found = interpret(derivative.backward, [residuals, *given]).outputs
    joint = interpret(derivative.joint, [*inputs, *given]).outputs
    assert same(joint, (*outputs, *found))
    for each in (derivative.forward, derivative.backward, derivative.joint):
        assert equivalent(parse(show(each)), each)
    return list(found)


TREE = """
    graph sum(%left: i64[?], %right: i64[?], %values: f64[?], %root: i64[]):
      %0: f64[] = invoke node(%root)
      return %0

    subgraph node(%i: i64[]):
      %v: f64[] = call torch.Tensor.__getitem__(%values, %i)
      %l: i64[] = call torch.Tensor.__getitem__(%left, %i)
      %leaf: bool[] = call torch.lt(%l, 0)
      %s: f64[] = if(%leaf):
        then():
          return %v
        else():
          %r: i64[] = call torch.Tensor.__getitem__(%right, %i)
          %a: f64[] = invoke node(%l)
          %b: f64[] = invoke node(%r)
          %c: f64[] = call torch.mul(%a, %b)
          %d: f64[] = call torch.add(%c, %v)
          return %d
      return %s
    """


def test_each_invocation_has_residuals_of_its_own():
    left, right = torch.tensor([1, 3, -1, -1, -1]), torch.tensor([2, 4, -1, -1, -1])
    values = torch.tensor([1, 2, 4, 8, 16], dtype=torch.float64)
    # value 0 = (v3 v4 + v1) v2 + v0
    (found,) = gradients(parse(TREE), [left, right, values, torch.tensor(0)], scalar(1))
    assert same(found, torch.tensor([1, 4, 8 * 16 + 2, 4 * 16, 4 * 8], dtype=torch.float64))


def test_a_recursive_subgraphs_gradient_invokes_itself():
    table = differentiate(parse(TREE)).backward.subgraphs
    assert list(table) == ["node.backward"]
    assert show(table["node.backward"]).count("invoke node.backward") == 2


@pytest.mark.parametrize(("flag", "expected"), [(True, (4.0, 0.0)), (False, (0.0, 1.0))])
def test_a_value_that_the_other_branch_reads_has_a_gradient_of_zero(flag: bool, expected: tuple[float, float]):
    graph = parse("""
        graph g(%p: object, %x: f64[], %y: f64[]):
          %0: f64[] = if(%p):
            then():
              %1: f64[] = call torch.mul(%x, %x)
              return %1
            else():
              return %y
          return %0
        """)
    assert gradients(graph, [flag, scalar(2), scalar(3)], scalar(1)) == [scalar(number) for number in expected]


def test_switch_and_loop_take_residuals_of_the_iteration():
    graph = parse("""
        graph g(%n: object, %x: f64[]):
          %0: f64[] = loop(%n, %x):
            body(%i: object, %a: f64[]):
              %1: object = call operator.mod(%i, 2)
              %2: f64[] = switch(%1, %a):
                even(%b: f64[]):
                  %3: f64[] = call torch.mul(%b, %b)
                  return %3
                odd(%c: f64[]):
                  %4: f64[] = call torch.mul(%c, %x)
                  return %4
              return %2
          return %0
        """)
    # n = 3: ((x x) x)² = x⁶; without an iteration: x
    assert gradients(graph, [3, scalar(2)], scalar(1)) == [scalar(6 * 2**5)]
    assert gradients(graph, [0, scalar(2)], scalar(1)) == [scalar(1)]


def test_while_goes_back_as_often_as_it_went_forward():
    graph = parse("""
        graph g(%x: f64[], %w: f64[], %limit: f64[]):
          %0: f64[], %n: object = while(%x, 0):
            condition(%a: f64[], %i: object):
              %1: bool[] = call torch.lt(%a, %limit)
              return %1
            body(%b: f64[], %j: object):
              %2: f64[] = call torch.mul(%b, %w)
              %3: object = call operator.add(%j, 1)
              return %2, %3
          return %0, %n
        """)
    # five times: x w⁵, and the limit has no gradient
    found = gradients(graph, [scalar(1), scalar(2), scalar(20)], scalar(1))
    assert found == [scalar(32), scalar(5 * 16), scalar(0)]
    assert gradients(graph, [scalar(1), scalar(2), scalar(0)], scalar(1)) == [scalar(1), scalar(0), scalar(0)]


def test_outputs_that_are_inputs_values_used_twice_and_values_unused():
    graph = parse("""
        graph g(%x: f64[], %y: f64[], %k: i64[], %unused: f64[]):
          %0: f64[] = invoke f(%x, %x)
          %dead: f64[] = call torch.exp(%y)
          return %0, %x, %k, %0

        subgraph f(%a: f64[], %b: f64[]):
          %1: f64[] = call torch.mul(%a, %b)
          return %1
        """)
    given = [scalar(1), scalar(10), scalar(100)]
    found = gradients(graph, [scalar(3), scalar(2), torch.tensor(4), scalar(5)], *given)
    assert found == [scalar(2 * 3 * 101 + 10), scalar(0), scalar(0)]


def test_gradients_of_what_invocations_read_are_summed():
    graph = parse("""
        graph g(%x: f64[], %w: f64[]):
          %0: f64[] = invoke f(%x)
          %1: f64[] = invoke f(%0)
          %2: f64[] = call torch.mul(%1, %w)
          return %2

        subgraph f(%a: f64[]):
          %3: f64[] = invoke h(%a)
          return %3

        subgraph h(%b: f64[]):
          %4: f64[] = call torch.mul(%b, %w)
          return %4
        """)
    assert gradients(graph, [scalar(5), scalar(2)], scalar(1)) == [scalar(8), scalar(5 * 3 * 4)]


def test_nodes_without_grad_and_detached_values_stop_gradients():
    graph = parse("""
        graph g(%x: f64[]):
          %0: f64[] = call torch.mul(%x, %x) {no_grad}
          %1: f64[] = call torch.detach(%x)
          %2: f64[] = call torch.mul(%0, %1)
          %3: f64[] = call torch.mul(%2, %x)
          return %3, %0
        """)
    assert gradients(graph, [scalar(2)], scalar(1), scalar(1)) == [scalar(8)]


def test_objects_within_a_region_carry_gradients_and_modes_hold():
    graph = parse(
        """
        graph g(%x: f32[2]):
          %m: object = call torch.max(%x, 0)
          %v: f32[] = get_attr(%m, "values")
          %r: f32[2,1] = call torch.Tensor.reshape(%x, 2, 1)
          %o: bf16[2,2] = call torch.matmul(%r, %r.t) {autocast:cpu=bf16}
          %s: f32[] = call torch.sum(%o, dtype=torch.float32)
          return %v, %s
        """.replace("%r.t", "%q").replace("%o: bf16", "%q: f32[1,2] = call torch.t(%r)\n          %o: bf16")
    )
    x = torch.tensor([1.0, 2.0])
    (found,) = gradients(graph, [x], torch.tensor(10.0), torch.tensor(1.0))
    leaf = x.clone().requires_grad_()
    values = interpret(graph, [leaf]).outputs
    assert same(found, torch.autograd.grad(values, leaf, [torch.tensor(10.0), torch.tensor(1.0)])[0])


def test_backward_may_run_again_and_outputs_have_no_history():
    derivative = differentiate(parse(TREE))
    inputs = [torch.tensor([-1]), torch.tensor([-1]), torch.tensor([3.0], requires_grad=True), torch.tensor(0)]
    value, residuals = interpret(derivative.forward, inputs).outputs
    assert isinstance(residuals, Residuals)
    assert not value.requires_grad
    first, second = (interpret(derivative.backward, [residuals, torch.tensor(2.0)]).outputs for _ in range(2))
    assert same(first, second)
    assert same(first, (torch.tensor([2.0]),))


def chain() -> Graph:
    return parse("""
        graph chain(%n: object, %x: f64[], %w: f64[]):
          %0: f64[] = invoke down(%n, %x)
          return %0

        subgraph down(%k: object, %h: f64[]):
          %p: object = call operator.gt(%k, 0)
          %s: f64[] = if(%p):
            then():
              %m: object = call operator.sub(%k, 1)
              %a: f64[] = invoke down(%m, %h)
              %b: f64[] = call torch.mul(%a, %w)
              return %b
            else():
              return %h
          return %s
        """)


@pytest.mark.slow
def test_recursion_far_deeper_than_pythons_stack():
    depth = 20_000
    derivative = differentiate(chain())
    value, residuals = interpret(derivative.forward, [depth, scalar(2), scalar(1)]).outputs
    assert value == 2
    assert interpret(derivative.backward, [residuals, scalar(1)]).outputs == (scalar(1), scalar(2 * depth))


@pytest.mark.parametrize(
    "statement",
    [
        "%1: f64[] = call torch.Tensor.mul_(%x, 2)",
        "%1: f64[] = call torch.nn.functional.dropout(%x, inplace=True)",
        "%1: f64[] = call torch.nn.functional.dropout(%x, 0.5, True, True)",
        "%1: f64[] = call torch.nn.functional.rrelu(%x, training=True)",
        'set_attr(%o, "steps", 1)',
        "set_item(%o, 0, %x)",
    ],
)
def test_effects_are_refused_in_any_body(statement: str):
    graph = parse(f"""
        graph g(%p: object, %x: f64[], %o: object):
          %0: f64[] = invoke f(%x)
          return %0

        subgraph f(%a: f64[]):
          if(%p):
            then():
              {statement}
              return
            else():
              return
          return %a
        """)
    with pytest.raises(DifferentiationError, match="expected an operation that neither writes"):
        differentiate(graph)


def test_random_numbers_are_drawn_once_and_as_eager_draws_them():
    graph = parse("""
        graph g(%x: f64[8]):
          %0: f64[8] = loop(3, %x):
            body(%i: object, %a: f64[8]):
              %1: f64[8] = call torch.nn.functional.dropout(%a, p=0.3, training=True)
              %2: f64[8] = call torch.rand_like(%1)
              %3: f64[8] = call torch.mul(%1, %2)
              return %3
          return %0
        """)
    x, given = torch.arange(1.0, 9.0, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    (value,) = interpret(graph, [leaf]).outputs
    torch.manual_seed(0)
    ours, gradient = interpret(differentiate(graph).joint, [x, given]).outputs
    assert same(ours, value.detach())
    assert same(gradient, torch.autograd.grad(value, leaf, given)[0])


def test_fetches_and_assertions_stay_in_the_forward_graph():
    graph = parse("""
        graph g(%x: f64[]):
          %0: f64[] = call torch.sin(%x)
          fetch(%0, name="v")
          %1: bool[] = call torch.lt(%0, 2)
          assert(%1)
          return %0
        """)
    derivative = differentiate(graph)
    expected = [effect.kind for effect in interpret(graph, [scalar(1)]).effects]
    assert [effect.kind for effect in interpret(derivative.forward, [scalar(1)]).effects] == expected
    assert "fetch" not in show(derivative.backward)


def test_a_differentiated_tensor_in_a_container_is_refused_where_bodies_meet():
    builder = GraphBuilder("g")
    x = builder.input("x", SCALAR)
    y = builder.call(torch.sin, x, result=SCALAR)
    with pytest.raises(DifferentiationError, match=r"outputs of g: expected .* as a value of its own"):
        differentiate(builder.finish([(y, 1)]))


def test_an_object_with_history_is_refused_where_it_leaves_its_region():
    graph = parse("""
        graph g(%x: f64[2]):
          %m: object = call torch.max(%x, 0)
          %0: f64[2] = loop(2, %x):
            body(%i: object, %a: f64[2]):
              %1: f64[] = get_attr(%m, "values")
              %2: f64[2] = call torch.mul(%a, %1)
              return %2
          return %0
        """)
    forward = differentiate(graph).forward
    with pytest.raises(DifferentiationError, match="the object %m holds a tensor whose gradient would be lost"):
        interpret(forward, [torch.ones(2, dtype=torch.float64)])
    assert constant((2, torch.ones(2)), "pair")[0] == 2


@pytest.mark.parametrize(("inputs", "outputs"), [([2], None), ([7], None), (None, [1])])
def test_positions_must_be_of_tensors_with_derivatives(inputs: list[int] | None, outputs: list[int] | None):
    graph = parse("graph g(%x: f64[], %y: f64[], %k: i64[]):\n  return %x, %k\n")
    with pytest.raises(DifferentiationError, match=r"expected the position of a floating or complex tensor, one of"):
        differentiate(graph, inputs, outputs)


def test_only_what_is_asked_for():
    graph = parse("""
        graph g(%x: f64[], %y: f64[]):
          %0: f64[] = call torch.mul(%x, %y)
          %1: f64[] = call torch.sin(%y)
          return %0, %1
        """)
    derivative = differentiate(graph, [0], [0])
    assert (derivative.inputs, derivative.outputs) == ((0,), (0,))
    assert interpret(derivative.joint, [scalar(2), scalar(3), scalar(1)]).outputs[2:] == (scalar(3),)

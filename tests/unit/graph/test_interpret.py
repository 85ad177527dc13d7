"""The reference interpreter: control flow, recursion, modes, and every kind of effect."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from twofold.graph import (
    Ambient,
    AssertionFailed,
    Constant,
    GraphBuilder,
    MalformedGraphError,
    Origin,
    TensorSpec,
    ambient_context,
    interpret,
    parse,
    run_node,
    same,
)

VECTOR = TensorSpec((2,), torch.float32)


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


IF = """
    graph g(%p: bool[], %x: f32[2]):
      %0: f32[2] = if(%p, %x):
        then(%a: f32[2]):
          %1: f32[2] = call torch.add(%a, %x)
          return %1
        else(%b: f32[2]):
          return %b
      return %0
    """


@pytest.mark.parametrize(("flag", "expected"), [(True, 2.0), (False, 1.0)])
def test_if(flag: bool, expected: float):
    outcome = interpret(parse(IF), [torch.tensor(flag), vector(1, 1)])
    assert same(outcome.outputs, (vector(expected, expected),))


def test_while_carries_values_and_reads_outer_ones():
    graph = parse("""
        graph g(%x: f32[], %limit: f32[]):
          %0: f32[], %n: object = while(%x, 0):
            condition(%a: f32[], %i: object):
              %1: bool[] = call torch.lt(%a, %limit)
              return %1
            body(%b: f32[], %j: object):
              %2: f32[] = call torch.mul(%b, 2)
              %3: object = call operator.add(%j, 1)
              return %2, %3
          return %0, %n
        """)
    assert interpret(graph, [torch.tensor(1.0), torch.tensor(100.0)]).outputs == (torch.tensor(128.0), 7)
    assert interpret(graph, [torch.tensor(1.0), torch.tensor(0.0)]).outputs == (torch.tensor(1.0), 0)


def test_loop_and_switch():
    graph = parse("""
        graph g(%n: object, %x: f32[]):
          %0: f32[] = loop(%n, %x):
            body(%i: object, %a: f32[]):
              %1: object = call operator.mod(%i, 2)
              %2: f32[] = switch(%1, %a):
                even(%b: f32[]):
                  %3: f32[] = call torch.add(%b, %i)
                  return %3
                odd(%c: f32[]):
                  %4: f32[] = call torch.mul(%c, 10)
                  return %4
              return %2
          return %0
        """)
    assert interpret(graph, [5, torch.tensor(1.0)]).outputs == (torch.tensor(((1 + 0) * 10 + 2) * 10.0 + 4),)
    with pytest.raises(IndexError, match="expected an index below 1, got 3"):
        interpret(parse("graph g():\n  switch(3):\n    one():\n      return\n  return\n"), [])


FACTORIAL = """
    graph g(%n: i64[], %unit: i64[]):
      %0: i64[] = invoke factorial(%n)
      return %0

    subgraph factorial(%k: i64[]):
      %1: bool[] = call torch.gt(%k, 1)
      %2: i64[] = if(%1):
        then():
          %3: i64[] = call torch.sub(%k, %unit)
          %4: i64[] = invoke factorial(%3)
          %5: i64[] = call torch.mul(%k, %4)
          return %5
        else():
          return %unit
      return %2
    """


def test_recursion_keeps_the_values_of_each_invocation():
    outcome = interpret(parse(FACTORIAL), [torch.tensor(10), torch.tensor(1)])
    assert outcome.outputs == (torch.tensor(3628800),)


def test_tree_sum_over_index_tensors():
    graph = parse("""
        graph sum(%left: i64[?], %right: i64[?], %values: f32[?], %root: i64[]):
          %0: f32[] = invoke node(%root)
          return %0

        subgraph node(%i: i64[]):
          %v: f32[] = call torch.Tensor.__getitem__(%values, %i)
          %l: i64[] = call torch.Tensor.__getitem__(%left, %i)
          %leaf: bool[] = call torch.lt(%l, 0)
          %s: f32[] = if(%leaf):
            then():
              return %v
            else():
              %r: i64[] = call torch.Tensor.__getitem__(%right, %i)
              %a: f32[] = invoke node(%l)
              %b: f32[] = invoke node(%r)
              %c: f32[] = call torch.add(%a, %b)
              %d: f32[] = call torch.add(%c, %v)
              return %d
          return %s
        """)
    left = torch.tensor([1, 3, -1, -1, -1])
    right = torch.tensor([2, 4, -1, -1, -1])
    values = vector(1, 2, 4, 8, 16).requires_grad_()
    (total,) = interpret(graph, [left, right, values, torch.tensor(0)]).outputs
    total.backward()
    assert total.item() == 31.0
    assert same(values.grad, torch.ones(5))


DEEP = """
    graph g(%n: object, %x: f32[]):
      %0: f32[] = invoke f(%n, %x)
      return %0

    subgraph f(%k: object, %a: f32[]):
      %1: object = call operator.gt(%k, 0)
      %2: f32[] = if(%1):
        then():
          %3: object = call operator.sub(%k, 1)
          %4: f32[] = call torch.add(%a, 1)
          %5: f32[] = invoke f(%3, %4)
          return %5
        else():
          return %a
      return %2
    """


def test_recursion_of_depth_ten_thousand():
    assert interpret(parse(DEEP), [10_000, torch.tensor(0.0)]).outputs == (torch.tensor(10_000.0),)


def test_feed_fetch_and_assert_are_reported_in_order_as_copies():
    graph = parse("""
        graph g(%x: f32[2]):
          %f: f32[2] = feed(name="batch")
          fetch(%x, name="before")
          %0: f32[2] = call torch.Tensor.add_(%x, %f)
          assert(True)
          fetch(%0)
          return %0
        """)
    x = vector(1, 2)
    outcome = interpret(graph, [x], read_feed={"batch": vector(1, 1)})
    assert outcome.outputs[0] is x
    kinds = [effect.kind for effect in outcome.effects]
    assert kinds == ["fetch", "assert", "fetch", "mutation"]
    expected = [("before", vector(1, 2)), (True,), (None, vector(2, 3)), ("%x", vector(2, 3))]
    assert same([effect.values for effect in outcome.effects], expected)
    with pytest.raises(ValueError, match="expected read_feed to be given, for feed 'batch'"):
        interpret(graph, [x])


def test_writes_to_objects_are_effects_with_paths():
    graph = parse("""
        graph g(%m: object):
          %layer: object = get_attr(%m, "layer")
          %w: f32[2] = get_item(%layer, "weight")
          %0: f32[2] = call torch.Tensor.mul_(%w, 2)
          set_attr(%m, "steps", 3)
          set_item(%layer, "last", %0)
          return
        """)
    model = SimpleNamespace(layer={"weight": vector(1, 2)})
    effects = interpret(graph, [model]).effects
    assert (model.steps, model.layer["last"]) == (3, model.layer["weight"])
    assert effects[0] == ("set_attr", ("%m", "steps", 3))
    assert effects[1].kind == "set_item"
    assert same(effects[1].values, ("%m.layer", "last", vector(2, 4)))
    assert same(effects[2].values, ("%m.layer['weight']", vector(2, 4)))


def test_gradients_and_random_state_are_effects():
    builder = GraphBuilder("g")
    weight = torch.ones(2, requires_grad=True)
    noise = builder.call(torch.rand, 2, result=VECTOR)
    product = builder.call(torch.mul, Constant(weight), noise, result=VECTOR)
    total = builder.call(torch.Tensor.sum, product, result=TensorSpec((), torch.float32))
    builder.call(torch.Tensor.backward, total)
    outcome = interpret(builder.finish([noise]), [])
    assert [effect.kind for effect in outcome.effects] == ["gradient", "random_state"]
    assert same(outcome.effects[0].values, ("constant", outcome.outputs[0]))


def test_what_an_optimizer_writes_is_an_effect():
    graph = parse("graph g(%o: object):\n  call torch.optim.sgd:SGD.step(%o)\n  return\n")
    weight = torch.ones(2, requires_grad=True)
    weight.grad = vector(1, 2)
    effects = interpret(graph, [torch.optim.SGD([weight], lr=1.0)]).effects
    assert [effect.kind for effect in effects] == ["mutation"]
    assert same(effects[0].values, ("%o.param_groups[0][0]", vector(0, -1)))


def test_failing_assert_raises_with_its_origin():
    builder = GraphBuilder("g")
    flag = builder.input("flag", TensorSpec((), torch.bool))
    builder.node("assert", arguments=[flag], keywords={"message": "shape"}, origin=Origin("a.py", 3))
    graph = builder.finish([])
    interpret(graph, [torch.tensor(True)])
    with pytest.raises(AssertionFailed, match=r"shape \(a\.py:3\)") as caught:
        interpret(graph, [torch.tensor(False)])
    assert caught.value.origin == Origin("a.py", 3)


def test_call_results_are_tensor_leaves_or_the_object_itself():
    graph = parse("""
        graph g(%x: f32[3]):
          %v: f32[3], %i: i64[3] = call torch.sort(%x, descending=True)
          %m: object = call torch.max(%x, 0)
          %n: object = get_attr(%m, "indices")
          %k: object = call torch.Tensor.item(%n)
          call torch.Tensor.neg(%x)
          %s: object = call torch.Tensor.shape.__get__(%x)
          return %i, {"k": %k}, %s
        """)
    outcome = interpret(graph, [vector(1, 3, 2)])
    assert same(outcome.outputs, (torch.tensor([1, 2, 0]), {"k": 1}, torch.Size([3])))
    wrong = parse("graph g(%x: f32[3]):\n  %v: f32[3] = call torch.sort(%x)\n  return\n")
    with pytest.raises(MalformedGraphError, match="expected 1 tensors, got 2"):
        interpret(wrong, [vector(1, 2)])


AMBIENTS = [
    Ambient(),
    Ambient(grad=False),
    Ambient(grad=False, inference=True),
    Ambient(autocast=(("cpu", torch.bfloat16),)),
    Ambient(autocast=(("cpu", torch.float16),), autocast_cache=False),
]


def _modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("outer", AMBIENTS, ids=str)
@pytest.mark.parametrize("inner", AMBIENTS, ids=str)
def test_modes_hold_whatever_holds_outside_and_are_restored(outer: Ambient, inner: Ambient):
    with ambient_context(outer):
        before = _modes()
        with contextlib.suppress(ZeroDivisionError), ambient_context(inner):
            dtype = inner.autocast[0][1] if inner.autocast else False
            assert _modes()[:3] == (inner.grad, inner.inference, dtype)
            raise ZeroDivisionError
        assert _modes() == before


def test_each_node_runs_under_its_modes():
    graph = parse("""
        graph g(%x: f32[2,2]!):
          %0: f32[2,2]! = call torch.matmul(%x, %x)
          %1: f32[2,2] = call torch.matmul(%x, %x) {no_grad}
          %2: bf16[2,2]! = call torch.matmul(%x, %x) {autocast:cpu=bf16}
          return %0, %1, %2
        """)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        outputs = interpret(graph, [torch.ones(2, 2, requires_grad=True)]).outputs
    assert [TensorSpec.of(output) for output in outputs] == [node.results[0].spec for node in graph.nodes]


def test_run_node_steps_through_a_straight_body_and_refuses_control_flow():
    graph = parse(IF)
    environment = dict(zip(graph.inputs, [torch.tensor(True), vector(1, 1)], strict=True))
    with pytest.raises(ValueError, match="expected an operation that runs by itself"):
        run_node(graph.nodes[0], environment)
    (then, _) = graph.nodes[0].subgraphs
    environment[then.inputs[0]] = vector(1, 2)
    run_node(then.nodes[0], environment)
    assert same(environment[then.nodes[0].results[0]], vector(2, 3))


def test_wrong_number_of_inputs():
    with pytest.raises(TypeError, match="expected 2 inputs, got 1"):
        interpret(parse(IF), [1])


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (vector(float("nan")), vector(float("nan")), True),
        (vector(0.0), vector(-0.0), False),
        (vector(1), torch.tensor([1]), False),
        (vector(1.0), [vector(1.0)], False),
        (torch.tensor(1j).conj(), torch.tensor(complex(0.0, -1.0)), True),
        (torch.zeros(2, 2), torch.zeros(4), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.zeros(1, 3)[:, 0], torch.zeros(1), True),
        (1, True, False),
        (float("nan"), float("nan"), True),
        ({"a": 1}, {"a": 1}, True),
    ],
)
def test_same_is_equality_bit_for_bit(a: object, b: object, equal: bool):
    assert same(a, b) is equal

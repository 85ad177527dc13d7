"""Which nodes have an effect, told without running them."""

import operator

import pytest
import torch
import torch.nn.functional as F

from twofold.graph import Ambient, Node, describe, effectful_subgraphs, has_effect, parse


def call(target: object, *arguments: object, **keywords: object) -> Node:
    return Node("call", target, arguments, tuple(keywords.items()), (), (), None, Ambient())  # type: ignore[arg-type]


PURE = [
    call(torch.add),
    call(torch.zeros, 3),
    call(torch.tensor, 1.0),
    call(torch.as_tensor, 1.0),
    call(F.linear),
    call(F.relu, None, False),
    call(F.cross_entropy),
    call(F.embedding, None, None, 0),
    call(F.max_pool2d, None, 2),
    call(torch.matmul, out=None),
    call(torch.sort),
    call(torch.Tensor.view),
    call(torch.Tensor.item),
    call(torch.Tensor.__getitem__),
    call(torch.Tensor.__radd__),
    call(torch.Tensor.grad.__get__),
    call(torch.ops.aten.add.Tensor),
    call(operator.add),
    call(operator.getitem),
]
EFFECTFUL = [
    call(torch.Tensor.add_),
    call(torch.Tensor.__iadd__),
    call(torch.Tensor.__setitem__),
    call(torch.Tensor.grad.__set__),
    call(torch.Tensor.requires_grad.__set__),
    call(torch.Tensor.backward),
    call(torch.Tensor.register_hook),
    call(torch.Tensor.retain_grad),
    call(torch.ops.aten.add_.Tensor),
    call(torch.ops.aten.add.out),
    call(torch.ops.aten.bernoulli.default),
    call(torch.ops.aten.native_batch_norm.default),
    call(operator.iadd),
    call(operator.setitem),
    call(torch.add, out=1),
    call(torch.rand, 3),
    call(torch.randint, 3),
    call(torch.bernoulli),
    call(torch.multinomial),
    call(torch.manual_seed, 0),
    call(torch.autograd.grad),
    call(torch.autograd.backward),
    call(torch._foreach_add_),
    call(torch._fused_adamw_),
    call(torch.nn.init.normal_),
    call(F.relu, None, True),
    call(F.relu, inplace=True),
    call(F.dropout),
    call(F.batch_norm),
    call(F.scaled_dot_product_attention),
    call(F.embedding, None, None, None, 1.0),
    call(F.embedding, max_norm=1.0),
    call(torch.optim.SGD.step),
    call(torch.optim.Optimizer.zero_grad),
    call(torch.set_grad_enabled, False),
    call(print),
    call(lambda: None),
]


@pytest.mark.parametrize("node", PURE, ids=describe)
def test_pure(node: Node):
    assert not has_effect(node)


@pytest.mark.parametrize("node", EFFECTFUL, ids=describe)
def test_effectful(node: Node):
    assert has_effect(node)


RECURSIVE = """
    graph g(%x: f32[2], %o: object):
      %f: f32[2] = feed(name="f")
      %a: f32[2] = get_attr(%o, "a")
      %0: f32[2] = invoke pure(%x)
      invoke indirect(%x)
      switch(0):
        one():
          fetch(%x)
          return
      switch(0):
        one():
          %1: f32[2] = invoke pure(%x)
          return
      assert(True)
      set_attr(%o, "a", 1)
      set_item(%o, "a", 1)
      return %0

    subgraph pure(%a1: f32[2]):
      %2: f32[2] = invoke pure(%a1)
      return %2

    subgraph indirect(%b: f32[2]):
      invoke direct(%b)
      return

    subgraph direct(%c: f32[2]):
      invoke indirect(%c)
      %3: f32[2] = call torch.Tensor.neg_(%c)
      return
    """


def test_effects_are_followed_through_bodies_and_recursion():
    graph = parse(RECURSIVE)
    effectful = effectful_subgraphs(graph)
    assert effectful == {"direct", "indirect"}
    found = [has_effect(node, effectful) for node in graph.nodes]
    assert found == [False, False, False, True, True, False, True, True, True]
    assert has_effect(graph.nodes[2])

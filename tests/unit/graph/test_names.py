"""Names of callables: `resolve` is the inverse of `qualified_name`."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions, get_testing_overrides

from twofold.graph import UnnamedCallableError, qualified_name, resolve


@pytest.mark.filterwarnings("ignore")
def test_every_function_that_torch_lets_override_has_a_name():
    functions = [*get_testing_overrides()]
    for group in get_overridable_functions().values():
        functions += group
    wrong = [function for function in functions if resolve(qualified_name(function)) != function]
    assert len(functions) > 2000
    assert wrong == []


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.add, "torch.add"),
        (torch.zeros, "torch.zeros"),
        (F.linear, "torch.nn.functional.linear"),
        (torch._C._nn.gelu, "torch.nn.functional.gelu"),
        (torch.Tensor.add_, "torch.Tensor.add_"),
        (torch.Tensor.__getitem__, "torch.Tensor.__getitem__"),
        (torch.Tensor.grad.__get__, "torch.Tensor.grad.__get__"),
        (torch.Tensor.data.__set__, "torch.Tensor.data.__set__"),
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (torch.ops.aten.relu.default, "aten.relu.default"),
        (torch.ops.prims.exp.default, "torch.ops.prims.exp.default"),
        (torch.ops.aten.add, "torch.ops.aten.add"),
        (operator.getitem, "operator.getitem"),
        (operator.iadd, "operator.iadd"),
        (torch.optim.Optimizer.state_dict, "torch.optim.optimizer:Optimizer.state_dict"),
        (functools.reduce, "_functools:reduce"),
    ],
)
def test_name_of(target, name: str):
    assert qualified_name(target) == name
    assert resolve(name) == target


@pytest.mark.parametrize("target", [lambda: None, functools.partial(torch.add), [].append, torch.zeros(1).add])
def test_callable_that_cannot_be_found_again_has_no_name(target):
    with pytest.raises(UnnamedCallableError, match="no name by which it can be found again"):
        qualified_name(target)


@pytest.mark.parametrize("name", ["torch", "numpy.add", "torch.no_such", "no_such_module:f"])
def test_unknown_name_is_not_resolved(name: str):
    with pytest.raises((ImportError, AttributeError)):
        resolve(name)

"""Leaf modules are called as one function that computes what the module computes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import twofold
from tests.unit.capture.recording import merged
from twofold.capture.leaf_modules import LEAVES, MODULE_HOOKS, leaf_call
from twofold.capture.match import Bound
from twofold.capture.trace_graph import PathNode, TraceGraph

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
ROW = torch.linspace(-2, 2, 8).reshape(2, 4)
PROBABILITIES = torch.linspace(0.1, 0.9, 8).reshape(2, 4)
CLASSES = torch.tensor([1, 3])

EXAMPLES: dict[type, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
    nn.Linear: (nn.Linear(4, 5, bias=False), (ROW,)),
    nn.Conv1d: (nn.Conv1d(3, 4, 3, stride=2), (IMAGE[:, :, 0],)),
    nn.Conv2d: (nn.Conv2d(3, 6, 3, padding=1, groups=3), (IMAGE,)),
    nn.Conv3d: (nn.Conv3d(3, 2, 1), (IMAGE.unsqueeze(2),)),
    nn.ConvTranspose2d: (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1, output_padding=1), (IMAGE,)),
    nn.LayerNorm: (nn.LayerNorm(4, eps=0.1), (ROW,)),
    nn.RMSNorm: (nn.RMSNorm(4, eps=0.1), (ROW,)),
    nn.GroupNorm: (nn.GroupNorm(3, 3), (IMAGE,)),
    nn.BatchNorm1d: (nn.BatchNorm1d(4, momentum=0.3), (ROW,)),
    nn.BatchNorm2d: (nn.BatchNorm2d(3), (IMAGE,)),
    nn.BatchNorm3d: (nn.BatchNorm3d(3, affine=False), (IMAGE.unsqueeze(2),)),
    nn.Embedding: (nn.Embedding(4, 3, padding_idx=1), (CLASSES,)),
    nn.Dropout: (nn.Dropout(0.3), (ROW,)),
    nn.Dropout1d: (nn.Dropout1d(0.3), (IMAGE[0],)),
    nn.Dropout2d: (nn.Dropout2d(0.3), (IMAGE,)),
    nn.Dropout3d: (nn.Dropout3d(0.3), (IMAGE.unsqueeze(2),)),
    nn.ReLU: (nn.ReLU(), (ROW,)),
    nn.SiLU: (nn.SiLU(), (ROW,)),
    nn.Tanh: (nn.Tanh(), (ROW,)),
    nn.Sigmoid: (nn.Sigmoid(), (ROW,)),
    nn.GELU: (nn.GELU("tanh"), (ROW,)),
    nn.LeakyReLU: (nn.LeakyReLU(0.2), (ROW,)),
    nn.ELU: (nn.ELU(0.5), (ROW,)),
    nn.Softplus: (nn.Softplus(2, 1), (ROW,)),
    nn.MaxPool1d: (nn.MaxPool1d(2), (IMAGE[0],)),
    nn.MaxPool2d: (nn.MaxPool2d(2, return_indices=True), (IMAGE,)),
    nn.AvgPool2d: (nn.AvgPool2d(2), (IMAGE,)),
    nn.AdaptiveAvgPool2d: (nn.AdaptiveAvgPool2d((2, 3)), (IMAGE,)),
    nn.Flatten: (nn.Flatten(1, 2), (IMAGE,)),
    nn.CrossEntropyLoss: (nn.CrossEntropyLoss(torch.ones(4), label_smoothing=0.1), (ROW, CLASSES)),
    nn.NLLLoss: (nn.NLLLoss(), (ROW, CLASSES)),
    nn.MSELoss: (nn.MSELoss(), (ROW, PROBABILITIES)),
    nn.L1Loss: (nn.L1Loss(reduction="sum"), (ROW, PROBABILITIES)),
    nn.BCELoss: (nn.BCELoss(), (PROBABILITIES, PROBABILITIES)),
    nn.BCEWithLogitsLoss: (nn.BCEWithLogitsLoss(pos_weight=torch.full((4,), 2.0)), (ROW, PROBABILITIES)),
    nn.LSTMCell: (nn.LSTMCell(4, 3), (ROW,)),
    nn.GRUCell: (nn.GRUCell(4, 3, bias=False), (ROW,)),
}


def leaves(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_leaf_call_is_the_module(kind: type, training: bool):
    module, inputs = copy.deepcopy(EXAMPLES[kind])
    twin = copy.deepcopy(module)
    for each in (module, twin):
        each.train(training)
    found = leaf_call(module)
    assert found is not None
    call, tensors = found
    torch.manual_seed(3)
    results = leaves(call(*tensors, *inputs))
    torch.manual_seed(3)
    expected = leaves(twin(*inputs))
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
        assert result.requires_grad == wanted.requires_grad
    assert all(map(torch.equal, module.state_dict().values(), twin.state_dict().values()))


def test_equal_modules_share_a_function():
    first, second = leaf_call(nn.LayerNorm(4)), leaf_call(nn.LayerNorm(4))
    other = leaf_call(nn.LayerNorm(4, eps=1e-3))
    assert first is not None
    assert second is not None
    assert other is not None
    assert first[0] is second[0]
    assert first[0] is not other[0]
    assert repr(other[0]) == "LayerNorm(normalized_shape=(4,), eps=0.001)"


class Subclass(nn.Linear):
    pass


def with_hook() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    return module


def with_own_forward() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x + 1  # type: ignore[method-assign]
    return module


def with_plain_weight() -> nn.Module:
    module = nn.Linear(2, 2)
    del module.weight
    module.weight = torch.ones(2, 2)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Subclass(2, 2),
        with_hook,
        with_own_forward,
        with_plain_weight,
        lambda: nn.Conv2d(1, 1, 3, padding_mode="circular"),
        lambda: nn.BatchNorm1d(4, momentum=None),
        lambda: nn.Embedding(4, 2, max_norm=1.0),
        lambda: nn.MaxPool2d([2, 2]),
        lambda: nn.Sequential(nn.ReLU()),
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=[
        "subclass", "hook", "forward of the instance", "weight of the instance", "padding", "cumulative average",
        "renormed", "list", "container", "parametrized",
    ],
)  # fmt: skip
def test_no_leaf(make: Any):
    assert leaf_call(make()) is None


def test_a_global_hook_sees_every_module():
    seen: list[nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert leaf_call(nn.ReLU()) is None
    finally:
        handle.remove()
    assert leaf_call(nn.ReLU()) is not None


def test_one_call_in_the_report_and_the_same_results():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Dropout(0.5))

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(x)

    graphed = twofold.function(forward, backend="replay", numerics="exact", background=False)
    for step in range(8):
        torch.manual_seed(step)
        expected = forward(ROW)
        torch.manual_seed(step)
        assert torch.equal(graphed(ROW), expected)
    report = twofold.report(graphed).to_dict()
    assert report["graph_iterations"] >= 5
    names = {operation["name"] for operation in report["operations"]}
    assert names == {"Linear", "LayerNorm", "GELU", "Dropout"}


def test_a_changed_attribute_is_another_call():
    dropout = nn.Dropout(0.5)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return dropout(x) * 1

    graphed = twofold.function(forward, backend="replay", numerics="exact", background=False)
    for step, p in enumerate([0.5, 0.5, 0.5, 0.1, 0.5, 0.1, 0.1, 0.1, 0.9]):
        dropout.p = p
        torch.manual_seed(step)
        expected = forward(ROW)
        torch.manual_seed(step)
        assert torch.equal(graphed(ROW), expected)
    assert twofold.report(graphed).to_dict()["graph_iterations"] >= 3


def test_a_mode_of_the_program_sees_the_functions_beneath():
    seen: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    linear = nn.Linear(4, 4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with Watch():
            return linear(x)

    forward(ROW)
    once = list(seen)
    graphed = twofold.function(forward, backend="replay", background=False)
    for _ in range(5):
        seen.clear()
        assert torch.equal(graphed(ROW), forward(ROW))
        assert seen == once * 2


def test_errors_are_those_of_the_module():
    linear = nn.Linear(4, 4)
    graphed = twofold.function(lambda x: linear(x), backend="replay", background=False)
    for _ in range(4):
        graphed(ROW)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        graphed(torch.ones(2, 3))


def test_a_wrong_call_raises_what_the_module_raises():
    linear = nn.Linear(4, 4)
    graphed = twofold.function(lambda *inputs: linear(*inputs), backend="replay", background=False)
    for _ in range(4):
        graphed(ROW)
    with pytest.raises(TypeError, match=r"Linear.forward\(\) takes 2 positional arguments but 3 were given"):
        graphed(ROW, ROW)


def matches(node: PathNode, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether the check of the module itself accepts it, and whether that of the function which it is does."""
    bound: tuple[Bound, Bound] = {}, {}
    leaf = leaf_call(module)
    own = node.module_match(module, inputs, {}, [], bound[0])
    other = leaf is not None and node.match(leaf[0], leaf[1] + inputs, {}, [], bound[1])
    assert bound[0].keys() == bound[1].keys() or not own
    return bool(own), bool(other)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_a_module_is_expected_as_long_as_nothing_about_it_changes(kind: type):
    module, inputs = copy.deepcopy(EXAMPLES[kind])
    given = (inputs[0].clone(), *inputs[1:])
    with torch.no_grad():
        node = merged(TraceGraph(), lambda: module(*given)).nodes[-1]
        assert matches(node, module, given) == (True, True)
        assert matches(node, module, (inputs[0].clone(), *inputs[1:])) == (False, False)
        assert matches(node, module, (*given, inputs[0])) == (False, False)
        assert not node.module_match(module, given, {"input": inputs[0]}, [], {})
        assert matches(node, nn.Identity(), given) == (False, False)
        leaf = LEAVES[kind]
        places = [(module.__dict__, name) for name in leaf.attributes]
        places += [(module._parameters, name) for name in leaf.parameters]
        places += [(module._buffers, name) for name in leaf.buffers]
        for holder, name in places:
            value = holder.pop(name)
            assert matches(node, module, given) == (False, False), name
            for other in changed(value):
                holder[name] = other
                assert matches(node, module, given)[0] is False, (name, other)
            holder[name] = value
            assert matches(node, module, given) == (True, True)
        for name in leaf.shadowing:
            held, module.__dict__[name] = module.__dict__.get(name, module), None
            assert matches(node, module, given) == (False, False), name
            del module.__dict__[name]
            if held is not module:
                module.__dict__[name] = held
        for name in MODULE_HOOKS:
            module.__dict__[name][0] = print
            assert matches(node, module, given) == (False, False), name
            module.__dict__[name].clear()
        for add in (
            torch.nn.modules.module.register_module_forward_hook,
            torch.nn.modules.module.register_module_forward_pre_hook,
            torch.nn.modules.module.register_module_full_backward_hook,
            torch.nn.modules.module.register_module_full_backward_pre_hook,
        ):
            handle = add(lambda *_: None)
            assert matches(node, module, given) == (False, False), add
            handle.remove()
        original = kind.forward
        try:
            kind.forward = lambda self, *given: original(self, *given)  # type: ignore[assignment]
            assert matches(node, module, given) == (False, False)
        finally:
            kind.forward = original
        assert matches(node, module, given) == (True, True)


def changed(value: Any) -> list[Any]:
    """Other values for an attribute of a module, or a parameter or buffer."""
    match value:
        case torch.Tensor():
            return [value.clone(), None]
        case None:
            return [torch.ones(3), (7,)]
        case bool():
            return [not value]
        case str():
            return [value + "?"]
        case tuple():
            return [(*value, 1), list(value)]
        case _:
            return [value + 1, float(value) if isinstance(value, int) else -value]

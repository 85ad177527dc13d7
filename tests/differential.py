"""Eager execution against any other way to run a program: can the user tell the difference?

In: a factory of `Program`s and a `Runner`. Out: `Observation`s, flat maps from a name such as
`grad model.conv1.weight` to what was seen there, one a step and one at the end, and the differences
between two such lists. Observed are results with their metadata, gradients, parameters, buffers,
Python attributes of modules, optimizer state, the program's other objects, printed text, exceptions
with the user's line, and all random streams; at the end also every result of an earlier step once more.

Not observed: object identity, warnings, standard error, hooks, time.
"""

import hashlib
import io
import marshal
import random
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.programs import Program
from twofold.api import Function

Factory = Callable[[], Program]
Step = Callable[..., Any]
Runner = Callable[[Program], AbstractContextManager[Step]]
"""Gives the callable that stands for `program.step`; what it enters lasts for all steps."""

Observe = Literal["each_step", "end"]
"""When tensors are looked at. "end" leaves the loop to the program: no reads between two steps."""

SHOWN_DIFFERENCES = 12

LIBRARIES = {"torch", "numpy", "builtins", "collections", "functools", "threading", "transformers"}
"""Top-level packages whose objects are named by their type only."""

Facts = dict[str, Any]
"""Names to leaves: a `TensorFact`, or a plain value that is compared by type and `==`."""


@dataclass(frozen=True)
class TensorFact:
    """A tensor's metadata and a copy of its values on the host."""

    metadata: str
    values: torch.Tensor

    def __str__(self) -> str:
        shown = self.values.flatten()[:4].tolist()
        return f"{self.metadata} {shown}{'...' if self.values.numel() > 4 else ''}"


@dataclass(frozen=True)
class Tolerance:
    """Relative and absolute tolerance by dtype, the same at every step; a dtype not listed is exact."""

    by_dtype: dict[torch.dtype, tuple[float, float]]
    torch_random: bool = True
    """Whether torch's own random streams must end in the same state."""
    hyper_parameters: bool = False
    """Whether hyper-parameters are within it too: the program computes them from values that it fetches."""


EXACT = Tolerance({})
FUSED = Tolerance(
    {
        torch.float64: (1e-7, 1e-10),
        torch.float32: (2e-4, 1e-5),
        torch.float16: (5e-3, 1e-3),
        torch.bfloat16: (3e-2, 1e-2),
    },
    torch_random=False,
)


@dataclass(frozen=True)
class Observation:
    """What a user could see after step number `step`; the last one is taken after the loop."""

    step: int
    facts: Facts


@contextmanager
def eager(program: Program) -> Generator[Step, None, None]:
    """The reference: the user's own function."""
    yield program.step


@dataclass
class Twofold:
    """Run under twofold; after the run `report` is `twofold.report(...).to_dict()`."""

    mode: Literal["function", "program"]
    options: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def __call__(self, program: Program) -> Generator[Step, None, None]:
        import twofold

        if self.mode == "function":
            reported = twofold.function(program.step, **self.options)
            yield reported
        else:
            with twofold.program(**self.options) as reported:
                yield program.step
        self.report = twofold.report(reported).to_dict()

    @property
    def tolerance(self) -> Tolerance:
        """Bit equality where eager's own kernels are asked for."""
        return EXACT if self.options.get("numerics") == "exact" else FUSED


def exact_backend() -> Literal["replay", "cuda_graph"]:
    """Return the lowest tier of the device that the tests run on."""
    return "replay" if torch.empty(0).device.type == "cpu" else "cuda_graph"


def function(**options: Any) -> Twofold:
    """`twofold.function(step, **options)`."""
    return Twofold("function", options)


def program(**options: Any) -> Twofold:
    """`with twofold.program(**options):` around the whole loop."""
    return Twofold("program", options)


def assert_same(
    factory: Factory,
    steps: int,
    configuration: Twofold,
    *,
    tolerance: Tolerance | None = None,
    observe: Observe = "each_step",
    seed: int = 0,
) -> dict[str, Any]:
    """Fail with the first differences from eager execution; return the report for its counters."""
    reference = run(factory, steps, eager, observe=observe, seed=seed)
    candidate = run(factory, steps, configuration, observe=observe, seed=seed)
    differences = compare(reference, candidate, tolerance or configuration.tolerance)
    if differences:
        shown = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        raise AssertionError(
            f"{len(differences)} differences from eager under {configuration.mode}"
            f"({configuration.options}), seed {seed}; the first:\n  {shown}"
        )
    return configuration.report


def run(
    factory: Factory, steps: int, run_unit: Runner, *, observe: Observe = "each_step", seed: int = 0
) -> list[Observation]:
    """Build a new program from equal random states, run it and observe it.

    An exception that leaves a step is an observation; the next step is run all the same.
    """
    seed_everything(seed)
    built = factory()
    seed_everything(seed + 1)
    observations: list[Observation] = []
    kept: dict[str, Any] = {}
    with run_unit(built) as step:
        for number in range(steps):
            facts, result = _run_step(step, built.batches(number))
            kept[f"step {number}'s result at the end"] = result
            if observe == "each_step":
                flatten("result", result, facts)
                _observe_state(built, facts)
            observations.append(Observation(number, facts))
    facts = {}
    for name, result in kept.items():
        flatten(name, result, facts)
    _observe_state(built, facts)
    return [*observations, Observation(steps, facts)]


def compare(reference: list[Observation], candidate: list[Observation], tolerance: Tolerance = EXACT) -> list[str]:
    """Return the differences, first step first; empty means that no user could tell."""
    differences: list[str] = []
    if len(reference) != len(candidate):
        differences.append(f"{len(candidate)} observations, eager gave {len(reference)}")
    for expected, actual in zip(reference, candidate, strict=False):
        names = [*expected.facts, *(name for name in actual.facts if name not in expected.facts)]
        for name in names:
            if name not in actual.facts:
                difference = f"missing, eager has {expected.facts[name]}"
            elif name not in expected.facts:
                difference = f"eager has none, got {actual.facts[name]}"
            else:
                difference = describe_difference(name, expected.facts[name], actual.facts[name], tolerance)
            if difference:
                differences.append(f"step {expected.step}: {name}: {difference}")
    return differences


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy's legacy global generator, and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _run_step(step: Step, arguments: tuple[Any, ...]) -> tuple[Facts, Any]:
    """Run one step; return what it printed and raised, the host's random states, and its result."""
    printed = io.StringIO()
    result, raised = None, None
    with redirect_stdout(printed):
        try:
            result = step(*arguments)
        # A user's KeyboardInterrupt between forward and backward must behave as in eager too.
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 an exception is an observation
            raised = error
    facts: Facts = {"printed": printed.getvalue()}
    facts["exception"] = None if raised is None else f"{type(raised).__name__}: {raised}"
    if raised is not None:
        facts["exception line"] = _user_line(raised)
        facts["exception cause"] = type(raised.__cause__).__name__
        facts["exception context"] = type(raised.__context__).__name__
    facts["random of Python"] = _digest(random.getstate())
    numpy_state: Any = np.random.get_state(legacy=True)
    facts["random of NumPy"] = _digest((numpy_state[1].tobytes(), *numpy_state[2:]))
    del raised  # it and this frame hold each other else, and all that the program's frames hold
    return facts, result


def _user_line(error: BaseException) -> str:
    """Return where the innermost frame outside twofold and torch was, as file:line in function."""
    libraries = [
        str(Path(file).parent)
        for name in ("torch", "twofold")
        if (file := getattr(sys.modules.get(name), "__file__", None))
    ]
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(tuple(libraries))]
    return f"{Path(users[-1].filename).name}:{users[-1].lineno} in {users[-1].name}"


def _observe_state(program: Program, facts: Facts) -> None:
    """Add everything that outlives a step."""
    for name, module in program.modules.items():
        for path, parameter in module.named_parameters():
            flatten(f"parameter {name}.{path}", parameter, facts)
            flatten(f"grad {name}.{path}", parameter.grad, facts)
        for path, buffer in module.named_buffers():
            flatten(f"buffer {name}.{path}", buffer, facts)
        for path, child in module.named_modules(prefix=name):
            attributes = {key: value for key, value in vars(child).items() if not key.startswith("_")}
            flatten(f"attributes {path}", attributes, facts)
    for name, optimizer in program.optimizers.items():
        flatten(f"optimizer {name}", optimizer.state_dict(), facts)
    for name, value in program.observed.items():
        flatten_attributes(f"observed {name}", value, facts)
    facts["random of torch"] = _digest(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_available():
        facts["random of torch on CUDA"] = _digest(
            [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
        )


def _digest(state: object) -> str:
    """Name a state that is made of numbers and bytes; as text, torch's takes fifty times as long, at every step."""
    return hashlib.sha256(marshal.dumps(state, 2)).hexdigest()[:12]


def flatten(name: str, value: Any, facts: Facts) -> None:
    """Add `value`'s leaves under names that start with `name`, and the types of its containers.

    Objects of the user's classes are opened; modules, optimizers and other library objects are only
    named by their type. No object is opened inside itself.
    """
    _flatten(name, value, facts, ())


def flatten_attributes(name: str, value: Any, facts: Facts) -> None:
    """As `flatten`, but open the outermost object whatever its class (a scheduler, a scaler)."""
    if hasattr(value, "__dict__") and not isinstance(value, dict):
        _flatten(name, vars(value), facts, (id(value),))
    else:
        _flatten(name, value, facts, ())


def _flatten(name: str, value: Any, facts: Facts, parents: tuple[int, ...]) -> None:
    if isinstance(value, Function):  # what is decorated is seen, not Twofold's own state
        value = value._wrapped
    if isinstance(value, torch.Tensor):
        facts[name] = _tensor_fact(value)
    elif isinstance(value, np.ndarray):
        facts[name] = TensorFact(f"ndarray {value.dtype}{list(value.shape)}", torch.from_numpy(value.copy()))
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        facts[name] = value
    elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)):
        facts[name] = f"{type(value).__name__} {_digest(_state_of(value))}"
    elif id(value) in parents:
        facts[name] = f"cycle to {type(value).__name__}"
    elif isinstance(value, Mapping):
        facts[name] = f"{type(value).__name__} of {len(value)}"
        for key, item in value.items():
            _flatten(f"{name}[{key!r}]", item, facts, (*parents, id(value)))
    elif isinstance(value, (list, tuple, deque)):
        facts[name] = f"{type(value).__name__} of {len(value)}"
        for index, item in enumerate(value):
            _flatten(f"{name}[{index}]", item, facts, (*parents, id(value)))
    elif isinstance(value, (set, frozenset)):
        facts[name] = f"{type(value).__name__} {sorted(map(repr, value))}"
    elif _is_users_object(value):
        facts[name] = f"object {type(value).__qualname__}"
        for key, item in vars(value).items():
            _flatten(f"{name}.{key}", item, facts, (*parents, id(value)))
    else:
        facts[name] = f"object {type(value).__qualname__}"


def _state_of(generator: random.Random | np.random.RandomState | np.random.Generator) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    state: Any = generator.get_state(legacy=True)
    return state[1].tolist(), *state[2:]


def _is_users_object(value: Any) -> bool:
    library = type(value).__module__.partition(".")[0] in LIBRARIES
    return hasattr(value, "__dict__") and not library and not isinstance(value, (type, nn.Module, Optimizer))


def _tensor_fact(tensor: torch.Tensor) -> TensorFact:
    metadata = (
        f"{type(tensor).__name__} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        f" stride={list(tensor.stride())} device={tensor.device} requires_grad={tensor.requires_grad}"
        f" is_leaf={tensor.is_leaf} has_grad_fn={tensor.grad_fn is not None} is_inference={tensor.is_inference()}"
    )
    return TensorFact(metadata, tensor.detach().to("cpu", copy=True))


def describe_difference(name: str, expected: Any, actual: Any, tolerance: Tolerance) -> str | None:
    """Return how two leaves differ beyond `tolerance`, or None."""
    if name.startswith("random of torch") and not tolerance.torch_random:
        return None
    if type(expected) is not type(actual):
        return f"expected {type(expected).__name__} {expected}, got {type(actual).__name__} {actual}"
    if isinstance(expected, TensorFact):
        if expected.metadata != actual.metadata:
            return f"expected {expected.metadata}, got {actual.metadata}"
        return _describe_values(expected.values, actual.values, tolerance)
    if isinstance(expected, float):
        # Hyper-parameters mostly come from Python alone; other numbers may have been fetched from f32 tensors.
        allowed = EXACT if name.startswith("optimizer") and not tolerance.hyper_parameters else tolerance
        first, second = (torch.tensor(value, dtype=torch.float64) for value in (expected, actual))
        return _describe_values(first, second, allowed, computed_in=torch.float32)
    return None if expected == actual else f"expected {expected!r}, got {actual!r}"


def _describe_values(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance, computed_in: torch.dtype | None = None
) -> str | None:
    """Compare tensors of equal metadata: bit by bit, or within the tolerance of their dtype."""
    allowed = tolerance.by_dtype.get(computed_in or expected.dtype)
    if allowed is None:
        # Bits, so that NaN equals itself and -0.0 differs from 0.0.
        pair = [tensor.contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (expected, actual)]
        if torch.equal(*pair):
            return None
        differs = torch.ne(*pair).any(dim=1)
    else:
        differs = ~torch.isclose(actual, expected, *allowed, equal_nan=True).reshape(-1)
    if not differs.any():
        return None
    first = int(differs.nonzero()[0])
    values = [tensor.reshape(-1)[first].item() for tensor in (expected, actual)]
    return (
        f"{int(differs.sum())} of {differs.numel()} values differ, the first at flat index {first}:"
        f" expected {values[0]!r}, got {values[1]!r}"
    )

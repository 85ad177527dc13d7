"""`TraceGraph`: the traces of one program merged by their common prefixes (Terra, section 4.1).

A node is one event. Two events are the same node if function, attributes, dataflow and ambient state agree; where
they differ, the graph forks. Each leaf ends a `Path`: one way through a unit, which can be run as a graph.

Tensors from outside are `static` (the same object each time: parameters, buffers) or `feed`s (a batch: any tensor
of the right spec). Only what was seen twice as the same object, or is a parameter, is static; an object that turns
out to change becomes a feed, and the paths through it are built again.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from twofold.graph import Origin, TensorSpec

from .history import Layout, Watch
from .number_feeds import differ_in_number, fits
from .recorder import PLAIN_TENSORS, current_ambient
from .trace import Event, External, Made, Slot, Trace, leaves

Bound = dict[int, Any]
Match = Callable[[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor], Bound], bool]

MAX_SITE_VARIANTS = 3
"""So many different constants at one line, in one place of the graph, and it is a host site or a number is fed."""

MAX_LAYOUTS = 8
"""Ways in which backwards may reach what units hand out; each is a segment of its own."""

Placeholders = dict[int, tuple[torch.Tensor, Made]]
"""Tensors that stand for results Python does not have yet, by `id`, each with what it stands for."""


@dataclass(slots=True)
class Role:
    """How a unit gets one of its external tensors. `tensor` is None for a feed, `is_number` for one from a number."""

    tensor: torch.Tensor | None
    spec: TensorSpec
    is_leaf: bool
    is_parameter: bool
    is_number: bool
    written: dict[int, None]
    """Storages that units write to, shared by all roles of a TraceGraph: a feed must not alias one."""
    placeholders: Placeholders

    def accepts(self, tensor: Any) -> bool:
        """Whether a tensor, or a number, may be fed here."""
        spec = self.spec
        if self.is_number:
            return fits(tensor, spec.dtype)
        return (
            type(tensor) in PLAIN_TENSORS
            and id(tensor) not in self.placeholders
            and tensor.dtype == spec.dtype
            and tensor.shape == spec.shape
            and tensor.device == spec.device
            and tensor.requires_grad == spec.requires_grad
            and tensor.is_leaf == self.is_leaf
            and (tensor.is_contiguous() if spec.stride is None else tensor.stride() == spec.stride)
            and tensor.untyped_storage()._cdata not in self.written
        )


@dataclass(eq=False)
class Path:
    """One way through a unit. `trace` is its latest recording; `program` and `executable` belong to the builder."""

    nodes: tuple[PathNode, ...]
    trace: Trace
    seen: int = 1
    stale: bool = True
    """Whether a graph must be built, or built again, before the path can run as one."""
    program: Any = None
    executable: Any = None
    failures: int = 0
    """How often a graph of the path raised."""
    blocked: str | None = None
    """Why the path stays eager for good, if it does."""
    units: int = 0
    """How often it ran as a graph."""
    volatile: set[Any] = field(default_factory=set[Any])
    """Optimizers seen with other hyper-parameters than those recorded."""
    _makers: list[PathNode] = field(default_factory=list["PathNode"])
    histories: dict[int, str] = field(default_factory=dict[int, str])
    """Slots seen alive at the end of a unit, with the state of their autograd history then. Never shrinks."""

    @property
    def call_count(self) -> int:
        return len(self.nodes)

    def maker_of(self, slot: int) -> PathNode:
        """Return the node whose call makes a slot."""
        if not self._makers:
            self._makers = [node for node in self.nodes if node.event is not None for _ in node.event.made]
        return self._makers[slot]


class PathNode:
    """One event in the merged graph. Mutable: forks grow, roles relax, the skeleton caches placeholders here."""

    __slots__ = (
        "answers_at_once",
        "children",
        "depth",
        "end",
        "event",
        "fed",
        "first_external",
        "idle_until",
        "kind",
        "latest",
        "match",
        "parent",
        "placeholders",
        "refusals",
        "roles",
        "sample",
        "streak",
    )

    def __init__(self, event: Event | None, parent: PathNode | None, roles: list[Role], first: int) -> None:
        self.event = event
        self.parent = parent
        self.depth = -1 if parent is None else parent.depth + 1
        self.roles = roles
        self.first_external = first
        self.children: list[PathNode] = []
        self.end: Path | None = None
        self.latest: Path | None = None
        self.refusals = 0
        """Of a root: units in a row that began here and could not be recorded."""
        self.idle_until = 0
        """Of a root: the iteration from which units are looked at again."""
        self.streak = 0
        """Of a fetch: units in a row that went on from here as predicted."""
        self.sample: Any = None
        """Of a fetch: what it gave Python last, or once."""
        self.placeholders: list[torch.Tensor | None] = []
        self.answers_at_once = False
        """Whether to return its one placeholder is all there is to do."""
        if event is not None:
            self.kind = event.kind
            self.placeholders = [None] * len(event.made)
            self.compile_match()

    def compile_match(self) -> None:
        """Compile the check of this event for the roles as they are now."""
        assert self.event is not None
        self.match: Match = build_match(self.event, self.role_of)
        self.fed = tuple(self.first_external + i for i, role in enumerate(self.roles) if role.tensor is None)
        event = self.event
        self.answers_at_once = (
            event.kind == "call" and not self.fed and len(event.made) == 1 and event.outcome == Slot(event.first_slot)
        )

    def role_of(self, index: int) -> tuple[Role, bool]:
        """Return the role of an external, and whether it is first used here."""
        node: PathNode = self
        while index < node.first_external:
            assert node.parent is not None
            node = node.parent
        return node.roles[index - node.first_external], node is self

    def walk_back(self) -> Iterator[PathNode]:
        """Yield this node and those before it, the root left out."""
        node: PathNode | None = self
        while node is not None and node.event is not None:
            yield node
            node = node.parent


Signature = tuple[Any, ...]


class TraceGraph:
    """All paths of one program, below one root for each state in which a unit can begin."""

    def __init__(self) -> None:
        self.roots: dict[Signature, PathNode] = {}
        self.paths: list[Path] = []
        self.placeholders: Placeholders = {}
        self._leaves: dict[int, torch.Tensor] = {}
        self.host_sites: frozenset[tuple[Any, Origin | None]] = frozenset()
        self.number_sites: frozenset[tuple[Any, Origin | None]] = frozenset()
        self.layouts: dict[Layout, None] = {}
        """How backwards outside the units were seen to reach what units handed out."""
        self.differentiated_twice = False
        """Whether gradients of gradients were taken of what units hand out."""
        self.lesson = ""
        """What the last merge taught that returned no path, for the report."""
        self.has_accelerator = False
        self._written_storages: dict[int, None] = {}

    def learn_backward(self, watch: Watch) -> None:
        """Learn how a backward reached what an eager unit handed out."""
        self.differentiated_twice = self.differentiated_twice or watch.create_graph
        if watch.layout is not None and len(self.layouts) < MAX_LAYOUTS:
            self.layouts[watch.layout] = None

    def writes_to(self, tensor: torch.Tensor) -> bool:
        """Whether some unit writes to the memory of a tensor."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._written_storages

    def clear(self) -> None:
        """Forget all paths; what was learned about sites and devices stays."""
        self.roots.clear()
        self.paths.clear()
        self.placeholders.clear()
        self._written_storages.clear()

    def signature(self) -> Signature:
        """Describe the state in which a unit begins, as far as a path depends on it.

        The switches of PyTorch that choose kernels. Then, for each leaf known to get gradients: whether it has none,
        requires one, runs no hooks, and none after accumulation.
        """
        return (_switches(), *_leaf_states(self._leaves.values()))

    def root(self, signature: Signature) -> PathNode:
        """Return the root for units that begin so."""
        root = self.roots.get(signature)
        if root is None:
            root = self.roots[signature] = PathNode(None, None, [], 0)
        return root

    def _complete(self, signature: Signature, trace: Trace) -> Signature:
        """Extend a signature by the leaves that its own unit was the first to show."""
        added = [g for g in trace.gradients if id(g.leaf) not in self._leaves]
        frozen = [leaf for leaf in trace.frozen.values() if id(leaf) not in self._leaves]
        if not added and not frozen:
            return signature
        self.clear()
        self._leaves.update((id(g.leaf), g.leaf) for g in added)
        self._leaves.update((id(leaf), leaf) for leaf in frozen)
        plain = (True,) * (len(added) + len(frozen))
        without_gradient = (*(g.entry is None for g in added), *(leaf.grad is None for leaf in frozen))
        requiring = (*(True for _ in added), *(False for _ in frozen))
        switches, *states = signature or (_switches(), (), (), (), ())
        return (switches, *map(operator.add, states, (without_gradient, requiring, plain, plain)))

    def merge(self, trace: Trace, signature: Signature) -> Path | None:
        """Add a trace of a unit that began so; return its path.

        None if it only taught something about the program: record again.
        """
        signature = self._complete(signature, trace)
        if not self.has_accelerator and any(spec.device.type == "cuda" for spec in trace.specs):
            self.has_accelerator = True
            if any(spec.device.type == "cpu" for spec in trace.specs):
                self.lesson = "the program computes on an accelerator; Python keeps its work on the CPU"
                self.clear()
                return None
        node = root = self.root(signature)
        nodes: list[PathNode] = []
        for event in trace.events:
            child = next((c for c in node.children if self._is_same(c, event, trace)), None)
            if child is None:
                if self._learn_numbers(node, len(nodes), trace) or self._learn_site(node, event, trace):
                    self.clear()
                    return None
                child = self._grow(node, event, trace)
            node = child
            node.sample = event.sample if event.sample is not None else node.sample
            nodes.append(node)
        if node.end is None:
            node.end = Path(tuple(nodes), trace)
            self.paths.append(node.end)
        else:
            node.end.seen += 1
            node.end.trace = trace
        node.end.histories.update(trace.escapes)
        self._written_storages.update((storage, None) for storage in trace.written_storages())
        for passed in (root, *nodes):
            passed.latest = node.end
        return node.end

    def _grow(self, parent: PathNode, event: Event, trace: Trace) -> PathNode:
        first = parent.first_external + len(parent.roles)
        fresh = sorted({e.index for e in leaves((event.arguments, event.keywords), External) if e.index >= first})
        roles = [self._role(trace, index) for index in fresh]
        node = PathNode(event, parent, roles, first)
        parent.children.append(node)
        return node

    def _role(self, trace: Trace, index: int) -> Role:
        tensor = trace.externals[index]
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        # Memory that PyTorch did not allocate may change unseen, so what it holds is copied when it is used.
        is_number = index in trace.fed_numbers
        is_borrowed = tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()
        return Role(
            None if is_number or (is_borrowed and not is_parameter) else tensor,
            TensorSpec.of(tensor),
            tensor.is_leaf,
            is_parameter,
            is_number,
            self._written_storages,
            self.placeholders,
        )

    def _is_same(self, node: PathNode, event: Event, trace: Trace) -> bool:
        known = node.event
        assert known is not None
        if (
            known.kind != event.kind
            or known.function != event.function
            or known.ambient != event.ambient
            or known.made != event.made
            or not equal_templates(known.arguments, event.arguments)
            or not equal_templates(known.keywords, event.keywords)
        ):
            return False
        return self._has_same_tensors(node, event, trace)

    def _admits(self, node: PathNode, role: Role, tensor: torch.Tensor) -> bool:
        if role.tensor is tensor:
            return True
        if role.is_parameter or isinstance(tensor, torch.nn.Parameter) or TensorSpec.of(tensor) != role.spec:
            return False
        if role.tensor is not None:
            self._relax(node, role)
        return True

    def _relax(self, node: PathNode, role: Role) -> None:
        assert role.tensor is not None
        role.tensor = None
        for path in self.paths:
            if node in path.nodes:
                path.stale = True
                for user in path.nodes:
                    user.compile_match()

    def _has_same_tensors(self, node: PathNode, event: Event, trace: Trace) -> bool:
        assert node.event is not None
        return _references(node.event) == _references(event) and all(
            role.is_number == (index in trace.fed_numbers) and self._admits(node, role, trace.externals[index])
            for index, role in enumerate(node.roles, node.first_external)
        )

    def _learn_numbers(self, parent: PathNode, depth: int, trace: Trace) -> bool:
        """Whether an event differs from its siblings in a number alone, too often: then that number is fed.

        So are all numbers further on in the unit that differ from those of the latest sibling.
        """
        event = trace.events[depth]
        siblings = [c for c in parent.children if c.event is not None and differ_in_number(c.event, event)]
        if len(siblings) + 1 < MAX_SITE_VARIANTS or (event.function, event.origin) in self.number_sites:
            return False
        assert siblings[-1].latest is not None
        earlier = siblings[-1].latest.trace.events
        pairs = zip(trace.events[depth:], earlier[depth:], strict=False)
        self.lesson = "arithmetic was given other Python numbers again; they are fed to the graph from now on"
        self.number_sites |= {(now.function, now.origin) for now, then in pairs if differ_in_number(now, then)}
        return True

    def _learn_site(self, parent: PathNode, event: Event, trace: Trace) -> bool:
        """Whether `event` differs from its siblings in constants alone, too often: then it becomes a host site."""
        if (event.function, event.origin) in self.host_sites:
            return False
        if leaves((event.arguments, event.keywords), Slot) or any(
            op.target._schema.is_mutable for op in event.operations
        ):
            return False
        if not event.made or any(t.requires_grad for t in _externals_of(event, trace)):
            return False
        siblings = [
            c
            for c in parent.children
            if c.event is not None
            and c.event.function == event.function
            and c.event.origin == event.origin
            and self._has_same_tensors(c, event, trace)
        ]
        if len(siblings) + 1 < MAX_SITE_VARIANTS:
            return False
        self.lesson = "a call was given other Python values again; Python keeps it"
        self.host_sites |= {(event.function, event.origin)}
        return True


def _references(event: Event) -> list[Any]:
    return leaves((event.arguments, event.keywords), (Slot, External))


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch._C._get_cublas_allow_tf32(),
        torch._C._get_cudnn_allow_tf32(),
        torch._C._get_cudnn_benchmark(),
    )


_grad, _requires_grad, _hooks, _late_hooks = map(
    operator.attrgetter, ("grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
)


def _leaf_states(leaves: Collection[torch.Tensor]) -> tuple[tuple[bool, ...], ...]:
    """Return one tuple for each thing that is looked at. Done before each unit, so all loops here are C's."""
    return (
        tuple(map(operator.is_, map(_grad, leaves), itertools.repeat(None))),
        tuple(map(_requires_grad, leaves)),
        tuple(map(operator.not_, map(_hooks, leaves))),
        tuple(map(operator.not_, map(_late_hooks, leaves))),
    )


def _externals_of(event: Event, trace: Trace) -> list[torch.Tensor]:
    return [trace.externals[e.index] for e in leaves((event.arguments, event.keywords), External)]


def equal_templates(left: Any, right: Any) -> bool:
    """Whether two templates agree in structure, references and constants (types and signs of zero included)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(equal_templates, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_templates(left[key], right[key]) for key in left)
    if isinstance(left, slice):
        return equal_templates((left.start, left.stop, left.step), (right.start, right.stop, right.step))
    if isinstance(left, float | complex):
        return str(left) == str(right)  # tells 0.0 from -0.0, and nan is nan
    if left is right:
        return True
    return _is_plain(left) and bool(left == right)


_PLAIN = (
    bool, int, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, Slot, External, type(Ellipsis), range,
)  # fmt: skip


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)


class _Emitter:
    """Writes the condition under which arguments match a template, as Python source with named constants."""

    def __init__(self, role_of: Callable[[int], tuple[Role, bool]]) -> None:
        self.terms: list[str] = []
        self.constants: list[Any] = []
        self._role_of = role_of
        self._seen: set[int] = set()

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"c{len(self.constants) - 1}"

    def emit(self, template: Any, place: str) -> None:
        kind = type(template)
        if kind is Slot:
            self.terms.append(f"{place} is S[{template.index}]")
        elif kind is External:
            self._emit_external(template.index, place)
        elif kind is tuple or kind is list:
            self.terms.append(f"type({place}) is {kind.__name__} and len({place}) == {len(template)}")
            for index, item in enumerate(template):
                self.emit(item, f"{place}[{index}]")
        elif kind is dict:
            self.terms.append(f"type({place}) is dict and len({place}) == {len(template)}")
            for key, item in template.items():
                name = self.constant(key)
                self.terms.append(f"{name} in {place}")
                self.emit(item, f"{place}[{name}]")
        elif kind is slice:
            self.terms.append(f"type({place}) is slice")
            for part in ("start", "stop", "step"):
                self.emit(getattr(template, part), f"{place}.{part}")
        elif template is None or template is True or template is False:
            self.terms.append(f"{place} is {template}")
        elif kind is int or kind is str:
            self.terms.append(f"type({place}) is {kind.__name__} and {place} == {self.constant(template)}")
        else:
            self.terms.append(f"E({place}, {self.constant(template)})")

    def _emit_external(self, index: int, place: str) -> None:
        role, is_first = self._role_of(index)
        if role.tensor is not None:
            self.terms.append(f"{place} is {self.constant(role.tensor)}")
        elif is_first and index not in self._seen:
            self._seen.add(index)
            self.terms.append(f"B(X, {index}, {place}, {self.constant(role)})")
        else:
            self.terms.append(f"{place} is X[{index}]")


def _bind(bound: Bound, index: int, tensor: Any, role: Role) -> bool:
    if not role.accepts(tensor):
        return False
    bound[index] = tensor
    return True


@functools.lru_cache(maxsize=4096)
def _compile_match(condition: str, names: int) -> Callable[..., Match]:
    parameters = ", ".join(f"c{index}" for index in range(names))
    source = f"def make({parameters}):\n def match(F, A, K, S, X):\n  return {condition}\n return match\n"
    scope: dict[str, Any] = {
        "E": equal_templates, "B": _bind, "L": leaves, "V": torch.Tensor,
        "G": torch.is_grad_enabled, "C": torch._C._is_any_autocast_enabled, "M": current_ambient,  # type: ignore[attr-defined]
    }  # fmt: skip
    exec(source, scope)
    return scope["make"]


def build_match(event: Event, role_of: Callable[[int], tuple[Role, bool]]) -> Match:
    """Compile the check of a call against an event.

    It takes the function, positional and keyword arguments, the placeholders of the unit by slot, and the feeds bound
    so far, to which it adds those first used here. A fetch is run for real, so only its tensors are checked. Events of
    equal structure share code.
    """
    if event.kind == "optimizer":
        return lambda _function, _arguments, _keywords, _slots, _bound: False
    emitter = _Emitter(role_of)
    known = emitter.constant(event.function)
    emitter.terms.append(f"(F is {known} or F == {known})")
    if event.kind == "fetch":
        emitter.terms.append(f"len(T := L((A, K), V)) == {len(event.arguments)}")
        for index, reference in enumerate(event.arguments):
            emitter.emit(reference, f"T[{index}]")
    else:
        emitter.terms.append(f"len(A) == {len(event.arguments)}")
        emitter.terms.append(f"len(K) == {len(event.keywords)}" if event.keywords else "not K")
        for index, item in enumerate(event.arguments):
            emitter.emit(item, f"A[{index}]")
        for key, item in event.keywords.items():
            emitter.terms.append(f"{key!r} in K")
            emitter.emit(item, f"K[{key!r}]")
    ambient = event.ambient
    emitter.terms.append(f"G() is {ambient.grad}")
    emitter.terms.append(f"C() and M() == {emitter.constant(ambient)}" if ambient.autocast else "not C()")
    condition = " and ".join(emitter.terms)
    return _compile_match(condition, len(emitter.constants))(*emitter.constants)

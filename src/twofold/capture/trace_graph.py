"""`TraceGraph`: the traces of one program merged by their common prefixes (Terra, section 4.1).

A node is one event. Two events are the same node if function, attributes, dataflow and ambient state agree; where
they differ, the graph forks. Each leaf ends a `Path`: one way through a unit, which can be run as a graph.

Tensors from outside are `static` (the same object each time: parameters, buffers) or `feed`s (a batch: any tensor
of the right spec). An object that turns out to change becomes a feed, and the paths through it are built again. Where
one path was fed at a place of the program, so are others from their first unit on, unless they share a static.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from twofold.graph import Origin

from .functions import is_random
from .gradients import presence_holds
from .history import Layout, Watch
from .match import Match, Placeholders, Role, build_match, build_module_match, columns, equal_templates, presence_of
from .number_feeds import differ_in_number, is_feedable
from .signature import KnownLeaves, Signature
from .trace import Event, External, Made, Presence, Slot, Trace, leaves

MAX_SITE_VARIANTS = 3
"""So many different constants at one line, in one place of the graph, and it is a host site or a number is fed."""

MAX_LAYOUTS = 8
"""Ways in which backwards may reach what units hand out; each is a segment of its own."""


Place = tuple[Any, Origin | None, int]
"""Where a tensor from outside is first used: the function, the line, and which of the call's tensors it is."""


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
    seconds: float = 0.0
    """What these units took."""
    volatile: set[Any] = field(default_factory=set[Any])
    """Optimizers seen with other hyper-parameters than those recorded."""
    _makers: list[tuple[PathNode, Made]] = field(default_factory=list["tuple[PathNode, Made]"])
    histories: dict[int, str] = field(default_factory=dict[int, str])
    """Slots seen alive at the end of a unit, with the state of their autograd history then. Never shrinks."""

    def __post_init__(self) -> None:
        self.read_presence()
        self._remade = [(node.depth, one) for node in self.nodes if node.event is not None for one in node.event.remade]

    def read_presence(self) -> None:
        """Read off the events which gradients the path depends on: of the leaves known, and of those fed, by index."""
        found = [presence_of(node.event, node.role_of) for node in self.nodes if node.event is not None]
        self._leaves, self._present = columns(entry for statics, _ in found for entry in statics)
        self.fed_presence = {index: present for _, fed in found for index, present in fed.items()}

    def can_begin(self) -> bool:
        """Whether the gradients that the path depends on are there, or not there, as they were when it began.

        Asked before a unit, or within one that nothing has been committed of.
        """
        return not self._leaves or presence_holds(self._leaves, self._present)

    @property
    def call_count(self) -> int:
        return len(self.nodes)

    def passes(self, node: PathNode) -> bool:
        """Whether a node, or a root, is on the path."""
        if node.parent is None:
            return bool(self.nodes) and self.nodes[0].parent is node
        return node.depth < len(self.nodes) and self.nodes[node.depth] is node

    def maker_of(self, slot: int) -> PathNode:
        """Return the node whose call makes a slot."""
        return self._made(slot)[0]

    def made_in(self, slot: int, until: int | None = None) -> Made:
        """Return what is known of the tensor of a slot besides its contents, at the end or at the event `until`."""
        made = self._made(slot)[1]
        for depth, (index, again) in self._remade:
            if index == slot and (until is None or depth < until):
                made = again
        return made

    def _made(self, slot: int) -> tuple[PathNode, Made]:
        if not self._makers:
            events = ((node, node.event) for node in self.nodes if node.event is not None)
            self._makers = [(node, made) for node, event in events for made in event.made]
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
        "module_match",
        "parent",
        "placeholders",
        "refusals",
        "roles",
        "sample",
        "streak",
        "units",
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
        self.units = 0
        """Of a root: how many units that began here ran as graphs."""
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
        self.module_match = build_module_match(self.event, self.role_of)
        self.fed = tuple(self.first_external + i for i, role in enumerate(self.roles) if role.tensor is None)
        event = self.event
        self.answers_at_once = (
            event.kind == "call"
            and not self.fed
            and not event.remade
            and len(event.made) == 1
            and event.outcome == Slot(event.first_slot)
        )

    def role_of(self, index: int) -> tuple[Role, bool]:
        """Return the role of an external, and whether it is first used here."""
        node: PathNode = self
        while index < node.first_external:
            assert node.parent is not None
            node = node.parent
        return node.roles[index - node.first_external], node is self

    def fits_optimizer(self, optimizer: Any) -> bool:
        """Whether the event is a step of an optimizer, with gradients from before the unit as they are now."""
        event = self.event
        if event is None or event.kind != "optimizer" or event.arguments[0] is not optimizer:
            return False
        return presence_holds(*columns(presence_of(event, self.role_of)[0]))

    def walk_back(self) -> Iterator[PathNode]:
        """Yield this node and those before it, the root left out."""
        node: PathNode | None = self
        while node is not None and node.event is not None:
            yield node
            node = node.parent


class TraceGraph:
    """All paths of one program, below one root for each state in which a unit can begin."""

    def __init__(self) -> None:
        self.roots: dict[Signature, PathNode] = {}
        self.paths: list[Path] = []
        self.placeholders: Placeholders = {}
        self._leaves = KnownLeaves()
        self._changing: dict[Place, None] = {}
        """Where units were seen to be given other objects."""
        self._relaxed: dict[PathNode, None] = {}
        """Nodes whose checks are to be compiled again before the next unit."""
        self.host_sites: frozenset[tuple[Any, Origin | None]] = frozenset()
        self.drawing_sites: frozenset[tuple[Any, Origin | None]] = frozenset()
        """Those that draw from the generator that units draw from."""
        self.number_sites: frozenset[tuple[Any, Origin | None]] = frozenset()
        self.layouts: dict[Layout, None] = {}
        """How backwards outside the units were seen to reach what units handed out."""
        self.differentiated_twice = False
        """Whether gradients of gradients were taken of what units hand out."""
        self.lesson = ""
        """What the last merge taught that returned no path, for the report."""
        self.has_accelerator = False
        self._written_storages: dict[int, StorageWeakRef] = {}

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
        self._relaxed.clear()

    def signature(self) -> Signature:
        """Describe the state in which a unit begins, as far as each of its paths depends on it."""
        return self._leaves.signature()

    def leaves(self) -> Iterator[torch.Tensor]:
        """Return the leaves that units were seen to use, but for those that they are fed."""
        others = (role.tensor for path in self.paths for node in path.nodes for role in node.roles if role.is_leaf)
        known = {id(leaf): leaf for leaf in (*self._leaves, *others) if leaf is not None}
        return iter(known.values())

    def likely(self, node: PathNode) -> Path | None:
        """Return the path that a unit which has come to a node most likely takes, of those that gradients allow.

        It is the latest there, or that which most units took.
        """
        path = node.latest
        if path is None or path.can_begin():
            return path
        here = [path for path in self.paths if path.passes(node) and path.can_begin()]
        return max(here, key=lambda path: path.units + path.seen, default=None)

    def root(self, signature: Signature) -> PathNode:
        """Return the root for units that begin so."""
        root = self.roots.get(signature)
        if root is None:
            root = self.roots[signature] = PathNode(None, None, [], 0)
        return root

    def merge(self, trace: Trace, signature: Signature) -> Path | None:
        """Add a trace of a unit that began so; return its path.

        None if it only taught something about the program: record again.
        """
        completed = self._leaves.complete(signature, trace)
        if completed is not None:
            signature = completed
            self.clear()
        if not self.has_accelerator and any(spec.device.type == "cuda" for spec in trace.specs):
            self.has_accelerator = True
            if any(spec.device.type == "cpu" for spec in trace.specs):
                self.lesson = "the program computes on an accelerator; Python keeps its work on the CPU"
                self.clear()
                return None
        self.host_sites |= trace.host_sites
        written = trace.written_storages()
        node = root = self.root(signature)
        nodes: list[PathNode] = []
        for event in trace.events:
            child = next((c for c in node.children if self._is_same(c, event, trace)), None)
            if child is None:
                if self._learn_numbers(node, len(nodes), trace) or self._learn_site(node, event, trace):
                    self.clear()
                    return None
                child = self._grow(node, event, trace, written)
            node = child
            node.sample = event.sample if event.sample is not None else node.sample
            nodes.append(node)
        self._compile_relaxed()
        if node.end is None:
            node.end = Path(tuple(nodes), trace)
            self.paths.append(node.end)
        else:
            node.end.seen += 1
            node.end.trace = trace
        node.end.histories.update(trace.escapes)
        self._written_storages.update(written)
        for passed in (root, *nodes):
            passed.latest = node.end
        return node.end

    def _grow(self, parent: PathNode, event: Event, trace: Trace, written: Collection[int]) -> PathNode:
        first = parent.first_external + len(parent.roles)
        fresh = sorted({e.index for e in leaves((event.arguments, event.keywords), External) if e.index >= first})
        roles = [self._role(trace, index, _place(event, index), written) for index in fresh]
        node = PathNode(event, parent, roles, first)
        parent.children.append(node)
        return node

    def _role(self, trace: Trace, index: int, place: Place, written: Collection[int]) -> Role:
        tensor, spec = trace.externals[index], trace.external_specs[index]
        is_lasting = _is_lasting(tensor, trace)
        # Memory that PyTorch did not allocate may change unseen, so what it holds is copied when it is used.
        is_number = index in trace.fed_numbers
        is_borrowed = tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()
        is_fed = is_borrowed or (place in self._changing and self._may_change(tensor, written))
        return Role(
            None if is_number or (is_fed and not is_lasting) else tensor,
            spec,
            tensor.is_leaf,
            tensor.is_inference(),
            is_lasting,
            first if (first := trace.external_firsts[index]) != index else None,
            is_number,
            self._written_storages,
            self.placeholders,
        )

    def _may_change(self, tensor: torch.Tensor, written: Collection[int]) -> bool:
        """Whether a tensor can be a feed: nothing writes to it, and no path knows it as static."""
        storage = tensor.untyped_storage()._cdata
        if storage in self._written_storages or storage in written:
            return False
        return not any(role.tensor is tensor for path in self.paths for node in path.nodes for role in node.roles)

    def _is_same(self, node: PathNode, event: Event, trace: Trace) -> bool:
        known = node.event
        assert known is not None
        if (
            known.kind != event.kind
            or known.function != event.function
            or known.ambient != event.ambient
            or known.made != event.made
            or known.remade != event.remade
            or not equal_templates(known.arguments, event.arguments)
            or not equal_templates(known.keywords, event.keywords)
            or not _is_same_presence(known.presence, event.presence)
        ):
            return False
        return self._has_same_tensors(node, event, trace)

    def _admits(self, node: PathNode, role: Role, trace: Trace, index: int) -> bool:
        tensor, spec = trace.externals[index], trace.external_specs[index]
        if trace.external_firsts[index] != (index if role.alias_of is None else role.alias_of):
            return False
        if role.tensor is tensor:
            return spec.requires_grad is role.spec.requires_grad
        if role.is_lasting or _is_lasting(tensor, trace) or spec != role.spec:
            return False
        if role.is_inference != tensor.is_inference():
            return False
        if role.tensor is not None:
            if spec.requires_grad and role.is_leaf and self.writes_to(role.tensor):
                return False  # trained by hand, as another is in units of their own
            self._relax(node, role)
        return True

    def _relax(self, node: PathNode, role: Role) -> None:
        assert role.tensor is not None
        assert node.event is not None
        role.tensor = None
        index = node.first_external + next(i for i, one in enumerate(node.roles) if one is role)
        self._changing[_place(node.event, index)] = None
        for path in self.paths:
            if node in path.nodes:
                path.stale = True
                self._relaxed.update(dict.fromkeys(path.nodes))

    def _compile_relaxed(self) -> None:
        """Compile the checks of the paths whose roles changed, once for all the changes that one trace brought."""
        for node in self._relaxed:
            node.compile_match()
            if node.end is not None:
                node.end.read_presence()
        self._relaxed.clear()

    def _has_same_tensors(self, node: PathNode, event: Event, trace: Trace) -> bool:
        assert node.event is not None
        return _references(node.event) == _references(event) and all(
            role.is_number == (index in trace.fed_numbers) and self._admits(node, role, trace, index)
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
        if not is_feedable(event, trace.specs):
            return False
        assert siblings[-1].latest is not None
        earlier = siblings[-1].latest.trace.events
        pairs = zip(trace.events[depth:], earlier[depth:], strict=False)
        self.lesson = "arithmetic was given other Python numbers again; they are fed to the graph from now on"
        self.number_sites |= {
            (now.function, now.origin)
            for now, then in pairs
            if differ_in_number(now, then) and is_feedable(now, trace.specs)
        }
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
        if any(is_random(operation.target) for operation in event.operations):
            self.drawing_sites |= {(event.function, event.origin)}
        return True


def _place(event: Event, index: int) -> Place:
    return event.function, event.origin, _references(event).index(External(index))


def _references(event: Event) -> list[Any]:
    return leaves((event.arguments, event.keywords), (Slot, External))


def _is_same_presence(left: Presence, right: Presence) -> bool:
    return len(left) == len(right) and all(
        had is has and (a is b or (isinstance(a, External) and isinstance(b, External) and a == b))
        for (a, had), (b, has) in zip(left, right, strict=True)
    )


def _is_lasting(tensor: torch.Tensor, trace: Trace) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or id(tensor) in trace.lasting


def _externals_of(event: Event, trace: Trace) -> list[torch.Tensor]:
    return [trace.externals[e.index] for e in leaves((event.arguments, event.keywords), External)]

"""The text of a stage: its operations as a Python function, which writes what is kept to where it stays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .factors import Link
from .native_run import OnePass
from .parts import BY_LEVEL, Crossing, Fixed, Role, Stage, StageCode, View, is_view
from .passes import Pass
from .vectorize import Joint, NotBatchableError, Rows
from .views import chain_to, keeps_rows

aten = torch.ops.aten


class Writer:
    """Writes the operations of one stage. `kept` are values of it that are written to rows that it is given.

    `inside` has operations that write over what they read of one of these.
    """

    def __init__(
        self,
        joint: Joint,
        stages: Mapping[fx.Node, Stage],
        stage: Stage,
        children: Mapping[fx.Node, Link],
        kept: Sequence[fx.Node],
        inside: Mapping[fx.Node, fx.Node],
        passes: Sequence[Pass] = (),
    ) -> None:
        self._joint = joint
        self._passes = {node: each for each in passes for node in each.nodes}
        self._stages = stages
        self._stage = stage
        self._children = children
        self._kept = kept
        self._inside = inside
        self._views: dict[str, tuple[fx.Node, int, Callable[[int, Tensor], Tensor]]] = {}
        """Views that this stage is given: of what, rows for an invocation, and how they are made."""
        self._within: dict[str, tuple[fx.Node, int, Callable[[int, Tensor], Tensor]]] = {}
        """The same of values in the memory of others."""
        self._fixed: dict[str, Fixed] = {}
        self._lines: list[str] = []
        self._objects: dict[str, Any] = {}
        self._made: set[fx.Node] = set()
        self._taken: dict[fx.Node, None] = {}
        self._links: dict[tuple[Role, Link], str] = {}
        self._place = {node: node.name for node in kept}
        """Where a result is written to: an expression."""
        for node in inside:
            self._see_inside(node)
        for node in kept:
            self._write_parts(node)

    def name(self, node: fx.Node) -> str:
        """Return the name of a value in this stage; make the view, or take the value, that it is."""
        if node in self._made:
            return node.name
        if node.op == "get_attr":
            self._objects[node.name] = self._joint.constants[str(node.target)]
        elif self._stages.get(node) is self._stage or is_view(node):
            if not self._hoist(node):
                self.node(node)
        elif node in self._children and self._stage is Stage.LEVEL:
            self._gather(node)
        else:
            self._taken[node] = None
        self._made.add(node)
        return node.name

    def node(self, node: fx.Node) -> None:
        """Write one operation."""
        if node in self._made:
            return
        if node in self._passes:
            self._pass(self._passes[node])
            return
        self._made.add(node)
        place = self._place.get(node)
        written = _WRITING[node.target] if place and writes(node) else None
        if node in self._kept and place is None:
            return  # a `cat` whose parts are written to where they belong
        if written is not None:
            arguments = ", ".join(self._text(argument) for argument in node.args)
            self._lines.append(f"{self._object(node.target, written)}({arguments}, out={place})")
            if node.name != place:
                self._lines.append(f"{node.name} = {place}")
        elif place is not None:
            self._lines.append(f"{place}.copy_({self._operation(node)})")
            if node.name != place:
                self._lines.append(f"{node.name} = {place}")
        else:
            self._lines.append(f"{node.name} = {self._operation(node)}")

    def _pass(self, done: Pass) -> None:
        """Write operations that are done in one compiled pass."""
        taken = [self.name(node) for node in done.taken]
        names = [node.name for node in (*done.taken, *done.made)]
        run = OnePass(done.code, names, [(n.name, n.meta["val"].shape) for n in done.made if n not in self._kept])
        given = [node.name for node in done.made if node in self._kept]
        call = self._object(f"pass_{len(self._objects)}", run)
        results = "".join(f"{name}, " for name, _ in run.made)
        self._lines.append(f"{results}{'= ' if results else ''}{call}(n, {', '.join([*taken, *given])})")
        self._made.update(done.nodes)

    def _hoist(self, node: fx.Node) -> bool:
        """Have a view of what is there before the levels, or has room for all of them, made once; say whether."""
        if self._stage not in BY_LEVEL or not is_view(node) or node.target is aten.split.Tensor:
            return False
        base, chain = chain_to(node, self._inside)
        if base.op == "get_attr":
            constant = self._joint.constants[str(base.target)]
            if any(view in self._joint.rows for view in chain):
                return False
            self._fixed[node.name] = Fixed(constant, self._maker(base, chain))
            return True
        here = self._stages.get(base) is self._stage or base in self._children
        if (here and base not in self._kept) or not keeps_rows(self._joint, base, chain):
            return False
        self._views[node.name] = base, self._joint.rows[node][1], self._maker(base, chain)
        if base in self._children:
            self.name(base)
        return True

    def _see_inside(self, node: fx.Node) -> None:
        """Have an operation write over what it reads."""
        base, chain = chain_to(node, self._inside)
        self._within[node.name] = base, self._joint.rows[node][1], self._maker(base, chain)
        self._place[node] = self.name(node.args[0])  # type: ignore[arg-type]

    def _maker(self, base: fx.Node, chain: Sequence[fx.Node]) -> Callable[[int, Tensor], Tensor]:
        """Return a function that makes a view."""
        before, self._made = self._made, {base, *chain}
        texts = [self._operation(node) if is_view(node) else self._text(node.args[0]) for node in chain]
        self._made = before
        lines = [f"{node.name} = {text}" for node, text in zip(chain, texts, strict=True)]
        return self._function("make", ["n", base.name], [*lines, f"return {chain[-1].name}"])[0]

    def give(self, link: Link, node: fx.Node) -> None:
        """Write that a gradient is added to those of children."""
        held = self.name(node)
        if self._base(node) in self._joint.tangents:
            held += ".clone()"  # handed on as it is: rows of the table that is written to
        give, table, rows = (self._link(role, link) for role in (Role.GIVE, Role.GRADIENTS, Role.OWED))
        self._lines.append(f"{give}({table}, 0, {rows}, {held})")

    def _base(self, node: fx.Node) -> fx.Node:
        while is_view(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _gather(self, node: fx.Node) -> None:
        link = self._children[node]
        table, rows = (self._link(role, link) for role in (Role.TABLE, Role.CHILDREN))
        gather = self._object(aten.index_select.default, torch.index_select)
        if node in self._place:
            self._lines.append(f"{gather}({table}, 0, {rows}, out={self._place[node]})")
        else:
            self._lines.append(f"{node.name} = {gather}({table}, 0, {rows})")

    def _link(self, role: Role, link: Link) -> str:
        return self._links.setdefault((role, link), f"{role.name.lower()}_of_{len(self._links)}")

    def _write_parts(self, cat: fx.Node) -> None:
        """Have the operands of a `cat` that is kept written to where they belong, if they all can be."""
        if cat.target is not aten.cat.default:
            return
        parts: Any = cat.args[0]
        dimension: Any = cat.args[1] if len(cat.args) > 1 else 0
        sources = [part.args[0] if part.target is aten.view.default else part for part in parts]
        own = all(self._stages.get(node) is self._stage for node in (*parts, *sources))
        sole = len({*parts}) == len(parts) and all(len(node.users) == 1 for node in (*parts, *sources))
        alike = all(part.meta["val"].dtype is cat.meta["val"].dtype for part in parts)
        if not (own and sole and alike) or any(not writes(node) or node in self._place for node in sources):
            return
        names = [f"{cat.name}_part_{index}" for index in range(len(parts))]  # `cat_1` is a node's own
        sizes = [part.meta["val"].shape[dimension] for part in parts]
        split = self._object(aten.split_with_sizes.default, torch.split_with_sizes)
        for index, (name, part, source) in enumerate(zip(names, parts, sources, strict=True)):
            self._place[source] = name
            expression, each = f"{split}({cat.name}, {sizes}, {dimension})[{index}]", self._joint.rows[source][1]
            if source is not part:
                self._made.add(part)
                expression += f".view({self._text([Rows(each), *source.meta['val'].shape[1:]])})"
            if self._stage in BY_LEVEL and dimension != 0:
                self._views[name] = cat, each, self._function("make", ["n", cat.name], [f"return {expression}"])[0]
            else:
                self._lines.append(f"{name} = {expression}")
        del self._place[cat]

    def _operation(self, node: fx.Node) -> str:
        target: Any = node.target
        if target is operator.getitem:
            source = node.args[0]
            if source.target is aten.split.Tensor and self._takes_one_chunk(source):  # type: ignore[union-attr]
                return self._chunk(node, source)
            return f"{self._text(node.args[0])}[{self._text(node.args[1])}]"
        arguments = [self._text(argument) for argument in node.args]
        if target is aten.view.default:
            return f"{arguments[0]}.reshape({arguments[1]})"
        if target is aten.t.default:
            return f"{arguments[0]}.t()"
        keywords = [f"{name}={self._text(argument)}" for name, argument in node.kwargs.items()]
        function = _FAST.get(target) or getattr(target, "_op", target)
        return f"{self._object(target, function)}({', '.join([*arguments, *keywords])})"

    def _takes_one_chunk(self, split: fx.Node) -> bool:
        chunks = [chunk for chunk in split.users if any(self._stages.get(user) is self._stage for user in chunk.users)]
        return split not in self._made and len(chunks) == 1

    def _chunk(self, node: fx.Node, split: Any) -> str:
        """Return the expression for one chunk without the others."""
        source, size, *rest = split.args
        dimension = rest[0] if rest else 0
        length = node.meta["val"].shape[dimension]
        return f"{self._text(source)}.narrow({dimension}, {node.args[1] * size}, {length})"  # type: ignore[operator]

    def _object(self, target: Any, function: Any) -> str:
        name = f"f_{str(target).replace('.', '_').replace('::', '_')}"
        self._objects[name] = function
        return name

    def _text(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self.name(argument)
        if isinstance(argument, Rows):
            return f"{argument.each} * n" if argument.each != 1 else "n"
        if isinstance(argument, tuple):
            return f"({''.join(self._text(item) + ', ' for item in argument)})"
        if isinstance(argument, list):
            return f"[{', '.join(self._text(item) for item in argument)}]"
        if argument is None or type(argument) in (int, bool, str):
            return repr(argument)
        name = f"c{len(self._objects)}"
        self._objects[name] = argument
        return name

    def code(self, returned: Sequence[fx.Node], crossings: Mapping[fx.Node, Crossing]) -> StageCode:
        """Compile the text."""
        missing = [node for node in self._taken if node not in crossings]
        if missing:
            raise NotBatchableError(f"{missing[0]} is needed in {self._stage.name} and not handed on")
        views = {name: View(crossings[base], each, make) for name, (base, each, make) in self._views.items()}
        arguments: list[tuple[str, tuple[Role, Any]]] = [
            *((node.name, (Role.PART, crossings[node])) for node in (*self._taken, *self._kept)),
            *((name, (Role.VIEW, view)) for name, view in views.items()),
            *((name, (Role.CONSTANT, fixed)) for name, fixed in self._fixed.items()),
            *((name, held) for held, name in self._links.items()),
        ]
        lines = [*self._lines, f"return ({''.join(node.name + ', ' for node in returned)})"]
        run, text = self._function("run", ["n", *(name for name, _ in arguments)], lines)
        kept = [crossings[node] for node in self._kept]
        inside = {name: View(crossings[base], each, make) for name, (base, each, make) in self._within.items()}
        return StageCode(run, [held for _, held in arguments], kept, inside, [node.name for node in returned], text)

    def _function(self, name: str, parameters: Sequence[str], lines: Sequence[str]) -> tuple[Any, str]:
        """Compile a function of the objects named so far; return it with its text."""
        text = f"def {name}({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in lines)
        namespace = dict(self._objects)
        exec(compile(text, f"<twofold {self._stage.name.lower()}>", "exec"), namespace)
        return namespace[name], text


def writes(node: fx.Node) -> bool:
    """Say whether an operation can write its result to where it is told."""
    return node.target in _WRITING and not node.kwargs


def _index(source: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Do what `source[indices]` does; rows named by numbers that do not count from the end are copied at once."""
    rows = indices[0]
    if rows is not None and len(indices) == 1 and rows.dim() == 1 and rows.dtype is torch.int64 and len(rows):
        copied = source.device.type == "cpu" and int(rows.amin()) >= 0
        return source.index_select(0, rows) if copied else aten.index.Tensor(source, indices)
    return aten.index.Tensor(source, indices)


_FAST: dict[Any, Any] = {
    aten.index.Tensor: _index,
    aten.mul.Tensor: torch.mul,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.addcmul.default: torch.addcmul,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.split.Tensor: torch._VF.split,  # pyright: ignore[reportAttributeAccessIssue] torch.split is Python
    aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select,
    aten.neg.default: torch.neg,
}
"""PyTorch's own Python functions, which are faster to call than the overloads they stand for."""

_WRITING: dict[Any, Any] = {
    target: _FAST[target]
    for target in (
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.div.Tensor,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.mm.default,
        aten.addmm.default,
        aten.addcmul.default,
        aten.cat.default,
        aten.stack.default,
        aten.neg.default,
    )
}
"""Those of them that write their result where `out` says."""

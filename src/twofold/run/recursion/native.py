"""A stage that runs level by level as C++: all levels in one call, each level's elementwise work in one pass.

From Python a level of the binary TreeLSTM is 10 operations forward and 9 backward, each called for some 20 rows; half
of a level's time is neither a product nor a function of an element. Here products are the BLAS's that PyTorch brings,
rows are gathered and given by copying them, and what is elementwise is done row by row, while the row is in the
first cache. What has no form here (see `EXPRESSIONS`) leaves the stage to Python.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .factors import Link
from .native_text import EXPRESSIONS, JOINING, PRELUDE, PRODUCTS
from .parts import Crossing, NativeCode, Role, Same, Stage, is_view
from .vectorize import SIZES, Joint
from .views import cuts_rows, shown

aten = torch.ops.aten


class NoNativeForm(Exception):
    """A stage has an operation, or values, that only Python can run. The text says which, for people."""


def unfit(node: fx.Node) -> NoNativeForm:
    """Return what is to be raised for a value that native code cannot read or write."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and (value.dtype is not torch.float32 or value.device.type != "cpu"):
        return NoNativeForm(f"native code has no values of {value.dtype} on {value.device.type}")
    return NoNativeForm(f"the rows of a value ({node.name}) lie in memory as native code cannot take them")


@dataclass(frozen=True)
class Place:
    """Where a value is: the argument that it is in, and an example of it as that lies in memory.

    `each` is how many of the example's rows belong to an invocation, `step` how many elements lie from one
    invocation to the next; both are 0 for what is the same for all. What is `passing` is overwritten by the next row.
    """

    argument: str
    example: Tensor
    each: int
    step: int
    passing: bool = False
    apart: str = ""
    """How many elements lie from one invocation to the next in memory, if that is told with a batch."""

    @property
    def row(self) -> str:
        """Where row `r` begins."""
        start = f" + {self.example.storage_offset()}" if self.example.storage_offset() else ""
        moving = f" + r * {self.apart or self.step}" if self.step and not self.passing else ""
        return f"{self.argument}{start}{moving}"


@dataclass
class NativeWriter:
    """Writes one stage. Of its values, `kept` are written to rows that it is given, `inside` over what they read."""

    joint: Joint
    stages: Mapping[fx.Node, Stage]
    stage: Stage
    children: Mapping[fx.Node, Link]
    kept: Sequence[fx.Node]
    inside: Mapping[fx.Node, fx.Node]
    crossings: Mapping[fx.Node, Crossing]
    places: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    arguments: dict[tuple[Role, Any], str] = field(default_factory=dict[tuple[Role, Any], str])
    matrices: set[str] = field(default_factory=set[str])
    """Arguments that may lie transposed."""
    heads: list[str] = field(default_factory=list[str])
    steps: list[list[str]] = field(default_factory=list[list[str]])
    """What is done at a level, in order; a list that begins with an empty line is done row by row."""

    def code(self, nodes: Sequence[fx.Node], owed: Sequence[tuple[Link, fx.Node]]) -> NativeCode:
        """Return the text for the operations of the stage, and what it takes. Raises `NoNativeForm`."""
        for node in self.children:
            if self.stage is Stage.LEVEL and any(self.stages.get(user) is self.stage for user in users_of(node)):
                self._gather(node)
        self._join_in_place(nodes)
        for node in nodes:
            self._node(node)
        for link, node in owed:
            self._give(link, node)
        lines = [line for step in self.steps for line in _loop(step)]
        body = "\n".join(f"        {line}" for line in [*self.heads, *lines])
        text = (
            f'{PRELUDE}\nextern "C" void run(const int64_t* segments, int64_t first, int64_t end, int64_t step,\n'
            "                    char** given, const int64_t* flags, Gemm gemm) {\n"
            "    for (int64_t s = first; s != end; s += step) {\n"
            "        const int64_t *segment = segments + 3 * s, n = segment[2];\n"
            f"{body}\n    }}\n}}\n"
        )
        widest = max([node.meta["val"].numel() // SIZES[0] for node in nodes], default=1)
        return NativeCode(text, list(self.arguments), widest)

    # Where values are.

    def _argument(self, role: Role, what: Any, kind: str, step: int | str | None) -> str:
        """Return the name of an argument. `step`: elements from row to row if a level begins at its own first row."""
        known = self.arguments.get((role, what))
        if known is None:
            number = len(self.arguments)
            known = self.arguments[role, what] = f"a{number}"
            # Rows of tables are counted apart from those of a block's values.
            offset = "" if step is None else f" + segment[flags[{number}] & 1] * {step}"
            self.heads.append(f"{kind}* {known} = ({kind}*)given[{number}]{offset};")
        return known

    def _place(self, node: fx.Node) -> Any:
        known = self.places.get(node)
        if known is None:
            known = self.places[node] = self._found(node)
        return known

    def _found(self, node: fx.Node) -> Any:
        if is_view(node):
            return self._viewed(node)
        if node in self.inside:
            return self._place(node.args[0])  # type: ignore[arg-type]
        if node.op == "get_attr":
            return self._constant(node, [])
        if self.stages.get(node) is self.stage and node not in self.kept:
            return self._scratch(node)
        crossing = self.crossings.get(node)
        if crossing is None or crossing.dtype is not torch.float32 or crossing.device != torch.device("cpu"):
            raise unfit(node)
        if crossing.dimension is None:
            return Place(self._argument(Role.SAME, crossing, "float", None), torch.empty(node.meta["val"].shape), 0, 0)
        if crossing.dimension != 0:
            raise unfit(node)
        step = crossing.each * math.prod(crossing.shape)
        if self.stages.get(node) is self.stage:
            name = self._argument(Role.PART, crossing, "float", step)
            return Place(name, torch.empty(node.meta["val"].shape), crossing.each, step)
        # Rows of what others made may lie apart: they may be a part of other rows.
        known = self.arguments.get((Role.PART, crossing))
        apart = f"(flags[{len(self.arguments) if known is None else known[1:]}] >> 1)"
        name = self._argument(Role.PART, crossing, "float", apart)
        return Place(name, torch.empty(node.meta["val"].shape), crossing.each, step, apart=apart)

    def _viewed(self, node: fx.Node) -> Any:
        source: Any = node.args[0]
        base, chain = source, [node]
        while is_view(base):
            base, chain = base.args[0], [base, *chain]
        if base.op == "get_attr":
            return self._constant(base, chain)
        held = self._place(source)
        listed = isinstance(held, list)
        if cuts_rows(node) or (not listed and held.each == 0) or self.joint.rows.get(node, (0, 0))[0] != 0:
            raise unfit(node)
        if listed:
            assert node.target is operator.getitem
            return held[node.args[1]]  # type: ignore[index]
        found = shown(held.example, [node])
        examples = list(found) if isinstance(found, tuple | list) else [found]
        storage = held.example.untyped_storage().data_ptr()
        if any(example.untyped_storage().data_ptr() != storage for example in examples):
            raise unfit(node)
        each = [self.joint.rows.get(node, (0, held.each * len(e) // len(held.example)))[1] for e in examples]
        made = [replace(held, example=e, each=n) for e, n in zip(examples, each, strict=True)]
        return made if isinstance(found, tuple | list) else made[0]

    def _constant(self, base: fx.Node, chain: Sequence[fx.Node]) -> Place:
        tensor = self.joint.constants[str(base.target)]
        if any(node in self.joint.rows for node in chain) or tensor.dtype is not torch.float32:
            raise unfit(base)
        if tensor.device.type != "cpu":
            raise unfit(base)
        example = shown(tensor.detach(), chain)
        what = Same(tensor, lambda held: shown(held, chain), tuple(node.name for node in (base, *chain)))
        return Place(self._argument(Role.CONSTANT, what, "float", None), torch.empty(example.shape), 0, 0)

    def _scratch(self, node: fx.Node) -> Place:
        """Give a value that this stage alone sees memory for the rows of a level."""
        value = node.meta["val"]
        if node not in self.joint.rows or not self.joint.keeps_rows_first(node) or value.dtype is not torch.float32:
            raise unfit(node)
        step = value.numel() // SIZES[0]
        name = self._argument(Role.SCRATCH, (node.name, step), "float", None)
        return Place(name, torch.empty(value.shape), self.joint.rows[node][1], step)

    def _join_in_place(self, nodes: Sequence[fx.Node]) -> None:
        """Have what a `cat` or `stack` joins computed where it belongs, if that is all that takes it."""
        for node in nodes:
            if node.target in JOINING:
                for part, place in self._parts(node):
                    source: Any = part.args[0] if part.target is aten.view.default else part
                    sole = all(len(held.users) == 1 for held in (part, source)) and source not in self.kept
                    written = source in nodes and source not in self.inside and source not in self.places
                    if sole and written and source.target not in JOINING and not is_view(source):
                        try:
                            example = place.example.view(source.meta["val"].shape)
                        except RuntimeError:  # not without a copy
                            continue
                        self.places[source] = replace(place, example=example, each=self.joint.rows[source][1])

    def _parts(self, node: fx.Node) -> list[tuple[fx.Node, Place]]:
        """Return what is joined, and where each part of it belongs."""
        place = self._place(node)
        parts: Any = node.args[0]
        dimension: Any = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()  # type: ignore[operator]
        if dimension == 0:
            raise unfit(node)
        if node.target is aten.stack.default:
            examples = place.example.unbind(dimension)
        else:
            examples = place.example.split([part.meta["val"].shape[dimension] for part in parts], dimension)
        return [(part, replace(place, example=example)) for part, example in zip(parts, examples, strict=True)]

    # What is done.

    def _node(self, node: fx.Node) -> None:
        if node.target in PRODUCTS and not node.kwargs:
            self._product(node)
        elif node.target in JOINING:
            for part, place in self._parts(node):
                if not _same_memory(self._place(part), place):
                    self._each("{0}", [part], place, part.meta["val"].shape)
        elif node.target in EXPRESSIONS and not node.kwargs:
            place = self._place(node)
            self._each(EXPRESSIONS[node.target], node.args, place, node.meta["val"].shape)
        elif not is_view(node):
            raise NoNativeForm(f"{node.target} has no native form")

    def _product(self, node: fx.Node) -> None:
        *bias, left, right = node.args
        a, b, c = self._place(left), self._place(right), self._place(node)  # type: ignore[arg-type]
        (_, depth), (_, width) = a.example.shape, c.example.shape
        if a.each == 0 or b.each or a.example.stride(1) != 1 or c.example.stride(1) != 1 or a.each != c.each:
            raise unfit(node)
        if a.step != a.each * a.example.stride(0) or c.step != c.each * c.example.stride(0):
            raise unfit(node)
        if bias:
            if self._place(bias[0]).example.shape != (width,):  # type: ignore[arg-type]
                raise unfit(node)
            self._each("{0}", bias, c, node.meta["val"].shape)
        if bias and self._place(bias[0]).argument == b.argument:  # type: ignore[arg-type]
            raise unfit(node)
        self.matrices.add(b.argument)
        if a.apart and a.each != 1:
            raise unfit(node)
        turned = f"flags[{list(self.arguments.values()).index(b.argument)}]"
        self.steps.append(
            [
                f"product(gemm, n * {a.each}, {width}, {depth}, {_at(a)}, {a.apart or a.example.stride(0)},"
                f" {_at(b)}, {turned}, {_at(c)}, {c.example.stride(0)}, {float(bool(bias))}f);"
            ]
        )

    def _each(self, expression: str, arguments: Sequence[Any], out: Place, shape: Sequence[int]) -> None:
        """Write an elementwise operation, row by row."""
        places: list[Place] = [out]
        texts: list[str] = []
        for argument in arguments:
            if isinstance(argument, fx.Node):
                texts.append(f"p{len(places)}[{{{len(places)}}}]")
                places.append(self._place(argument))
                if places[-1].argument in self.matrices:
                    raise unfit(argument)
            elif type(argument) in (int, float) and math.isfinite(argument):
                texts.append(f"{float(argument)!r}f")
            else:
                raise NoNativeForm(f"{argument!r} is no number that native code takes")
        sizes, strides = _nest([_inner(place, shape, out.each) for place in places])
        if not self.steps or self.steps[-1][0]:
            self.steps.append([""])
        lines = [f"float* p{index} = {place.row};" for index, place in enumerate(places)]
        indices = [" + ".join(f"i{d} * {s}" for d, s in enumerate(own) if s) or "0" for own in strides]
        for d, size in enumerate(sizes):
            if d == len(sizes) - 1:
                lines.append("#pragma GCC ivdep")
            lines.append(f"for (int64_t i{d} = 0; i{d} < {size}; i{d}++)")
        value = expression.format(*texts).format(*indices)
        lines.append(f"    p0[{indices[0]}] = {value};")
        self.steps[-1] += ["{", *(f"    {line}" if line[0] != "#" else line for line in lines), "}"]

    def _gather(self, node: fx.Node) -> None:
        link = self.children[node]
        place = self._place(node) if node in self.kept else self._scratch(node)
        self.places[node] = place
        row = place.step // place.each
        table = self._argument(Role.TABLE, link, "float", None)
        rows = self._argument(Role.CHILDREN, link, "int64_t", place.each)
        self.steps.append(
            [
                f"for (int64_t r = 0; r < n * {place.each}; r++)"
                f" memcpy({place.argument} + r * {row}, {table} + {rows}[r] * {row}, {4 * row});"
            ]
        )

    def _give(self, link: Link, node: fx.Node) -> None:
        place = self._place(node)
        each = len(link.operands)
        row = place.step // each
        if place.each != each or place.example.stride(0) != row or not place.example[0].is_contiguous():
            raise unfit(node)
        if place.example[0].numel() != row or (place.apart and each > 1):
            raise unfit(node)
        table = self._argument(Role.GRADIENTS, link, "float", None)
        rows = self._argument(Role.OWED, link, "int64_t", each)
        once = f"flags[{list(self.arguments.values()).index(table)}]"
        self.steps.append(
            [
                f"for (int64_t r = 0; r < n * {each}; r++) {{",
                f"    float *to = {table} + {rows}[r] * {row}, *from = {_at(place)} + r * {place.apart or row};",
                f"    if ({once}) memcpy(to, from, {4 * row});",
                f"    else for (int64_t i = 0; i < {row}; i++) to[i] += from[i];",
                "}",
            ]
        )


def users_of(node: fx.Node) -> list[fx.Node]:
    """Return the operations that take a value or views of it."""
    found: list[fx.Node] = []
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            (waiting if is_view(user) else found).append(user)
    return found


def _at(place: Place) -> str:
    return f"{place.argument} + {place.example.storage_offset()}" if place.example.storage_offset() else place.argument


def _same_memory(one: Place, other: Place) -> bool:
    if one.argument != other.argument or one.example.shape != other.example.shape:
        return False
    apart = [
        s != t for n, s, t in zip(one.example.shape, one.example.stride(), other.example.stride(), strict=True) if n > 1
    ]
    return one.example.storage_offset() == other.example.storage_offset() and not any(apart)


def _loop(step: list[str]) -> list[str]:
    if step[0]:
        return step
    return ["for (int64_t r = 0; r < n; r++) {", *step[1:], "}"]


def _inner(place: Place, shape: Sequence[int], each: int) -> list[tuple[int, int]]:
    """Return sizes and strides within an invocation of a value that is broadcast to a shape."""
    if place.each not in (0, each):
        raise NoNativeForm("an operation takes rows of several kinds")
    try:
        wide = place.example.expand(tuple(shape))
    except RuntimeError as error:
        raise NoNativeForm(str(error)) from error
    first = (each, wide.stride(0))
    if place.each and each * wide.stride(0) != place.step:
        raise NoNativeForm("an operation takes rows that lie apart")
    return [first, *zip(wide.shape[1:], wide.stride()[1:], strict=True)]


def _nest(places: Sequence[list[tuple[int, int]]]) -> tuple[list[int], list[list[int]]]:
    """Return the sizes of as few nested loops as will do, and the strides of each value in them."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in places]
    for dimension, (size, _) in enumerate(places[0]):
        own = [place[dimension][1] for place in places]
        if size == 1:
            continue
        if sizes and all(held[-1] == size * stride for held, stride in zip(strides, own, strict=True)):
            sizes[-1] *= size
            for held, stride in zip(strides, own, strict=True):
                held[-1] = stride
        else:
            sizes.append(size)
            for held, stride in zip(strides, own, strict=True):
                held.append(stride)
    if not sizes:
        return [1], [[0] for _ in places]
    return sizes, strides

"""Reading graphs back from the text that `text.show` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from .ir import DTYPE_NAMES, Ambient, Argument, Graph, Node, Origin, SubGraph, TensorSpec, Value
from .names import resolve
from .ops import OPS
from .verify import verify

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_HEADER = re.compile(r"(?P<keyword>graph |subgraph |)(?P<name>[^\s(]+)\(")
_OPERATION = re.compile(r"(?P<op>[a-z_]+)(?: (?P<target>[^\s(]+))?\(")
_TRAILER = re.compile(r"(?: \{(?P<ambient>[^}]*)\})?(?P<colon>:)?(?:  # (?P<origin>.*))?")
_ORIGIN = re.compile(r"(?P<file>.*?):(?P<line>\d+)(?: in (?P<function>.*))?")
_DEFINITION = re.compile(r"%(?P<name>[A-Za-z0-9_.]+): (?P<spec>[^\s=(),]+(?:,[^\s=(),]+)*)")
_SPEC = re.compile(
    r"(?P<dtype>[a-z0-9_]+)\[(?P<shape>[\d?,]*)\](?:\{(?P<stride>[\d,]*)\})?(?:@(?P<device>[a-z0-9:]+))?(?P<grad>!)?"
)
_TOKEN = re.compile(
    r"%(?P<value>[A-Za-z0-9_.]+)"
    r'|(?P<string>"(?:[^"\\]|\\.)*")'
    r"|(?P<number>-?(?:inf|nan|\d+(?:\.\d*)?(?:e[+-]?\d+)?))(?![A-Za-z0-9_])"
    r"|(?P<word>\.\.\.|[A-Za-z_][A-Za-z0-9_.]*)"
    r"|(?P<opening>[(\[{])"
    r"|(?P<opaque><)"
)
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "complex": complex,
    "device": torch.device,
    "Size": torch.Size,
    "range": range,
    "slice": slice,
}
_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False, "...": ...}
_TORCH_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)


class GraphSyntaxError(ValueError):
    """Text that is not a graph; the message has the line and what was expected there."""


def parse(text: str) -> Graph:
    """Read a graph, with its table of SubGraphs, and verify it. Common indentation is ignored.

    Raises `GraphSyntaxError`, and `MalformedGraphError` for text that reads well but breaks a rule.
    """
    lines = _Lines(text)
    graph = _parse_body(lines, lines.next("a graph"), "graph ", {})
    scope = {value.name: value for value in graph.inputs}
    table: dict[str, SubGraph] = {}
    while (line := lines.peek()) is not None:
        body = _parse_body(lines, lines.next("a subgraph"), "subgraph ", scope)
        if body.name in table:
            line.fail(f"a name other than {body.name}, which is taken")
        table[body.name] = body
    result = Graph(graph.name, graph.inputs, graph.nodes, graph.outputs, table)
    verify(result)
    return result


def parse_spec(text: str) -> TensorSpec | None:
    """Read a spec as `str(TensorSpec)` writes it; `object` is None."""
    if text == "object":
        return None
    match = _SPEC.fullmatch(text)
    dtype: Any = match and (_DTYPES.get(match["dtype"]) or getattr(torch, match["dtype"], None))
    if match is None or not isinstance(dtype, torch.dtype):
        raise GraphSyntaxError(f"expected a spec like f32[2,?], got {text!r}")
    shape = tuple(None if size == "?" else int(size) for size in match["shape"].split(",") if size)
    stride = match["stride"]
    strides = None if stride is None else tuple(int(step) for step in stride.split(",") if step)
    device = torch.device(match["device"] or "cpu")
    return TensorSpec(shape, dtype, device, match["grad"] is not None, strides)


@dataclass(slots=True)
class _Line:
    """One line, read from left to right."""

    number: int
    depth: int
    text: str
    position: int = 0

    def fail(self, expected: str) -> NoReturn:
        rest = self.text[self.position :] or "the end of the line"
        raise GraphSyntaxError(f"line {self.number}: expected {expected}, got {rest!r}")

    def take(self, literal: str) -> bool:
        if not self.text.startswith(literal, self.position):
            return False
        self.position += len(literal)
        return True

    def expect(self, literal: str) -> None:
        if not self.take(literal):
            self.fail(repr(literal))

    def match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        found = pattern.match(self.text, self.position)
        if found is None:
            self.fail(expected)
        self.position = found.end()
        return found

    def expect_end(self) -> None:
        if self.position != len(self.text):
            self.fail("the end of the line")


class _Lines:
    """The lines that are not blank, with the depth of each relative to the first."""

    def __init__(self, text: str) -> None:
        numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        margins = [len(line) - len(line.lstrip(" ")) for _, line in numbered]
        least = min(margins, default=0)
        self._lines = [
            _Line(number, margin - least, line.strip())
            for (number, line), margin in zip(numbered, margins, strict=True)
        ]
        self._next = 0

    def peek(self) -> _Line | None:
        return self._lines[self._next] if self._next < len(self._lines) else None

    def next(self, expected: str) -> _Line:
        line = self.peek()
        if line is None:
            raise GraphSyntaxError(f"expected {expected}, got the end of the text")
        self._next += 1
        return line


Scope = dict[str, Value]


def _parse_body(lines: _Lines, header: _Line, keyword: str, outer: Scope) -> SubGraph:
    match = header.match(_HEADER, f"{keyword}name(")
    if match["keyword"] != keyword:
        header.position = 0
        header.fail(f"{keyword}name(")
    inputs = tuple(_parse_definitions(header, ")"))
    header.expect(":")
    header.expect_end()
    scope = outer | {value.name: value for value in inputs}
    nodes: list[Node] = []
    while True:
        line = lines.next(f"return of {match['name']}")
        if line.depth <= header.depth:
            line.fail(f"return of {match['name']}")
        if line.take("return"):
            outputs = tuple(_parse_items(line, scope, "")) if line.take(" ") else ()
            line.expect_end()
            return SubGraph(match["name"], inputs, tuple(nodes), outputs)
        node = _parse_node(lines, line, scope)
        nodes.append(node)
        scope.update((value.name, value) for value in node.results)


def _parse_definitions(line: _Line, closing: str) -> Iterator[Value]:
    while not line.take(closing):
        match = line.match(_DEFINITION, f"%name: spec or {closing!r}")
        try:
            spec = parse_spec(match["spec"])
        except GraphSyntaxError as error:
            raise GraphSyntaxError(f"line {line.number}: {error}") from None
        yield Value(match["name"], spec)
        line.take(", ")


def _parse_node(lines: _Lines, line: _Line, scope: Scope) -> Node:
    results = tuple(_parse_definitions(line, " = ")) if line.text.startswith("%") else ()
    match = line.match(_OPERATION, "an operation")
    op = OPS.get(match["op"])
    if op is None:
        line.position = match.start()
        line.fail(f"one of the ops {', '.join(OPS)}")
    target: Any = match["target"]
    if op.target == "callable":
        target = _parse_target(line, target or "")
    arguments: list[Argument] = []
    keywords: list[tuple[str, Argument]] = []
    while not line.take(")"):
        if name := re.compile(r"([A-Za-z_]\w*)=").match(line.text, line.position):
            line.position = name.end()
            keywords.append((name[1], _parse_argument(line, scope)))
        else:
            arguments.append(_parse_argument(line, scope))
        line.take(", ")
    trailer = line.match(_TRAILER, "the end of a node")
    line.expect_end()
    subgraphs: list[SubGraph] = []
    while trailer["colon"] and (body := lines.peek()) is not None and body.depth > line.depth:
        subgraphs.append(_parse_body(lines, lines.next("a body"), "", scope))
    origin = _parse_origin(line, trailer["origin"])
    ambient = _parse_ambient(line, trailer["ambient"] or "")
    pairs = tuple(keywords)
    return Node(match["op"], target, tuple(arguments), pairs, results, tuple(subgraphs), origin, ambient)


def _parse_target(line: _Line, name: str) -> Callable[..., Any]:
    if "<" in name:
        raise GraphSyntaxError(f"line {line.number}: {name} has no name by which it can be found again")
    try:
        return resolve(name)
    except (ImportError, AttributeError):
        raise GraphSyntaxError(f"line {line.number}: expected a known callable, got {name!r}") from None


def _parse_ambient(line: _Line, text: str) -> Ambient:
    words = text.split()
    autocast: list[tuple[str, torch.dtype]] = []
    for word in words:
        device, _, name = word.removeprefix("autocast:").partition("=")
        dtype = _DTYPES.get(name) or getattr(torch, name, None)
        if word.startswith("autocast:") and isinstance(dtype, torch.dtype):
            autocast.append((device, dtype))
        elif word not in {"no_grad", "inference", "no_autocast_cache"}:
            raise GraphSyntaxError(f"line {line.number}: expected a mode, got {word!r}")
    return Ambient("no_grad" not in words, "inference" in words, tuple(autocast), "no_autocast_cache" not in words)


def _parse_origin(line: _Line, text: str | None) -> Origin | None:
    if text is None:
        return None
    match = _ORIGIN.fullmatch(text)
    if match is None:
        raise GraphSyntaxError(f"line {line.number}: expected an origin like train.py:12, got {text!r}")
    return Origin(match["file"], int(match["line"]), match["function"] or "")


def _parse_items(line: _Line, scope: Scope, closing: str) -> Iterator[Argument]:
    """Yield arguments up to `closing`, or up to the end of the line if it is empty."""
    while not (line.take(closing) if closing else line.position == len(line.text)):
        yield _parse_argument(line, scope)
        line.take(",")
        line.take(" ")


def _parse_argument(line: _Line, scope: Scope) -> Any:
    start = line.position
    token = line.match(_TOKEN, "an argument")
    text = token[0]
    match token.lastgroup:
        case "value":
            value = scope.get(token["value"])
            if value is None:
                raise GraphSyntaxError(f"line {line.number}: {text} is not defined before its use")
            return value
        case "string":
            return json.loads(text)
        case "number":
            return float(text) if re.search(r"[.ean]", text) else int(text)
        case "opening":
            return _parse_container(line, scope, text)
        case "word":
            return _parse_word(line, scope, text)
        case _:
            line.position = start
            return line.fail("an argument (an object shown as <…> cannot be read back)")


def _parse_container(line: _Line, scope: Scope, opening: str) -> Any:
    if opening == "(":
        return tuple(_parse_items(line, scope, ")"))
    if opening == "[":
        return list(_parse_items(line, scope, "]"))
    items: dict[Any, Any] = {}
    while not line.take("}"):
        key = _parse_argument(line, scope)
        line.expect(": ")
        items[key] = _parse_argument(line, scope)
        line.take(", ")
    return items


def _parse_word(line: _Line, scope: Scope, word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if word in _CONSTRUCTORS and line.take("("):
        return _CONSTRUCTORS[word](*_parse_items(line, scope, ")"))
    constant = getattr(torch, word.removeprefix("torch."), None)
    if not isinstance(constant, _TORCH_CONSTANTS):
        raise GraphSyntaxError(f"line {line.number}: expected an argument, got {word!r}")
    return constant

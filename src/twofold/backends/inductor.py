"""Inductor: segments compiled to fused kernels, outside the program's process.

A segment is cut into pieces: runs that Inductor compiles, and calls that are best left as they are (fused optimizer
kernels, loss scaling). Each piece travels as the text of its graph to a compile process and comes back as a file,
so that the program never waits for a compiler and shares no interpreter lock with one. Kernels are kept in
Inductor's own disk cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch

from twofold.convert.from_traces import Program
from twofold.convert.segments import carve
from twofold.graph import Graph, Node, Value, map_values, parse, show

from .executable import Environment, lower_to_fx
from .host import keep_freed_memory, on_one_thread, threads_for

aten: Any = torch.ops.aten

MAX_PIECE_NODES = 1500
"""Beyond this a piece is cut: Inductor's scheduling grows faster than linearly (35-step LSTM loop as one graph of
2,500 nodes: more than 5 minutes; in two halves: about 13 s each)."""

SMALLEST_CHUNK = 8192
"""Elements that a thread of a compiled CPU kernel is given at least: some 4 µs of work. Inductor's own 512 are done
sooner than a second thread is there: the MLP of the benchmarks on two threads took 450 µs a launch instead of 390."""

VECTORS = frozenset({"AVX2", "AVX512"})
"""What PyTorch calls the instructions for which its own kernels were built and are in use."""

_LEFT_ALONE = ("_fused_", "_amp_", "_foreach_")


class CompileFailed(Exception):
    """The compiler gave up on a piece; the message is its own last line. `code` is one of `errors.CODES`."""

    def __init__(self, reason: str, code: str = "compile_failed") -> None:
        super().__init__(reason)
        self.code = code

    @classmethod
    def of(cls, error: BaseException) -> CompileFailed:
        """Name what went wrong beneath a compiler, memory that ran out among it."""
        message = str(error).strip().splitlines() or [""]
        code = "out_of_memory" if _is_for_memory(error) else "compile_failed"
        return cls(f"{type(error).__name__}: {message[0][:300]}".removesuffix(": "), code)


def _is_for_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, here or in what led to `error`: Inductor wraps what is raised within it."""
    if error is None:
        return False
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "Killed signal terminated program" in str(error)  # g++ of its cc1plus
        or _is_for_memory(error.__cause__)
    )


def is_left_alone(node: Node) -> bool:
    """Whether a call stays one of eager's kernels."""
    return getattr(node.target, "__name__", str(node.target)).removeprefix("aten.").startswith(_LEFT_ALONE)


def split_pieces(program: Program) -> list[list[Graph]]:
    """Return, for each segment, the bodies that are compiled or replayed one after the other."""
    finals = {value for segment in program.segments for value in segment.outputs}
    runs: list[list[Node]] = []
    owners: list[int] = []
    for index, segment in enumerate(program.segments):
        for run in _runs(segment.graph.nodes):
            runs.append(run)
            owners.append(index)
    nothing: list[set[Value]] = [set() for _ in runs]
    views = {v: n for v, n in program.views.items() if v not in finals}
    bodies = carve(runs, nothing, views, finals, "piece")
    return [[b for b, owner in zip(bodies, owners, strict=True) if owner == i] for i in range(len(program.segments))]


def _runs(nodes: Sequence[Node]) -> list[list[Node]]:
    runs: list[list[Node]] = []
    size = 0
    kind: bool | None = None
    for node in nodes:
        alone = is_left_alone(node)
        if alone is not kind or size >= MAX_PIECE_NODES:
            runs.append([])
            kind, size = alone, 0
        runs[-1].append(node)
        size += 1
    return runs


def rewrite_for_inductor(graph: Graph) -> Graph:
    """Replace operations whose schema hides what they write.

    `native_batch_norm` and `cudnn_batch_norm` update the running statistics unannounced, which Inductor's
    functional form would drop; `_native_batch_norm_legit` announces it.
    """
    nodes = tuple(new for node in graph.nodes for new in _REWRITES.get(node.target, _keep)(node))
    return replace(graph, nodes=nodes)


def _keep(node: Node) -> list[Node]:
    return [node]


def _rewrite_batch_norm(node: Node) -> list[Node]:
    x, weight, bias, mean, variance, training, momentum, epsilon = node.arguments
    if not training or mean is None:
        return [node]
    target = aten._native_batch_norm_legit.default
    return [replace(node, target=target, arguments=(x, weight, bias, mean, variance, True, momentum, epsilon))]


def _rewrite_cudnn_batch_norm(node: Node) -> list[Node]:
    inner = replace(node, target=aten.native_batch_norm.default, results=node.results[:3])
    reserve = Node(
        "call", aten.new_zeros.default, (node.arguments[0], [0]), (("dtype", torch.uint8),), node.results[3:]
    )
    return [*_rewrite_batch_norm(inner), reserve]


def _rewrite_cudnn_batch_norm_backward(node: Node) -> list[Node]:
    x, gradient, weight, mean, variance, saved_mean, saved_inverse, epsilon, _reserve = node.arguments
    arguments = (gradient, x, weight, mean, variance, saved_mean, saved_inverse, True, epsilon, [True, True, True])
    return [replace(node, target=aten.native_batch_norm_backward.default, arguments=arguments)]


_REWRITES: dict[Any, Callable[[Node], list[Node]]] = {
    aten.native_batch_norm.default: _rewrite_batch_norm,
    aten.cudnn_batch_norm.default: _rewrite_cudnn_batch_norm,
    aten.cudnn_batch_norm_backward.default: _rewrite_cudnn_batch_norm_backward,
}


def compile_to_file(text: str, path: str, threads: int) -> None:
    """Compile the graph that `text` shows and save the artifact at `path`. Raises `CompileFailed`.

    Random operations keep eager's kernels and so eager's stream (`fallback_random`). Launch parameters are not searched
    beyond Inductor's few candidates: on an H200 its coordinate descent had ResNet-18 wait for kernels for more than
    170 s instead of 31, for 1.8 ms a step either way; BERT-base at 16x128 takes 10.95 ms instead of 10.72 without it.
    On a CPU what calls the kernels is C++ too: of the 0.32 ms that the MLP of the benchmarks took, 0.07 were Python's.
    """
    from torch._inductor import config, standalone_compile

    from .layout import prefer_channels_last  # which imports Inductor

    torch.set_num_threads(threads)
    try:
        graph = rewrite_for_inductor(parse(text))
        module = lower_to_fx(graph)
        on_cuda = any(value.spec is not None and value.spec.device.type == "cuda" for value in graph.inputs)
        settings = {
            "fallback_random": True,
            "triton.cudagraphs": False,
            "cpp_wrapper": not on_cuda,
            "cpp.threads": threads_for(graph),
            "cpp.vec_isa_ok": vectors_work(),
            "cpp.min_chunk_size": SMALLEST_CHUNK,
        }
        with torch.no_grad(), config.patch(settings):
            with torch._subclasses.FakeTensorMode():
                examples: list[Any] = [_empty_like(value) for value in graph.inputs]
                outputs = [_empty_like(value) for value in graph.outputs if isinstance(value, Value)]
                module = prefer_channels_last(module, examples, outputs)
            artifact = standalone_compile(module, examples, dynamic_shapes="from_example_inputs")
            if on_cuda:
                _tune(artifact, graph)
            part = FilePath(path).with_suffix(".part")
            artifact.save(path=str(part), format="binary")
            part.replace(path)
    except Exception as error:
        raise CompileFailed.of(error) from error


def _tune(artifact: Callable[..., Any], graph: Graph) -> None:
    """Run a compiled piece once: its kernels choose among candidates at their first launch, and Inductor keeps on disk
    which were best.

    The program may leave no memory for this. Then it chooses by itself, when it captures the piece.
    """
    with contextlib.suppress(torch.OutOfMemoryError), torch.random.fork_rng():
        artifact(*[_empty_like(value).zero_() for value in graph.inputs])
        torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _empty_like(value: Value) -> torch.Tensor:
    """Return a tensor like a value, without contents; a fake one under `FakeTensorMode`."""
    spec = value.spec
    assert spec is not None
    shape = [size for size in spec.shape if size is not None]
    if spec.stride is None:
        return torch.empty(shape, dtype=spec.dtype, device=spec.device)
    return torch.empty_strided(shape, spec.stride, dtype=spec.dtype, device=spec.device)


def vectors_work() -> bool | None:
    """Whether Inductor may take for granted that C++ with this processor's vector instructions compiles and loads.

    Else it compiles one and the same file for each set of instructions, where its cache is empty: 10 of the 31 s of
    processor time that the training step of `examples/digits.py` took. PyTorch's own kernels answer the question.
    None leaves it to Inductor.
    """
    from torch._inductor import config

    return True if torch.backends.cpu.get_cpu_capability() in VECTORS else config.cpp.vec_isa_ok


def piece_key(text: str) -> str:
    """Name a piece by its text, so that equal pieces compile once."""
    return hashlib.sha256(f"{torch.__version__} {torch.get_num_threads()}\n{text}".encode()).hexdigest()[:24]


def piece_texts(program: Program) -> dict[str, str]:
    """Return the texts of the pieces to compile by key. Raises `CompileFailed` if one has no text form."""
    texts: dict[str, str] = {}
    for pieces in split_pieces(program):
        for piece in pieces:
            if not is_left_alone(piece.nodes[0]):
                text = _text(piece)
                texts[piece_key(text)] = text
    return texts


def _text(piece: Graph) -> str:
    try:
        return show(_without_names(piece))
    except ValueError as error:
        raise CompileFailed(str(error)) from error


def _without_names(piece: Graph) -> Graph:
    """Return a piece with its values numbered in order and no origins: all that its kernels do not depend on.

    Where a batch turns out to be a feed, and on paths that differ elsewhere, it is the same text and compiled once.
    """
    numbered: dict[Value, Value] = {}

    def number(value: Value) -> Value:
        known = numbered.get(value)
        if known is None:
            known = numbered[value] = Value(str(len(numbered)), value.spec)
        return known

    return replace(
        piece,
        inputs=tuple(map(number, piece.inputs)),
        nodes=tuple(
            replace(
                node,
                arguments=map_values(node.arguments, number),
                keywords=map_values(node.keywords, number),
                results=tuple(map(number, node.results)),
                origin=None,
            )
            for node in piece.nodes
        ),
        outputs=map_values(piece.outputs, number),
    )


class InductorExecutable:
    """Runs the pieces of each segment in order. Built from artifacts that exist already."""

    backend = "inductor"
    reuses_outputs = False
    lends_outputs = False

    def __init__(self, program: Program, artifact: Callable[[str], Callable[..., Any]]) -> None:
        """`artifact` returns the compiled callable of a piece by key."""
        if not program.on_accelerator:
            keep_freed_memory()
        self._segments: list[list[tuple[Sequence[Value], Sequence[Value], Callable[..., Any]]]] = []
        for pieces in split_pieces(program):
            made: list[tuple[Sequence[Value], Sequence[Value], Callable[..., Any]]] = []
            for piece in pieces:
                run = lower_to_fx(piece).forward if is_left_alone(piece.nodes[0]) else artifact(piece_key(_text(piece)))
                if threads_for(piece) == 1 < torch.get_num_threads():
                    run = on_one_thread(run)
                outputs = [value for value in piece.outputs if isinstance(value, Value)]
                made.append((piece.inputs, outputs, run))
            self._segments.append(made)

    def launch(self, index: int, environment: Environment) -> None:
        """Run segment `index`; see `Executable`."""
        for inputs, outputs, run in self._segments[index]:
            environment.update(zip(outputs, run(*[environment[value] for value in inputs]), strict=True))

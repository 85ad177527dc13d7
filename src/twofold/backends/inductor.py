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
from typing import Any, NamedTuple

import torch

from twofold.convert.from_traces import Program
from twofold.convert.repeats import Piece
from twofold.graph import Graph, Node, Value, map_values, parse, show

from .executable import Environment, lower_to_function, lower_to_fx
from .host import keep_freed_memory, on_one_thread, threads_for
from .pieces import spent_values, split_pieces

aten: Any = torch.ops.aten

SMALLEST_CHUNK = 8192
"""Elements that a thread of a compiled CPU kernel is given at least: some 4 µs of work. Inductor's own 512 are done
sooner than a second thread is there: the MLP of the benchmarks on two threads took 450 µs a launch instead of 390."""

VECTORS = frozenset({"AVX2", "AVX512"})
"""What PyTorch calls the instructions for which its own kernels were built and are in use."""


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
    Small kernels that do not need one another are one there: 592 launches instead of 735 and 10.69 ms instead of 10.95.
    On a CPU what calls the kernels is C++ too: of the 0.32 ms that the MLP of the benchmarks took, 0.07 were Python's.
    """
    from torch._inductor import config, standalone_compile

    from .layout import prefer_channels_last  # which imports Inductor, as does the next
    from .ordered_draws import settings_for

    torch.set_num_threads(threads)
    try:
        graph = rewrite_for_inductor(parse(text))
        module = lower_to_fx(graph)
        on_cuda = any(value.spec is not None and value.spec.device.type == "cuda" for value in graph.inputs)
        settings = {
            "fallback_random": True,
            "triton.cudagraphs": False,
            "combo_kernels": on_cuda,
            "cpp_wrapper": not on_cuda,
            "cpp.threads": threads_for(graph),
            "cpp.vec_isa_ok": vectors_work(),
            "cpp.min_chunk_size": SMALLEST_CHUNK,
            **settings_for(module),
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
    assert value.spec is not None
    return value.spec.empty()


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
    graphs = {piece.graph: None for pieces in split_pieces(program) for piece in pieces if piece.is_compiled}
    texts = map(_text, graphs)
    return {piece_key(text): text for text in texts}


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
        made: dict[Graph, Callable[..., Any]] = {}
        self._segments: list[list[_Call]] = []
        segments = split_pieces(program)
        spent = iter(spent_values(segments, {value for segment in program.segments for value in segment.outputs}))
        for pieces in segments:
            for piece in pieces:
                if piece.graph not in made:
                    made[piece.graph] = _callable_of(piece, artifact)
            self._segments.append([_Call(p.inputs, p.outputs, made[p.graph], next(spent)) for p in pieces])

    def launch(self, index: int, environment: Environment) -> None:
        """Run segment `index`; see `Executable`."""
        for inputs, outputs, run, spent in self._segments[index]:
            environment.update(zip(outputs, run(*[environment[value] for value in inputs]), strict=True))
            for value in spent:
                del environment[value]


class _Call(NamedTuple):
    inputs: Sequence[Value]
    outputs: Sequence[Value]
    run: Callable[..., Any]
    spent: Sequence[Value]
    """What is read by no later piece and by nobody else."""


def _callable_of(piece: Piece, artifact: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    run = artifact(piece_key(_text(piece.graph))) if piece.is_compiled else lower_to_function(piece.graph)
    return on_one_thread(run) if threads_for(piece.graph) == 1 < torch.get_num_threads() else run

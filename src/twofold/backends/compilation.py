"""Compiling beside the program: one process, started when first needed, that turns graph texts into artifacts.

The program's threads only write a line and poll a file. A failed or killed compile process costs the graphs it was
working on, never the program: the next order starts another one, until `MAX_DEATHS` have ended one after the other.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path as FilePath
from typing import Any

import torch

from .inductor import CompileFailed, compile_to_file, vectors_work

MAX_DEATHS = 3
"""Compile processes that end without an answer, one after the other, before compiling is given up. Each takes some
10 s of the processor to start, and where the system ends them for lack of memory, it may end the program next."""


class Compiler:
    """Compiles pieces by key; results are shared by all programs of the process."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="twofold-")
        self._artifacts: dict[str, Future[Callable[..., Any]]] = {}
        self._orders: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._seconds: dict[str, float] = {}
        self._is_busy = False
        self._deaths = 0
        """How many compile processes have ended since one gave an answer."""

    def order(self, key: str, text: str, background: bool) -> Future[Callable[..., Any]]:
        """Have a piece compiled, once. The future holds the callable, or `CompileFailed`.

        In the foreground it is done on return; in the background, a thread of ours completes it.
        """
        future = self._artifacts.get(key)
        if future is None:
            future = self._artifacts[key] = Future()
            if background:
                self._start_thread()
                self._orders.put((key, text))
            else:
                self._fulfil(key, lambda path: compile_to_file(text, path, torch.get_num_threads()))
        elif not background:
            with contextlib.suppress(CompileFailed):
                future.result()
        return future

    def artifact(self, key: str) -> Callable[..., Any]:
        """Return the callable of a piece that is ready. Raises `CompileFailed` if it failed."""
        return self._artifacts[key].result()

    def seconds_of(self, key: str) -> float:
        """Return how long a piece took to compile and load; 0 while it has not."""
        return self._seconds.get(key, 0.0)

    @property
    def is_working(self) -> bool:
        """Whether orders are worked on in the background, or wait."""
        return self._is_busy or not self._orders.empty()

    def close(self) -> None:
        """End the compile process; orders that wait are dropped."""
        self._end_process()
        self._directory.cleanup()

    def _end_process(self) -> int:
        """End the compile process, if it has not ended; return its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what is left of an order that nobody reads
                pipe.close()
        return process.wait()

    def _fulfil(self, key: str, compile_piece: Callable[[str], None]) -> None:
        future = self._artifacts[key]
        began = time.perf_counter()
        path = FilePath(self._directory.name, f"{key}.artifact")
        try:
            compile_piece(str(path))
            future.set_result(load_artifact(str(path)))
        except CompileFailed as error:
            future.set_exception(error)
        except Exception as error:  # noqa: BLE001 - an artifact that does not load is a compile that failed
            future.set_exception(CompileFailed.of(error))
        finally:
            self._seconds[key] = time.perf_counter() - began
            path.unlink(missing_ok=True)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="twofold-compile", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (order := self._orders.get()) is not None:
            self._is_busy = True
            key, text = order
            self._fulfil(key, lambda path, text=text: self._ask_process(text, path))
            self._is_busy = False

    def _ask_process(self, text: str, path: str) -> None:
        if self._deaths >= MAX_DEATHS:
            raise CompileFailed(f"compiling was given up: {MAX_DEATHS} compile processes ended one after the other")
        process = self._running_process()
        assert process.stdin is not None
        assert process.stdout is not None
        reply = ""
        with contextlib.suppress(OSError):  # it is gone
            process.stdin.write(json.dumps([text, path, torch.get_num_threads()]) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        if not reply.endswith("\n"):
            self._deaths += 1
            raise _death(self._end_process())
        self._deaths = 0
        failure = json.loads(reply)
        if failure is not None:
            raise CompileFailed(*failure)

    def _running_process(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end_process()
            search = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "twofold.backends.compile_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
                # Not a session of its own: where Linux groups processes by session, niceness counts within one
                # only, and a compiler beside a training loop cost 100 ms a step instead of 1.4.
                process_group=0,
            )
            _import_loader()
        return self._process


def _death(status: int) -> CompileFailed:
    if status == -signal.SIGKILL:
        return CompileFailed("the compile process was killed, as it is where memory runs out", "out_of_memory")
    return CompileFailed(f"the compile process ended with status {status}")


@contextlib.contextmanager
def _giving_way() -> Generator[None]:
    """Let the program's thread have the interpreter lock whenever it asks.

    It asks after every operation. At Python's default interval of 5 ms a step took 390 ms while this thread imported
    something, at 10 µs no longer than before.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _import_loader() -> None:
    """Import what loading an artifact needs, 2 to 3 s, while the compile process works."""
    with _giving_way():
        importlib.import_module("torch._inductor.standalone_compile")
        importlib.import_module("torch._inductor.compile_fx")


def load_artifact(path: str) -> Callable[..., Any]:
    """Load a compiled piece: a callable from input tensors to a list of output tensors.

    The first asks once more which instructions work.
    """
    from torch._inductor import CompiledArtifact, config

    with _giving_way(), config.patch({"cpp.vec_isa_ok": vectors_work()}):
        return CompiledArtifact.load(path=path, format="binary")


_compiler: Compiler | None = None


def compiler() -> Compiler:
    """Return the process's compiler, made at the first call."""
    global _compiler
    if _compiler is None:
        _compiler = Compiler()
        atexit.register(_compiler.close)
    return _compiler


def is_compiling() -> bool:
    """Whether the process's compiler works beside the program."""
    return _compiler is not None and _compiler.is_working

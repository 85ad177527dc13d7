"""C++ for this machine's CPU, compiled beside the program to functions that are called with pointers.

The compiler is the one that Inductor uses. A text is compiled once in a process; a failure costs the kernel alone.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import queue
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twofold.options import cpp_compiler, has_cpp_compiler

FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]
"""Compilers make vectors of what has no error numbers and traps to keep; no order of operations is changed."""
NICENESS = 3
"""As that of the compile process."""


def ordered(text: str) -> Callable[..., None] | str:
    """Return the function `run` of a text if it is compiled; else have it compiled, and return why it is not there."""
    lacking = lacks()
    if lacking is not None:
        return lacking
    known = _functions.get(text)
    if known is None:
        known = _functions[text] = _Order(text)
        start(known)
    return known.outcome


def start(order: _Order) -> None:
    """Have an order compiled by a thread of ours; one at a time."""
    _orders.put(order)
    if not _threads:
        _threads.append(threading.Thread(target=_serve, name="twofold-cpu-code", daemon=True))
        _threads[0].start()


class _Order:
    """A text that is to be compiled, and its function when that is there, else why it is not."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.outcome: Callable[..., None] | str = "it is being compiled"

    def compile(self) -> None:
        """Compile and load the text. Where that fails there is no function."""
        try:
            self.outcome = self._compiled()
        except (OSError, AttributeError) as error:
            self.outcome = f"its code cannot be compiled or loaded: {error}"

    def _compiled(self) -> Callable[..., None] | str:
        folder = Path(_folder().name)
        # Never a name that was used before: the compiler would write over code that is loaded.
        source = folder / f"{os.getpid()}-{next(_numbers)}.cpp"
        library = source.with_suffix(".so")
        source.write_text(self.text)
        command = [*shlex.split(cpp_compiler()), *FLAGS, str(source), "-o", str(library)]
        done = subprocess.run(["nice", f"-n{NICENESS}", *command], capture_output=True, check=False, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            return f"the C++ compiler failed with status {done.returncode}{': ' + said[0] if said else ''}"
        function: Callable[..., None] = ctypes.CDLL(str(library)).run
        function.restype = None  # type: ignore[attr-defined]
        function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3]  # type: ignore[attr-defined]
        return function


def _serve() -> None:
    while True:
        _orders.get().compile()


_functions: dict[str, _Order] = {}
_orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
_numbers = itertools.count()
_threads: list[threading.Thread] = []


@functools.cache
def _folder() -> Any:
    folder = tempfile.TemporaryDirectory(prefix="twofold-")
    atexit.register(folder.cleanup)
    return folder


@functools.cache
def lacks() -> str | None:
    """Return what is missing for code to be compiled and to be worth it; None where nothing is."""
    if os.name != "posix" or not has_cpp_compiler():
        return f"there is no C++ compiler ({cpp_compiler()})"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the processor has no fast fused multiplications"
    return "PyTorch brings no BLAS that can be called (sgemm_)" if gemm() is None else None


@functools.cache
def gemm() -> ctypes.c_void_p | None:
    """Return the address of the matrix product of the BLAS that PyTorch brings; None if it cannot be asked."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ctypes.c_void_p)
    except (OSError, AttributeError):  # another name, or a build with another library
        return None

"""The options of ``twofold.function`` and ``twofold.program``, checked before anything runs.

The only reader of environment variables:

``TWOFOLD_ENGINE``
    Overrides ``engine`` everywhere, so that Twofold can be switched off (``eager``) with no edit.
``CXX``
    The C++ compiler, as Inductor reads it.
``MALLOC_…``, ``GLIBC_TUNABLES``
    Settings of the C library's allocator, which are left as they are.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

import torch

from twofold.errors import BackendUnavailableError, OptionError

Engine = Literal["auto", "speculation", "coexecution", "eager"]
Backend = Literal["auto", "replay", "cuda_graph", "inductor"]
Numerics = Literal["fused", "exact"]

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "engine": get_args(Engine),
    "backend": get_args(Backend),
    "numerics": get_args(Numerics),
}


@dataclass(frozen=True)
class Options:
    """Validated options. Build with ``Options.make``; the constructor itself checks nothing.

    ``engine`` and ``backend``: "auto" chooses by measurement, a name is obeyed.
    ``numerics``: "fused" allows fused kernels; "exact" keeps eager's own kernels, bit for bit.
    ``warm_up``: iterations of a path that are recorded before its first graph is made.
    ``background``: compile beside the program; ``False`` makes the program wait (tests, benchmarks).
    ``strict``: raise ``NotConvertibleError`` where the program would stay eager for good.
    """

    engine: Engine = "auto"
    backend: Backend = "auto"
    numerics: Numerics = "fused"
    warm_up: int = 2
    background: bool = True
    strict: bool = False

    @property
    def is_paced(self) -> bool:
        """Whether graphs may be postponed: not where the program asks for them, waits for them, or wants to be told."""
        return self.backend == "auto" and self.background and not self.strict

    @classmethod
    def make(cls, **given: Any) -> Options:
        """Options from keyword arguments.

        Raises ``OptionError`` on an unknown name or a bad value, and ``BackendUnavailableError`` if a backend
        is named that this machine cannot run. Each message is one line that says what to do.
        """
        for name, value in given.items():
            _check_name(name)
            _check_value(name, value)
        engine = os.environ.get("TWOFOLD_ENGINE")
        if engine:
            if engine not in CHOICES["engine"]:
                raise OptionError(f"environment variable TWOFOLD_ENGINE: {_bad_choice('engine', engine)}")
            given["engine"] = engine
        options = cls(**given)
        if options.engine != "eager":
            _check_available(options.backend)
        return options


def _check_name(name: str) -> None:
    names = [field.name for field in fields(Options)]
    if name not in names:
        raise OptionError(f"unknown option {name!r}{_suggestion(name, names)}; valid options are {', '.join(names)}")


def _check_value(name: str, value: object) -> None:
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise OptionError(_bad_choice(name, value))
    elif name == "warm_up":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"option warm_up must be a whole number of at least 1, got {value!r}")
    elif not isinstance(value, bool):
        raise OptionError(f"option {name} must be True or False, got {value!r}")


def _bad_choice(name: str, value: object) -> str:
    choices = CHOICES[name]
    return f"option {name} must be one of {', '.join(choices)}, got {value!r}{_suggestion(value, choices)}"


def _suggestion(given: object, valid: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1, cutoff=0.6) if isinstance(given, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_available(backend: Backend) -> None:
    cuda = torch.cuda.is_available()
    if backend == "cuda_graph" and not cuda:
        raise BackendUnavailableError(
            "backend 'cuda_graph' needs a CUDA device and PyTorch sees none: use backend='auto',"
            " or install a CUDA build of torch on a machine with a GPU"
        )
    if backend == "inductor" and cuda and importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError(
            "backend 'inductor' needs Triton on CUDA: install the triton package of this torch, or use backend='auto'"
        )
    if backend == "inductor" and not cuda and not has_cpp_compiler():
        raise BackendUnavailableError(
            "backend 'inductor' needs a C++ compiler on CPU: install g++ or set CXX to one, or use backend='auto'"
        )


def has_cpp_compiler() -> bool:
    """Whether Inductor will find a C++ compiler: the one named by ``CXX``, else ``g++``."""
    return shutil.which(shlex.split(cpp_compiler())[0]) is not None


def cpp_compiler() -> str:
    """Return the command of the C++ compiler."""
    return os.environ.get("CXX") or "g++"


def has_allocator_settings() -> bool:
    """Whether the user has set up the C library's allocator."""
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")

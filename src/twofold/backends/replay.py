"""Replay: eager's own operations, called in order. The tier that works everywhere and changes no bit."""

from __future__ import annotations

from twofold.convert.from_traces import Program

from .executable import Environment, lower_to_function
from .host import keep_freed_memory


class ReplayExecutable:
    """Runs each segment operation by operation."""

    backend = "replay"
    reuses_outputs = False
    lends_outputs = False

    def __init__(self, program: Program) -> None:
        if not program.on_accelerator:
            keep_freed_memory()
        self._segments = [
            (segment.inputs, segment.outputs, lower_to_function(segment.graph)) for segment in program.segments
        ]

    def launch(self, index: int, environment: Environment) -> None:
        """Run segment `index`; see `Executable`."""
        inputs, outputs, forward = self._segments[index]
        results = forward(*[environment[value] for value in inputs])
        environment.update(zip(outputs, results, strict=True))

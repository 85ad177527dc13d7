"""Bounds on the seconds that parts of a benchmark may take, so that a run of many programs ends in a known time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence


class Budget:
    """The seconds that one program may take, from now on; `seconds` may be None, which is no bound."""

    FOR_ROUNDS = 0.2
    """What setting up leaves for the rounds that count, at least."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()

    def left(self) -> float | None:
        """Return the seconds that are left, below zero if the bound is passed."""
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self._began)

    def share(self, contenders: int) -> float | None:
        """Return the seconds that one of so many contenders that are still to come may take to be set up."""
        left = self.left()
        if left is None or self.seconds is None:
            return None
        return max(1.0, (left - self.FOR_ROUNDS * self.seconds) / contenders)

    def is_over(self) -> bool:
        """Whether nothing is left."""
        left = self.left()
        return left is not None and left <= 0


def run_within(command: Sequence[str], seconds: float) -> int | None:
    """Run a command, its standard error hidden; return its status, or None if it was ended with all its processes."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

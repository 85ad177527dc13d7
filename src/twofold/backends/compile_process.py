"""The compile process: reads orders, one JSON line each, and answers null or the reason and code of a failure.

It runs at a lower priority, so that on few cores the program keeps most of them, and ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys

from twofold.backends.inductor import CompileFailed, compile_to_file

NICENESS = 3
"""On 2 cores that a program keeps busy, compiling costs it about 20 s of its time in all, whatever the priority: at 0
it ran at half speed for 40 s, at 5 at three quarters for 90 s, at 10 at 0.92 for more than 4 minutes."""
FEW_CORES = 2
"""So few that Inductor's pool of compiling processes costs more than it gains: 25.7 s of CPU time instead of 20.8 for
the training step of `examples/digits.py`."""


def main() -> None:
    """Serve orders until the standard input ends."""
    os.nice(NICENESS)
    if len(os.sched_getaffinity(0)) <= FEW_CORES:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print; only replies may reach the program
    for line in sys.stdin:
        text, path, threads = json.loads(line)
        failure = None
        try:
            compile_to_file(text, path, threads)
        except CompileFailed as error:
            failure = str(error), error.code
        replies.write(json.dumps(failure) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

"""The compile process: reads orders, one JSON line each, and answers null or the reason of a failure.

It runs at a low priority, so that on few cores the program keeps most of them, and ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys

from twofold.backends.inductor import CompileFailed, compile_to_file


def main() -> None:
    """Serve orders until the standard input ends."""
    os.nice(10)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print; only replies may reach the program
    for line in sys.stdin:
        text, path, threads = json.loads(line)
        failure = None
        try:
            compile_to_file(text, path, threads)
        except CompileFailed as error:
            failure = str(error)
        replies.write(json.dumps(failure) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

"""Turn the segments of a program into something that runs: replay, Inductor, CUDA graphs."""

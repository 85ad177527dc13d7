"""Speculation: run calls by their host graphs, keep several of these a function, learn from assumptions that fail."""

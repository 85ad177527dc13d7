"""Recursion over trees: the data, the rivals written by hand, and what measures them against plain recursion."""

"""From what was seen of a program to graphs."""

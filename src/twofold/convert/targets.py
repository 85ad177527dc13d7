"""The callables that converted functions name beside PyTorch's and Python's own."""

from __future__ import annotations

from typing import Any


def apply(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call an object: a module, or a function that is only known when the graph runs."""
    return function(*arguments, **keywords)


def method(receiver: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a method by its name."""
    return getattr(receiver, name)(*arguments, **keywords)


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """Return the items of an iterable, of which there must be `count`. Raises ValueError, as an assignment does."""
    items = tuple(value)
    if len(items) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(items) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(items)})")
    return items


def fail(exception: Any, cause: Any = None) -> None:
    """Raise, as a `raise` statement does."""
    raise exception from cause

"""What takes memory, in a module that a process imports at once."""

from __future__ import annotations


def bytes_taken(count: int) -> int:
    """Takes so much address space, of which nothing is touched."""
    return len(bytes(count))

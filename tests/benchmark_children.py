"""Functions that tests/test_benchmarks.py runs in fresh processes; imports nothing slow."""

from __future__ import annotations

import os

from avcl_jax.errors import UserError


def cores() -> list[int]:
    """The cores that the process may use."""
    return sorted(os.sched_getaffinity(0))


def fail(*, message: str) -> None:
    """Fails."""
    raise ValueError(message)


def refuse(*, message: str) -> None:
    """Ends in an error that a user can fix."""
    raise UserError(message)

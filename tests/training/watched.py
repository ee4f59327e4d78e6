"""Runs `avcl_jax.main` and writes what the loop did between one step and the next.

    python -m tests.training.watched NOTES.json --config=... --workdir=...

The notes are taken whenever a step's batch goes to the device: how many programs had been compiled
or loaded until then, how many arrays had been read by the host, and whether the first state was
still there. From the first batch on, implicit transfers are refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app

from avcl_jax import main
from avcl_jax.training import program, run_steps

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Watch:
    """Counts, and notes the counts of every step."""

    def __init__(self) -> None:
        self.notes: list[dict[str, Any]] = []
        self.compiled = 0
        self.read = 0
        self.first_state: Any = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        array = type(jnp.zeros(()))
        value = array._value  # type: ignore[attr-defined]

        def read(this: Any) -> Any:
            self.read += 1
            return value.fget(this)

        array._value = property(read)  # type: ignore[attr-defined]

    def _on_event(self, name: str, *_: Any, **__: Any) -> None:
        self.compiled += name == _COMPILED

    def create_state(self, *args: Any, **options: Any) -> Any:
        """Keeps hold of the state before the first step."""
        self.first_state, shardings = _create_state(*args, **options)
        return self.first_state, shardings

    def to_device_batch(self, *args: Any) -> Any:
        """Takes the notes of a step."""
        jax.config.update("jax_transfer_guard", "disallow")
        leaves = jax.tree.leaves(self.first_state)
        self.notes.append(
            {
                "compiled": self.compiled,
                "read": self.read,
                "deleted": [leaf.is_deleted() for leaf in leaves],
            }
        )
        return _to_device_batch(*args)


_create_state, _to_device_batch = program.create_state, run_steps.to_device_batch


def run(path: str, arguments: list[str]) -> None:
    """Runs main and writes the notes, also if it fails."""
    watch = Watch()
    with (
        mock.patch.object(program, "create_state", watch.create_state),
        mock.patch.object(run_steps, "to_device_batch", watch.to_device_batch),
    ):
        try:
            app.run(main.main, ["main", *arguments], flags_parser=main.parse_flags)
        finally:
            Path(path).write_text(json.dumps(watch.notes))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])

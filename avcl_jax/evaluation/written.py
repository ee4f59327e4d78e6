"""Files that an evaluation leaves behind, and what every one of them says: times and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "librosa",
    "av",
    "numpy",
    "scikit-learn",
)


class Stages:
    """Says what is being done, and keeps how long each part took."""

    def __init__(self) -> None:
        """Starts the clock."""
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times one part."""
        began = time.monotonic()
        print(f"evaluation: {name} …", end="", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f" {self.seconds[name]:.0f} s", flush=True)

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began


def print_paths(workdir: epath.Path) -> None:
    """Prints where the report and the results are."""
    print(f"report  {workdir / 'report.html'}\nresults {workdir / 'results.json'}", flush=True)


def write_text(path: epath.Path, content: str) -> None:
    """Writes a file, whole or not at all."""
    write_bytes(path, content.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_bytes(content)
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}

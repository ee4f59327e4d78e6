"""Versions of everything that decides numbers: Python, packages, and the code of this one."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "librosa", "av", "numpy"),
    "scikit-learn",
)


@functools.cache
def versions() -> dict[str, str]:
    """Returns the version of each; that of avcl_jax is a digest of its sources."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"avcl_jax": sources_digest()[:12]}


@functools.cache
def sources_digest() -> str:
    """SHA-256 of all sources of this package, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

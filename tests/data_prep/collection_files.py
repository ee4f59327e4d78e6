"""Reading a collection as its command does, and files that only have to be there."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from avcl_jax.data_prep.manifest import Entry, Manifest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LISTS = SHARED / "annotations"
needs_lists = pytest.mark.skipif(not LISTS.exists(), reason=f"no official lists in {LISTS}")


def read(collection: str, *arguments: object) -> Manifest:
    """Returns what `avcl-data COLLECTION ARGUMENTS` would prepare."""
    module = importlib.import_module(f"avcl_jax.data_prep.collections.{collection}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.read(parser.parse_args(list(map(str, arguments))))


def touch(folder: Path, names: Iterable[str]) -> Path:
    """Makes empty files: listing a collection must not open its media."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(manifest: Manifest, folder: Path) -> dict[str, tuple[str, float, float | None]]:
    """Returns file, start and end of each record."""
    return {
        entry.record_id: (
            str(Path(entry.path).relative_to(folder)),
            entry.start_seconds,
            entry.end_seconds,
        )
        for entry in manifest.entries
    }


def by_id(manifest: Manifest) -> dict[str, Entry]:
    return {entry.record_id: entry for entry in manifest.entries}

"""Media files out of the files and folders that a command names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from avcl_jax.fingerprint.error import FingerprintError

# In folders, where notes and pictures lie beside the films; what is named itself is always tried.
SUFFIXES = frozenset(
    (
        *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
        *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".aac", ".aif", ".aiff", ".flac", ".m4a"),
        *(".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".weba", ".wma"),
    )
)


def media_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields files as they are named, and those in folders, at any depth, in order of name.

    Raises:
        FingerprintError: if a path does not exist, or a folder has no media file.
    """
    for path in paths:
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
            if not found:
                raise FingerprintError(f"the folder {path} has no media file")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FingerprintError(f"{path} does not exist")

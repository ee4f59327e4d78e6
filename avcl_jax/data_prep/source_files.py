"""Source files of clips: size, time and content, local copies, and exact duplicates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from avcl_jax.data.media import MediaError
from avcl_jax.data_prep.manifest import Entry
from avcl_jax.paths import is_remote


class FileState(NamedTuple):
    """Size in bytes and time of the last change, 0 if unknown; copying changes only the time."""

    bytes: int
    mtime_ns: int


def state_of(path: str) -> FileState | None:
    """Returns the state of a local or remote file; None if there is none."""
    try:
        if is_remote(path):
            found = epath.Path(path).stat()
            return FileState(found.length, found.mtime * 10**9)
        status = os.stat(path)
    except OSError:
        return None
    # A pipe or a device has no end to read to.
    return FileState(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


@functools.lru_cache(maxsize=256)  # many clips are cut from one file
def sha256_of(path: str, state: FileState | None) -> str | None:
    """Returns the SHA-256 of a file's content in a state; None if it cannot be read."""
    if state is None:
        return None
    try:
        with epath.Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """Yields a local path of a file: its own, or that of a temporary copy.

    Raises MediaError if a remote file cannot be copied.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = os.path.join(scratch, os.path.basename(path))
        try:
            epath.Path(path).copy(copy)
        except FileNotFoundError as error:
            raise MediaError("not_found", f"{path} does not exist") from error
        except OSError as error:
            raise MediaError("unreadable", f"{path}: {error}") from error
        yield copy


def find_duplicates(entries: Sequence[Entry]) -> dict[int, dict[str, str]]:
    """Finds clips of the same file content and interval; only files of equal size are read.

    Returns lines of duplicates.jsonl by number of the entry, none for the first of its kind.
    """
    states = {path: state_of(path) for path in dict.fromkeys(entry.path for entry in entries)}
    sizes = Counter(state.bytes for state in states.values() if state)
    content = {
        path: sha256_of(path, state)
        for path, state in states.items()
        if state and sizes[state.bytes] > 1
    }
    duplicates: dict[int, dict[str, str]] = {}
    first: dict[object, Entry] = {}
    for number, entry in enumerate(entries):
        # What decides its video and audio.
        interval = (entry.start_seconds, entry.end_seconds, entry.example)
        other = first.setdefault((content.get(entry.path) or entry.path, *interval), entry)
        if other is not entry:
            line = {"path": entry.path, "id": entry.record_id, "split": entry.split}
            original = {"duplicate_of": other.record_id, "duplicate_split": other.split}
            duplicates[number] = line | original
    return duplicates

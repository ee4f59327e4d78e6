"""The files that clips come from: what they were when they were read, and which are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import stat
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from avcl_jax.data.media_error import MediaError
from avcl_jax.paths import is_remote
from data_prep.manifest import Entry

_BLOCK_BYTES = 1 << 20
# Fields of an entry that, with its file's content, decide what is seen and heard.
_INTERVAL = [
    field.name
    for field in dataclasses.fields(Entry)
    if field.name not in ("path", "record_id", "source_id", "split", "labels")
]


class FileState(NamedTuple):
    """A file as a directory lists it.

    Attributes:
      bytes: Its size.
      mtime_ns: When it was changed; 0 if nobody knows. Copying changes this, and not what is in
        it.
    """

    bytes: int
    mtime_ns: int


def state_of(path: str) -> FileState | None:
    """Returns the state of a local file or of one in an object store; None if there is none."""
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
def _sha256(path: str, state: FileState) -> str:
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: str) -> str | None:
    """Returns the SHA-256 of a file's content; None if it cannot be read."""
    state = state_of(path)
    if state is None:
        return None
    try:
        return _sha256(path, state)
    except OSError:
        return None


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """Yields a local path of a file: its own, or of a copy that goes afterwards.

    Raises:
      MediaError: If a remote file cannot be copied.
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


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """A clip whose file, byte by byte, and interval are those of an earlier one.

    Attributes:
      path: Its file.
      id: Its record id.
      split: Its split.
      duplicate_of: Record id of the first such clip.
      duplicate_split: Split of that.
    """

    path: str
    id: str
    split: str
    duplicate_of: str
    duplicate_split: str


def find_duplicates(entries: Sequence[Entry]) -> dict[int, Duplicate]:
    """Finds clips of the same content; only files of the same size are read.

    Args:
      entries: All clips.

    Returns:
      By number of the entry; the first of each kind is not in it.
    """
    same_size: dict[int, set[str]] = defaultdict(set)
    states = {path: state_of(path) for path in dict.fromkeys(entry.path for entry in entries)}
    for path, state in states.items():
        if state is not None:
            same_size[state.bytes].add(path)
    content: dict[str, str | None] = {}
    for path, state in states.items():
        if state is not None and len(same_size[state.bytes]) > 1:
            content[path] = sha256_of(path)
    found: dict[int, Duplicate] = {}
    first: dict[object, Entry] = {}
    for number, entry in enumerate(entries):
        shown = (
            content.get(entry.path) or entry.path,
            *(getattr(entry, name) for name in _INTERVAL),
        )
        other = first.setdefault(shown, entry)
        if other is not entry:
            found[number] = Duplicate(
                entry.path, entry.record_id, entry.split, other.record_id, other.split
            )
    return found

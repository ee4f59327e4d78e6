"""Source files of clips: size, time and content, local copies, and exact duplicates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from avcl_jax.data.media import MediaError
from avcl_jax.data_prep.manifest import Entry
from avcl_jax.errors import is_of_store
from avcl_jax.paths import is_remote, store_of

# Requests that wait for a store or a network disk at one time.
_THREADS = 64
# A listing states 1,000 files per request. Of a folder from which fewer are wanted each is asked
# for, since the folder may contain a million others.
_LIST_FROM = 32


class FileState(NamedTuple):
    """Size in bytes, time of the last change, 0 if unknown, and a store's tag of the content.

    Copying changes time and tag, but not the size.
    """

    bytes: int
    mtime_ns: int
    etag: str = ""


def state_of(path: str) -> FileState | None:
    """Returns the state of a local or remote file; None if there is none."""
    try:
        if is_remote(path):
            files, name = store_of(path)
            if "gs" not in files.protocol:
                return _state_in_store(files.info(name))
            # gcsfs would send up to four requests, to see whether it is a folder.
            folder, _, prefix = name.rpartition("/")
            info = files.find(folder, prefix=prefix, detail=True).get(name)
            return None if info is None else _state_in_store(info)
        status = os.stat(path)
    except OSError:
        return None
    # A pipe or a device has no end to read to.
    return FileState(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _state_in_store(info: Mapping[str, Any]) -> FileState | None:
    """Returns the state of a file from the properties that fsspec states, by names of each store.

    Times are whole seconds: a listing of S3 states milliseconds, a request for one file does not.
    """
    if info["type"] != "file":
        return None
    changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or 0
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    return FileState(info["size"], int(seconds) * 10**9, info.get("etag") or info.get("ETag") or "")


def states_of(paths: Iterable[str]) -> dict[str, FileState | None]:
    """Returns the state of each of many files; None where there is none.

    Folders of a store are listed, and all other files asked for, many at one time.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    single: list[str] = []
    for path in dict.fromkeys(paths):
        if is_remote(path):
            folders[path.rpartition("/")[0]].append(path)
        else:
            single.append(path)
    listed = {folder for folder, wanted in folders.items() if len(wanted) >= _LIST_FROM}
    states: dict[str, FileState | None] = {}
    with ThreadPoolExecutor(_THREADS) as threads:
        for found in threads.map(_list_folder, listed):
            states.update(found)
        wanted = single + [path for some in folders.values() for path in some]
        asked = [path for path in wanted if path not in states]
        shares = [asked[n::_THREADS] for n in range(min(_THREADS, len(asked)))]
        for found in threads.map(lambda share: {path: state_of(path) for path in share}, shares):
            states.update(found)
    return {path: states[path] for path in wanted}


def _list_folder(folder: str) -> dict[str, FileState | None]:
    """Returns the states of all files of a folder in a store, by path."""
    files, name = store_of(folder)
    try:
        found = files.ls(name, detail=True)
    except OSError:
        return {}
    return {files.unstrip_protocol(info["name"]): _state_in_store(info) for info in found}


@functools.lru_cache(maxsize=256)  # many clips are cut from one file
def sha256_of(path: str, state: FileState | None) -> str | None:
    """Returns the SHA-256 of a file's content in a state; None if it cannot be read."""
    if state is None:
        return None
    try:
        with local_file(path) as local, open(local, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (MediaError, OSError):
        return None


def sha256_of_all(
    paths: Collection[str], states: Mapping[str, FileState | None]
) -> dict[str, str | None]:
    """Returns the SHA-256 of the content of each file, None where it cannot be read."""
    with ThreadPoolExecutor(_THREADS if any(map(is_remote, paths)) else 1) as threads:
        return dict(
            zip(paths, threads.map(lambda path: sha256_of(path, states[path]), paths), strict=True)
        )


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
        files, name = store_of(path)
        # gcsfs would otherwise ask for the size first.
        whole = {"concurrency": 1} if "gs" in files.protocol else {}
        try:
            files.get_file(name, copy, **whole)
        except FileNotFoundError as error:
            raise MediaError("not_found", f"{path} does not exist") from error
        except Exception as error:
            if not isinstance(error, OSError) and not is_of_store(error):
                raise
            raise MediaError("unreadable", f"{path}: {' '.join(str(error).split())}") from error
        yield copy


class LocalFiles(contextlib.ExitStack):
    """Local paths of the files of entries in their order: a remote file is copied once.

    Clips that are cut from one file follow each other: only the last copy is kept.
    """

    def __init__(self) -> None:
        """Starts without a copy."""
        super().__init__()
        self._path, self._local = "", ""

    def local(self, path: str) -> str:
        """Returns the local path of a file, valid until another one is asked for.

        Raises MediaError if a remote file cannot be copied.
        """
        if path != self._path:
            self.close()
            self._path = ""
            self._local = self.enter_context(local_file(path))
            self._path = path
        return self._local


def find_duplicates(
    entries: Sequence[Entry], content: Mapping[str, str | None]
) -> dict[int, dict[str, str]]:
    """Finds clips of the same file content and interval.

    Args:
      entries: clips.
      content: SHA-256 by path of the file, as far as it is known.

    Returns lines of duplicates.jsonl by number of the entry, none for the first of its kind.
    """
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


def content_of_equal_sizes(states: Mapping[str, FileState | None]) -> dict[str, str | None]:
    """Returns the SHA-256 of files that may have the same content: those of equal size."""
    sizes = Counter(state.bytes for state in states.values() if state)
    paths = [path for path, state in states.items() if state and sizes[state.bytes] > 1]
    return sha256_of_all(paths, states)

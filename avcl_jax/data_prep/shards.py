"""The unit of work: clips of one shard, prepared and written, with a line about each entry.

A part is idempotent, and independent of what runs it: the same part gives the same bytes in a local
process or on a machine of a cluster. A finished part is a shard, its index, and a line per entry
(`train-00000.tfrecord`, `.table`, `.json`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import simplejpeg
from etils import epath

from avcl_jax.data.media import MediaError
from avcl_jax.data.record_format import FORMAT_VERSION, Record
from avcl_jax.data.record_index import load_table, save_table
from avcl_jax.data.record_writer import RecordWriter
from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.clip import ClipOptions, parse_cut, pieces, prepare_clip
from avcl_jax.data_prep.manifest import Entry, by_split
from avcl_jax.data_prep.source_files import (
    FileState,
    LocalFiles,
    sha256_of,
    sha256_of_all,
    state_of,
)
from avcl_jax.paths import is_remote, write_bytes

PREPARED = "prepared"
# Raised when the same file becomes another record, so that old and new are never mixed.
_PREPARATION = 3
# Clips that are rejected for these reasons may pass the next time, though the file is the same.
MAY_PASS = frozenset({"unreadable", "timeout", "crashed"})

# Facts about an entry: its file, hashes of its plan and description, the outcomes of its clips.
Line = Mapping[str, Any]


class Known(NamedTuple):
    """Line of an entry that still holds, and the numbers of its records in the earlier data set."""

    line: Line
    records: Sequence[int]


KnownEntries = Mapping[tuple[str, str], Known]  # by (split, record id), in order


@dataclasses.dataclass(frozen=True)
class Part:
    """Entries of one shard, and everything that a worker needs to make it.

    If all clips are rejected there is no shard.
    """

    number: int  # among the parts of its split
    split: str
    entries: tuple[Entry, ...]
    options: ClipOptions
    directory: epath.Path  # for the shard until it is published
    states: Mapping[str, FileState | None]  # of the files, before any was read
    # By number of the entry, those to take from the earlier data set, above `directory`.
    known: Mapping[int, Known] = dataclasses.field(default_factory=dict)
    # By number of the entry, reason and message of those to reject.
    skip: Mapping[int, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def path(self, suffix: str) -> epath.Path:
        """Returns the path of one of its files until it is published."""
        return self.directory / f"{self.split}-{self.number:05d}.{suffix}"

    @property
    def shard(self) -> epath.Path:
        """Path of the shard."""
        return self.path(self.options.file_format)


@dataclasses.dataclass(frozen=True)
class Finished:
    """Result of a part: a line per entry, the index of its shard, and the shard."""

    split: str
    lines: Sequence[Line]
    index: pa.Table
    shard: epath.Path  # in the directory of the part, or of an earlier data set

    @property
    def size(self) -> tuple[int, int]:
        """Records, and their bytes."""
        return len(self.index), int(np.sum(self.index["length"]))


def plan_parts(
    entries: Sequence[Entry],
    shard_size: int,
    options: ClipOptions,
    directory: epath.Path,
    states: Mapping[str, FileState | None],
    known: KnownEntries,
) -> list[Part]:
    """Divides the entries of each split, in their order, into parts of at most `shard_size`."""
    parts = []
    for split, of_split in by_split(entries).items():
        for number, first in enumerate(range(0, len(of_split), shard_size)):
            some = tuple(of_split[first : first + shard_size])
            keys = enumerate((split, entry.record_id) for entry in some)
            of_part = {place: known[key] for place, key in keys if key in known}
            of_files = {entry.path: states[entry.path] for entry in some}
            parts.append(Part(number, split, some, options, directory, of_files, of_part))
    return parts


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def entry_plan(entry: Entry, options: ClipOptions) -> str:
    """Returns a hash of all that decides video and audio, but for the content of the file."""
    interval = dataclasses.asdict(entry) | {"path": "", "source_id": "", "labels": {}}
    libraries = [av.__version__, simplejpeg.__version__, np.__version__]
    return _hash([FORMAT_VERSION, _PREPARATION, *libraries], dataclasses.asdict(options), interval)


def description(entry: Entry) -> str:
    """Returns a hash of a clip's source and labels."""
    return _hash(entry.source_id, entry.labels)


def still_hold(
    lines: Sequence[Line],
    entries: Sequence[Entry],
    options: ClipOptions,
    states: Mapping[str, FileState | None],
) -> list[bool]:
    """Returns whether the plan and the file of each entry are those of its line."""
    holds, doubtful = [], {}
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True)):
        state = states[entry.path]
        before = None
        if line["bytes"] is not None:
            # Lines of earlier releases have no tag.
            before = FileState(line["bytes"], line["mtime_ns"], line.get("etag", ""))
        same_plan = line["plan"] == entry_plan(entry, options)
        if state is None or before is None or (state == before and (state.etag or state.mtime_ns)):
            holds.append(same_plan and state == before)
            continue
        # Copied or touched, or in a store that states no time: the content decides.
        holds.append(same_plan and state.bytes == before.bytes)
        if holds[-1]:
            doubtful[number] = entry.path
    content = sha256_of_all(set(doubtful.values()), states)
    for number, path in doubtful.items():
        holds[number] = content[path] == lines[number]["sha256"]
    return holds


def may_pass(line: Line, reasons: Collection[str] = MAY_PASS) -> bool:
    """Returns whether a clip of an entry was rejected for one of `reasons`."""
    return any(outcome in reasons for _, outcome, _ in line["clips"])


def read_finished(part: Part) -> Finished | None:
    """Returns the result of a part, or None if it has to be prepared (again)."""
    index = load_table(part.path("table"))
    try:
        lines = json.loads(part.path("json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if index is None or not isinstance(lines, list) or len(lines) != len(part.entries):
        return None
    finished = Finished(part.split, lines, index, part.shard)
    holds = all(
        line["description"] == description(entry)
        for line, entry in zip(lines, part.entries, strict=True)
    ) and all(still_hold(lines, part.entries, part.options, part.states))
    return finished if holds and (not finished.size[0] or part.shard.exists()) else None


def prepare_part(part: Part, begin: Callable[[int], None]) -> None:
    """Writes the shard and the index of a part, then its lines; all or nothing.

    Calls `begin` with the number of each entry before its file is read.

    Raises OSError if the results cannot be written or an earlier record cannot be read, RecordError
    if that is damaged.
    """
    part.path("json").unlink(missing_ok=True)
    lines: list[dict[str, Any]] = []
    earlier = functools.cache(lambda: RecordDataset(part.directory.parent, part.split))
    with RecordWriter(part.shard, part.options.file_format) as writer, LocalFiles() as files:
        for number, entry in enumerate(part.entries):
            begin(number)
            if (known := part.known.get(number)) is not None:
                lines.append({**known.line, "description": description(entry)})
                today: dict[str, Any] = {"source_id": entry.source_id, "labels": entry.labels}
                for index in known.records:
                    writer.write(dataclasses.replace(earlier()[index], **today))
                continue
            # A local file may have changed meanwhile; asking a store again takes a while.
            remote = is_remote(entry.path)
            state = part.states[entry.path] if remote else state_of(entry.path)
            lines.append(_line(entry, part.options, state))
            if number in part.skip:
                lines[-1]["clips"].append([entry.record_id, *part.skip[number]])
                continue
            begins = functools.partial(begin, number)
            for record in _prepare(entry, part.options, lines[-1], state, files, begins):
                writer.write(record)
    save_table(part.path("table"), writer.table())
    write_bytes(part.path("json"), json.dumps(lines).encode())


def _line(entry: Entry, options: ClipOptions, state: FileState | None) -> dict[str, Any]:
    """Returns the line of an entry whose file is not read yet."""
    return {
        "path": entry.path,
        "id": entry.record_id,
        "split": entry.split,
        "bytes": state.bytes if state else None,
        "mtime_ns": state.mtime_ns if state else None,
        "etag": state.etag if state else "",
        "sha256": None,
        "plan": entry_plan(entry, options),
        "description": description(entry),
        "clips": [],  # id, outcome and message of each
        "notes": [],  # id of the clip, kind and message of each
    }


def _prepare(
    entry: Entry,
    options: ClipOptions,
    line: dict[str, Any],
    state: FileState | None,
    files: LocalFiles,
    begin: Callable[[], object],
) -> Iterator[Record]:
    """Yields the records of an entry, and adds its content and the outcomes to its line."""
    outcomes = line["clips"]
    try:
        # Of a record file one example is read, in place: copying it for each would take for ever.
        path = files.local(entry.path) if entry.example is None else entry.path
        line["sha256"] = sha256_of(path, state)
        local = dataclasses.replace(entry, path=path)
        cut = parse_cut(options.cut) if options.cut else None
        for clip in pieces(local, cut, min_seconds=options.min_seconds) if cut else [local]:
            begin()
            try:
                record, notes = prepare_clip(clip, options)
            except MediaError as error:
                outcomes.append([clip.record_id, error.reason, error.message])
                continue
            except MemoryError:
                too_large = "it needs more memory than a worker may use"
                outcomes.append([clip.record_id, "too_large", too_large])
                continue
            outcomes.append([clip.record_id, PREPARED, ""])
            line["notes"].extend([clip.record_id, *note] for note in notes.items())
            yield record
    except MediaError as error:  # it could not be copied or cut
        outcomes.append([entry.record_id, error.reason, error.message])


def remove_temporary(directory: epath.Path, pid: int | None = None) -> None:
    """Removes files that a process, or any, has left half-written."""
    for path in list(directory.glob("*.tmp" if pid is None else f"*.{pid}.tmp")):
        path.unlink(missing_ok=True)

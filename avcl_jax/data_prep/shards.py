"""The unit of work: clips of one shard, prepared and written, with a line about each entry.

A part is idempotent, and independent of what runs it: the same part gives the same bytes in a local
process or on a machine of a cluster. A finished part is a shard, its index, and a line per entry
(`train-00000.tfrecord`, `.table`, `.json`).
"""

from __future__ import annotations

import contextlib
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
from avcl_jax.data_prep.source_files import FileState, local_file, sha256_of, state_of
from avcl_jax.paths import write_bytes

PREPARED = "prepared"
# Raised when the same file becomes another record, so that old and new are never mixed.
_PREPARATION = 2
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
    known: KnownEntries,
) -> list[Part]:
    """Divides the entries of each split, in their order, into parts of at most `shard_size`."""
    parts = []
    for split, of_split in by_split(entries).items():
        for number, first in enumerate(range(0, len(of_split), shard_size)):
            some = tuple(of_split[first : first + shard_size])
            keys = enumerate((split, entry.record_id) for entry in some)
            of_part = {place: known[key] for place, key in keys if key in known}
            parts.append(Part(number, split, some, options, directory, of_part))
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


def still_holds(line: Line, entry: Entry, options: ClipOptions) -> bool:
    """Returns whether the plan and the file of an entry are those of its line."""
    if line["plan"] != entry_plan(entry, options):
        return False
    state = state_of(entry.path)
    before = None if line["bytes"] is None else FileState(line["bytes"], line["mtime_ns"])
    if state is None or before is None or (state == before and state.mtime_ns):
        return state == before
    # Copied or touched, or in a store that states no time: the content decides.
    return state.bytes == before.bytes and sha256_of(entry.path, state) == line["sha256"]


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
        line["description"] == description(entry) and still_holds(line, entry, part.options)
        for line, entry in zip(lines, part.entries, strict=True)
    )
    return finished if holds and (not finished.size[0] or part.shard.exists()) else None


def prepare_part(part: Part, begin: Callable[[int], None]) -> None:
    """Writes the shard and the index of a part, then its lines; all or nothing.

    Calls `begin` with the number of each entry before its file is read.

    Raises OSError if the results cannot be written or an earlier record cannot be read, RecordError
    if that is damaged.
    """
    part.path("json").unlink(missing_ok=True)
    lines: list[Line] = []
    earlier = functools.cache(lambda: RecordDataset(part.directory.parent, part.split))
    with RecordWriter(part.shard, part.options.file_format) as writer:
        for number, entry in enumerate(part.entries):
            begin(number)
            if (known := part.known.get(number)) is not None:
                lines.append({**known.line, "description": description(entry)})
                today: dict[str, Any] = {"source_id": entry.source_id, "labels": entry.labels}
                for index in known.records:
                    writer.write(dataclasses.replace(earlier()[index], **today))
                continue
            lines.append(_line(entry, part.options))
            for record in _prepare(part, number, lines[-1], begin):
                writer.write(record)
    save_table(part.path("table"), writer.table())
    write_bytes(part.path("json"), json.dumps(lines).encode())


def _line(entry: Entry, options: ClipOptions) -> dict[str, Any]:
    """Returns the line of an entry, still without outcomes."""
    state = state_of(entry.path)
    return {
        "path": entry.path,
        "id": entry.record_id,
        "split": entry.split,
        "bytes": state.bytes if state else None,
        "mtime_ns": state.mtime_ns if state else None,
        "sha256": sha256_of(entry.path, state),
        "plan": entry_plan(entry, options),
        "description": description(entry),
        "clips": [],  # id, outcome and message of each
        "notes": [],  # id of the clip, kind and message of each
    }


def _prepare(part: Part, number: int, line: Line, begin: Callable[[int], None]) -> Iterator[Record]:
    """Yields the records of an entry, and adds the outcome of each clip to its line."""
    entry, options, outcomes = part.entries[number], part.options, line["clips"]
    if number in part.skip:
        outcomes.append([entry.record_id, *part.skip[number]])
        return
    try:
        # Of a record file one example is read, in place: copying it for each would take for ever.
        in_place = contextlib.nullcontext(entry.path)
        with local_file(entry.path) if entry.example is None else in_place as path:
            local = dataclasses.replace(entry, path=path)
            cut = parse_cut(options.cut) if options.cut else None
            for clip in pieces(local, cut, min_seconds=options.min_seconds) if cut else [local]:
                begin(number)
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
    except MediaError as error:  # it could not be cut
        outcomes.append([entry.record_id, error.reason, error.message])


def remove_temporary(directory: epath.Path, pid: int | None = None) -> None:
    """Removes files that a process, or any, has left half-written."""
    for path in list(directory.glob("*.tmp" if pid is None else f"*.{pid}.tmp")):
        path.unlink(missing_ok=True)

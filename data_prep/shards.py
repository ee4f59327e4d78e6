"""The unit of work: one shard's worth of clips, prepared, written, and described beside it.

It is idempotent and knows nothing of who runs it: the same part gives the same bytes from a local
process or a machine of a cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np
import simplejpeg
from etils import epath

from avcl_jax.data.media import MediaError
from avcl_jax.data.record_index import (
    index_path,
    load_columns,
    save_columns,
    shard_columns,
)
from avcl_jax.data.records import FORMAT_VERSION, Record, RecordDataset, RecordWriter
from data_prep.clip import ClipOptions, prepare_clip
from data_prep.cut import parse_cut, pieces
from data_prep.manifest import Entry
from data_prep.source_files import FileState, local_file, sha256_of, state_of

PREPARED = "prepared"
# Raised when the same file becomes another record, so that old and new are never mixed.
_PREPARATION = 2
# What is rejected for these may pass the next time, though the file is the same.
MAY_PASS = frozenset({"unreadable", "timeout", "crashed"})


@dataclasses.dataclass(frozen=True)
class Part:
    """Entries that go into one shard; if all of them are rejected there is none.

    Attributes:
      number: Among the parts of its split.
      split: Of all its entries.
      entries: In order.
    """

    number: int
    split: str
    entries: tuple[Entry, ...]

    def path(self, directory: epath.Path, suffix: str) -> epath.Path:
        """Returns where the shard (suffix: its format) or what belongs to it waits."""
        return directory / f"{self.split}-{self.number:05d}.{suffix}"


@dataclasses.dataclass(frozen=True)
class Known:
    """What an earlier run found out about an entry whose file has not changed since.

    Attributes:
      line: What it wrote down about it.
      records: Numbers of its records in the earlier data set.
    """

    line: Mapping[str, Any]
    records: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a worker needs to make one shard.

    Attributes:
      part: The clips.
      options: How they are prepared.
      directory: Where the shard and what belongs to it are written.
      known: By number of the entry, what need not be prepared again.
      earlier: Directory that holds the records of `known`; None if there are none.
      same_as: Name and number of the shard there that holds just this part's records, unchanged;
        None if there is no such shard.
    """

    part: Part
    options: ClipOptions
    directory: epath.Path
    known: Mapping[int, Known]
    earlier: epath.Path | None
    same_as: tuple[str, int] | None

    @property
    def shard_path(self) -> epath.Path:
        """Where the shard waits until it is published."""
        return self.part.path(self.directory, self.options.file_format)

    @property
    def plan(self) -> str:
        """Hash of all that decides the shard's bytes, but for the content of the files."""
        plans = "".join(
            entry_plan(entry, self.options) + description(entry) for entry in self.part.entries
        )
        return hashlib.sha256(plans.encode()).hexdigest()


def plan_parts(entries: Sequence[Entry], shard_size: int) -> list[Part]:
    """Cuts the entries of each split, in their order, into parts of at most `shard_size`."""
    by_split: dict[str, list[Entry]] = {}
    for entry in entries:
        by_split.setdefault(entry.split, []).append(entry)
    return [
        Part(number, split, tuple(chosen[first : first + shard_size]))
        for split, chosen in by_split.items()
        for number, first in enumerate(range(0, len(chosen), shard_size))
    ]


def entry_plan(entry: Entry, options: ClipOptions) -> str:
    """Returns a hash of all that decides picture and sound, but for the content of the file."""
    interval = dataclasses.asdict(entry) | {"path": "", "source_id": "", "labels": {}}
    libraries = [av.__version__, simplejpeg.__version__, np.__version__]
    versions = [FORMAT_VERSION, _PREPARATION, *libraries]
    text = json.dumps([versions, dataclasses.asdict(options), interval], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def description(entry: Entry) -> str:
    """Returns a hash of what is said about a clip: its source and its labels."""
    text = json.dumps([entry.source_id, entry.labels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def unchanged(line: Mapping[str, Any], entry: Entry, options: ClipOptions) -> bool:
    """Whether what was written down about an entry still holds."""
    if line["plan"] != entry_plan(entry, options):
        return False
    state = state_of(entry.path)
    before = None if line["bytes"] is None else FileState(line["bytes"], line["mtime_ns"])
    if state is None or before is None or (state == before and state.mtime_ns):
        return state == before
    # Copied or touched, or in a store that does not tell: the content decides.
    return state.bytes == before.bytes and sha256_of(entry.path) == line["sha256"]


def may_pass(line: Mapping[str, Any], reasons: Collection[str] = MAY_PASS) -> bool:
    """Whether a clip of an entry was rejected for one of `reasons`."""
    return any(outcome in reasons for _, outcome, _ in line["clips"])


def read_report(job: Job) -> dict[str, Any] | None:
    """Returns the report of a finished part, or None if it is to be prepared (again)."""
    try:
        report = json.loads(job.part.path(job.directory, "json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    fresh = report["plan"] == job.plan and all(
        unchanged(line, entry, job.options)
        for line, entry in zip(report["lines"], job.part.entries, strict=True)
    )
    finished = not report["num_records"] or job.shard_path.exists()
    return report if fresh and finished else None


def prepare_part(
    job: Job, *, skip: Mapping[int, tuple[str, str]], begin: Callable[[int], None]
) -> None:
    """Makes one shard, then writes its report; all or nothing.

    Args:
      job: What to make.
      skip: Reason and message, by number of the entry, of those found to be hopeless.
      begin: Called with the number of each entry before it is touched.

    Raises:
      OSError: If the results cannot be written, or an earlier record cannot be read.
      RecordError: If an earlier record is damaged.
    """
    part = job.part
    report_path = part.path(job.directory, "json")
    report_path.unlink(missing_ok=True)
    if job.same_as is not None:
        _adopt(job, *job.same_as)
        return
    lines = []
    counts = {"no_picture": 0, "no_sound": 0, "seconds": 0.0}
    earlier = None
    if any(known.records for known in job.known.values()):
        assert job.earlier is not None
        earlier = RecordDataset(job.earlier, part.split)
    writer = RecordWriter(job.shard_path, job.options.file_format)
    try:
        for number, entry in enumerate(part.entries):
            begin(number)
            known = job.known.get(number)
            clips: Iterator[Record]
            if known is not None:
                line = {**known.line, "description": description(entry)}
                clips = (_described(earlier[record], entry) for record in known.records if earlier)
            else:
                line = _line(entry, job.options)
                clips = _prepared(
                    entry, job.options, skip.get(number), line, functools.partial(begin, number)
                )
            for record in clips:
                writer.write(record)
                counts["no_picture"] += not record.has_video
                counts["no_sound"] += not record.has_audio
                counts["seconds"] += record.duration_seconds
            lines.append(line)
        info = writer.finish()
        save_columns(part.path(job.directory, "columns"), writer.columns())
    except BaseException:  # also when interrupted: no temporary file stays behind
        writer.abandon()
        raise
    report = {
        "plan": job.plan,
        "num_records": info.num_records,
        "num_bytes": info.num_bytes,
        **counts,
        "lines": lines,
    }
    write_text(report_path, json.dumps(report))


def _described(record: Record, entry: Entry) -> Record:
    """Returns an earlier record with what is said about it today."""
    return dataclasses.replace(record, source_id=entry.source_id, labels=entry.labels)


def _adopt(job: Job, shard: str, number: int) -> None:
    """Makes a shard of the earlier data set this part's, without copying where links can be."""
    assert job.earlier is not None
    target = job.shard_path
    target.unlink(missing_ok=True)
    try:
        os.link(job.earlier / shard, target)
    except OSError:  # an object store, or a file system without links
        temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"
        (job.earlier / shard).copy(temporary, overwrite=True)
        temporary.replace(target)
    dataset = shard.partition(f"-{job.part.split}.{job.options.file_format}-")[0]
    index = index_path(job.earlier, dataset, job.part.split)
    columns = load_columns(index)
    if columns is None:
        RecordDataset(job.earlier, job.part.split)  # makes it
        columns = load_columns(index)
        assert columns is not None
    found = shard_columns(columns, number)
    save_columns(job.part.path(job.directory, "columns"), found)
    report = {
        "plan": job.plan,
        "num_records": len(found["length"]),
        "num_bytes": int(found["length"].sum()),
        "no_picture": int((found["num_frames"] == 0).sum()),
        "no_sound": int((found["num_samples"] == 0).sum()),
        "seconds": float(found["duration_seconds"].sum()),
        "lines": [job.known[entry].line for entry in range(len(job.part.entries))],
    }
    write_text(job.part.path(job.directory, "json"), json.dumps(report))


def _line(entry: Entry, options: ClipOptions) -> dict[str, Any]:
    """Returns what is written down about an entry before it is touched."""
    state = state_of(entry.path)
    return {
        "path": entry.path,
        "id": entry.record_id,
        "split": entry.split,
        "bytes": state.bytes if state else None,
        "mtime_ns": state.mtime_ns if state else None,
        "sha256": sha256_of(entry.path) if state else None,
        "plan": entry_plan(entry, options),
        "description": description(entry),
        "clips": [],
        "notes": [],
    }


def _prepared(
    entry: Entry,
    options: ClipOptions,
    hopeless: tuple[str, str] | None,
    line: dict[str, Any],
    begin: Callable[[], None],
) -> Iterator[Record]:
    """Yields the records of an entry, and writes the outcome of each clip into its line.

    Args:
      entry: A clip, or a video to cut.
      options: How.
      hopeless: Reason and message, if it is known to be.
      line: Gets `clips`, of each its id, outcome and message, and `notes`, of each the id of its
        clip, kind and message.
      begin: Called before each clip.
    """
    if hopeless is not None:
        line["clips"].append([entry.record_id, *hopeless])
        return
    try:
        # Of a record file one example is read, in place: copying it for each would take for ever.
        in_place = contextlib.nullcontext(entry.path)
        with local_file(entry.path) if entry.example is None else in_place as path:
            local = dataclasses.replace(entry, path=path)
            cut = parse_cut(options.cut) if options.cut else None
            clips = pieces(local, cut, min_seconds=options.min_seconds) if cut else [local]
            for clip in clips:
                begin()
                try:
                    record, notes = prepare_clip(clip, options)
                except MediaError as error:
                    line["clips"].append([clip.record_id, error.reason, error.message])
                    continue
                except MemoryError:
                    too_large = "it needs more memory than a worker may use"
                    line["clips"].append([clip.record_id, "too_large", too_large])
                    continue
                line["clips"].append([clip.record_id, PREPARED, ""])
                line["notes"] += [[clip.record_id, *note] for note in notes.items()]
                yield record
    except MediaError as error:  # it could not be cut
        line["clips"].append([entry.record_id, error.reason, error.message])


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file all at once: a temporary file, then a rename."""
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

"""One shard's worth of clips: prepared, written, and described beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
from etils import epath

from avcl_jax.data.media import MediaError
from avcl_jax.data.record_index import save_columns
from avcl_jax.data.records import FORMAT_VERSION, RecordWriter
from data_prep.clip import ClipOptions, prepare_clip
from data_prep.manifest import Entry


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

    def shard_path(self, directory: Path) -> Path:
        """Returns where the shard waits until all are finished."""
        return directory / f"{self.split}-{self.number:05d}.tfrecord"

    def columns_path(self, directory: Path) -> Path:
        """Returns where its part of the split's index waits."""
        return directory / f"{self.split}-{self.number:05d}.columns"

    def report_path(self, directory: Path) -> Path:
        """Returns where its report lies; a part with a report is finished."""
        return directory / f"{self.split}-{self.number:05d}.json"


def plan_parts(entries: Sequence[Entry], shard_size: int) -> list[Part]:
    """Cuts the entries of each split, in their order, into parts of at most `shard_size`."""
    parts = []
    for split in dict.fromkeys(entry.split for entry in entries):
        chosen = tuple(entry for entry in entries if entry.split == split)
        parts += [
            Part(number, split, chosen[first : first + shard_size])
            for number, first in enumerate(range(0, len(chosen), shard_size))
        ]
    return parts


def fingerprint(part: Part, options: ClipOptions) -> str:
    """Returns a hash of all that decides a part's bytes: entries, files, options, libraries."""
    files: list[Any] = []
    for entry in part.entries:
        try:
            status = os.stat(entry.path)
            files.append((status.st_size, status.st_mtime_ns))
        except OSError:
            files.append(None)
    described = json.dumps(
        [
            [FORMAT_VERSION, av.__version__, simplejpeg.__version__, np.__version__],
            dataclasses.asdict(options),
            [dataclasses.asdict(entry) for entry in part.entries],
            files,
        ],
        sort_keys=True,
    )
    return hashlib.sha256(described.encode()).hexdigest()


def read_report(part: Part, directory: Path, expected_fingerprint: str) -> dict[str, Any] | None:
    """Returns the report of a finished part, or None if it is to be prepared (again)."""
    try:
        report = json.loads(part.report_path(directory).read_text())
    except (FileNotFoundError, ValueError):
        return None
    finished = report["fingerprint"] == expected_fingerprint and part.shard_path(directory).exists()
    return report if finished else None


def rejection(entry: Entry, reason: str, message: str) -> dict[str, str]:
    """Returns one line of rejected.jsonl."""
    return {
        "path": entry.path,
        "id": entry.record_id,
        "split": entry.split,
        "reason": reason,
        "message": message,
    }


def prepare_part(
    part: Part,
    *,
    options: ClipOptions,
    directory: Path,
    part_fingerprint: str,
    skip: Mapping[int, tuple[str, str]],
    begin: Callable[[int], None],
) -> None:
    """Prepares all clips of a part, then writes its report; the shard is all or nothing.

    Args:
      part: What to prepare.
      options: How.
      directory: Where shard and report go.
      part_fingerprint: Of `fingerprint`, for the report.
      skip: Reason and message, by number of the entry, of those already known to be hopeless.
      begin: Called with the number of each entry before it is touched.

    Raises:
      OSError: If the results cannot be written.
    """
    shard = part.shard_path(directory)
    report_path = part.report_path(directory)
    report_path.unlink(missing_ok=True)
    rejected = []
    counts = {"no_picture": 0, "no_sound": 0, "seconds": 0.0}
    writer = RecordWriter(epath.Path(shard))
    try:
        for number, entry in enumerate(part.entries):
            begin(number)
            if number in skip:
                rejected.append(rejection(entry, *skip[number]))
                continue
            try:
                record = prepare_clip(entry, options)
            except MediaError as error:
                rejected.append(rejection(entry, error.reason, error.message))
                continue
            except MemoryError:
                rejected.append(rejection(entry, "too_large", "it needs more memory than a worker"))
                continue
            writer.write(record)
            counts["no_picture"] += not record.has_video
            counts["no_sound"] += not record.has_audio
            counts["seconds"] += record.duration_seconds
        info = writer.finish()
        save_columns(part.columns_path(directory), writer.columns())
    except BaseException:  # also when interrupted: no temporary file stays behind
        writer.abandon()
        raise
    report = {
        "fingerprint": part_fingerprint,
        "num_records": info.num_records,
        "num_bytes": info.num_bytes,
        **counts,
        "rejected": rejected,
    }
    write_text(report_path, json.dumps(report))


def write_text(path: Path, text: str) -> None:
    """Writes a file all at once: a temporary file, then a rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

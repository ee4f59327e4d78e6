"""What an earlier run left in the output directory, and what of it still holds."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from avcl_jax.data.records import FORMAT_VERSION, ShardInfo, shard_name
from data_prep.clip import ClipOptions
from data_prep.manifest import Manifest, PrepareError
from data_prep.shards import (
    PREPARED,
    Job,
    Known,
    Part,
    description,
    entry_plan,
    may_pass,
    unchanged,
)

SOURCES = "sources.jsonl"
PREPARATION = "preparation.json"


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A finished data set.

    Attributes:
      directory: Where it lies.
      preparation: Content of preparation.json.
      file_format: Of its shards.
      shards: Of each split.
      lines: What is written down about each clip, by split, in the order of the clips.
    """

    directory: epath.Path
    preparation: Mapping[str, Any]
    file_format: str
    shards: Mapping[str, Sequence[ShardInfo]]
    lines: Mapping[str, Sequence[Mapping[str, Any]]]

    def shard_with(self, part: Part, known: Mapping[int, Known]) -> tuple[str, int] | None:
        """Returns name and number of the shard that holds just what a part would hold."""
        if len(known) < len(part.entries) or any(
            known[number].line["description"] != description(entry)
            for number, entry in enumerate(part.entries)
        ):
            return None
        records = [record for number in sorted(known) for record in known[number].records]
        lengths = [shard.num_records for shard in self.shards[part.split]]
        ends = np.cumsum(lengths)
        number = int(np.searchsorted(ends, records[0], side="right")) if records else 0
        if not records or records != list(range(ends[number] - lengths[number], ends[number])):
            return None
        name = self.preparation["name"]
        return shard_name(name, part.split, number, len(lengths), self.file_format), number


def read_earlier(out: epath.Path) -> Earlier | None:
    """Reads what describes a finished data set; None if `out` holds none.

    Raises:
      PrepareError: If `out` holds a data set of another version, or of another program.
    """
    info_path = out / "dataset_info.json"
    if not info_path.exists():
        return None
    try:
        info = json.loads(info_path.read_text())
    except ValueError as error:
        raise PrepareError(f"{info_path} is damaged: use another --out or --overwrite") from error
    if info.get("version") != FORMAT_VERSION:
        raise PrepareError(
            f"{out} holds records from another version ({info.get('version')}, this release "
            f"writes {FORMAT_VERSION}): use another --out or --overwrite"
        )
    lines: dict[str, list[dict[str, Any]]] = {}
    try:
        preparation = json.loads((out / PREPARATION).read_text())
        for line in map(json.loads, (out / SOURCES).read_text().splitlines()):
            lines.setdefault(line["split"], []).append(line)
    except (FileNotFoundError, ValueError) as error:
        raise PrepareError(
            f"{out} holds a data set that was not prepared by data_prep: use another --out"
        ) from error
    shards = {}
    for entry in info["splits"]:
        lengths = [int(length) for length in entry["shardLengths"]]
        # TFDS keeps only the sum of the bytes.
        shards[entry["name"]] = [
            ShardInfo(length, int(entry["numBytes"]) if number == 0 else 0)
            for number, length in enumerate(lengths)
        ]
    return Earlier(out, preparation, info["fileFormat"], shards, lines)


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the clips of the splits to prepare differ from what is there already.

    Attributes:
      known: What still holds, by (split, record id).
      new: Clips that are not there.
      changed: Clips that are there, with another content, other times or other options.
      same_plan: Clips that are there with the same times and options, changed or not.
      gone: Clips that are there and are not asked for any more.
      rearranged: The order of the clips, or labels and sources of unchanged ones, differ.
    """

    known: Mapping[tuple[str, str], Known]
    new: int
    changed: int
    same_plan: int
    gone: int
    rearranged: bool

    @property
    def none(self) -> bool:
        """Whether all is there already."""
        return not (self.new or self.changed or self.gone or self.rearranged)

    def __str__(self) -> str:
        """Returns a description for a person."""
        counts = {"unchanged": len(self.known), "changed": self.changed, "new": self.new}
        counts["gone"] = self.gone
        return ", ".join(f"{count} {what}" for what, count in counts.items())


def compare(
    earlier: Earlier | None, parts: Sequence[Part], options: ClipOptions, *, overwrite: bool
) -> Changes:
    """Finds out what of an earlier data set can be kept."""
    before: dict[tuple[str, str], Known] = {}
    order: dict[str, list[str]] = {}
    entries = [entry for part in parts for entry in part.entries]
    splits = {part.split for part in parts}
    if earlier is not None and not overwrite:
        for split in splits & set(earlier.lines):
            number = 0
            for line in earlier.lines[split]:
                prepared = sum(outcome == PREPARED for _, outcome, _ in line["clips"])
                records = tuple(range(number, number + prepared))
                before[split, line["id"]] = Known(line, records)
                number += prepared
                order.setdefault(split, []).append(line["id"])
    known = {}
    counts: collections.Counter[str] = collections.Counter()
    for entry in entries:
        key = (entry.split, entry.record_id)
        if key not in before:
            counts["new"] += 1
            continue
        line = before[key].line
        counts["same_plan"] += line["plan"] == entry_plan(entry, options)
        if unchanged(line, entry, options) and not may_pass(line):
            known[key] = before[key]
            counts["relabelled"] += line["description"] != description(entry)
        else:
            counts["changed"] += 1
    asked: dict[str, list[str]] = {}
    for entry in entries:
        asked.setdefault(entry.split, []).append(entry.record_id)
    return Changes(
        known,
        new=counts["new"],
        changed=counts["changed"],
        same_plan=counts["same_plan"],
        gone=len(before) - len(entries) + counts["new"],
        rearranged=counts["relabelled"] > 0
        or any(asked[split] != ids for split, ids in order.items()),
    )


def check_belongs(
    earlier: Earlier,
    changes: Changes,
    splits: Sequence[str],
    manifest: Manifest,
    *,
    name: str,
    file_format: str,
) -> None:
    """Raises PrepareError where clips would come into a data set that they do not belong to."""
    out, preparation = earlier.directory, earlier.preparation
    clash = sorted(set(splits) & set(earlier.lines))
    if clash and not changes.same_plan:
        raise PrepareError(
            f"{out} already holds the split {clash[0]!r}, prepared from other files, with other "
            "options or by other versions of the libraries: use another --out, or --overwrite to "
            "replace it"
        )
    classes = {label: list(names) for label, names in manifest.class_names.items()}
    others = set(earlier.lines) - set(splits)
    if preparation["name"] != name or (others and preparation["class_names"] != classes):
        raise PrepareError(
            f"{out} holds a data set of another name or with other labels: use another "
            "--out, or one manifest with a split column for all splits"
        )
    if others and earlier.file_format != file_format:
        raise PrepareError(
            f"{out} holds {earlier.file_format} files: use --file-format {earlier.file_format}, or "
            "another --out"
        )


def jobs(
    parts: Sequence[Part],
    options: ClipOptions,
    directory: epath.Path,
    earlier: Earlier | None,
    changes: Changes,
) -> list[Job]:
    """Returns the work of each part, less what is known."""
    made = []
    for part in parts:
        known = {
            number: changes.known[part.split, entry.record_id]
            for number, entry in enumerate(part.entries)
            if (part.split, entry.record_id) in changes.known
        }
        made.append(
            Job(
                part,
                options,
                directory,
                known,
                earlier.directory if earlier else None,
                earlier.shard_with(part, known) if earlier else None,
            )
        )
    return made

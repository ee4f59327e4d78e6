"""The data set in the output directory: what of it still holds, and publication of finished parts.

Published are shards and indexes under their final names, metadata, and lists of sources, rejected
and missing clips.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import pyarrow as pa
import simplejpeg
from etils import epath

from avcl_jax.data.record_files import FILE_FORMATS
from avcl_jax.data.record_index import index_path, load_table, merge, save_table, shard_table
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import FORMAT_VERSION, RecordDataset, shard_name
from avcl_jax.data_prep.clip import ClipOptions
from avcl_jax.data_prep.manifest import Entry, Manifest, PrepareError, by_split
from avcl_jax.data_prep.shards import (
    PREPARED,
    Finished,
    Known,
    KnownEntries,
    Line,
    Part,
    description,
    entry_plan,
    may_pass,
    still_hold,
)
from avcl_jax.data_prep.source_files import FileState
from avcl_jax.paths import is_remote, replacing, store_of, write_bytes

INCOMPLETE, PREPARATION = ".incomplete", "preparation.json"
SOURCES, REJECTED = "sources.jsonl", "rejected.jsonl"
MISSING, DUPLICATES = "missing.jsonl", "duplicates.jsonl"
_LISTS = (SOURCES, REJECTED, MISSING, DUPLICATES)
_JOURNAL = "publish.json"


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Finished data set that is already in the output directory, by default an empty one."""

    directory: epath.Path
    preparation: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"name": "", "splits": {}, "seconds": 0.0}
    )
    file_format: str = ""
    # By split, records and bytes of each shard.
    shards: Mapping[str, Sequence[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    known: KnownEntries = dataclasses.field(default_factory=dict)
    # By split, as far as they were loaded.
    indexes: dict[str, pa.Table] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> set[str]:
        """Splits of its entries, also of those without records."""
        return {split for split, _ in self.known}

    def lines(self, split: str) -> list[Line]:
        """Returns the lines of a split, in order."""
        return [known.line for (other, _), known in self.known.items() if other == split]

    def compare(
        self,
        entries: Sequence[Entry],
        options: ClipOptions,
        states: Mapping[str, FileState | None],
    ) -> tuple[KnownEntries, Counter[str]]:
        """Compares its entries, of the splits of those to prepare, with these and their files.

        Returns:
          Entries that still hold. Numbers of clips that are `unchanged`, `changed`, `new`, `gone`
          and `rearranged` (have other labels, sources or places in the order), and of those with
          the `same_plan` (times and options), changed or not.
        """
        splits = by_split(entries)
        before = {key: known for key, known in self.known.items() if key[0] in splits}
        counts: Counter[str] = Counter()
        known = {}
        order = [(entry.split, entry.record_id) for entry in entries]
        both = [entry for entry, key in zip(entries, order, strict=True) if key in before]
        lines = [before[key].line for key in order if key in before]
        counts["new"] = len(entries) - len(both)
        holds = still_hold(lines, both, options, states)
        for entry, line, unchanged in zip(both, lines, holds, strict=True):
            counts["same_plan"] += line["plan"] == entry_plan(entry, options)
            if unchanged and not may_pass(line):
                key = (entry.split, entry.record_id)
                known[key] = before[key]
                counts["unchanged"] += 1
                counts["rearranged"] += line["description"] != description(entry)
            else:
                counts["changed"] += 1
        counts["gone"] = len(before.keys() - set(order))
        # Sorting is stable: the clips of a split stay in their order.
        old, new = (sorted(keys, key=lambda key: key[0]) for keys in (before, order))
        counts["rearranged"] += old != new
        return known, counts

    def finished(self, part: Part) -> Finished | None:
        """Returns the shard with exactly the records of a part, if there is one."""
        lines = [known.line for known in part.known.values()]
        if len(lines) < len(part.entries) or any(
            line["description"] != description(entry)
            for line, entry in zip(lines, part.entries, strict=True)
        ):
            return None
        records = [record for known in part.known.values() for record in known.records]
        lengths = [num_records for num_records, _ in self.shards[part.split]]
        ends = np.cumsum(lengths)
        number = int(np.searchsorted(ends, records[0], side="right")) if records else 0
        if not records or records != list(range(ends[number] - lengths[number], ends[number])):
            return None
        name = self.preparation["name"]
        shard = shard_name(name, part.split, number, len(lengths), self.file_format)
        index = index_path(self.directory, name, part.split)
        if part.split not in self.indexes:
            if load_table(index) is None:
                RecordDataset(self.directory, part.split)  # makes it
            self.indexes[part.split] = load_table(index)
        table = shard_table(self.indexes[part.split], number)
        return Finished(part.split, lines, table, self.directory / shard)

    def check_accepts(
        self, manifest: Manifest, counts: Counter[str], name: str, file_format: str
    ) -> None:
        """Raises PrepareError if the clips of a manifest do not belong to the data set."""
        out, splits = self.directory, {entry.split for entry in manifest.entries}
        clash = sorted(self.splits & splits)
        if clash and not counts["same_plan"]:
            raise PrepareError(
                f"{out} already holds the split {clash[0]!r}, prepared from other files, with "
                "other options or by other versions of the libraries: use another --out, or "
                "--overwrite to replace it"
            )
        classes = {label: list(names) for label, names in manifest.class_names.items()}
        others = self.splits - splits
        other_labels = others and self.preparation["class_names"] != classes
        if self.known and (self.preparation["name"] != name or other_labels):
            raise PrepareError(
                f"{out} holds a data set of another name or with other labels: use another "
                "--out, or one manifest with a split column for all splits"
            )
        if others and self.file_format != file_format:
            raise PrepareError(
                f"{out} holds {self.file_format} files: use --file-format {self.file_format}, or "
                "another --out"
            )


def read_earlier(out: epath.Path) -> Earlier:
    """Reads the metadata of a finished data set, empty if `out` has none.

    Raises PrepareError if `out` has a data set of another version, or of another program.
    """
    info_path = out / "dataset_info.json"
    if not info_path.exists():
        return Earlier(out)
    try:
        info = json.loads(info_path.read_text())
    except ValueError as error:
        raise PrepareError(f"{info_path} is damaged: use another --out or --overwrite") from error
    if info.get("version") != FORMAT_VERSION:
        raise PrepareError(
            f"{out} holds records from another version ({info.get('version')}, this release "
            f"writes {FORMAT_VERSION}): use another --out or --overwrite"
        )
    known: dict[tuple[str, str], Known] = {}
    records: Counter[str] = Counter()
    try:
        preparation = json.loads((out / PREPARATION).read_text())
        for line in map(json.loads, (out / SOURCES).read_text().splitlines()):
            split, first = line["split"], records[line["split"]]
            records[split] += sum(outcome == PREPARED for _, outcome, _ in line["clips"])
            known[split, line["id"]] = Known(line, range(first, records[split]))
    except (FileNotFoundError, ValueError) as error:
        raise PrepareError(
            f"{out} holds a data set that was not prepared by data_prep: use another --out"
        ) from error
    sizes = {}
    for split in info["splits"]:
        # TFDS keeps only the sum of the bytes.
        num_bytes = [int(split["numBytes"])] + [0] * len(split["shardLengths"])
        lengths = map(int, split["shardLengths"])
        sizes[split["name"]] = list(zip(lengths, num_bytes, strict=False))
    return Earlier(out, preparation, info["fileFormat"], sizes, known)


def all_lines(parts: Collection[Finished]) -> list[Line]:
    """Returns the lines of all parts."""
    return [line for part in parts for line in part.lines]


def rejections(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Returns the lines of rejected.jsonl."""
    return [
        {"path": line["path"], "id": clip, "split": line["split"], "reason": outcome, "message": m}
        for line in lines
        for clip, outcome, m in line["clips"]
        if outcome != PREPARED
    ]


def _counts(parts: Sequence[Finished]) -> dict[str, Any]:
    lines = all_lines(parts)
    rejected = Counter(clip["reason"] for clip in rejections(lines))
    notes = Counter(kind for line in lines for _, kind, _ in line["notes"])
    length, frames, samples, seconds = (
        np.concatenate([finished.index[name] for finished in parts])
        for name in ("length", "num_frames", "num_samples", "duration_seconds")
    )
    return {
        "records": len(length),
        "no_picture": int((frames == 0).sum()),
        "no_sound": int((samples == 0).sum()),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "bytes": int(length.sum()),
        "source_bytes": sum({line["path"]: line["bytes"] or 0 for line in lines}.values()),
        "rejected": dict(sorted(rejected.items())),
        "notes": dict(sorted(notes.items())),
    }


def publish(
    out: epath.Path,
    name: str,
    options: ClipOptions,
    manifest: Manifest,
    parts: Sequence[Finished],
    earlier: Earlier,
    *,
    duplicates: Collection[Mapping[str, str]],
    seconds: float,
) -> Mapping[str, Any]:
    """Moves finished parts to their names and writes the metadata; returns counts by split.

    The moves are first written to a journal: a publication that is interrupted is finished by
    `finish_publication` at the next start. Splits of the earlier data set that `parts` do not
    prepare stay.
    """
    incomplete, file_format = out / INCOMPLETE, options.file_format
    prepared = by_split(parts)
    splits = earlier.preparation["splits"] | {s: _counts(some) for s, some in prepared.items()}
    spent = earlier.preparation["seconds"] if len(splits) > len(prepared) else 0.0
    preparation = {
        "name": name,
        "seconds": round(spent + seconds, 3),
        "splits": splits,
        "class_names": {label: list(names) for label, names in manifest.class_names.items()},
        "multilabel": sorted(manifest.multilabel),
        "options": vars(options),
        "ignored_files": manifest.ignored,
        "versions": {"av": av.__version__, "simplejpeg": simplejpeg.__version__},
    }
    lines, moves = all_lines(parts), []
    shards: dict[str, Sequence[tuple[int, int]]] = {}
    for split in sorted(earlier.shards.keys() - prepared.keys()):
        shards[split] = earlier.shards[split]
        lines += earlier.lines(split)
    kept = set(shards)
    with_records = [finished for finished in parts if finished.size[0]]
    with ThreadPoolExecutor() as threads:  # copies in an object store take a while each
        list(threads.map(lambda finished: _link(finished.shard, incomplete), with_records))
    for split, of_split in by_split(with_records).items():
        shards[split] = [finished.size for finished in of_split]
        for number, finished in enumerate(of_split):
            final = shard_name(name, split, number, len(of_split), file_format)
            moves.append((finished.shard.name, final))
        index = index_path(incomplete, name, split)
        save_table(index, merge(finished.index for finished in of_split))
        moves.append((index.name, index.name))
    missing = [
        {"id": clip.record_id, "split": clip.split, "expected": clip.expected}
        for clip in manifest.missing
    ]
    for listed, rows in (
        (SOURCES, lines),
        (REJECTED, rejections(lines)),
        (MISSING, missing + _lines_of(out / MISSING, kept)),
        (DUPLICATES, [*duplicates, *_lines_of(out / DUPLICATES, kept)]),
    ):
        write_lines(incomplete / listed, rows)
        if rows:
            moves.append((listed, listed))
    journal = {"splits": shards, "moves": moves, "preparation": preparation}
    write_bytes(incomplete / _JOURNAL, json.dumps(journal).encode())
    finish_publication(out)
    return splits


def _link(shard: epath.Path, directory: epath.Path) -> None:
    """Makes a shard appear in a directory, copied only where links are impossible."""
    target = directory / shard.name
    if shard == target:
        return
    target.unlink(missing_ok=True)
    try:
        os.link(shard, target)
    except OSError:  # an object store, or a file system without links
        with replacing(target) as temporary:
            shard.copy(temporary, overwrite=True)


def _move(source: epath.Path, target: epath.Path) -> None:
    """Moves a file; in an object store it is copied, since its folder is removed afterwards."""
    if is_remote(source):
        files, name = store_of(source)
        files.cp_file(name, store_of(target)[1])
    else:
        source.replace(target)


def finish_publication(out: epath.Path) -> None:
    """Executes the journal in `out`, if there is one; safe to repeat."""
    incomplete = out / INCOMPLETE
    if not (incomplete / _JOURNAL).exists():
        return
    journal = json.loads((incomplete / _JOURNAL).read_text())
    preparation = journal["preparation"]
    name, file_format = preparation["name"], preparation["options"]["file_format"]
    # Without this file the directory is not a data set, so that nobody reads a half-replaced one.
    (out / "dataset_info.json").unlink(missing_ok=True)
    wanted = {target for _, target in journal["moves"]}
    for split, shards in journal["splits"].items():
        wanted.add(index_path(out, name, split).name)
        for number in range(len(shards)):
            wanted.add(shard_name(name, split, number, len(shards), file_format))
    shards_there = [path for kind in FILE_FORMATS for path in out.glob(f"*.{kind}-*")]
    for path in [*shards_there, *out.glob("*.index"), *(out / listed for listed in _LISTS)]:
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    there = {path.name for path in incomplete.glob("*")}
    # Others were moved before an interruption.
    moves = [(incomplete / a, out / b) for a, b in journal["moves"] if a in there]
    with ThreadPoolExecutor() as threads:
        list(threads.map(_move, *zip(*moves, strict=True)) if moves else ())
    write_bytes(out / PREPARATION, (json.dumps(preparation, indent=2) + "\n").encode())
    write_dataset_metadata(
        out,
        name=name,
        class_names=preparation["class_names"],
        multilabel=preparation["multilabel"],
        splits=journal["splits"],
        file_format=file_format,
    )
    incomplete.rmtree()


def write_lines(path: epath.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, or removes the file if there are none."""
    if lines:
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)


def _lines_of(path: epath.Path, splits: Collection[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [
        line for line in map(json.loads, path.read_text().splitlines()) if line["split"] in splits
    ]

"""Finished parts to a data set: final names, metadata, reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from avcl_jax.data.record_index import index_path, load_columns, merge, save_columns
from avcl_jax.data.records import FILE_FORMATS, ShardInfo, shard_name
from data_prep.earlier import PREPARATION, SOURCES, Earlier
from data_prep.manifest import Manifest
from data_prep.shards import PREPARED, Part, write_text
from data_prep.source_files import Duplicate

INCOMPLETE = ".incomplete"
REJECTED, MISSING, DUPLICATES = "rejected.jsonl", "missing.jsonl", "duplicates.jsonl"
_LISTS = (SOURCES, REJECTED, MISSING, DUPLICATES)
_JOURNAL = "publish.json"


def publish(
    out: epath.Path,
    *,
    name: str,
    manifest: Manifest,
    duplicates: Sequence[Duplicate],
    parts: Sequence[tuple[Part, Mapping[str, Any]]],
    preparation: Mapping[str, Any],
    earlier: Earlier | None,
) -> None:
    """Moves finished parts to their names and writes the metadata.

    What is to be done is written down first: a publication that is interrupted is finished by
    `finish_publication` at the next start.

    Args:
      out: Directory of the data set.
      name: Of the data set.
      manifest: Labels, and what is missing.
      duplicates: Clips of the same content.
      parts: With their reports, in order.
      preparation: Content of preparation.json; its splits are those of `parts` and those that
        stay.
      earlier: What is already there; None if nothing of it stays.
    """
    incomplete = out / INCOMPLETE
    prepared = {part.split for part, _ in parts}
    kept = set(earlier.shards) - prepared if earlier else set()
    chosen: dict[str, list[tuple[Part, Mapping[str, Any]]]] = {}
    for part, report in parts:
        if report["num_records"]:
            chosen.setdefault(part.split, []).append((part, report))
    file_format = preparation["options"]["file_format"]
    moves = []
    shards = {split: [list(info) for info in earlier.shards[split]] for split in kept if earlier}
    for split, with_records in chosen.items():
        shards[split] = [[r["num_records"], r["num_bytes"]] for _, r in with_records]
        for number, (part, _) in enumerate(with_records):
            final = shard_name(name, split, number, len(with_records), file_format)
            moves.append((part.path(incomplete, file_format).name, final))
        columns = [load_columns(part.path(incomplete, "columns")) for part, _ in with_records]
        if all(found is not None for found in columns):  # else the first reader makes it
            final = index_path(out, name, split).name
            save_columns(incomplete / final, merge([found for found in columns if found]))
            moves.append((final, final))
    lines = [line for _, report in parts for line in report["lines"]]
    for split in sorted(kept):
        lines += earlier.lines.get(split, []) if earlier else []
    _write_lists(incomplete, out, lines, manifest, duplicates, kept)
    moves += [(listed, listed) for listed in _LISTS if (incomplete / listed).exists()]
    journal = {
        "name": name,
        "class_names": {label: list(names) for label, names in manifest.class_names.items()},
        "multilabel": sorted(manifest.multilabel),
        "splits": shards,
        "moves": moves,
        "preparation": preparation,
    }
    write_text(incomplete / _JOURNAL, json.dumps(journal))
    finish_publication(out)


def rejections(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the lines of rejected.jsonl from what is written down about an entry."""
    return [
        {
            "path": line["path"],
            "id": clip,
            "split": line["split"],
            "reason": outcome,
            "message": message,
        }
        for clip, outcome, message in line["clips"]
        if outcome != PREPARED
    ]


def _write_lists(
    incomplete: epath.Path,
    out: epath.Path,
    lines: Sequence[Mapping[str, Any]],
    manifest: Manifest,
    duplicates: Sequence[Duplicate],
    kept: set[str],
) -> None:
    """Writes the lists for people and for the next run; of splits that stay, what was there."""

    def stays(listed: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(out / listed) if line["split"] in kept]

    write_lines(incomplete / SOURCES, lines)
    rejected = [rejected for line in lines for rejected in rejections(line)]
    write_lines(incomplete / REJECTED, rejected)
    missing = [
        {"id": clip.record_id, "split": clip.split, "expected": clip.expected}
        for clip in manifest.missing
    ]
    write_lines(incomplete / MISSING, [*missing, *stays(MISSING)])
    write_lines(
        incomplete / DUPLICATES, [*(vars(found) for found in duplicates), *stays(DUPLICATES)]
    )


def finish_publication(out: epath.Path) -> None:
    """Carries out what a journal in `out` says, if there is one; safe to repeat."""
    incomplete = out / INCOMPLETE
    if not (incomplete / _JOURNAL).exists():
        return
    journal = json.loads((incomplete / _JOURNAL).read_text())
    # TFDS takes seconds to import, and only this needs it.
    from avcl_jax.data.record_metadata import write_dataset_metadata

    # Without this file the directory is no data set, so that nobody reads a half-replaced one.
    (out / "dataset_info.json").unlink(missing_ok=True)
    file_format = journal["preparation"]["options"]["file_format"]
    wanted = {target for _, target in journal["moves"]}
    for split, shards in journal["splits"].items():
        wanted.add(index_path(out, journal["name"], split).name)
        wanted |= {
            shard_name(journal["name"], split, number, len(shards), file_format)
            for number in range(len(shards))
        }
    shards_there = [path for kind in FILE_FORMATS for path in out.glob(f"*.{kind}-*")]
    for path in [*shards_there, *out.glob("*.index"), *(out / listed for listed in _LISTS)]:
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    for source, target in journal["moves"]:
        if (incomplete / source).exists():  # else it was moved before the interruption
            (incomplete / source).replace(out / target)
    write_text(out / PREPARATION, json.dumps(journal["preparation"], indent=2) + "\n")
    write_dataset_metadata(
        out,
        name=journal["name"],
        class_names=journal["class_names"],
        multilabel=journal["multilabel"],
        splits={
            split: [ShardInfo(*info) for info in shards]
            for split, shards in journal["splits"].items()
        },
        file_format=file_format,
    )
    incomplete.rmtree()


def write_lines(path: epath.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, or removes the file when there is nothing to say."""
    if lines:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Returns what `write_lines` wrote; nothing if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]

"""Finished parts to a data set: final names, metadata, reports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from avcl_jax.data.record_index import index_path, load_columns, merge, save_columns
from avcl_jax.data.records import FORMAT_VERSION, ShardInfo, shard_name
from data_prep.manifest import PrepareError
from data_prep.shards import Part, write_text

INCOMPLETE = ".incomplete"
REJECTED, MISSING = "rejected.jsonl", "missing.jsonl"
_JOURNAL = "publish.json"
_PREPARATION = "preparation.json"


def read_preparation(out: Path) -> dict[str, Any] | None:
    """Returns preparation.json of a finished data set; None if `out` holds none.

    Raises:
      PrepareError: If `out` holds a data set of another version, or of another program.
    """
    try:
        info = json.loads((out / "dataset_info.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PrepareError(f"{out}/dataset_info.json is damaged: use another --out") from error
    if info.get("version") != FORMAT_VERSION:
        raise PrepareError(
            f"{out} holds records from another version ({info.get('version')}, this release "
            f"writes {FORMAT_VERSION}): use another --out or --overwrite"
        )
    try:
        return json.loads((out / _PREPARATION).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise PrepareError(
            f"{out} holds a data set that was not prepared by data_prep: use another --out"
        ) from error


def read_splits(out: Path) -> dict[str, list[ShardInfo]]:
    """Returns the shards of each split that `out` already holds."""
    info = json.loads((out / "dataset_info.json").read_text())
    splits = {}
    for entry in info["splits"]:
        lengths = [int(length) for length in entry["shardLengths"]]
        # TFDS keeps only the sum of the bytes.
        splits[entry["name"]] = [
            ShardInfo(length, int(entry["numBytes"]) if number == 0 else 0)
            for number, length in enumerate(lengths)
        ]
    return splits


def publish(
    out: Path,
    *,
    name: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str],
    parts: Sequence[tuple[Part, Mapping[str, Any]]],
    preparation: Mapping[str, Any],
    kept_splits: Mapping[str, Sequence[ShardInfo]],
    rejected: Sequence[Mapping[str, str]],
    missing: Sequence[Mapping[str, str]],
) -> None:
    """Moves finished parts to their names and writes the metadata.

    What is to be done is written down first: a publication that is interrupted is finished by
    `finish_publication` at the next start.

    Args:
      out: Directory of the data set.
      name: Of the data set.
      class_names: For each label.
      multilabel: Labels of which a clip may have several.
      parts: With their reports, in order.
      preparation: Content of preparation.json.
      kept_splits: Splits that are already there and stay.
      rejected: Lines of rejected.jsonl.
      missing: Lines of missing.jsonl.
    """
    splits: dict[str, list[tuple[Part, Mapping[str, Any]]]] = {}
    for part, report in parts:
        if report["num_records"]:
            splits.setdefault(part.split, []).append((part, report))
    incomplete = out / INCOMPLETE
    moves = [
        (part.shard_path(incomplete).name, shard_name(name, split, number, len(chosen)))
        for split, chosen in splits.items()
        for number, (part, _) in enumerate(chosen)
    ]
    for split, chosen in splits.items():
        final = index_path(out, name, split).name
        columns = [load_columns(part.columns_path(incomplete)) for part, _ in chosen]
        if all(found is not None for found in columns):  # else the first reader makes it
            save_columns(incomplete / final, merge([found for found in columns if found]))
            moves.append((final, final))
    infos = {split: [list(info) for info in shards] for split, shards in kept_splits.items()}
    for split, chosen in splits.items():
        infos[split] = [[report["num_records"], report["num_bytes"]] for _, report in chosen]
    journal = {
        "name": name,
        "class_names": {label: list(names) for label, names in class_names.items()},
        "multilabel": sorted(multilabel),
        "splits": infos,
        "moves": moves,
        "preparation": preparation,
        "rejected": list(rejected),
        "missing": list(missing),
    }
    write_text(incomplete / _JOURNAL, json.dumps(journal))
    finish_publication(out)


def finish_publication(out: Path) -> None:
    """Carries out what a journal in `out` says, if there is one; safe to repeat."""
    incomplete = out / INCOMPLETE
    try:
        journal = json.loads((incomplete / _JOURNAL).read_text())
    except FileNotFoundError:
        return
    # TFDS takes seconds to import, and only this needs it.
    from avcl_jax.data.record_metadata import write_dataset_metadata

    # Without this file the directory is no data set, so that nobody reads a half-replaced one.
    (out / "dataset_info.json").unlink(missing_ok=True)
    final = {target for _, target in journal["moves"]}
    kept = {
        shard_name(journal["name"], split, number, len(shards))
        for split, shards in journal["splits"].items()
        for number in range(len(shards))
    }
    kept |= {index_path(out, journal["name"], split).name for split in journal["splits"]}
    for path in (*out.glob("*.tfrecord-*"), *out.glob("*.index")):
        if path.name not in final | kept:
            path.unlink()
    for source, target in journal["moves"]:
        if (incomplete / source).exists():  # else it was moved before the interruption
            os.replace(incomplete / source, out / target)
    write_lines(out / REJECTED, journal["rejected"])
    write_lines(out / MISSING, journal["missing"])
    write_text(out / _PREPARATION, json.dumps(journal["preparation"], indent=2) + "\n")
    write_dataset_metadata(
        out,
        name=journal["name"],
        class_names=journal["class_names"],
        multilabel=journal["multilabel"],
        splits={
            split: [ShardInfo(*info) for info in shards]
            for split, shards in journal["splits"].items()
        },
    )
    shutil.rmtree(incomplete)


def write_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Writes one JSON object a line, or removes the file when there is nothing to say."""
    if lines:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, str]]:
    """Returns what `write_lines` wrote; nothing if there is no such file."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []

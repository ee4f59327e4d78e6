"""Publication of finished parts: final names, metadata, and lists of sources and rejections."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import simplejpeg
from etils import epath

from avcl_jax.data.record_files import FILE_FORMATS
from avcl_jax.data.record_index import index_path, merge, save_table
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import shard_name
from avcl_jax.paths import replacing, write_bytes
from data_prep.clip import ClipOptions
from data_prep.earlier import PREPARATION, SOURCES, Earlier
from data_prep.manifest import Manifest, by_split
from data_prep.shards import PREPARED, Finished, Line

INCOMPLETE = ".incomplete"
REJECTED, MISSING, DUPLICATES = "rejected.jsonl", "missing.jsonl", "duplicates.jsonl"
_LISTS = (SOURCES, REJECTED, MISSING, DUPLICATES)
_JOURNAL = "publish.json"


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


def describe(
    name: str,
    options: ClipOptions,
    manifest: Manifest,
    parts: Sequence[Finished],
    earlier: Earlier,
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of preparation.json: settings, and counts of each split.

    Splits of the earlier data set that `parts` do not prepare stay.
    """
    prepared = by_split(parts)
    counts = {split: _counts(of_split) for split, of_split in prepared.items()}
    splits = earlier.preparation["splits"] | counts
    spent = earlier.preparation["seconds"] if len(splits) > len(prepared) else 0.0
    return {
        "name": name,
        "seconds": round(spent + seconds, 3),
        "splits": splits,
        "class_names": {label: list(names) for label, names in manifest.class_names.items()},
        "multilabel": sorted(manifest.multilabel),
        "options": vars(options),
        "ignored_files": manifest.ignored,
        "versions": {"av": av.__version__, "simplejpeg": simplejpeg.__version__},
    }


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
    parts: Sequence[Finished],
    preparation: Mapping[str, Any],
    manifest: Manifest,
    duplicates: Collection[Mapping[str, str]],
    earlier: Earlier,
) -> None:
    """Moves finished parts to their names and writes the metadata.

    The moves are first written to a journal: a publication that is interrupted is finished by
    `finish_publication` at the next start. Splits of the earlier data set that `parts` do not
    prepare stay.
    """
    incomplete = out / INCOMPLETE
    name, file_format = preparation["name"], preparation["options"]["file_format"]
    lines, moves = all_lines(parts), []
    shards: dict[str, Sequence[tuple[int, int]]] = {}
    for split in sorted(earlier.shards.keys() - by_split(parts).keys()):
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
    for source, target in journal["moves"]:
        if (incomplete / source).exists():  # else it was moved before the interruption
            (incomplete / source).replace(out / target)
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

"""The data set that is already in the output directory, and the records of it that still hold."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from avcl_jax.data.record_index import index_path, load_table, shard_table
from avcl_jax.data.records import FORMAT_VERSION, RecordDataset, shard_name
from data_prep import shards
from data_prep.manifest import Manifest, PrepareError
from data_prep.shards import Finished, Known, Line, Part

SOURCES = "sources.jsonl"
PREPARATION = "preparation.json"

KnownEntries = Mapping[tuple[str, str], Known]  # by (split, record id), in order


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A finished data set, or an empty one."""

    directory: epath.Path
    preparation: Mapping[str, Any]  # content of preparation.json
    file_format: str
    shards: Mapping[str, Sequence[tuple[int, int]]]  # records and bytes of each, by split
    known: KnownEntries
    # By split, as far as they were loaded.
    indexes: dict[str, pa.Table] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> set[str]:
        """Splits of its entries, also of those without records."""
        return {split for split, _ in self.known}

    def lines(self, split: str) -> list[Line]:
        """Returns the lines of a split, in order."""
        return [known.line for (other, _), known in self.known.items() if other == split]

    def compare(self, parts: Sequence[Part]) -> tuple[KnownEntries, Counter[str]]:
        """Compares its entries, of the splits of some parts, with the entries of the parts.

        Returns:
          Entries that still hold. Numbers of clips that are `unchanged`, `changed`, `new`, `gone`
          and `rearranged` (have other labels, sources or places in the order), and of those with
          the `same_plan` (times and options), changed or not.
        """
        splits = {part.split for part in parts}
        before = {key: known for key, known in self.known.items() if key[0] in splits}
        counts: Counter[str] = Counter()
        known, order = {}, []
        for part in parts:
            for entry in part.entries:
                key = (entry.split, entry.record_id)
                order.append(key)
                if key not in before:
                    counts["new"] += 1
                    continue
                line = before[key].line
                counts["same_plan"] += line["plan"] == shards.entry_plan(entry, part.options)
                if shards.still_holds(line, entry, part.options) and not shards.may_pass(line):
                    known[key] = before[key]
                    counts["unchanged"] += 1
                    counts["rearranged"] += line["description"] != shards.description(entry)
                else:
                    counts["changed"] += 1
        counts["gone"] = len(before.keys() - set(order))
        # Sorting is stable: the clips of a split stay in their order.
        by_split = [sorted(keys, key=lambda key: key[0]) for keys in (before, order)]
        counts["rearranged"] += by_split[0] != by_split[1]
        return known, counts

    def add_to(self, part: Part, known: KnownEntries) -> Part:
        """Returns a part with those of its entries that are known."""
        keys = [(part.split, entry.record_id) for entry in part.entries]
        of_part = {number: known[key] for number, key in enumerate(keys) if key in known}
        return dataclasses.replace(part, known=of_part, earlier=self.directory)

    def finished(self, part: Part) -> Finished | None:
        """Returns the shard with exactly the records of a part, if there is one."""
        lines = [known.line for known in part.known.values()]
        if len(lines) < len(part.entries) or any(
            line["description"] != shards.description(entry)
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


def nothing(out: epath.Path) -> Earlier:
    """Returns an empty data set."""
    return Earlier(out, {"name": "", "splits": {}, "seconds": 0.0}, "", {}, {})


def read_earlier(out: epath.Path) -> Earlier:
    """Reads the metadata of a finished data set, empty if `out` has none.

    Raises PrepareError if `out` has a data set of another version, or of another program.
    """
    info_path = out / "dataset_info.json"
    if not info_path.exists():
        return nothing(out)
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
            records[split] += sum(outcome == shards.PREPARED for _, outcome, _ in line["clips"])
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

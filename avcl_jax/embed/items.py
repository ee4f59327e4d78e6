"""Media files, rows of tables and records to embed, each with its id."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from etils import epath

from avcl_jax.data.records import RecordDataset, split_names
from avcl_jax.data_prep.collections import folder_or_table
from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path, is_remote


@dataclasses.dataclass(frozen=True)
class Item:
    """A media file, an interval of one, or a record.

    Attributes:
        name: its id in the output.
        path: media file, or directory of records.
        start_seconds: beginning of the interval.
        end_seconds: end of the interval; None for that of the file.
        records: split of the data set that contains the record; None for a file.
        index: number of the record.
    """

    name: str
    path: str
    start_seconds: float = 0.0
    end_seconds: float | None = None
    records: RecordDataset | None = None
    index: int = 0


def list_items(paths: Sequence[str], root: epath.Path | None) -> list[Item]:
    """Lists files, rows of tables and records in the order of the paths.

    Raises:
        UserError: if a path does not exist or contains nothing, or two items have the same id.
    """
    items: list[Item] = []
    for given in paths:
        path = absolute_path(given)
        if (path / "dataset_info.json").exists():
            items += _records(path)
        else:
            items += _files(given, path, root)
    known: dict[str, Item] = {}
    for item in items:
        other = known.setdefault(item.name, item)
        if other is not item:
            raise UserError(
                f"two clips would have the id {item.name!r}: of {other.path} and {item.path}; give "
                "the folder above both, or a table with ids"
            )
    return items


def _records(path: epath.Path) -> Iterator[Item]:
    for split in split_names(path):
        records = RecordDataset(path, split)
        for index, name in enumerate(records.record_ids):
            yield Item(_printable(name), str(path), records=records, index=index)


def _files(given: str, path: epath.Path, root: epath.Path | None) -> Iterator[Item]:
    entries = folder_or_table.read_path(path, "train", root).entries
    is_file = len(entries) == 1 and entries[0].path == str(path)
    for entry in entries:
        if is_remote(entry.path):
            raise UserError(f"{entry.path} must be local: copy it to a local disk first")
        name = given if is_file else entry.record_id
        yield Item(_printable(name), entry.path, entry.start_seconds, entry.end_seconds)


def _printable(name: str) -> str:
    """Returns a name as UTF-8, which Parquet requires and names of files need not be."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

"""Vectors of clips, computed part by part, and the table that is made of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tqdm

from avcl_jax.batched import batched_map, cache_key
from avcl_jax.data_prep.source_files import state_of
from avcl_jax.embed.cutting import Clips, Cutter
from avcl_jax.embed.items import Item
from avcl_jax.errors import UserError
from avcl_jax.export.encoder import MODALITIES, Encoder
from avcl_jax.export.runs import EncoderSource
from avcl_jax.paths import replacing, write_bytes

# Clips of one modality that are encoded before they are stored.
_PART_CLIPS = 256
# Names of what `Parts` writes.
_OWN = re.compile(r"output|(job|\d{6}\.parquet)(\.\d+\.tmp)?")
_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} files [{elapsed}<{remaining}]"


class Job:
    """Items to encode, and how.

    Attributes:
        lengths: length of a vector, by modality.
        about: origin of the vectors, which the output contains.
        key: text that changes when the output would.
    """

    def __init__(
        self,
        items: Sequence[Item],
        source: EncoderSource,
        cutter: Cutter,
        *,
        speed: int,
        batch_size: int,
    ):
        """Takes encoders and what cuts their clips."""
        self.items, self.cutter, self.speed = items, cutter, speed
        self.lengths, self._encode = {}, {}
        for modality, encoder in source.encoders.items():
            spec = encoder.preprocess
            features = _features(encoder.description, spec)
            clips = np.zeros((1, *spec.clip_shape), spec.clip_dtype)
            shapes = jax.eval_shape(features, encoder.params, {"clips": clips})
            self.lengths[modality] = shapes["features"].shape[1]
            self._encode[modality] = batched_map(
                features,
                {"encoder": encoder.params},
                inputs=("clips",),
                chunk=batch_size,
                threads=1,
                identity=f"features {encoder.description} {spec}",
            )
        self.about = {
            "encoder": source.path,
            "encoder_sha256": source.fingerprint,
            "hop_seconds": cutter.hop,
        }
        self.key = cache_key(
            self.about,
            list(self.lengths),
            [_identity(item) for item in items],
            (speed, batch_size, jax.default_backend(), jax.local_device_count()),
        )

    def encode(self, modality: str, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Encodes clips, float32 [clips, C]."""
        outputs = self._encode[modality](lambda n: {"clips": clips[n]}, range(len(clips)))
        return outputs["encoder/features"]


# Cached, because a function is compiled once per process.
@functools.cache
def _features(description: str, preprocess: Any) -> Any:
    """Returns the function of the parameters of an encoder and clips to features."""
    encoder = Encoder.without_weights(description, preprocess)

    def features(params: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        return {"features": encoder.apply(params, arrays["clips"])}

    return features


def _identity(item: Item) -> tuple[Any, ...]:
    state = state_of(item.path) if item.records is None else item.records.fingerprint
    return item.name, item.path, item.start_seconds, item.end_seconds, state


class Parts:
    """Rows that were computed so far, in a folder beside the output; each file whole or not at all.

    Attributes:
        directory: the folder.
        next: numbers of the item and of its piece that come after them.
        failed: reasons by number of the item.
    """

    def __init__(self, directory: Path, key: str):
        """Takes the folder, and the text that changes when the rows would."""
        self.directory, self._key = directory, key
        self.next = (0, 0)
        self.failed: dict[int, str] = {}
        self._count = 0

    def open(self) -> None:
        """Reads where the same command was interrupted; removes the parts of another one."""
        job = self.directory / "job"
        if not job.exists() or job.read_bytes() != self._key.encode():
            paths = list(self.directory.iterdir())
            for path in paths:
                if not _OWN.fullmatch(path.name):
                    raise UserError(
                        f"{self.directory} is for unfinished output, but contains {path.name}: "
                        "move it, or give another --out"
                    )
            for path in paths:
                path.unlink()
            write_bytes(job, self._key.encode())
        while self._path(self._count).exists():
            state = json.loads(self._read(self._count, pq.read_schema).metadata[b"state"])
            self.next = tuple(state["next"])
            self.failed = {int(number): reason for number, reason in state["failed"].items()}
            self._count += 1

    def append(self, rows: pa.Table, position: tuple[int, int]) -> None:
        """Stores rows, after which `position` comes next."""
        self.next = position
        state = json.dumps({"next": position, "failed": self.failed})
        with replacing(self._path(self._count)) as temporary, temporary.open("wb") as file:
            pq.write_table(rows.replace_schema_metadata({"state": state}), file)
        self._count += 1

    def tables(self) -> Iterator[pa.Table]:
        """Yields the rows of each part, without those of items that failed later."""
        for number in range(self._count):
            table = self._read(number, pq.read_table)
            rows = table["item"].to_numpy()
            yield table.filter(~np.isin(rows, list(self.failed)))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.directory)

    def _read(self, number: int, read: Callable[[BinaryIO], Any]) -> Any:
        # From an open file: Arrow takes a path for an address, and only of UTF-8.
        with self._path(number).open("rb") as file:
            try:
                return read(file)
            except pa.ArrowInvalid as error:
                raise UserError(
                    f"{self._path(number)} is damaged ({error}): delete {self.directory} and run "
                    "again"
                ) from error

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.parquet"


def compute(job: Job, parts: Parts) -> None:
    """Encodes what the parts lack, and stores it part by part."""
    waiting: dict[str, list[tuple[int, Clips]]] = {modality: [] for modality in job.lengths}

    def store(position: tuple[int, int]) -> None:
        parts.append(_rows(job, waiting), position)
        for clips in waiting.values():
            clips.clear()

    bar = tqdm.tqdm(
        total=len(job.items), initial=parts.next[0], bar_format=_BAR, smoothing=0, disable=None
    )
    pieces = job.cutter.cut(job.items, parts.next, parts.failed)
    with bar, contextlib.closing(pieces):
        for piece, cut in pieces:
            if piece.item in parts.failed:
                continue
            if cut.error:
                parts.failed[piece.item] = cut.error
            for modality, clips in cut.clips.items():
                waiting[modality].append((piece.item, clips))
            is_done = cut.error or (piece.is_last and not cut.continues)
            done = 1.0 if is_done else (piece.number + 1) / max(piece.count, piece.number + 2)
            bar.update(piece.item + done - bar.n)
            position = (piece.item + 1, 0) if is_done else (piece.item, piece.number + 1)
            if any(
                sum(len(clips.starts) for _, clips in some) >= _PART_CLIPS
                for some in waiting.values()
            ):
                store(position)
        if parts.next != (len(job.items), 0):
            store((len(job.items), 0))


def _rows(job: Job, waiting: Mapping[str, Sequence[tuple[int, Clips]]]) -> pa.Table:
    """Encodes clips of each modality, with the numbers of their items, to rows in order."""
    rows = []
    for modality, some in waiting.items():
        if not some:
            continue
        span = job.cutter.spans[modality]
        vectors = job.encode(modality, [clip for _, clips in some for clip in clips.values])
        places = [(item, start) for item, clips in some for start in clips.starts.tolist()]
        for (item, start), vector in zip(places, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise UserError(
                    f"{job.items[item].path}: the vector of the {modality} at {start:g} s is not "
                    "finite: this encoder is broken"
                )
            rows.append((item, start, start + span, modality, vector))
    rows.sort(key=lambda row: (row[0], row[1], MODALITIES.index(row[3])))
    return _table(job, rows)


def _table(job: Job, rows: Sequence[tuple[int, float, float, str, np.ndarray]]) -> pa.Table:
    """Returns rows of item, start, end, modality and vector as a table, with the item's number."""
    items, starts, ends, modalities, vectors = zip(*rows, strict=True) if rows else [()] * 5
    return pa.table(
        {
            "item": pa.array(items, pa.int64()),
            "id": pa.array([job.items[item].name for item in items], pa.string()),
            "start": pa.array(starts, pa.float64()),
            "end": pa.array(ends, pa.float64()),
            "speed": pa.array([job.speed] * len(rows), pa.int32()),
            "modality": pa.array(modalities, pa.string()),
            "vector": pa.array(vectors, pa.list_(pa.float32())),
        }
    )


def write(out: Path, parts: Parts, job: Job, *, per_file: bool) -> int:
    """Writes the output, whole or not at all; returns its number of rows."""
    tables = _means(parts.tables(), job) if per_file else parts.tables()
    about = {"avcl_embed": json.dumps(job.about)}
    tables = (table.drop_columns("item").replace_schema_metadata(about) for table in tables)
    # Among the parts, so that nothing stays beside the output if the process is killed here.
    temporary = parts.directory / "output"
    with temporary.open("wb") as file:
        if out.suffix == ".npz":
            table = pa.concat_tables(tables)
            np.savez(file, **_arrays(table))  # type: ignore[arg-type] # numpy's stub
            count = len(table)
        else:
            first, count = next(tables), 0
            with pq.ParquetWriter(file, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table)
                    count += len(table)
    temporary.replace(out)
    return count


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Returns the columns of each modality, whose vectors have lengths of their own."""
    arrays: dict[str, np.ndarray] = {}
    for modality in pc.unique(table["modality"]).to_pylist():
        rows = table.filter(pc.equal(table["modality"], modality)).drop_columns("modality")
        columns = {name: rows[name].to_numpy() for name in rows.column_names}
        columns["id"], columns["vector"] = columns["id"].astype(str), np.stack(columns["vector"])
        arrays |= {f"{modality}_{name}": column for name, column in columns.items()}
    return arrays


def _means(tables: Iterator[pa.Table], job: Job) -> Iterator[pa.Table]:
    """Averages the clips of each item and modality, which may be in several parts."""
    sums: dict[tuple[int, str], tuple[float, float, Any, int]] = {}

    def finished(before: float) -> pa.Table:
        keys = sorted(key for key in sums if key[0] < before)
        keys.sort(key=lambda key: (key[0], MODALITIES.index(key[1])))
        rows = []
        for item, modality in keys:
            start, end, total, count = sums.pop((item, modality))
            rows.append((item, start, end, modality, (total / count).astype(np.float32)))
        return _table(job, rows)

    last = 0
    for table in tables:
        columns = (table[name].to_pylist() for name in ("item", "modality", "start", "end"))
        for item, modality, start, end, vector in zip(
            *columns, table["vector"].to_numpy(), strict=True
        ):
            first, _, total, count = sums.get((item, modality), (start, end, 0.0, 0))
            sums[item, modality] = (first, end, total + vector.astype(np.float64), count + 1)
            last = item
        yield finished(last)
    yield finished(np.inf)

"""Parts of an index: what one `add` wrote, never changed afterwards.

A part is a directory with two Parquet tables (sources, segments) and, per modality, the features
(float16) and a FAISS index of their projections. Row n of a modality's features is number n in its
FAISS index, and the table of segments says whose it is.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avcl_jax.fingerprint import ann
from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.projection import Projection

SOURCES, SEGMENTS = "sources.parquet", "segments.parquet"


@dataclasses.dataclass(frozen=True)
class SourceRow:
    """One indexed medium.

    Attributes:
        name: what a match says.
        content: SHA-256 of the file, or of the arrays of a medium in memory.
        duration_seconds: of the medium.
        path: of the file, None for a medium in memory.
    """

    name: str
    content: str
    duration_seconds: float
    path: str | None


@dataclasses.dataclass(frozen=True)
class Part:
    """An opened part.

    Attributes:
        directory: where it is.
        sources: its media.
        first_segment: int64 [sources + 1], segments of source s are first[s] up to first[s + 1].
        rows: modality -> int32 [segments], row in the features, −1 where missing.
        segments: modality -> int32 [rows], the segment of each row.
        features: modality -> float16 [rows, D], memory-mapped.
        searchers: modality -> FAISS index.
    """

    directory: Path
    sources: Sequence[SourceRow]
    first_segment: np.ndarray
    rows: Mapping[str, np.ndarray]
    segments: Mapping[str, np.ndarray]
    features: Mapping[str, np.ndarray]
    searchers: Mapping[str, Any]

    def features_of(
        self, modality: str, source: int, first: int = 0, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads segments of a source, from `first` up to `end`, as far as it has them.

        Returns:
            float32 [segments, D], zeros where missing; bool [segments].
        """
        begin, stop = self.first_segment[source : source + 2]
        last = stop if end is None else min(begin + end, stop)
        rows = self.rows[modality][begin + first : max(last, begin + first)]
        here = rows >= 0
        found = np.zeros((len(rows), self.features[modality].shape[1]), np.float32)
        found[here] = self.features[modality][rows[here]]
        return found, here


def write_part(
    directory: Path,
    media: Sequence[tuple[SourceRow, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    projections: Mapping[str, Projection],
    kind: str,
) -> dict[str, str]:
    """Writes a part and makes it durable.

    Args:
        directory: new.
        media: of each its description, features and presence as in `SegmentFeatures`.
        projections: of each modality.
        kind: of the FAISS index, see `FingerprintSettings`.

    Returns:
        File name -> SHA-256.
    """
    directory.mkdir(parents=True)
    rows_of = [row for row, _, _ in media]
    pq.write_table(
        pa.table(
            {
                "name": [row.name for row in rows_of],
                "content": [row.content for row in rows_of],
                "duration_seconds": [row.duration_seconds for row in rows_of],
                "path": pa.array([row.path for row in rows_of], pa.string()),
            }
        ),
        directory / SOURCES,
    )
    counts = [len(next(iter(present.values()))) for _, _, present in media]
    columns: dict[str, Any] = {
        "source": np.repeat(np.arange(len(media), dtype=np.int32), counts),
        "segment": np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
    }
    for modality, projection in projections.items():
        here = np.concatenate([present[modality] for _, _, present in media])
        features = np.concatenate([f[modality][p[modality]] for _, f, p in media])
        np.save(directory / f"{modality}.npy", features.astype(np.float16))
        rows = np.full(len(here), -1, np.int32)
        rows[here] = np.arange(here.sum(), dtype=np.int32)
        columns[modality] = rows
        # Of what a reader will read: features rounded to float16.
        vectors = projection(features.astype(np.float16))
        ann.write(ann.build(vectors, kind), directory / f"{modality}.faiss")
    pq.write_table(pa.table(columns), directory / SEGMENTS)
    for path in sorted(directory.iterdir()):
        make_durable(path)
    make_durable(directory)
    return {path.name: file_sha256(path) for path in sorted(directory.iterdir())}


def open_part(directory: Path, modalities: Sequence[str]) -> Part:
    """Opens a part.

    Raises:
        FileNotFoundError: if a file of it is missing.
        FingerprintError: if one is damaged.
    """
    _check_files(directory, modalities)
    ann.faiss()  # what is not installed is not damage
    try:
        names = pq.read_table(directory / SOURCES).to_pylist()
        table = pq.read_table(directory / SEGMENTS)
        sources = [SourceRow(**row) for row in names]
        counts = np.bincount(table["source"].to_numpy(), minlength=len(sources))
        rows = {m: table[m].to_numpy() for m in modalities}
        features = {m: np.load(directory / f"{m}.npy", mmap_mode="r") for m in modalities}
        searchers = {m: ann.read(directory / f"{m}.faiss") for m in modalities}
    except (pa.ArrowException, KeyError, TypeError, ValueError, EOFError, ann.AnnError) as error:
        _check_files(directory, modalities)  # a writer may have deleted it meanwhile
        raise FingerprintError(
            f"{directory} is damaged ({str(error).splitlines()[0]}): index the media again"
        ) from error
    segments = {m: np.flatnonzero(r >= 0).astype(np.int32) for m, r in rows.items()}
    for m in modalities:
        if not len(segments[m]) == len(features[m]) == searchers[m].ntotal:
            raise FingerprintError(
                f"{directory}: the table has {len(segments[m])} {m} segments, features "
                f"{len(features[m])}, FAISS {searchers[m].ntotal}: index the media again"
            )
    first = np.concatenate([[0], np.cumsum(counts)])
    return Part(directory, sources, first, rows, segments, features, searchers)


def _check_files(directory: Path, modalities: Sequence[str]) -> None:
    for name in _file_names(modalities):
        if not (directory / name).exists():  # not all that read a file say which is missing
            raise FileNotFoundError(errno.ENOENT, "no such file", str(directory / name))


def _file_names(modalities: Sequence[str]) -> list[str]:
    return [SOURCES, SEGMENTS, *(f"{m}.{kind}" for m in modalities for kind in ("npy", "faiss"))]


def make_durable(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

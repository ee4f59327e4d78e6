"""The vectors of an index in memory, as they were when it was opened, and the search among them.

They are computed from the database and kept beside it in `cache-GENERATION`. The cache of another
generation gives what has not changed since; a missing or damaged one is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from avcl_jax.fingerprint.database import DATABASE, SourceRow, Transaction, transaction
from avcl_jax.fingerprint.projection import Projection, fit_projection
from avcl_jax.fingerprint.segments import SegmentFeatures
from avcl_jax.fingerprint.settings import FingerprintSettings

# From here on vectors are compressed and searched in cells; a flat search of this size takes 100 MB
# and, for the queries of a ten-second clip, about a second on two cores.
IVFPQ_FROM = 200_000
_PROBES, _CODE_BYTES = 32, 32
# Cells are learned again when the number of vectors has changed by this factor.
_LEARNED_WITHIN = 2
# The projection is fitted again at every growth by this factor, until it was fitted to enough: an
# index to which films are added one by one ends up as one made of them all.
_FIT_GROWTH, _FIT_ENOUGH = 4, 50_000
_COHORT = 512
_CACHE = re.compile(r"cache-[0-9a-f]{16}(\.\w+)?")
# Neighbours that may be of the source itself, as in still images, before they are searched again.
_OWN = 40
# The label of a segment is the id of its source, followed by its number in these bits.
_NUMBER_BITS = 32


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Segments of all sources that have a modality, in the order of their labels."""

    projection: Projection
    labels: np.ndarray  # int64 [segments]
    values: np.ndarray  # float32 [segments, d], made by the projection
    cells: Any = None  # FAISS index of the compressed vectors in cells; None if all are compared
    learned_from: int = 0  # number of vectors from which the cells were learned

    @functools.cached_property
    def searcher(self) -> Any:
        """FAISS index of the vectors by their labels."""
        if self.cells is not None:
            return self.cells
        flat = faiss.IndexIDMap2(faiss.IndexFlatIP(self.values.shape[1]))
        flat.add_with_ids(np.ascontiguousarray(self.values), self.labels)
        return flat

    @functools.cached_property
    def cohort(self) -> np.ndarray:
        """Vectors of segments all over the library: what any query may resemble by chance."""
        count = len(self.values)
        return self.values[np.linspace(0, count - 1, min(_COHORT, count)).astype(int)]

    def with_cells(self, kind: str, former: Vectors) -> Vectors:
        """Returns these vectors in cells, if there are enough: those of `former` where they fit."""
        count, width = self.values.shape
        # Cells and codebooks cannot be learned from fewer than 256 vectors.
        if kind == "flat" or count < (IVFPQ_FROM if kind == "auto" else 256):
            return self
        learned = former.learned_from
        if learned / _LEARNED_WITHIN < count < learned * _LEARNED_WITHIN:
            cells = faiss.clone_index(former.cells)  # others may search the former ones
            cells.remove_ids(np.setdiff1d(former.labels, self.labels))
            new = ~np.isin(self.labels, former.labels)
            cells.add_with_ids(self.values[new], self.labels[new])
            return dataclasses.replace(self, cells=cells, learned_from=learned)
        code = next(n for n in range(min(_CODE_BYTES, width), 0, -1) if width % n == 0)
        number = max(1, min(4096, count // 64))
        quantiser, metric = faiss.IndexFlatIP(width), faiss.METRIC_INNER_PRODUCT
        cells = faiss.IndexIVFPQ(quantiser, width, number, code, 8, metric)
        cells.cp.seed = 1
        cells.train(self.values[:: max(1, count // 400_000)])
        cells.nprobe = _PROBES
        cells.add_with_ids(self.values, self.labels)
        return dataclasses.replace(self, cells=cells, learned_from=count)


@dataclasses.dataclass(frozen=True)
class Library:
    """Sources, numbered in the order of their ids, and their vectors."""

    stored: Mapping[str, Any]  # `Transaction.settings`
    sources: Sequence[SourceRow]
    vectors: Mapping[str, Vectors]  # by modality; none in an index that never had media
    is_stored: bool = True  # whether the database has the projections of the vectors

    @functools.cached_property
    def settings(self) -> FingerprintSettings:
        """Settings with which the index was made."""
        return FingerprintSettings.from_json(self.stored["settings"])

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Ids of the sources, int64, ascending."""
        return np.array([source.id for source in self.sources], np.int64)

    @functools.cached_property
    def num_segments(self) -> int:
        """Number of segments."""
        return sum(source.segments for source in self.sources)

    def project(self, segments: SegmentFeatures) -> SegmentFeatures:
        """Returns segments with vectors, zeros where missing, in place of their features."""
        vectors = {}
        for modality, own in self.vectors.items():
            vectors[modality] = own.projection(segments.features[modality])
            vectors[modality][~segments.present[modality]] = 0
        return dataclasses.replace(segments, features=vectors)

    def vectors_of(
        self, modality: str, number: int, first: int, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns segments of a source from `first` up to `end`, as far as it has them.

        They are float32 [segments, d], zeros where missing, and bool [segments].
        """
        vectors, source = self.vectors[modality], self.sources[number]
        start, count = source.id << _NUMBER_BITS, max(min(end, source.segments) - first, 0)
        rows = slice(*np.searchsorted(vectors.labels, start + first + np.array([0, count])))
        places = vectors.labels[rows] - start - first
        values = np.zeros((count, vectors.values.shape[1]), np.float32)
        present = np.zeros(count, bool)
        values[places], present[places] = vectors.values[rows], True
        return values, present

    def search(
        self, modality: str, queries: np.ndarray, count: int, exclude: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds the `count` nearest segments of each query, float32 [n, d], but not of one source.

        Returns:
            Similarity, float32 [n, count], best first; number of the source, −1 where there are
            fewer; and number of the segment in its source, both int64 [n, count].
        """
        searcher, parameters = self.vectors[modality].searcher, None
        if exclude is not None:
            id_ = self.sources[exclude].id
            same = faiss.IDSelectorRange(id_ << _NUMBER_BITS, (id_ + 1) << _NUMBER_BITS)
            others = faiss.IDSelectorNot(same)
            parameters = (
                faiss.SearchParametersIVF(sel=others, nprobe=_PROBES)
                if isinstance(searcher, faiss.IndexIVF)
                else faiss.SearchParameters(sel=others)
            )
        queries = np.ascontiguousarray(queries, np.float32)
        similarity, labels = searcher.search(queries, count, params=parameters)
        missing = labels < 0
        return (
            np.where(missing, -np.inf, similarity),
            np.where(missing, -1, np.searchsorted(self.ids, labels >> _NUMBER_BITS)),
            np.where(missing, -1, labels & ((1 << _NUMBER_BITS) - 1)),
        )

    def neighbours(
        self, modality: str, numbers: Sequence[int], count: int
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Finds the `count` nearest segments, of other sources, of each segment of some sources.

        Returns:
            By source, what `search` returns for its segments that are present.
        """
        vectors = self.vectors[modality]
        starts = self.ids[numbers] << _NUMBER_BITS
        rows = np.searchsorted(vectors.labels, [starts, starts + (1 << _NUMBER_BITS)]).T
        queries = np.concatenate([vectors.values[a:b] for a, b in rows])
        own = np.repeat(numbers, rows[:, 1] - rows[:, 0])
        # Without a selection of sources, FAISS compares by matrix products, three times as fast.
        wide = self.search(modality, queries, count + _OWN)
        others = wide[1] != own[:, None]
        # The first ones that are not of the source itself, in their order.
        order = np.argsort(~others, axis=1, kind="stable")[:, :count]
        found = [np.take_along_axis(values, order, axis=1) for values in wide]
        crowded = others.sum(axis=1) < count
        for number in np.unique(own[crowded]).tolist():
            some = crowded & (own == number)
            for values, again in zip(
                found, self.search(modality, queries[some], count, number), strict=True
            ):
                values[some] = again
        ends = np.cumsum(rows[:, 1] - rows[:, 0])[:-1]
        return list(zip(*(np.split(values, ends) for values in found), strict=True))

    def save(self, directory: Path) -> None:
        """Writes the cache of this generation, unless it is there, and deletes those of others.

        Where there is no room, or the folder cannot be written, there is none afterwards, and
        readers compute what it would contain.
        """
        place = _cache_of(directory, self.stored)
        if _read_cache(place):
            return
        with contextlib.suppress(OSError):
            new = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=directory))
            with contextlib.suppress(OSError):
                _write_cache(new, self.vectors)
                new.rename(place)
            for path in directory.iterdir():
                if _CACHE.fullmatch(path.name) and path != place:
                    shutil.rmtree(path, ignore_errors=True)


def load(directory: Path, former: Mapping[str, Vectors] | None = None) -> Library:
    """Reads an index; unchanged vectors of an earlier state, `former`, are used again.

    Raises:
        FingerprintError: if there is no index, or it is damaged.
    """
    with transaction(directory) as opened:
        stored = opened.settings()
        if former is None:
            places = [_cache_of(directory, stored)]
            places += [path for path in directory.iterdir() if _CACHE.fullmatch(path.name)]
            former = next(filter(None, map(_read_cache, places)), {})
        return _build(opened, stored, former)


def verify(directory: Path) -> list[str]:
    """Checks the database, and that the cache agrees with it; returns one line per problem.

    Raises:
        FingerprintError: if there is no index, or it cannot be read.
    """
    with transaction(directory) as opened:
        if problems := opened.problems():
            return problems
        library = _build(opened, opened.settings(), {})
        place = _cache_of(directory, library.stored)
        cache = _read_cache(place)
    if cache.keys() != library.vectors.keys():
        return []  # it is computed again when the index is opened
    agree = all(
        np.array_equal(cache[m].labels, vectors.labels)
        and np.allclose(cache[m].values, vectors.values, atol=1e-4)
        and cache[m].searcher.ntotal == len(vectors.labels)
        for m, vectors in library.vectors.items()
    )
    return [] if agree else [f"{place} does not agree with {DATABASE}: delete it"]


def _build(
    opened: Transaction, stored: Mapping[str, Any], former: Mapping[str, Vectors]
) -> Library:
    """Computes the vectors of all media, but for those that `former` has by the same projections.

    The projections are fitted if there are none yet, or the index has grown much since.
    """
    library = Library(stored, opened.media(), {})
    projections = opened.projections()
    fitted = max((p.fitted_to for p in projections.values()), default=0)
    grown = fitted < _FIT_ENOUGH and library.num_segments >= _FIT_GROWTH * max(fitted, 1)
    if not library.sources or (projections and not grown):
        vectors = _vectors(opened, library, projections, former)
        # Otherwise the first film was added to an index of songs.
        if all(v.projection.fitted_to or not len(v.labels) for v in vectors.values()):
            return dataclasses.replace(library, vectors=vectors)
    rng = np.random.default_rng(0)
    features = [opened.features_of(source)[0] for source in library.sources]
    for modality, width in stored["dimensions"].items():
        rows = np.concatenate([np.zeros((0, width), np.float32), *(f[modality] for f in features)])
        if len(rows) > _FIT_ENOUGH:
            rows = rows[rng.choice(len(rows), _FIT_ENOUGH, replace=False)]
        projections[modality] = fit_projection(rows, stored["settings"]["dimensions"])
    vectors = _vectors(opened, library, projections, {})
    return dataclasses.replace(library, vectors=vectors, is_stored=False)


def _vectors(
    opened: Transaction,
    library: Library,
    projections: Mapping[str, Projection],
    former: Mapping[str, Vectors],
) -> Mapping[str, Vectors]:
    """Computes the vectors of all media that `former` does not have by the same projections."""
    same = former.keys() == projections.keys() and all(
        np.array_equal(former[m].projection.mean, p.mean)
        and np.array_equal(former[m].projection.matrix, p.matrix)
        for m, p in projections.items()
    )
    if not same:
        former = {
            m: Vectors(p, np.zeros(0, np.int64), np.zeros((0, p.matrix.shape[1]), np.float32))
            for m, p in projections.items()
        }
    # Each source has a segment of some modality.
    labels = np.concatenate([np.zeros(0, np.int64), *(v.labels for v in former.values())])
    known = np.unique(labels >> _NUMBER_BITS)
    if np.array_equal(known, library.ids):
        return former
    parts = {}
    for modality, vectors in former.items():
        kept = np.isin(vectors.labels >> _NUMBER_BITS, library.ids)
        parts[modality] = [(vectors.labels[kept], vectors.values[kept])]
    for number in np.flatnonzero(~np.isin(library.ids, known)).tolist():
        source = library.sources[number]
        features, present = opened.features_of(source)
        for modality, projection in projections.items():
            labels = (source.id << _NUMBER_BITS) + np.flatnonzero(present[modality])
            parts[modality].append((labels, projection(features[modality])))
    made = {}
    for modality, projection in projections.items():
        labels, values = map(np.concatenate, zip(*parts[modality], strict=True))
        order = np.argsort(labels)
        vectors = Vectors(projection, labels[order], values[order])
        made[modality] = vectors.with_cells(library.settings.kind, former[modality])
    return made


def _cache_of(directory: Path, stored: Mapping[str, Any]) -> Path:
    return directory / f"cache-{stored['generation']}"


def _write_cache(directory: Path, vectors_by_modality: Mapping[str, Vectors]) -> None:
    for modality, vectors in vectors_by_modality.items():
        arrays: dict[str, Any] = {**vectors.projection._asdict(), "labels": vectors.labels}
        if vectors.cells is not None:
            arrays["cells"] = faiss.serialize_index(vectors.cells)
            arrays["learned_from"] = vectors.learned_from
        np.savez(directory / f"{modality}.npz", **arrays)
        np.save(directory / f"{modality}.npy", vectors.values)
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _read_cache(directory: Path) -> dict[str, Vectors]:
    """Reads a cache; returns nothing if it is missing or damaged."""
    made: dict[str, Vectors] = {}
    try:
        for path in sorted(directory.glob("*.npz")):
            # Opened here, because numpy leaves a file open that it cannot read.
            with path.open("rb") as file, np.load(file) as loaded:
                arrays = dict(loaded)
            made[path.stem] = Vectors(
                Projection.from_arrays(arrays),
                arrays["labels"],
                np.load(path.with_suffix(".npy"), mmap_mode="r"),
                faiss.deserialize_index(arrays["cells"]) if "cells" in arrays else None,
                int(arrays.get("learned_from", 0)),
            )
    # The last is FAISS's error for everything.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError):
        return {}
    return made if all(len(v.labels) == len(v.values) for v in made.values()) else {}

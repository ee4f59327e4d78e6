"""What a reader sees: the parts that a manifest names, as one library of numbered sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from avcl_jax.fingerprint import ann
from avcl_jax.fingerprint.part import Part, SourceRow
from avcl_jax.fingerprint.projection import Projection

_COHORT = 512


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Nearest reference segments of query segments; source −1 where there are fewer.

    Attributes:
        similarity: float32 [queries, k], best first.
        source: int64 [queries, k], number of the source.
        segment: int64 [queries, k], number of the segment in its source.
    """

    similarity: np.ndarray
    source: np.ndarray
    segment: np.ndarray


class Snapshot:
    """Opened parts; sources are numbered through, those removed keep their numbers."""

    def __init__(
        self,
        parts: Sequence[Part],
        removed: Sequence[Sequence[int]],
        projections: Mapping[str, Projection],
    ):
        """Takes parts, the numbers of the removed sources of each, and the projections."""
        self.parts = parts
        self.projections = projections
        self._offsets = np.cumsum([0, *(len(part.sources) for part in parts)])
        self.live = np.ones(self._offsets[-1], bool)
        for offset, numbers in zip(self._offsets, removed, strict=False):
            self.live[offset + np.array(numbers, int)] = False
        self._keep: list[dict[str, np.ndarray | None]] = []
        for number, part in enumerate(parts):
            live = self.live[self._offsets[number] : self._offsets[number + 1]]
            owners = np.repeat(np.arange(len(part.sources)), np.diff(part.first_segment))
            self._keep.append(
                {
                    m: None if live.all() else live[owners[segments]]
                    for m, segments in part.segments.items()
                }
            )
        self.cohort = {modality: self._draw_cohort(modality) for modality in projections}

    @property
    def num_segments(self) -> int:
        """Number of segments of sources that are not removed."""
        counts = [np.diff(part.first_segment) for part in self.parts]
        return int(np.concatenate([*counts, np.zeros(0, int)])[self.live].sum())

    def source(self, number: int) -> SourceRow:
        """Returns what is known of a source."""
        part, local = self._locate(number)
        return part.sources[local]

    def sources(self) -> list[SourceRow]:
        """Returns all sources that are not removed."""
        return [self.source(int(n)) for n in np.flatnonzero(self.live)]

    def numbers_of(self, content: str) -> list[int]:
        """Returns the sources with this SHA-256 that are not removed."""
        return [n for n in np.flatnonzero(self.live).tolist() if self.source(n).content == content]

    def length_of(self, number: int) -> int:
        """Returns the number of segments of a source."""
        part, local = self._locate(number)
        return int(part.first_segment[local + 1] - part.first_segment[local])

    def features_of(
        self, modality: str, number: int, first: int, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Part.features_of`."""
        part, local = self._locate(number)
        return part.features_of(modality, local, first, end)

    def vectors_of(
        self, modality: str, number: int, first: int, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns segments of a source from `first` up to `end`, as far as it has them.

        Returns:
            Projected, float32 [segments, d], zeros where missing; bool [segments].
        """
        features, here = self.features_of(modality, number, first, end)
        vectors = self.projections[modality](features)
        vectors[~here] = 0
        return vectors, here

    def search(
        self, modality: str, queries: np.ndarray, count: int, exclude: int | None = None
    ) -> Neighbours:
        """Finds the nearest segments of all parts.

        Args:
            modality: whose vectors.
            queries: float32 [n, d], projected.
            count: neighbours of each.
            exclude: number of a source that is not to be found.
        """
        excluded = (None, -1) if exclude is None else self._locate(exclude)
        found = [
            (np.full((len(queries), 1), -np.inf, np.float32), *np.full((2, len(queries), 1), -1))
        ]
        for number, part in enumerate(self.parts):
            segments = part.segments[modality]
            if not len(segments):
                continue
            keep = self._keep[number][modality]
            if part is excluded[0]:
                first, end = part.first_segment[excluded[1] : excluded[1] + 2]
                others = (segments < first) | (segments >= end)
                keep = others if keep is None else others & keep
            similarity, rows = ann.search(
                part.searchers[modality], queries, min(count, len(segments)), keep
            )
            segment = segments[rows].astype(np.int64)
            source = np.searchsorted(part.first_segment, segment, side="right") - 1
            within = segment - part.first_segment[source]
            missing = rows < 0
            found.append(
                (
                    np.where(missing, -np.inf, similarity),
                    np.where(missing, -1, source + self._offsets[number]),
                    np.where(missing, -1, within),
                )
            )
        similarity, source, segment = (
            np.concatenate(columns, axis=1) for columns in zip(*found, strict=True)
        )
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        return Neighbours(*(np.take_along_axis(a, order, 1) for a in (similarity, source, segment)))

    def _locate(self, number: int) -> tuple[Part, int]:
        which = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return self.parts[which], int(number - self._offsets[which])

    def _draw_cohort(self, modality: str) -> np.ndarray:
        """Vectors of segments all over the library: what any query may resemble by chance."""
        features = []
        total = sum(len(part.segments[modality]) for part in self.parts)
        for part, keep in zip(self.parts, self._keep, strict=True):
            mask = keep[modality]
            rows = np.arange(len(part.segments[modality])) if mask is None else np.flatnonzero(mask)
            wanted = -(-_COHORT * len(rows) // max(total, 1))
            if wanted:
                chosen = rows[np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int)]
                features.append(part.features[modality][chosen])
        projection = self.projections[modality]
        if not features:
            return np.zeros((0, projection.matrix.shape[1]), np.float32)
        return projection(np.concatenate(features))

"""Calibration of evidence to a score: how rarely an unrelated query finds as much.

The best evidence that an unrelated query finds anywhere in the library is a maximum over many
places, so it follows a Gumbel distribution, whose location grows with the logarithm of the number
of places. It is fitted to excerpts of the library itself, which may match anything but their own
source: no unrelated query resembles the references more. An excerpt is one rendering of a query; a
query has one for each rate and for each offset between two segments, nearly independent of each
other.

score = −log10 of the chance that an unrelated query finds more: 2 is one in a hundred.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from avcl_jax.fingerprint.library import Library
from avcl_jax.fingerprint.matching import QUERY_DENSITY, align, prepare
from avcl_jax.fingerprint.segments import SegmentFeatures

# Fewer sources say nothing about unrelated queries.
MIN_SOURCES = 12
_QUERIES = 32
_LENGTHS_SECONDS = (1.5, 3.0, 6.0, 12.0)
# Weight of the default, as a number of queries.
_PRIOR_QUERIES = 8


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Gumbel distribution of the best evidence of unrelated queries."""

    location: float  # for a query of one second
    growth: float  # of the location with the natural logarithm of the query's seconds
    scale: float
    segments: int  # of the library to which it was fitted

    def score(self, evidence: float, *, query_seconds: float, segments: int) -> float:
        """Returns −log10 of the chance that an unrelated query finds such evidence.

        `segments` is the number in the library.
        """
        places = math.log(max(segments, 1) / max(self.segments, 1))
        location = self.location + self.growth * math.log(max(query_seconds, 0.5))
        surprise = (evidence - location) / self.scale - places
        if surprise > 30:  # where 1 − exp(−x) is x
            return surprise / math.log(10)
        # Twice the exponential overflows below; there the chance is 1.
        return -math.log10(-math.expm1(-math.exp(-max(surprise, -6.0))))


# By `name_of`, with "" where nothing is compared, for an index with too few sources: fitted to 200
# clips of the demo by the encoders `small`. Real media are similar: in an index of this size, video
# is at 9.5 and audio at 10.6.
_BOTH = Calibration(location=10.2, growth=1.4, scale=1.2, segments=6693)
DEFAULTS = {
    "": _BOTH,
    "audio+video": _BOTH,
    "video": Calibration(location=8.5, growth=0.9, scale=1.5, segments=6693),
    "audio": Calibration(location=8.3, growth=1.2, scale=0.9, segments=6693),
}
_PRIOR_SCALE = 1.2


def name_of(modalities: Iterable[str]) -> str:
    """Returns the key under which `fit` returns the distribution of these modalities together."""
    return "+".join(sorted(modalities))


def fit(library: Library, spans: Mapping[str, float]) -> dict[str, Calibration]:
    """Fits the distributions to queries made of the library's own sources.

    Median and quartiles are fitted, so that a quarter of the sources may have a duplicate in the
    library, such as two cuts of one film.

    Args:
        spans: modality -> length of a segment, of all modalities of the library.

    Returns:
        The distribution of all modalities together and of each alone, by `name_of`; `DEFAULTS`
        where there are too few sources with these modalities.
    """
    sets = {name_of(used): {m: spans[m] for m in used} for used in [spans, *((m,) for m in spans)]}
    count = len(library.sources)
    if count < MIN_SOURCES:
        return {name: DEFAULTS[name] for name in sets}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    rng = np.random.default_rng(0)
    numbers = rng.choice(count, min(_QUERIES, count), replace=False)
    for n, number in enumerate(numbers.tolist()):
        seconds = _LENGTHS_SECONDS[n % len(_LENGTHS_SECONDS)]
        query = _excerpt(library, number, seconds, spans, rng)
        # One search serves every choice of modalities: most of the work of adding short media.
        queries = prepare(library, [query], list(spans), exclude=number)
        for name, own in sets.items():
            if all(query.present[m].any() for m in own):
                best = align(library, queries, own)
                evidence = best[0].evidence(own) if best else 0.0
                points[name].append((math.log(query.duration_seconds), evidence))
    return {
        name: _distribution(np.array(own_points), library)
        if len(own_points) >= MIN_SOURCES
        else DEFAULTS[name]
        for name, own_points in points.items()
    }


def _distribution(points: np.ndarray, library: Library) -> Calibration:
    """Fits evidence [queries, 1], which grows with the logarithm of the seconds [queries, 0]."""
    import scipy.stats  # takes half as long to import as JAX, and a query does not fit

    seconds, evidence = points.T
    # The median slope of all pairs: a few outliers do not move it.
    slope = scipy.stats.theilslopes(evidence, seconds).slope if np.ptp(seconds) else 0.0
    growth = max(0.0, float(slope))
    low, middle, high = np.quantile(evidence - growth * seconds, (0.25, 0.5, 0.75))
    # Of the unit Gumbel: quartiles are 1.5725 apart, the median is at 0.3665.
    weight = len(evidence) / (len(evidence) + _PRIOR_QUERIES)
    scale = weight * float(high - low) / 1.5725 + (1 - weight) * _PRIOR_SCALE
    renderings_of_a_query = len(library.settings.rates) * QUERY_DENSITY
    return Calibration(
        location=float(middle) - 0.3665 * scale + scale * math.log(renderings_of_a_query),
        growth=growth,
        scale=scale,
        segments=library.num_segments,
    )


def _excerpt(
    library: Library,
    number: int,
    seconds: float,
    spans: Mapping[str, float],
    rng: np.random.Generator,
) -> SegmentFeatures:
    """Cuts these seconds, or as many as there are, out of a source's segments.

    Each segment is repeated where a query has others between it and the next.
    """
    hop, span = library.settings.hop_seconds, max(spans.values())
    wanted = max(1, round((seconds - span) / hop) + 1)
    total = library.sources[number].segments
    first = int(rng.integers(max(total - wanted, 0) + 1))
    features, present = {}, {}
    for modality in spans:
        vectors, here = library.vectors_of(modality, number, first, first + wanted)
        features[modality] = np.repeat(vectors, QUERY_DENSITY, axis=0)
        present[modality] = np.repeat(here, QUERY_DENSITY)
    return SegmentFeatures(features, present, (min(wanted, total) - 1) * hop + span)

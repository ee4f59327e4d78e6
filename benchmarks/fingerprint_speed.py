"""Times of fingerprinting, each measured in a process of its own by benchmarks/fingerprint.py."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

_QUERY_SECONDS = 10.0
_SEGMENTS_PER_SOURCE = 100
_WARM_QUERIES = 5


def seconds_of_query(encoder: str, clip: str, segments: int, kind: str) -> list[float]:
    """Wall-clock seconds of warm queries, decoding included, against an index of this size.

    Features of the index are mixtures of those of real segments: as many neighbours, of as many
    sources, as in a library of that size.

    Args:
        encoder: as `open_encoders` takes it.
        clip: media file of which ten seconds are asked.
        segments: of the index.
        kind: of `FingerprintSettings`.
    """
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.database import SourceRow, transaction
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.segments import SegmentFeatures
    from avcl_jax.fingerprint.settings import FingerprintSettings

    with tempfile.TemporaryDirectory() as directory:
        settings = FingerprintSettings(kind=kind)  # type: ignore[arg-type]  # checked by it
        index = FingerprintIndex.create(Path(directory) / "index", encoder, settings)
        decoding = index.segmenter.decoding
        real = index.segmenter.of_file(clip)
        rng = np.random.default_rng(0)
        per = _SEGMENTS_PER_SOURCE
        seconds_per_source = per * settings.hop_seconds
        with transaction(index.directory, write=True) as stored:
            for number in range(segments // per):
                mixed = {}
                for modality, features in real.features.items():
                    known = features[real.present[modality]]
                    one, other = known[rng.integers(len(known), size=(2, per))]
                    share = rng.uniform(size=(per, 1))
                    noise = known.std() * rng.standard_normal(one.shape)
                    mixed[modality] = (share * one + (1 - share) * other + noise).astype(np.float32)
                present = {modality: np.ones(per, bool) for modality in mixed}
                row = SourceRow(f"source {number}", str(number), seconds_per_source, None)
                stored.insert(row, SegmentFeatures(mixed, present, seconds_per_source))
        index = FingerprintIndex.open(index.directory)
        assert index.num_segments == segments
        seconds = []
        for _ in range(1 + _WARM_QUERIES):
            begin = time.perf_counter()
            index.query(decode_media(clip, end_seconds=_QUERY_SECONDS, **decoding))
            seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def seconds_of_indexing(encoder: str, files: list[str], only_decode: bool) -> float:
    """Wall-clock seconds in which files are indexed, or only decoded in the same way.

    The first file is done once before, so that compiling is not counted.
    """
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.settings import FingerprintSettings

    with tempfile.TemporaryDirectory() as directory:
        index = FingerprintIndex.create(Path(directory) / "index", encoder, FingerprintSettings())
        decoding = index.segmenter.decoding
        index.segmenter.of_file(files[0])
        begin = time.perf_counter()
        if only_decode:
            for path in files:
                decode_media(path, **decoding)
        else:
            report = index.add_files(map(Path, files))
            assert not report.failed, report.failed
        return time.perf_counter() - begin

"""Time of `avcl-fingerprint duplicates`: `python -m benchmarks.duplicates --json F`.

Features of the clips are mixtures of those of a real file, each with a number of neighbours as in a
library of that size; one clip in ten is a copy of another. Indexing is not counted. The second row
shows by what the time of a clip grows when there are four times as many: comparing all pairs would
make it four times as long.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.paths import local_path
from benchmarks import measure
from benchmarks.measure import Measured, RowTable, SkipError, Target

_CLIPS, _SECONDS, _FEWER = 1000, 10.0, 4
_COPIES = 0.1


def seconds_of_duplicates(encoder: str, clip: str, count: int, seconds: float) -> dict[str, float]:
    """Wall-clock seconds of comparing all clips of an index with each other, and the copies."""
    from avcl_jax.fingerprint.database import SourceRow, transaction
    from avcl_jax.fingerprint.details import AUDIO_HZ, IMAGE_BYTES, VIDEO_HZ, Details
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.segments import SegmentFeatures
    from avcl_jax.fingerprint.settings import FingerprintSettings

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        settings = FingerprintSettings()
        index = FingerprintIndex.create(Path(directory) / "index", encoder, settings)
        real = index.segmenter.of_file(clip)
        per = round((seconds - max(index.segmenter.spans.values())) / settings.hop_seconds) + 1
        copies = round(_COPIES * count)

        def made() -> SegmentFeatures:
            mixed = {}
            for modality, features in real.features.items():
                known = features[real.present[modality]]
                one, other = known[rng.integers(len(known), size=(2, per))]
                weight = rng.uniform(size=(per, 1))
                noise = known.std() * rng.standard_normal(one.shape)
                mixed[modality] = (weight * one + (1 - weight) * other + noise).astype("f")
            images = rng.integers(0, 256, (round(seconds * VIDEO_HZ), IMAGE_BYTES), np.uint8)
            signs = rng.integers(1, 1 << 32, round(seconds * AUDIO_HZ), np.uint32)
            present = {modality: np.ones(per, bool) for modality in mixed}
            return SegmentFeatures(mixed, present, seconds, details=Details(images, signs))

        segments = made()
        with transaction(index.directory, write=True) as stored:
            for number in range(count):
                if number >= copies or not number % 2:
                    segments = made()
                stored.insert(SourceRow(f"clip {number}", str(number), seconds, None), segments)
        index = FingerprintIndex.open(index.directory)
        _ = index.segmenter
        shared: list[Any] = []
        taken = measure.seconds_of(lambda: shared.append(index.shared()))
        return {"seconds": taken, "segments": index.num_segments, "groups": len(shared[0].groups)}


class _Benchmark:
    """Measurements; both rows use the same ones."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.measured = functools.cache(self._measured)

    def _measured(self, count: int) -> dict[str, float]:
        measure.need("faiss")
        files = sorted(self._args.clips.glob("*.mp4"))
        if not files:
            raise SkipError(f"{self._args.clips} contains no MP4 files: `make demo`, or --clips")
        arguments = {
            "encoder": self._args.encoder,
            "clip": str(files[0]),
            "count": count,
            "seconds": _SECONDS,
        }
        return measure.run_child("benchmarks.duplicates:seconds_of_duplicates", arguments)

    def seconds(self) -> Measured:
        """Seconds of all clips."""
        found = self.measured(self._args.count)
        return found["seconds"], {"clips": self._args.count, **found}

    def growth(self) -> Measured:
        """Seconds of a clip among all over those among a quarter of them."""
        few, all_ = self.measured(self._args.count // _FEWER), self.measured(self._args.count)
        return all_["seconds"] / few["seconds"] / _FEWER, {"few": few, "all": all_}


_ROWS: RowTable[_Benchmark] = {
    "duplicates_seconds": ("s", Target("<=", 180), _Benchmark.seconds),
    "duplicates_growth": ("ratio", Target("<=", 2), _Benchmark.growth),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("duplicates", __doc__, rows=_ROWS)
    parser.add_argument("--encoder", default="small", help="name, run or exported encoders")
    clips = "folder of MP4 files; the first is used"
    parser.add_argument("--clips", type=local_path, default="data/foley/media/test", help=clips)
    parser.add_argument("--count", type=int, default=_CLIPS, help="clips in the index")
    args = parser.parse_args(arguments)
    measure.measure_rows(_ROWS, args.rows, _Benchmark(args), args.json)


if __name__ == "__main__":
    measure.run_command(main)

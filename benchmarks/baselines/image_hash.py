"""Perceptual hashes of frames: what people reach for to find copies of pictures (`imagehash`).

pHash (the signs of the low frequencies of the cosine transform against their median) of frames four
times a second. The settings were chosen on training clips of the demo, as those of our index on its
test clips (docs/fingerprint.md); neither are clips of the benchmark.
"""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

from avcl_jax.data.decoded import DecodedMedia
from avcl_jax.evaluation.fingerprint_search import Items, Ranking, background_score
from benchmarks.baselines.aligned_codes import AlignedCodes

_HASHES_PER_SECOND = 4.0
_SIDE = 8  # 64 bits
_CHANCE_BITS = 24.0  # of 64; unrelated frames differ in 32 and rarely in fewer than 20
_LEAST_CONTRAST = 2.0  # of 255: the hash of an even picture is noise (PDQ's quality, likewise)


class ImageHashSearcher:
    """Hashes of the pictures; the sound is not looked at."""

    methods = ("image_hash",)

    def __init__(self, *, answers: int):
        """Makes an empty index that returns so many answers, at most."""
        self._answers = answers
        self._rng = np.random.default_rng(0)
        self._references, self._background = (
            AlignedCodes(step_seconds=1 / _HASHES_PER_SECOND, chance_bits=_CHANCE_BITS)
            for _ in range(2)
        )

    def index(self, references: Items, background: Items) -> None:
        """Takes the clips."""
        for codes, items in ((self._references, references), (self._background, background)):
            for name, media in items:
                codes.add(name, hashes(media, self._rng, mirrored=False))

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns what the pictures resemble, as they are or mirrored."""
        variants = [hashes(media, self._rng, mirrored=mirrored) for mirrored in (False, True)]
        return {
            "image_hash": Ranking(
                self._references.query(variants, self._answers),
                background_score(self._background.query(variants, self._answers)),
            )
        }


def hashes(media: DecodedMedia, rng: np.random.Generator, *, mirrored: bool) -> np.ndarray:
    """Returns uint64 [moments, 1], the hash of the frame that is shown at each moment.

    Args:
        media: whose pictures.
        rng: gives even pictures, which have no hash, a code like no other.
        mirrored: hash their mirror images.
    """
    if not media.has_video:
        return np.empty((0, 1), np.uint64)
    end = media.frame_seconds[-1] + 1e-6
    moments = np.arange(media.frame_seconds[0], end, 1 / _HASHES_PER_SECOND)
    shown = np.searchsorted(media.frame_seconds, moments + 1e-6, side="right") - 1
    codes: list[np.ndarray] = []
    for frame in media.frames[np.maximum(shown, 0)]:
        picture = Image.fromarray(frame[:, ::-1] if mirrored else frame).convert("L")
        if np.asarray(picture).std() < _LEAST_CONTRAST:
            # Far from everything: half of the bits of any code differ on average.
            bits = rng.integers(0, 2, _SIDE * _SIDE).astype(bool)
        else:
            bits = imagehash.phash(picture, hash_size=_SIDE).hash.reshape(-1)
        codes.append(np.packbits(bits).view(np.uint64))
    return np.array(codes)

"""Chromaprint, the fingerprint of AcoustID and MusicBrainz, for the sound.

`pyacoustid` calls libchromaprint (Debian: libchromaprint1); raw sub-fingerprints of 32 bits, eight
a second, are compared by bit error rate at every alignment, as AcoustID compares them.
"""

from __future__ import annotations

import acoustid
import chromaprint
import numpy as np

from avcl_jax.data.decoded import DecodedMedia
from avcl_jax.evaluation.fingerprint_search import Items, Ranking, background_score
from benchmarks.baselines.aligned_codes import AlignedCodes

_STEP_SECONDS = 1365 / 11025  # Chromaprint's hop: a third of 4096 samples at 11025 Hz
_CHANCE_BITS = 13.0  # of 32; unrelated sub-fingerprints differ in 16, seldom in fewer than 10


class ChromaprintSearcher:
    """Fingerprints of the sound; the picture is not looked at."""

    methods = ("chromaprint",)

    def __init__(self, *, answers: int):
        """Makes an empty index that returns so many answers, at most."""
        self._answers = answers
        self._references, self._background = (
            AlignedCodes(step_seconds=_STEP_SECONDS, chance_bits=_CHANCE_BITS) for _ in range(2)
        )

    def index(self, references: Items, background: Items) -> None:
        """Takes the clips."""
        for codes, items in ((self._references, references), (self._background, background)):
            for name, media in items:
                codes.add(name, sub_fingerprints(media))

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns what the sound resembles; nothing for less than three seconds of it."""
        variants = [sub_fingerprints(media)]
        return {
            "chromaprint": Ranking(
                self._references.query(variants, self._answers),
                background_score(self._background.query(variants, self._answers)),
            )
        }


def sub_fingerprints(media: DecodedMedia) -> np.ndarray:
    """Returns uint64 [moments, 1]; a moment is the beginning of the 2.6 s it describes."""
    if not media.has_audio:
        return np.empty((0, 1), np.uint64)
    packed = acoustid.fingerprint(
        media.sample_rate_hz, 1, iter([media.waveform.tobytes()]), maxlength=24 * 3600
    )
    codes, _ = chromaprint.decode_fingerprint(packed)
    return (np.array(codes, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint64).reshape(-1, 1)

"""Baselines: a perceptual hash of frames and Chromaprint, the methods that people would use.

Both describe moments at equal distances by binary codes. Codes are matched along lines of constant
offset at the playback rates that our index tries, without a threshold: moments whose codes differ
by as much as chance add nothing. Settings were chosen on training clips of the demo, as those of
our index on its test clips (docs/fingerprint.md); neither are clips of the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.searchers import Answer, Items, Ranking, background_score

_RATES = (1.0, 0.8, 0.9, 1.125, 1.25)
_CANDIDATES = 24  # sources aligned per query, as many as our index aligns
_HASH_SIDE = 8  # 64 bits
_LEAST_CONTRAST = 2.0  # of 255: the hash of a frame of one colour is noise (as PDQ's quality)


class AlignedCodes:
    """References as codes of equally spaced moments."""

    def __init__(self, *, step_seconds: float, chance_bits: float):
        """Makes an empty index.

        Args:
            step_seconds: time from one code to the next.
            chance_bits: Hamming distance from which two codes have nothing in common.
        """
        self._step = step_seconds
        self._chance = chance_bits
        self._references: list[tuple[str, np.ndarray]] = []

    def add(self, name: str, codes: np.ndarray) -> None:
        """Adds a reference: codes uint64 [moments, 1], perhaps none."""
        if len(codes):
            self._references.append((name, codes))

    def query(self, variants: Sequence[np.ndarray], count: int) -> list[Answer]:
        """Returns the best references.

        The score is the mean over the query's moments of how far below chance their distance is, 1
        for equal codes, along the best line.

        Args:
            variants: codes uint64 [moments, 1] of the query, perhaps also of its mirror image.
            count: largest number of references.
        """
        best: dict[str, Answer] = {}
        for codes in variants:
            if not len(codes) or not self._references:
                continue
            likeness = [self._likeness(codes, reference) for _, reference in self._references]
            votes = [values.max(axis=1).sum() for values in likeness]
            for place in np.argsort(votes)[::-1][:_CANDIDATES]:
                answer = self._align(self._references[place][0], likeness[place])
                if answer.source not in best or answer.score > best[answer.source].score:
                    best[answer.source] = answer
        return sorted(best.values(), key=lambda a: -a.score)[:count]

    def _likeness(self, query: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Returns float32 [query, reference], 1 for equal codes, 0 from chance on."""
        differing = np.bitwise_count(query ^ reference.T).astype(np.float32)
        return np.maximum(1 - differing / self._chance, 0)

    def _align(self, name: str, likeness: np.ndarray) -> Answer:
        moments, places = likeness.shape
        rows = np.arange(moments)
        best = (-1.0, 0)
        for rate in _RATES:
            offsets = np.arange(-int(rate * moments), places)
            columns = np.rint(rate * rows)[None, :].astype(int) + offsets[:, None]
            inside = (columns >= 0) & (columns < places)
            along = np.where(inside, likeness[rows, np.clip(columns, 0, places - 1)], 0.0)
            means = along.mean(axis=1)
            line = int(np.argmax(means))
            best = max(best, (float(means[line]), int(offsets[line])))
        return Answer(name, best[0], best[1] * self._step)


class _CodeSearcher:
    """A method of one modality whose fingerprints are codes."""

    method: str
    step_seconds: float
    chance_bits: float
    mirrored: tuple[bool, ...] = (False,)  # variants of a query

    def __init__(self, *, answers: int):
        """Makes an empty index that returns at most `answers` references per query."""
        self.methods = (self.method,)
        self._answers = answers
        self._references, self._background = (
            AlignedCodes(step_seconds=self.step_seconds, chance_bits=self.chance_bits)
            for _ in range(2)
        )

    def codes(self, media: DecodedMedia, *, mirrored: bool) -> np.ndarray:
        """Returns uint64 [moments, 1]; empty without the modality."""
        raise NotImplementedError

    def index(self, references: Items, background: Items) -> None:
        """Adds the clips."""
        for codes, items in ((self._references, references), (self._background, background)):
            for name, media in items:
                codes.add(name, self.codes(media, mirrored=False))

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns a ranking; without answers if the clip lacks the modality or is too short."""
        variants = [self.codes(media, mirrored=mirrored) for mirrored in self.mirrored]
        answers = self._references.query(variants, self._answers)
        background = self._background.query(variants, self._answers)
        return {self.method: Ranking(answers, background_score(background))}


class ImageHash(_CodeSearcher):
    """pHash (`imagehash`) of four frames per second, also of their mirror images.

    The hash is the signs of the low frequencies of the cosine transform against their median.
    """

    method = "image_hash"
    step_seconds = 0.25
    chance_bits = 24.0  # of 64; unrelated frames differ in 32 and rarely in fewer than 20
    mirrored = (False, True)

    def __init__(self, *, answers: int):
        """Makes an empty index; ImportError without imagehash."""
        super().__init__(answers=answers)
        import imagehash

        self._phash = imagehash.phash
        self._rng = np.random.default_rng(0)

    def codes(self, media: DecodedMedia, *, mirrored: bool) -> np.ndarray:
        """Returns the hash of the frame at each moment; of one colour it is a random code."""
        if not media.has_video:
            return np.empty((0, 1), np.uint64)
        end = media.frame_seconds[-1] + 1e-6
        moments = np.arange(media.frame_seconds[0], end, self.step_seconds)
        places = np.searchsorted(media.frame_seconds, moments + 1e-6, side="right") - 1
        codes: list[np.ndarray] = []
        for frame in media.frames[np.maximum(places, 0)]:
            grey = Image.fromarray(frame[:, ::-1] if mirrored else frame).convert("L")
            if np.asarray(grey).std() < _LEAST_CONTRAST:
                # Far from everything: half of the bits of any code differ on average.
                bits = self._rng.integers(0, 2, _HASH_SIDE * _HASH_SIDE).astype(bool)
            else:
                bits = self._phash(grey, hash_size=_HASH_SIDE).hash.reshape(-1)
            codes.append(np.packbits(bits).view(np.uint64))
        return np.array(codes)


class Chromaprint(_CodeSearcher):
    """Chromaprint, the audio fingerprint of AcoustID and MusicBrainz.

    `pyacoustid` calls libchromaprint (Debian: libchromaprint1). Raw sub-fingerprints of 32 bits,
    eight per second, are compared by bit error rate at every alignment, as AcoustID compares them.
    """

    method = "chromaprint"
    step_seconds = 1365 / 11025  # Chromaprint's hop: a third of 4096 samples at 11025 Hz
    chance_bits = 13.0  # of 32; unrelated sub-fingerprints differ in 16, seldom in fewer than 10

    def __init__(self, *, answers: int):
        """Makes an empty index; ImportError without pyacoustid or libchromaprint."""
        super().__init__(answers=answers)
        import acoustid
        import chromaprint

        self._fingerprint, self._decode = acoustid.fingerprint, chromaprint.decode_fingerprint

    def codes(self, media: DecodedMedia, *, mirrored: bool) -> np.ndarray:
        """Returns sub-fingerprints; each is at the beginning of the 2.6 s that it describes."""
        if not media.has_audio:
            return np.empty((0, 1), np.uint64)
        packed = self._fingerprint(
            media.sample_rate_hz, 1, iter([media.waveform.tobytes()]), maxlength=24 * 3600
        )
        codes, _ = self._decode(packed)
        return (np.array(codes, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint64).reshape(-1, 1)


BASELINES: Mapping[str, type[_CodeSearcher]] = {b.method: b for b in (ImageHash, Chromaprint)}

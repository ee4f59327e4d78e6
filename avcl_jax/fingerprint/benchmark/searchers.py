"""Methods that the protocol measures: our index, and baselines that people would use otherwise.

The baselines are a perceptual hash of frames and Chromaprint. Both describe moments at equal
distances by binary codes. Codes are matched along lines of constant offset at the playback rates
that our index tries, without a threshold: moments whose codes differ by as much as chance add
nothing. Settings were chosen on training clips of the demo, as those of our index on its test clips
(docs/fingerprint.md); neither are clips of the benchmark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from avcl_jax.data.media import DecodedMedia
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintSettings

Items = Iterable[tuple[str, DecodedMedia]]
_RATES = (1.0, 0.8, 0.9, 1.125, 1.25)
_CANDIDATES = 24  # sources aligned per query, as many as our index aligns
_LEAST_CONTRAST = 2.0  # of 255: the hash of a frame of one colour is noise (as PDQ's quality)
# Our methods and the modalities that they compare.
OURS: Mapping[str, tuple[str, ...]] = {
    "fused": ("video", "audio"),
    "video": ("video",),
    "audio": ("audio",),
}


class Answer(NamedTuple):
    """One source that a query may come from."""

    source: str
    score: float  # higher is surer; comparable between queries
    offset_seconds: float  # time in the source of the query's beginning
    accepted: bool | None = None  # as a match; None if the method has no threshold of its own


class Ranking(NamedTuple):
    """Result of a query."""

    answers: Sequence[Answer]  # the best of each source, best first; perhaps none
    background: float  # score where nothing can be found, subtracted from normalised scores


class Searcher(Protocol):
    """A fingerprinting method, or several that share their work."""

    methods: tuple[str, ...]

    def index(self, references: Items, background: Items) -> None:
        """Adds the clips to find, and clips that no query comes from; called once."""

    def query(self, media: DecodedMedia) -> Mapping[str, Ranking]:
        """Returns a ranking by method."""


def background_score(answers: Sequence[Answer]) -> float:
    """Returns the mean of the three best scores, as one is noisy; 0 for a missing answer."""
    return sum(a.score for a in answers[:3]) / 3


class IndexSearcher:
    """Our index, searched three times: with both modalities and with each alone."""

    methods = tuple(OURS)

    def __init__(
        self, directory: Path, encoder_path: str, settings: FingerprintSettings, answers: int
    ):
        """Makes two empty indexes in a new directory that return at most `answers` per query."""
        self._references, self._background = (
            FingerprintIndex.create(directory / name, encoder_path, settings)
            for name in ("references", "background")
        )
        self._answers = answers

    def index(self, references: Items, background: Items) -> None:
        """Adds the clips; UserError if one has no segment."""
        for index, items in ((self._references, references), (self._background, background)):
            if failed := index.add(items).failed:
                name, reason = failed[0]
                raise UserError(f"{name} cannot be indexed: {reason}")

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns a ranking by method, without answers where its modality is missing."""
        # Encoded once, for three methods and two indexes.
        renderings = self._references.render(media)

        def answers(index: FingerprintIndex, modalities: tuple[str, ...]) -> list[Answer]:
            found = index.match(renderings, media.duration_seconds, modalities, self._answers)
            return [Answer(m.source, m.score, m.offset_seconds, m.accepted) for m in found.matches]

        return {
            method: Ranking(
                answers(self._references, modalities),
                background_score(answers(self._background, modalities)),
            )
            for method, modalities in OURS.items()
        }


class CodeSearcher:
    """A method whose fingerprints are codes of equally spaced moments."""

    def __init__(
        self,
        method: str,
        codes: Callable[[DecodedMedia], np.ndarray],
        step_seconds: float,
        *,
        chance_bits: float,
        answers: int,
        mirrored: bool = False,
    ):
        """Makes an empty index that returns at most `answers` references per query.

        Args:
            codes: maps a clip to its codes, uint64 [moments, 1]; empty without the modality.
            step_seconds: time from one moment to the next.
            chance_bits: Hamming distance from which two codes have nothing in common.
            mirrored: look for the mirror image of a query too.
        """
        self.methods: tuple[str, ...] = (method,)
        self._codes = codes
        self._step_seconds = step_seconds
        self._chance_bits = chance_bits
        self._answers = answers
        self._mirrored = mirrored
        self._references: list[tuple[str, np.ndarray]] = []
        self._background: list[tuple[str, np.ndarray]] = []

    def index(self, references: Items, background: Items) -> None:
        """Adds the clips."""
        self._references += ((name, self._codes(media)) for name, media in references)
        self._background += ((name, self._codes(media)) for name, media in background)

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns a ranking; without answers if the clip lacks the modality or is too short."""
        variants = [self._codes(media)]
        if self._mirrored:
            mirror = dataclasses.replace(media, frames=media.frames[:, :, ::-1])
            variants.append(self._codes(mirror))
        background = background_score(self.search(self._background, variants))
        return {self.methods[0]: Ranking(self.search(self._references, variants), background)}

    def search(
        self, references: Sequence[tuple[str, np.ndarray]], variants: Sequence[np.ndarray]
    ) -> list[Answer]:
        """Returns the best references.

        The score is the mean over the query's moments of how far below chance their distance is, 1
        for equal codes, along the best line.
        """
        best: dict[str, Answer] = {}
        for codes in variants:
            if not len(codes):
                continue
            likeness = {
                name: np.maximum(
                    1 - np.bitwise_count(codes ^ known.T).astype(np.float32) / self._chance_bits, 0
                )
                for name, known in references
                if len(known)
            }
            votes = [values.max(axis=1).sum() for values in likeness.values()]
            names = list(likeness)
            for place in np.argsort(votes)[::-1][:_CANDIDATES]:
                answer = self._align(names[place], likeness[names[place]])
                if answer.source not in best or answer.score > best[answer.source].score:
                    best[answer.source] = answer
        return sorted(best.values(), key=lambda a: -a.score)[: self._answers]

    def _align(self, name: str, likeness: np.ndarray) -> Answer:
        """Returns the best line through float32 [query, reference], 1 for equal codes."""
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
        return Answer(name, best[0], best[1] * self._step_seconds)


def image_hash(*, answers: int) -> CodeSearcher:
    """Returns pHash (`imagehash`) of four frames per second, also of their mirror images.

    The hash is the signs of the low frequencies of the cosine transform against their median. That
    of a frame of one colour is a random code.

    Raises:
        ImportError: without imagehash.
    """
    import imagehash

    rng, step_seconds = np.random.default_rng(0), 0.25

    def codes(media: DecodedMedia) -> np.ndarray:
        if not media.has_video:
            return np.empty((0, 1), np.uint64)
        end = media.frame_seconds[-1] + 1e-6
        moments = np.arange(media.frame_seconds[0], end, step_seconds)
        hashes: list[np.ndarray] = []
        for frame in media.frames[media.shown_at(moments)]:
            grey = Image.fromarray(frame).convert("L")
            if np.asarray(grey).std() < _LEAST_CONTRAST:
                # Far from everything: half of the bits of any code differ on average.
                bits = rng.integers(0, 2, 64).astype(bool)
            else:
                bits = imagehash.phash(grey).hash.reshape(-1)
            hashes.append(np.packbits(bits).view(np.uint64))
        return np.array(hashes)

    # Of 64 bits unrelated frames differ in 32 and rarely in fewer than 20.
    return CodeSearcher(
        "image_hash", codes, step_seconds, chance_bits=24.0, answers=answers, mirrored=True
    )


def chromaprint(*, answers: int) -> CodeSearcher:
    """Returns Chromaprint, the audio fingerprint of AcoustID and MusicBrainz.

    `pyacoustid` calls libchromaprint (Debian: libchromaprint1). Raw sub-fingerprints of 32 bits,
    eight per second, each at the beginning of the 2.6 s that it describes, are compared by bit
    error rate at every alignment, as AcoustID compares them.

    Raises:
        ImportError: without pyacoustid or libchromaprint.
    """
    import acoustid
    from chromaprint import decode_fingerprint

    def codes(media: DecodedMedia) -> np.ndarray:
        if not media.has_audio:
            return np.empty((0, 1), np.uint64)
        packed = acoustid.fingerprint(
            media.sample_rate_hz, 1, iter([media.waveform.tobytes()]), maxlength=24 * 3600
        )
        numbers, _ = decode_fingerprint(packed)
        return (np.array(numbers, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint64).reshape(-1, 1)

    # Chromaprint's hop is a third of 4096 samples at 11025 Hz. Of 32 bits, unrelated
    # sub-fingerprints differ in 16, seldom in fewer than 10.
    return CodeSearcher("chromaprint", codes, 1365 / 11025, chance_bits=13.0, answers=answers)


BASELINES: Mapping[str, Callable[..., CodeSearcher]] = {
    baseline.__name__: baseline for baseline in (image_hash, chromaprint)
}


def load_baselines(names: Sequence[str], *, answers: int) -> tuple[list[Searcher], dict[str, str]]:
    """Returns the baselines of these names that can run here, and the reasons of the others."""
    available: list[Searcher] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            available.append(BASELINES[name](answers=answers))
        except ImportError as error:
            skipped[name] = f"{error}: pip install -r benchmarks/requirements.txt"
            print(f"{name} is left out: {skipped[name]}", flush=True)
    return available, skipped

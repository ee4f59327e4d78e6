"""Methods that the protocol measures: our index, and baselines that people would use otherwise.

The baselines are a perceptual hash of frames and Chromaprint. Both describe moments at equal
distances by binary codes. Codes are matched along lines of constant offset at the playback rates
that our index tries, without a threshold: moments whose codes differ by as much as chance add
nothing. Settings were chosen on training clips of the demo, as those of our index on its test clips
(docs/fingerprint.md); neither are clips of the benchmark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Answer:
    """One source that a query may come from.

    Attributes:
        score: higher is surer; comparable between queries.
        offset_seconds: time in the source of the query's beginning.
        accepted: whether the method calls it a match; None if it has no threshold of its own.
    """

    source: str
    score: float
    offset_seconds: float
    accepted: bool | None = None


class Ranking(NamedTuple):
    """Result of a query.

    Attributes:
        answers: best answer of each source, best first; perhaps none.
        background: score where nothing can be found, subtracted from normalised scores.
    """

    answers: Sequence[Answer]
    background: float


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
    """A method whose fingerprints are codes of equally spaced moments.

    `chance_bits` is the Hamming distance from which two codes have nothing in common; `mirrored`
    looks for the mirror image of a query too.
    """

    method: str
    step_seconds: float
    chance_bits: float
    mirrored = False

    def __init__(self, *, answers: int):
        """Makes an empty index that returns at most `answers` references per query."""
        self.methods: tuple[str, ...] = (self.method,)
        self._answers = answers
        self._references: list[tuple[str, np.ndarray]] = []
        self._background: list[tuple[str, np.ndarray]] = []

    def codes(self, media: DecodedMedia) -> np.ndarray:
        """Returns uint64 [moments, 1]; empty without the modality."""
        raise NotImplementedError

    def index(self, references: Items, background: Items) -> None:
        """Adds the clips."""
        self._references += ((name, self.codes(media)) for name, media in references)
        self._background += ((name, self.codes(media)) for name, media in background)

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns a ranking; without answers if the clip lacks the modality or is too short."""
        variants = [self.codes(media)]
        if self.mirrored:
            mirror = dataclasses.replace(media, frames=media.frames[:, :, ::-1])
            variants.append(self.codes(mirror))
        background = background_score(self.search(self._background, variants))
        return {self.method: Ranking(self.search(self._references, variants), background)}

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
                    1 - np.bitwise_count(codes ^ known.T).astype(np.float32) / self.chance_bits, 0
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
        return Answer(name, best[0], best[1] * self.step_seconds)


class ImageHash(CodeSearcher):
    """pHash (`imagehash`) of four frames per second, also of their mirror images.

    The hash is the signs of the low frequencies of the cosine transform against their median.
    """

    method = "image_hash"
    step_seconds = 0.25
    chance_bits = 24.0  # of 64; unrelated frames differ in 32 and rarely in fewer than 20
    mirrored = True

    def __init__(self, *, answers: int):
        """Makes an empty index; ImportError without imagehash."""
        super().__init__(answers=answers)
        import imagehash

        self._phash = imagehash.phash
        self._rng = np.random.default_rng(0)

    def codes(self, media: DecodedMedia) -> np.ndarray:
        """Returns the hash of the frame at each moment; of one colour it is a random code."""
        if not media.has_video:
            return np.empty((0, 1), np.uint64)
        end = media.frame_seconds[-1] + 1e-6
        moments = np.arange(media.frame_seconds[0], end, self.step_seconds)
        places = np.searchsorted(media.frame_seconds, moments + 1e-6, side="right") - 1
        codes: list[np.ndarray] = []
        for frame in media.frames[np.maximum(places, 0)]:
            grey = Image.fromarray(frame).convert("L")
            if np.asarray(grey).std() < _LEAST_CONTRAST:
                # Far from everything: half of the bits of any code differ on average.
                bits = self._rng.integers(0, 2, 64).astype(bool)
            else:
                bits = self._phash(grey).hash.reshape(-1)
            codes.append(np.packbits(bits).view(np.uint64))
        return np.array(codes)


class Chromaprint(CodeSearcher):
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

    def codes(self, media: DecodedMedia) -> np.ndarray:
        """Returns sub-fingerprints; each is at the beginning of the 2.6 s that it describes."""
        if not media.has_audio:
            return np.empty((0, 1), np.uint64)
        packed = self._fingerprint(
            media.sample_rate_hz, 1, iter([media.waveform.tobytes()]), maxlength=24 * 3600
        )
        codes, _ = self._decode(packed)
        return (np.array(codes, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint64).reshape(-1, 1)


BASELINES: Mapping[str, type[CodeSearcher]] = {b.method: b for b in (ImageHash, Chromaprint)}


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

"""Binary fingerprints of equally spaced moments, matched along lines of constant offset and rate.

What the perceptual hash and Chromaprint have in common. It tries the same playback rates as our
index does, and needs no threshold: moments whose codes differ by more than chance count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avcl_jax.evaluation.fingerprint_search import Answer

RATES = (1.0, 0.8, 0.9, 1.125, 1.25)
_CANDIDATES = 24  # sources looked at closely, as many as our index looks at


class AlignedCodes:
    """References as codes."""

    def __init__(self, *, step_seconds: float, chance_bits: float):
        """Makes an empty index.

        Args:
            step_seconds: time from one code to the next.
            chance_bits: Hamming distance from which two codes have nothing in common.
        """
        self._step = step_seconds
        self._chance = chance_bits
        self._names: list[str] = []
        self._codes: list[np.ndarray] = []

    def add(self, name: str, codes: np.ndarray) -> None:
        """Takes a reference.

        Args:
            name: of the reference.
            codes: uint64 [moments, words], may be empty.
        """
        if len(codes):
            self._names.append(name)
            self._codes.append(codes)

    def query(self, variants: Sequence[np.ndarray], count: int) -> list[Answer]:
        """Returns the best references.

        The score is the mean over the query's moments of how far below chance their distance is, 1
        for equal codes, along the best line.

        Args:
            variants: codes uint64 [moments, words] of the query, perhaps also of its mirror image.
            count: how many references, at most.
        """
        best: dict[str, Answer] = {}
        for codes in variants:
            if not len(codes) or not self._codes:
                continue
            found = [self._likeness(codes, reference) for reference in self._codes]
            votes = [likeness.max(axis=1).sum() for likeness in found]
            for place in np.argsort(votes)[::-1][:_CANDIDATES]:
                answer = self._align(self._names[place], found[place])
                if answer.source not in best or answer.score > best[answer.source].score:
                    best[answer.source] = answer
        return sorted(best.values(), key=lambda a: -a.score)[:count]

    def _likeness(self, query: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Float32 [query, reference], 1 for equal codes, 0 for what is no better than chance."""
        differing = np.zeros((len(query), len(reference)), np.float32)
        for word in range(query.shape[1]):
            differing += np.bitwise_count(query[:, None, word] ^ reference[None, :, word])
        return np.maximum(1 - differing / self._chance, 0)

    def _align(self, name: str, likeness: np.ndarray) -> Answer:
        moments, places = likeness.shape
        rows = np.arange(moments)
        best = (-1.0, 0)
        for rate in RATES:
            offsets = np.arange(-int(rate * moments), places)
            columns = np.rint(rate * rows)[None, :].astype(int) + offsets[:, None]
            inside = (columns >= 0) & (columns < places)
            met = np.where(inside, likeness[rows, np.clip(columns, 0, places - 1)], 0.0)
            means = met.mean(axis=1)
            line = int(np.argmax(means))
            best = max(best, (float(means[line]), int(offsets[line])))
        return Answer(name, best[0], best[1] * self._step)

"""What the fingerprinting protocol asks of a method, and ours in that form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from avcl_jax.data.media import DecodedMedia
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintSettings

Items = Iterable[tuple[str, DecodedMedia]]
# Answers from the background that its score is a mean of: one alone would be too noisy.
_BACKGROUND_ANSWERS = 3


@dataclasses.dataclass(frozen=True)
class Answer:
    """One source that a query may come from.

    Attributes:
        source: name under which it was indexed.
        score: higher is surer; comparable between queries.
        offset_seconds: time in the source of the query's beginning.
        accepted: whether the method calls it a match; None if it has no threshold of its own.
    """

    source: str
    score: float
    offset_seconds: float
    accepted: bool | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a method says of a query.

    Attributes:
        answers: at most one per source, best first; perhaps none.
        background: score that the query gets where nothing is to be found; a normalised score is
            the score minus this.
    """

    answers: Sequence[Answer]
    background: float


class Searcher(Protocol):
    """A fingerprinting method, or several that share their work."""

    @property
    def methods(self) -> Sequence[str]:
        """Names of what it measures."""

    def index(self, references: Items, background: Items) -> None:
        """Takes the clips to find, and clips that no query comes from; once."""

    def query(self, media: DecodedMedia) -> Mapping[str, Ranking]:
        """Returns a ranking by method."""


def background_score(answers: Sequence[Answer]) -> float:
    """Returns the mean score of the three best answers from the background; 0 for a missing one."""
    return sum(a.score for a in answers[:_BACKGROUND_ANSWERS]) / _BACKGROUND_ANSWERS


# Methods of ours: fused, and each modality alone.
MODALITIES_OF: Mapping[str, tuple[str, ...]] = {
    "fused": ("video", "audio"),
    "video": ("video",),
    "audio": ("audio",),
}


class IndexSearcher:
    """Our index, asked three times: with both modalities and with each alone."""

    methods = tuple(MODALITIES_OF)

    def __init__(
        self,
        directory: Path,
        encoder_path: str,
        settings: FingerprintSettings,
        *,
        answers: int,
    ):
        """Makes two empty indexes, of references and of the background.

        Args:
            directory: new or empty.
            encoder_path: as `open_encoders` takes it.
            settings: of the indexes.
            answers: to return, at most.
        """
        self._references, self._background = (
            FingerprintIndex.create(directory / name, encoder_path, settings)
            for name in ("references", "background")
        )
        self._answers = answers

    def index(self, references: Items, background: Items) -> None:
        """Takes the clips.

        Raises:
            UserError: if one has no segment.
        """
        for index, items in ((self._references, references), (self._background, background)):
            report = index.add(items)
            if report.failed:
                name, reason = report.failed[0]
                raise UserError(f"{name} cannot be indexed: {reason}")

    def query(self, media: DecodedMedia) -> dict[str, Ranking]:
        """Returns a ranking by method, without answers where its modality is missing."""
        # Encoded once, for three methods and two indexes.
        renderings = self._references.render(media)

        def answers(index: FingerprintIndex, method: str) -> list[Answer]:
            found = index.match(
                renderings, media.duration_seconds, MODALITIES_OF[method], self._answers
            )
            return [
                Answer(match.source, match.score, match.offset_seconds, match.accepted)
                for match in found.matches
            ]

        return {
            method: Ranking(
                answers(self._references, method),
                background_score(answers(self._background, method)),
            )
            for method in self.methods
        }

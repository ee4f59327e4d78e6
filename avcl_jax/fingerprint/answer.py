"""Result of a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from avcl_jax.export.runs import MODALITIES
from avcl_jax.fingerprint.calibration import THRESHOLD


@dataclasses.dataclass(frozen=True)
class Interval:
    """Seconds of the query and of the reference that agree, and how many sources match there."""

    query_start: float
    query_end: float
    reference_start: float
    reference_end: float
    shared_by: int


@dataclasses.dataclass(frozen=True)
class SegmentScore:
    """Similarity of seconds of the query to the source, in standard deviations above chance.

    It is None for a modality that the query lacks there.
    """

    query_start: float
    query_end: float
    video: float | None
    audio: float | None


@dataclasses.dataclass(frozen=True)
class Match:
    """A source from which a query may come."""

    source: str  # name in the index
    path: str | None  # of its file; None if it was added from memory
    offset_seconds: float  # time in the source of the query's beginning
    rate: float  # seconds of the source per second of the query
    score: float  # −log10 of the chance that an unrelated query finds as much; no upper bound
    accepted: bool  # that chance is small, and all required modalities match; or the same file
    same_file: bool  # the query has the content of this file
    matched: tuple[str, ...]  # modalities that suffice for a match without the other
    # Names of other sources that match equally well; none if a part of the query that only this
    # one matches suffices for a match.
    shared_with: tuple[str, ...]
    video_score: float | None  # evidence of the video, 0 is chance; None where it was not compared
    audio_score: float | None
    duration_seconds: float  # of the source
    intervals: Sequence[Interval]
    segments: Sequence[SegmentScore]  # all along the query, in order

    @property
    def what_matched(self) -> str:
        """Says which modalities match."""
        if self.same_file:
            return "the same file"
        if self.video_score is None or self.audio_score is None:
            compared, other = MODALITIES if self.audio_score is None else MODALITIES[::-1]
            verb = "matches" if self.matched else "does not match"
            return f"the {compared} {verb}, the {other} was not compared"
        if len(self.matched) == 1:
            return f"only the {self.matched[0]} matches"
        if self.matched:
            return "video and audio match"
        together = self.score >= THRESHOLD
        return f"neither video nor audio matches alone{', together they do' * together}"


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """All that a query found."""

    matches: Sequence[Match]  # one per source, best first, also those that are not accepted
    query_seconds: float
    # Modality of the query without content to compare (silent audio, or video of one colour),
    # beside one that was compared.
    empty: tuple[str, ...] = ()
    threshold: float = THRESHOLD

    @property
    def best(self) -> Match | None:
        """The best accepted match that is not shared with other sources, None without one."""
        return next((m for m in self.matches if m.accepted and not m.shared_with), None)

    @property
    def verdict(self) -> str:
        """Returns "same file", "match", "shared" (by several sources alike) or "no match"."""
        if self.best is not None:
            return "same file" if self.best.same_file else "match"
        return "shared" if any(m.accepted for m in self.matches) else "no match"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources that match; for the same file, only of its copies."""
        accepted = [m for m in self.matches if m.accepted]
        return tuple(m.source for m in accepted if m.same_file or self.verdict != "same file")

    @property
    def remark(self) -> str:
        """Says which modality of the query was empty while the other was compared; "" if none."""
        remarks = {
            "audio": "the audio is silent: only the video was compared",
            "video": "the video shows one colour: only the audio was compared",
        }
        return "".join(remarks[modality] for modality in self.empty)

"""A fingerprint index: media in, matches out.

index = FingerprintIndex.create("films.index", "small", FingerprintSettings())
index.add_files([Path("a.mp4")])
result = index.query(decode_media("clip.mp4", **index.segmenter.decoding))
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avcl_jax import weights
from avcl_jax.data.media import DecodedMedia, MediaError
from avcl_jax.data.media_streams import check_regular
from avcl_jax.errors import one_line
from avcl_jax.export.encoder import MODALITIES
from avcl_jax.export.runs import open_encoders
from avcl_jax.fingerprint import calibration, database, library, matching
from avcl_jax.fingerprint.answer import QueryResult, make_matches
from avcl_jax.fingerprint.database import SourceRow, transaction
from avcl_jax.fingerprint.details import (
    QUERY_FINER,
    Candidate,
    Details,
    Judgement,
    describe,
    judge,
)
from avcl_jax.fingerprint.relations import Sharing
from avcl_jax.fingerprint.segments import Segmenter, SegmentFeatures, not_empty
from avcl_jax.fingerprint.settings import FingerprintError, FingerprintSettings
from avcl_jax.fingerprint.sharing import LEAST_SECONDS, find_shared
from avcl_jax.paths import local_path

NOTHING_TO_COMPARE = "show one colour and are silent, or lack the modalities of the encoders"
# Segments that `add` stores before it brings the cache up to date, or this fraction of the index.
_UPDATE_SEGMENTS, _UPDATE_FRACTION = 20_000, 0.25
# The calibration is for the size at which it was fitted, and follows it by theory from there.
_CALIBRATED_WITHIN = 1.5


@dataclasses.dataclass
class AddReport:
    """Result of `add`: names of the media, by outcome."""

    added: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)  # of the same content
    replaced: list[str] = dataclasses.field(default_factory=list)
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # with the reason


@dataclasses.dataclass(eq=False)
class FingerprintIndex:
    """An index in the state in which it was opened, or last changed by this object."""

    directory: Path
    _encoder_path: str | Path | None
    _library: library.Library

    @classmethod
    def open(
        cls, directory: str | Path, encoder_path: str | Path | None = None
    ) -> FingerprintIndex:
        """Opens an index; `encoder_path` is where the encoders are now, if they were moved.

        Raises:
            FingerprintError: if there is no index, or it is damaged.
        """
        directory = local_path(directory)
        return cls(directory, encoder_path, library.load(directory))

    def reopened(self) -> FingerprintIndex:
        """Returns the index as it is now: this object if nothing has changed.

        Encoders that are still the right ones are not loaded again. This object stays as it was, so
        that a query that runs meanwhile ends on what it began with.

        Raises:
            FingerprintError: the errors of `open`.
        """
        before = self._library.stored
        with transaction(self.directory) as opened:
            if opened.settings()["generation"] == before["generation"]:
                return self
        now = copy.copy(self)
        now._library = library.load(self.directory, self._library.vectors)
        if any(now._library.stored[key] != before[key] for key in ("encoder", "settings")):
            now.__dict__.pop("segmenter", None)
        return now

    @classmethod
    def create(
        cls, directory: str | Path, encoder_path: str | Path, settings: FingerprintSettings
    ) -> FingerprintIndex:
        """Makes an empty index.

        Args:
            directory: new or empty.
            encoder_path: name, run or exported encoders, as `open_encoders` takes them.
            settings: cannot be changed later.

        Raises:
            FingerprintError: if the directory is not empty.
            ExportError: if there are no encoders.
        """
        directory = local_path(directory)
        encoders = weights.canonical(encoder_path)
        if directory.exists():
            database.check_empty(directory)
        source = open_encoders(encoders)
        dimensions = Segmenter(source, settings).dimensions
        directory.mkdir(parents=True, exist_ok=True)
        database.create(
            directory,
            {
                "encoder": {"path": encoders, "fingerprint": source.fingerprint},
                "settings": dataclasses.asdict(settings),
                "dimensions": dimensions,
                "calibration": {"segments": 0, "by_modalities": {}},
            },
        )
        return cls.open(directory, encoders)

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        """Cuts and encodes media as this index does.

        Raises:
            FingerprintError: if the encoders are not those that made the index.
            ExportError: if they are not there.
        """
        stored = self._library.stored
        expected = stored["encoder"]
        source = open_encoders(
            self._encoder_path or expected["path"], known=expected["fingerprint"]
        )
        if source.fingerprint != expected["fingerprint"]:
            raise FingerprintError(
                f"{self.directory} was made with encoders {expected['fingerprint'][:12]} "
                f"({expected['path']}), {source.path} contains {source.fingerprint[:12]}: give "
                "the former, or index the media again"
            )
        return Segmenter(source, self._library.settings, stored["dimensions"])

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self._library.num_segments

    @property
    def size(self) -> str:
        """Numbers of sources and segments in words."""
        counts = {"source": len(self.sources()), "segment": self.num_segments}
        return ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the index compares."""
        return tuple(self._library.stored["dimensions"])

    def sources(self) -> list[SourceRow]:
        """Returns the indexed media."""
        return list(self._library.sources)

    def add_files(self, paths: Iterable[Path]) -> AddReport:
        """Adds media files, named by their absolute paths."""
        return self.add((str(path), path) for path in map(local_path, paths))

    def add(self, items: Iterable[tuple[str, Path | DecodedMedia]]) -> AddReport:
        """Adds media, each in its own transaction; media of the same name are replaced.

        Args:
            items: name, and file or media decoded with `segmenter.decoding`.
        """
        report = AddReport()
        new_segments = 0
        for name, media in items:
            if not _is_text(name):
                report.failed.append((name, "its name is not UTF-8: rename it"))
                continue
            try:
                content = file_sha256(media) if isinstance(media, Path) else _sha256(media)
                with transaction(self.directory) as opened:
                    if opened.content_of(name) == content:
                        report.skipped.append(name)
                        continue
                segments = self.segmenter.of(media)
                seconds = segments.duration_seconds
                if not any(present.any() for present in segments.present.values()):
                    shortest = self.segmenter.shortest_seconds
                    short = f"are less than a segment of {shortest:.2f} s"
                    nothing = short if seconds < shortest else NOTHING_TO_COMPARE
                    report.failed.append((name, f"{seconds:.2f} s {nothing}"))
                    continue
                path = str(media) if isinstance(media, Path) else None
                with transaction(self.directory, write=True) as opened:
                    replaces = opened.insert(SourceRow(name, content, seconds, path), segments)
            except (MediaError, OSError) as error:
                report.failed.append((name, one_line(error)))
                continue
            (report.replaced if replaces else report.added).append(name)
            new_segments += len(segments)
            if new_segments >= max(_UPDATE_SEGMENTS, _UPDATE_FRACTION * self.num_segments):
                self._update()
                new_segments = 0
        self._update()
        return report

    def remove(self, names: Sequence[str]) -> None:
        """Removes media by name.

        Raises:
            FingerprintError: if one is not in the index; then none is removed.
        """
        with transaction(self.directory, write=True) as opened:
            for name in names:
                if not _is_text(name) or not opened.delete(name):
                    raise FingerprintError(f"{name} is not in {self.directory}")
        self._update()

    def query(
        self,
        media: DecodedMedia,
        modalities: Sequence[str] = MODALITIES,
        count: int = 10,
        *,
        required: Sequence[str] = (),
        content: str | None = None,
        start_seconds: float = 0.0,
    ) -> QueryResult:
        """Finds where a clip may come from.

        Args:
            media: decoded with `segmenter.decoding`.
            modalities: modalities to compare, if encoders and clip have them.
            count: matches to return, at most.
            required: modalities that must each match for a source to be accepted.
            content: SHA-256 of the clip's file, to recognise an indexed file.
            start_seconds: start of `media` in that file.

        Raises:
            FingerprintError: if the clip is shorter than a segment, or a required modality is
                missing.
        """
        self.check_required(required, modalities)
        available = ["video"] * media.has_video + ["audio"] * media.has_audio
        for modality in required:
            if modality not in available:
                raise FingerprintError(f"the query has no {modality}, which is required")
        renderings = self.render(media)
        if not any(map(len, renderings)):
            raise FingerprintError(
                f"the query lasts {media.duration_seconds:.2f} s, a segment "
                f"{self.segmenter.shortest_seconds:.2f} s: give a longer clip"
            )
        same = [n for n, s in enumerate(self._library.sources) if s.content == content]
        result = self.match(
            renderings,
            media.duration_seconds,
            modalities,
            count,
            required=required,
            known=dict.fromkeys(same, start_seconds),
        )
        compared = {m for m in available if m in self.modalities and m in modalities}
        empty = compared - set(not_empty(media))
        # A query without any content has no match to remark on.
        return dataclasses.replace(result, empty=tuple(empty if empty < compared else ()))

    def shared(
        self,
        min_seconds: float = 3.0,
        progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> Sharing:
        """Finds what the sources share: copies, parts of each other, and what many have.

        Args:
            min_seconds: shortest interval to report.
            progress: wraps the numbers of the sources while they are compared.

        Raises:
            FingerprintError: if `min_seconds` is too short.
        """
        if not LEAST_SECONDS <= min_seconds < math.inf:
            raise FingerprintError(
                f"min_seconds {min_seconds} must be at least {LEAST_SECONDS:g} and finite: shorter "
                "parts are alike by chance"
            )
        spans = self.segmenter.spans
        return find_shared(
            self._library, self.directory, spans, min_seconds=min_seconds, progress=progress
        )

    def check_required(self, required: Sequence[str], modalities: Sequence[str]) -> None:
        """Checks that the required modalities are indexed and among those to compare.

        Raises:
            FingerprintError: if one is not.
        """
        for what, given in (("indexed", self.modalities), ("compared", modalities)):
            for modality in required:
                if modality not in given:
                    raise FingerprintError(
                        f"{modality} is required, but only {' and '.join(given)} is {what}"
                    )

    def render(self, media: DecodedMedia) -> list[SegmentFeatures]:
        """Encodes a query, decoded with `segmenter.decoding`, at every rate."""
        settings = self._library.settings
        hop = settings.hop_seconds / matching.QUERY_DENSITY
        renderings = [
            self.segmenter.of_media(media, hop_seconds=hop, rate=rate) for rate in settings.rates
        ]
        details = describe(media, media.duration_seconds, finer=QUERY_FINER)
        return [dataclasses.replace(renderings[0], details=details), *renderings[1:]]

    def match(
        self,
        renderings: Sequence[SegmentFeatures],
        query_seconds: float,
        modalities: Sequence[str] = MODALITIES,
        count: int = 10,
        *,
        required: Sequence[str] = (),
        known: Mapping[int, float] | None = None,
    ) -> QueryResult:
        """Finds where a query may come from, as `query` does.

        Args:
            renderings: query, from `render` of this index or one with its encoders and settings.
            known: second of each source, by number, at which the query begins if it is its file.
        """
        known = known or {}
        renderings = [self._library.project(r) for r in renderings if len(r)]
        if not self._library.vectors or not renderings:
            return QueryResult([], query_seconds)
        spans = {m: s for m, s in self.segmenter.spans.items() if m in modalities}
        queries = matching.prepare(self._library, renderings, list(spans))
        alignments = matching.align(self._library, queries, spans, known=known)
        matches = make_matches(
            alignments,
            self._judged(renderings[0].details, query_seconds, alignments, spans),
            self.calibration,
            self._library.sources,
            # A modality that the clip lacks has no evidence, which would count as unrelated.
            spans={m: s for m, s in spans.items() if any(r.present[m].any() for r in renderings)},
            segment_seconds=min(spans.values(), default=0.0),
            query_seconds=query_seconds,
            required=required,
            known=known,
        )
        # Even before higher scores that lack a required modality or are shared with other sources.
        matches.sort(key=lambda m: (not m.accepted, bool(m.shared_with), not m.same_file))
        return QueryResult(matches[:count], query_seconds)

    def _judged(
        self,
        query: Details,
        seconds: float,
        alignments: Sequence[matching.Alignment],
        modalities: Collection[str],
    ) -> list[Judgement]:
        candidates = []
        with transaction(self.directory) as opened:
            for a in alignments:
                ends = a.offset_seconds, a.offset_seconds + a.rate * seconds
                found = opened.details_of(self._library.sources[a.source], *ends)
                candidates.append(Candidate(*found, a.rate, a.offset_seconds))
        return judge(query, candidates, modalities)

    def calibration(self, modalities: Sequence[str]) -> calibration.Calibration:
        """Returns the calibration of evidence of these modalities together."""
        fitted = self._library.stored["calibration"]["by_modalities"]
        name = calibration.name_of(modalities)
        fields = fitted.get(name)
        return calibration.Calibration(**fields) if fields else calibration.DEFAULTS[name]

    def _update(self) -> None:
        """Brings projections, calibration and cache up to date with the media."""
        while True:
            self._library = library.load(self.directory, self._library.vectors)
            stored, calibrated = self._library.stored, self._calibrated()
            if self._library.is_stored and calibrated == stored["calibration"]:
                break
            with transaction(self.directory, write=True) as opened:
                # Otherwise another process has changed the index meanwhile.
                if opened.settings()["generation"] == stored["generation"]:
                    vectors = self._library.vectors
                    opened.write_projections({m: v.projection for m, v in vectors.items()})
                    opened.write_settings({"calibration": calibrated})
        self._library.save(self.directory)

    def _calibrated(self) -> dict[str, Any]:
        """Returns the calibrations, fitted again if the index has changed much since."""
        before, now = self._library.stored["calibration"], self.num_segments
        if before["segments"] / _CALIBRATED_WITHIN < now < before["segments"] * _CALIBRATED_WITHIN:
            return before
        fitted = calibration.fit(self._library, self.segmenter.spans)
        by_modalities = {name: dataclasses.asdict(found) for name, found in fitted.items()}
        return {"segments": now, "by_modalities": by_modalities}


def file_sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content.

    Raises:
        MediaError: if it is a pipe or a device.
    """
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_text(name: str) -> bool:
    """Tests whether a name is UTF-8, as SQLite, JSON and the page require."""
    return name.encode(errors="replace").decode() == name


def _sha256(media: DecodedMedia) -> str:
    digest = hashlib.sha256()
    for array in (media.frames, media.frame_seconds, media.waveform):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    digest.update(f"{media.sample_rate_hz} {media.audio_start_seconds!r}".encode())
    return digest.hexdigest()

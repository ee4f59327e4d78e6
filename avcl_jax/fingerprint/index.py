"""A fingerprint index: media in, matches out.

index = FingerprintIndex.create("films.index", "runs/demo/export", FingerprintSettings())
index.add_files([Path("a.mp4")])
result = index.query(decode_media("clip.mp4", **index.segmenter.decoding))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from avcl_jax.data.decoded import DecodedMedia
from avcl_jax.data.media_error import MediaError
from avcl_jax.encoder_source import MODALITIES, open_encoders
from avcl_jax.fingerprint import calibration, changing, matching
from avcl_jax.fingerprint.answer import Match, QueryResult, make_match
from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.part import SourceRow, file_sha256, open_part
from avcl_jax.fingerprint.scores import score_alignments
from avcl_jax.fingerprint.segments import Segmenter, SegmentFeatures, not_empty
from avcl_jax.fingerprint.settings import FingerprintSettings
from avcl_jax.fingerprint.snapshot import Snapshot
from avcl_jax.fingerprint.store import (
    FORMAT_VERSION,
    delete_leftovers,
    one_writer,
    read_manifest,
    replace_manifest,
)
from avcl_jax.paths import absolute_path, local_path

__all__ = ["AddReport", "FingerprintIndex", "Match", "QueryResult"]

# Modalities that can be required to match, by name.
REQUIREMENTS = {"video": ("video",), "audio": ("audio",), "both": MODALITIES}
NOTHING_TO_COMPARE = "show one colour and are silent, or lack the modalities of the encoders"
# What one `add` holds in memory before it commits; an interrupted one loses no more than this.
_COMMIT_SEGMENTS = 20_000
# The calibration is for the size at which it was fitted, and follows it by theory from there.
_CALIBRATED_WITHIN = 1.5
# A reader that meets a commit finds old parts gone: it reads the manifest again, so many times.
_OPENING_ATTEMPTS = 5


@dataclasses.dataclass
class AddReport:
    """What became of the media that were to be added.

    Attributes:
        added: names.
        skipped: names that the index holds with this very content.
        replaced: names that it held with another content.
        failed: name and reason of each that cannot be decoded or has no segment.
    """

    added: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    replaced: list[str] = dataclasses.field(default_factory=list)
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Item:
    """A medium to add, whose segments are computed only if its content is new."""

    name: str
    path: str | None
    content: Callable[[], str]
    segments: Callable[[], SegmentFeatures]


class FingerprintIndex:
    """An index as it was when it was opened, or last changed through this object."""

    def __init__(self, directory: Path, encoder_path: str | None):
        """Opens; see `open`."""
        self.directory = directory
        self._encoder_path = encoder_path
        self._load()

    @classmethod
    def open(
        cls, directory: str | Path, encoder_path: str | Path | None = None
    ) -> FingerprintIndex:
        """Opens an index.

        Args:
            directory: of the index.
            encoder_path: where its encoders are now; None for where they were when it was made.

        Raises:
            FingerprintError: if there is none, or a file of it is damaged.
        """
        return cls(local_path(directory), None if encoder_path is None else str(encoder_path))

    def reopened(self) -> FingerprintIndex:
        """Returns the index as it is now: this object if nothing has changed.

        Encoders that are still the right ones are not loaded again. This object stays as it was, so
        that a query that runs meanwhile ends on what it began with.

        Raises:
            FingerprintError: as `open`.
        """
        if read_manifest(self.directory) == self._manifest:
            return self
        now = FingerprintIndex(self.directory, self._encoder_path)
        same = all(now._manifest[key] == self._manifest[key] for key in ("encoder", "settings"))
        if same and "segmenter" in self.__dict__:
            now.segmenter = self.segmenter
        return now

    @classmethod
    def create(
        cls, directory: str | Path, encoder_path: str | Path, settings: FingerprintSettings
    ) -> FingerprintIndex:
        """Makes an empty index.

        Args:
            directory: new or empty.
            encoder_path: as `open_encoders` takes it.
            settings: of this index for ever.

        Raises:
            FingerprintError: if the directory holds something.
            ExportError: if there are no encoders.
        """
        directory = local_path(directory)
        encoders = os.fspath(absolute_path(encoder_path))
        if directory.exists() and any(directory.iterdir()):
            raise FingerprintError(
                f"{directory} is not empty: `add` to the index there, or give a new directory"
            )
        source = open_encoders(encoders)
        segmenter = Segmenter(source, settings)
        directory.mkdir(parents=True, exist_ok=True)
        replace_manifest(
            directory,
            {
                "format_version": FORMAT_VERSION,
                "encoder": {
                    "path": encoders,
                    "fingerprint": source.fingerprint,
                },
                "settings": settings.to_json(),
                "dimensions": segmenter.dimensions,
                "projection": None,
                "parts": [],
                "next_part": 1,
                "calibration": {"segments": 0, "by_modalities": {}},
            },
        )
        return cls(directory, encoders)

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        """Cuts and encodes media as this index does.

        Raises:
            FingerprintError: if the encoders are not those that made the index.
            ExportError: if they are not there.
        """
        expected = self._manifest["encoder"]
        source = open_encoders(self._encoder_path or expected["path"])
        if source.fingerprint != expected["fingerprint"]:
            raise FingerprintError(
                f"{self.directory} was made with encoders {expected['fingerprint'][:12]} "
                f"({expected['path']}), {source.path} holds {source.fingerprint[:12]}: give the "
                "former, or index the media again"
            )
        return Segmenter(source, self.settings)

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self._snapshot.num_segments

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the index compares."""
        return tuple(self._manifest["dimensions"])

    def sources(self) -> list[SourceRow]:
        """Returns what is indexed."""
        return self._snapshot.sources()

    def add(self, items: Iterable[tuple[str, DecodedMedia]]) -> AddReport:
        """Adds media in memory.

        Args:
            items: name and medium, decoded with `segmenter.decoding`.
        """
        return self._add(
            _Item(
                name,
                None,
                functools.partial(_content_of, media),
                functools.partial(self.segmenter.of_media, media),
            )
            for name, media in items
        )

    def add_files(self, paths: Iterable[Path]) -> AddReport:
        """Adds media files, named by their absolute paths."""
        return self._add(
            _Item(
                str(path),
                str(path),
                functools.partial(file_sha256, path),
                functools.partial(self.segmenter.of_file, path),
            )
            for path in map(local_path, paths)
        )

    def remove(self, names: Sequence[str]) -> None:
        """Removes media by name.

        Raises:
            FingerprintError: if one is not in the index; then none is removed.
        """
        with self._writing():
            known = {source.name for source in self.sources()}
            unknown = [name for name in names if name not in known]
            if unknown:
                raise FingerprintError(f"{unknown[0]} is not in {self.directory}")
            self._commit([], list(names))
            self._calibrate()

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
            modalities: which to compare, of those that encoders and clip have.
            count: matches to return, at most.
            required: modalities that must each match for a source to be accepted.
            content: SHA-256 of the clip's file, to recognise an indexed file.
            start_seconds: start of `media` in that file.

        Raises:
            FingerprintError: if the clip is shorter than a segment, or a required modality is
                missing.
        """
        self.check_required(required, modalities)
        there = [m for m, has in (("video", media.has_video), ("audio", media.has_audio)) if has]
        for modality in required:
            if modality not in there:
                raise FingerprintError(f"the query has no {modality}, which is required")
        renderings = self.render(media)
        if not any(len(r.segments) for r in renderings):
            raise FingerprintError(
                f"the query lasts {media.duration_seconds:.2f} s, a segment "
                f"{self.segmenter.shortest_seconds:.2f} s: give a longer clip"
            )
        numbers = self._snapshot.numbers_of(content) if content is not None else ()
        result = self.match(
            renderings,
            media.duration_seconds,
            modalities,
            count,
            required=required,
            known=[(number, start_seconds) for number in numbers],
        )
        compared = [m for m in there if m in self.modalities and m in modalities]
        full = not_empty(media)
        # A query without any content has no match to remark on.
        empty = [m for m in compared if m not in full] if any(m in full for m in compared) else ()
        return dataclasses.replace(result, empty=tuple(empty))

    def check_required(self, required: Sequence[str], modalities: Sequence[str]) -> None:
        """Checks that the required modalities are compared.

        Args:
            required: as `query`.
            modalities: as `query`.

        Raises:
            FingerprintError: if one is not.
        """
        for what, given in (("indexed", self.modalities), ("compared", modalities)):
            for modality in required:
                if modality not in given:
                    raise FingerprintError(
                        f"{modality} is required, but only {' and '.join(given)} is {what}"
                    )

    def render(self, media: DecodedMedia) -> list[matching.Rendering]:
        """Encodes a query at every rate; what the encoders do not know of is empty.

        Args:
            media: decoded with `segmenter.decoding`.
        """
        hop = self.settings.hop_seconds / matching.QUERY_DENSITY
        return [
            matching.Rendering(rate, self.segmenter.of_media(media, hop_seconds=hop, rate=rate))
            for rate in self.settings.rates
        ]

    def match(
        self,
        renderings: Sequence[matching.Rendering],
        query_seconds: float,
        modalities: Sequence[str] = MODALITIES,
        count: int = 10,
        *,
        required: Sequence[str] = (),
        known: Sequence[tuple[int, float]] = (),
    ) -> QueryResult:
        """Finds where an encoded query may come from.

        Args:
            renderings: of the query, by this index or another with its encoders and settings.
            query_seconds: length of the query.
            modalities: as `query`.
            count: as `query`.
            required: as `query`.
            known: as `matching.align`.
        """
        used = [m for m in self._manifest["dimensions"] if m in modalities]
        renderings = [r for r in renderings if len(r.segments)]
        if not self._snapshot.projections or not renderings:
            return QueryResult([], query_seconds, tuple(required))
        spans = {m: self.segmenter.span_seconds(m) for m in used}
        prepared = matching.prepare(
            self._snapshot, renderings, used, hop_seconds=self.settings.hop_seconds
        )
        found = matching.align(prepared, spans, known)
        # What the clip lacks finds nothing, also where it is unrelated.
        heard = [m for m in used if any(r.segments.present[m].any() for r in renderings)]
        scored = score_alignments(
            found,
            self.calibration,
            spans={m: spans[m] for m in heard},
            query_seconds=query_seconds,
            segments=self.num_segments,
        )
        same = dict(known)
        scored.sort(key=lambda s: s.alignment.source not in same)
        matches = [
            make_match(
                s,
                self._snapshot.source(s.alignment.source),
                min(spans.values()),
                rivals=[self._snapshot.source(number).name for number in s.rivals],
                required=required,
                same_file_from=same.get(s.alignment.source),
            )
            for s in scored
        ]
        # Even before higher scores that lack a required modality or are shared with other sources.
        matches.sort(key=lambda match: (not match.accepted, bool(match.shared_with)))
        return QueryResult(matches[:count], query_seconds, tuple(required))

    @property
    def settings(self) -> FingerprintSettings:
        """Settings with which the index was made."""
        return FingerprintSettings.from_json(self._manifest["settings"])

    def calibration(self, modalities: Sequence[str]) -> calibration.Calibration:
        """Returns how evidence of these modalities becomes a score here."""
        fitted = self._manifest["calibration"]["by_modalities"]
        fields = fitted.get(calibration.name_of(modalities))
        return calibration.Calibration(**fields) if fields else calibration.DEFAULT

    def _load(self) -> None:
        for attempt in range(_OPENING_ATTEMPTS):
            manifest = read_manifest(self.directory)
            modalities = list(manifest["dimensions"])
            try:
                projections = changing.load_projections(self.directory, manifest)
                parts = [
                    open_part(self.directory / part["name"], modalities)
                    for part in manifest["parts"]
                ]
            except FileNotFoundError as error:
                if attempt == _OPENING_ATTEMPTS - 1:
                    raise FingerprintError(
                        f"{error.filename} is missing: index the media again"
                    ) from error
                continue
            self._manifest = manifest
            removed = [part["removed"] for part in manifest["parts"]]
            self._snapshot = Snapshot(parts, removed, projections)
            return

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the index for writing, as the last writer left it."""
        with one_writer(self.directory):
            delete_leftovers(self.directory)
            self._load()
            yield
            delete_leftovers(self.directory)

    def _add(self, items: Iterable[_Item]) -> AddReport:
        report = AddReport()
        with self._writing():
            pending: list[changing.Media] = []
            removed: list[str] = []
            known = {source.name: source.content for source in self.sources()}
            for item in items:
                try:
                    content = item.content()
                    if known.get(item.name) == content:
                        report.skipped.append(item.name)
                        continue
                    found = item.segments()
                except (MediaError, OSError) as error:
                    report.failed.append((item.name, str(error)))
                    continue
                if not any(present.any() for present in found.present.values()):
                    short = found.duration_seconds < self.segmenter.shortest_seconds
                    nothing = "have no whole segment" if short else NOTHING_TO_COMPARE
                    report.failed.append((item.name, f"{found.duration_seconds:.2f} s {nothing}"))
                    continue
                if item.name in known:
                    removed.append(item.name)
                    report.replaced.append(item.name)
                else:
                    report.added.append(item.name)
                known[item.name] = content
                pending = [media for media in pending if media[0].name != item.name]
                row = SourceRow(item.name, content, found.duration_seconds, item.path)
                pending.append((row, found.features, found.present))
                if (
                    sum(len(present[next(iter(present))]) for _, _, present in pending)
                    >= _COMMIT_SEGMENTS
                ):
                    self._commit(pending, removed)
                    pending, removed = [], []
            if pending:
                self._commit(pending, removed)
            self._calibrate()
        return report

    def _commit(self, media: list[changing.Media], removed: list[str]) -> None:
        changing.commit(self.directory, self._manifest, self._snapshot, media, removed)
        self._load()

    def _calibrate(self) -> None:
        """Fits what scores mean anew, if the index has changed much since."""
        last = self._manifest["calibration"]["segments"]
        now = self.num_segments
        if last / _CALIBRATED_WITHIN < now < last * _CALIBRATED_WITHIN:
            return
        fitted = calibration.fit(
            self._snapshot,
            hop_seconds=self.settings.hop_seconds,
            spans={m: self.segmenter.span_seconds(m) for m in self._manifest["dimensions"]},
            num_rates=len(self.settings.rates),
        )
        by_modalities = {name: found.to_json() for name, found in fitted.items()}
        calibrated = {"segments": now, "by_modalities": by_modalities}
        replace_manifest(self.directory, {**self._manifest, "calibration": calibrated})
        self._load()


def _content_of(media: DecodedMedia) -> str:
    digest = hashlib.sha256()
    for array in (media.frames, media.frame_seconds, media.waveform):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    digest.update(f"{media.sample_rate_hz} {media.audio_start_seconds!r}".encode())
    return digest.hexdigest()

"""Questions to the index, one at a time: the machine is not faster with two, only fuller."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from avcl_jax.data.decoded import DecodedMedia, decode_media
from avcl_jax.data.media import probe
from avcl_jax.data.media_error import REASONS, MediaError
from avcl_jax.encoder_source import MODALITIES
from avcl_jax.export import ExportError
from avcl_jax.fingerprint.answer import QueryResult
from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.part import SourceRow, file_sha256
from avcl_jax.fingerprint.web.media_process import MediaProcess, MediaProcessError
from avcl_jax.fingerprint.web.refusal import Refusal
from avcl_jax.training.checkpoint import CheckpointError

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a clip.

    Attributes:
        result: of the index.
        media: the clip as it was compared.
        has_video: whether the clip has video, compared or not.
        has_audio: whether it has audio.
        clip_seconds: length of all of it, None where its header does not say.
        sources: of the result's matches, by name.
    """

    result: QueryResult
    media: DecodedMedia
    has_video: bool
    has_audio: bool
    clip_seconds: float | None
    sources: dict[str, SourceRow]


class Desk:
    """Takes clips, one after the other, to an index that may change meanwhile."""

    def __init__(
        self,
        index: FingerprintIndex,
        *,
        max_waiting: int,
        max_seconds: float,
        max_decode_seconds: float,
    ):
        """Takes an opened index.

        Args:
            index: opened; its encoders are loaded here, so that a wrong one shows at once.
            max_waiting: clips that may wait while one is compared.
            max_seconds: of a clip are compared, from its beginning.
            max_decode_seconds: that reading a clip may take.
        """
        self._index = index
        self._max_waiting = max_waiting
        self.max_seconds = max_seconds
        self._places = 0
        self._reopening = threading.Lock()
        self._named: tuple[FingerprintIndex, dict[str, SourceRow]] | None = None
        self._worker = ThreadPoolExecutor(1, "fingerprint-query")
        self._media = MediaProcess(max_decode_seconds)
        self.shortest_seconds = index.segmenter.shortest_seconds

    @property
    def directory(self) -> Path:
        """Of the index."""
        return self._index.directory

    @property
    def empty_message(self) -> str:
        """What is said of an index without media."""
        return (
            f"the index {self.directory} is empty: add media with "
            f"`avcl-fingerprint add VIDEOS --index {self.directory}`"
        )

    def close(self) -> None:
        """Takes no more; what is being compared comes to its end by itself, reading ends now."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._media.close()

    def warm_up(self) -> None:
        """Starts in the background what the first clip need not wait for."""
        self._worker.submit(self._media.start)
        self._worker.submit(self._encode_noise)

    @contextlib.contextmanager
    def place(self) -> Iterator[int]:
        """Holds a place in the line for the block; gives how many are before.

        Raises:
            Refusal: if all are taken.
        """
        if self._places > self._max_waiting:
            raise Refusal(
                503,
                f"{self._places} clips are being compared or wait, no more are taken: try again "
                "in a minute",
            )
        self._places += 1
        try:
            yield self._places - 1
        finally:
            self._places -= 1

    async def ask(self, path: Path, name: str, required: Sequence[str], report: Report) -> Answer:
        """Compares a clip.

        Args:
            path: of the clip.
            name: what messages call it.
            required: modalities that have to match.
            report: is told what is being done, from another thread.

        Raises:
            Refusal: if the clip or the index cannot be used.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._ask, path, name, required, report)

    def sources(self) -> dict[str, SourceRow]:
        """Returns what is indexed now, by the names that the page uses for it.

        Raises:
            Refusal: if the index cannot be read.
        """
        index = self._current()
        # A film that plays asks many times.
        if self._named is None or self._named[0] is not index:
            self._named = index, {source_id(row): row for row in index.sources()}
        return self._named[1]

    def num_segments(self) -> int:
        """Number of segments indexed now.

        Raises:
            Refusal: if the index cannot be read.
        """
        return self._current().num_segments

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the index compares."""
        return self._index.modalities

    @property
    def sample_rate_hz(self) -> int:
        """At which sound is heard."""
        return int(self._index.segmenter.decoding["sample_rate_hz"])

    def _current(self) -> FingerprintIndex:
        with self._reopening:
            try:
                self._index = self._index.reopened()
            except FingerprintError as error:
                raise Refusal(500, str(error)) from error
            return self._index

    def _ask(self, path: Path, name: str, required: Sequence[str], report: Report) -> Answer:
        index = self._current()
        if not index.num_segments:
            raise Refusal(409, self.empty_message)
        try:
            index.check_required(required, MODALITIES)
        except FingerprintError as error:
            raise Refusal(422, str(error)) from error
        try:
            segmenter = index.segmenter
        except (FingerprintError, ExportError, CheckpointError) as error:
            raise Refusal(500, str(error)) from error
        report("decoding")
        try:
            info = self._media.call(probe, path)
            media = self._media.call(
                decode_media, path, end_seconds=self.max_seconds, **segmenter.decoding
            )
        except MediaError as error:
            # FFmpeg's words may hold the place where the upload lies, which is nobody's concern.
            found = error.message.replace(str(path), name)
            raise Refusal(
                422,
                f"{name} cannot be compared: {REASONS[error.reason]} ({found}). Give another file",
            ) from error
        except MediaProcessError as error:
            raise Refusal(422, f"{name} cannot be compared: {error}. Give another file") from error
        if media.duration_seconds < segmenter.shortest_seconds:
            raise Refusal(
                422,
                f"{name} lasts {media.duration_seconds:.2f} s, the shortest clip that can be "
                f"found {segmenter.shortest_seconds:.2f} s: give a longer one",
            )
        report("comparing")
        try:
            result = index.query(
                media, count=CANDIDATES, required=required, content=file_sha256(path)
            )
        except FingerprintError as error:
            raise Refusal(422, f"{name}: {error}") from error
        known = {row.name: row for row in index.sources()}
        return Answer(
            result,
            media,
            info.video is not None,
            info.audio is not None,
            info.duration_seconds,
            {m.source: known[m.source] for m in result.matches},
        )

    def _encode_noise(self) -> None:
        segmenter = self._index.segmenter
        arguments = segmenter.decoding
        seconds = 2 * max(map(segmenter.span_seconds, segmenter.source.encoders))
        side, rate = arguments["short_side"] or 16, arguments["sample_rate_hz"]
        times = np.arange(0, seconds, 1 / arguments["max_fps"])
        rng = np.random.default_rng(0)
        segmenter.of_media(
            DecodedMedia(
                frames=rng.integers(0, 256, (len(times), side, side, 3), np.uint8),
                frame_seconds=times,
                waveform=rng.integers(-9999, 9999, int(seconds * rate)).astype(np.int16),
                sample_rate_hz=rate,
                audio_start_seconds=0.0,
                duration_seconds=seconds,
            )
        )


def source_id(row: SourceRow) -> str:
    """Returns the name of a source in addresses: it tells nothing, and leads to no other file."""
    return hashlib.sha256(f"{row.name}\0{row.content}".encode()).hexdigest()[:24]

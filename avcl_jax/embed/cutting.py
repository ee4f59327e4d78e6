"""Clips at equal distances over files and records of any length, cut ahead by threads.

A file is cut in pieces of about a minute, so that an hour takes no more memory than a minute, and
several threads cut one file. The clips of a piece are those that begin in it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from avcl_jax.data.images import apply_crop, center_crop, each_jpeg
from avcl_jax.data.media import Frame, MediaError, decode_audio, decode_frames, probe
from avcl_jax.data.media_streams import check_regular
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.record_format import Record
from avcl_jax.embed.items import Item
from avcl_jax.export import Encoder

_PIECE_SECONDS = 60.0
# Seconds decoded before and after what the clips of a piece need: whether the file continues there
# tells where it ends.
_MARGIN_SECONDS = 1.0
# A remainder below this fraction of a clip gets no clip, because containers round durations.
_SLACK = 0.05


@dataclasses.dataclass(frozen=True)
class Piece:
    """The clips of an item that begin in an interval, which is in seconds from the item's start.

    Attributes:
        item: number of the item.
        number: number of the piece in it.
        count: number of its pieces according to the header of the file, 0 if unknown.
    """

    item: int
    number: int
    count: int

    @property
    def is_last(self) -> bool:
        """True if the file ends in this piece, unless its header is wrong."""
        return self.number >= self.count - 1


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of one modality.

    Attributes:
        starts: float64 [clips], seconds of the file or record.
        values: [clips, …], as the encoder takes them.
    """

    starts: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class CutPiece:
    """Result of a piece: its clips by modality, none after an error."""

    clips: Mapping[str, Clips]
    continues: bool = False  # the file is longer than its header states
    error: str = ""  # reason why it could not be decoded


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One modality of a part of an item; times are seconds from the item's start."""

    begin: float
    end: float
    clips_at: Callable[[Sequence[float]], np.ndarray]


def clip_starts(begin: float, end: float, span: float, hop: float) -> np.ndarray:
    """Returns starts of clips of `span` at the multiples of `hop` in an interval, in seconds.

    If clips follow each other without gaps (`hop` ≤ `span`), others at the very beginning and end
    cover the rest there. There is at least one: a clip that is longer than the interval begins with
    it.
    """
    slack = _SLACK * span
    first, last = math.ceil((begin - slack) / hop), math.floor((end - span + slack) / hop)
    starts = (hop * np.arange(first, last + 1)).tolist()
    if not starts:
        starts = [begin]
    if hop <= span:
        if starts[0] - begin > slack:
            starts.insert(0, begin)
        if end - (starts[-1] + span) > slack:
            starts.append(end - span)
    return np.round(starts, 6)


class Cutter:
    """Cuts items into the clips of encoders.

    Attributes:
        spans: seconds of a clip, by modality.
        hop: seconds from one clip to the next.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], *, speed: int, hop: float | None, threads: int
    ):
        """Takes encoders by modality, and seconds of media per second of a clip.

        Args:
            hop: None for the shortest of the clips, which then cover each file.
            threads: pieces that are cut at a time.
        """
        self._preprocess = {name: encoder.preprocess for name, encoder in encoders.items()}
        self._speed, self._threads = speed, threads
        self.spans = {m: spec.clip_seconds * speed for m, spec in self._preprocess.items()}
        self.hop = hop or min(self.spans.values())
        self._piece_seconds = self.hop * max(1, round(_PIECE_SECONDS / self.hop))

    def cut(
        self, items: Sequence[Item], first: tuple[int, int], failed: Container[int]
    ) -> Generator[tuple[Piece, CutPiece]]:
        """Yields the pieces of items in their order, while threads cut the next ones.

        Args:
            first: number of an item and of a piece, with which to begin.
            failed: numbers of items that need no further piece; it may grow.
        """
        ahead = 2 * self._threads
        planned = self._plan(items, first, failed)
        pending: collections.deque[tuple[Piece, Future[CutPiece]]] = collections.deque()
        pool = ThreadPoolExecutor(self._threads)

        def submit(piece: Piece) -> tuple[Piece, Future[CutPiece]]:
            return piece, pool.submit(self._cut, items[piece.item], piece)

        try:
            while True:
                pending.extend(map(submit, itertools.islice(planned, ahead - len(pending))))
                if not pending:
                    return
                piece, future = pending.popleft()
                result = future.result()
                if result.continues:
                    longer = dataclasses.replace(piece, number=piece.number + 1)
                    pending.appendleft(submit(longer))
                yield piece, result
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(
        self, items: Sequence[Item], first: tuple[int, int], failed: Container[int]
    ) -> Iterator[Piece]:
        number = first[1]
        for item in range(first[0], len(items)):
            count = self._count(items[item])
            for piece in range(number, max(count, number + 1)):
                if item not in failed:
                    yield Piece(item, piece, count)
            number = 0

    def _count(self, item: Item) -> int:
        """Returns the number of pieces, 0 if the header of a file does not state its duration."""
        if item.records is not None:
            return 1
        try:
            check_regular(item.path)
            end = probe(item.path).duration_seconds
        except MediaError:  # which cutting the first piece meets too
            return 1
        if not end:
            return 0
        end = min(end, np.inf if item.end_seconds is None else item.end_seconds)
        return max(1, math.ceil((end - item.start_seconds) / self._piece_seconds - _SLACK))

    def _cut(self, item: Item, piece: Piece) -> CutPiece:
        try:
            if item.records is not None:
                return self._cut_streams(item, self._of_record(item), -np.inf, np.inf)
            return self._cut_file(item, piece)
        except (MediaError, RecordError) as error:
            return CutPiece({}, error=str(error))

    def _cut_file(self, item: Item, piece: Piece) -> CutPiece:
        check_regular(item.path)
        origin, hop = item.start_seconds, self.hop
        # Rounded as the starts of clips are: each start must belong to one piece.
        numbers = (piece.number, piece.number + 1)
        begin, next_begin = (round(self._piece_seconds * number, 6) for number in numbers)
        # Without gaps, the last clip of a file may begin here and end with the next piece.
        span = max(self.spans.values())
        end = next_begin + span - (hop if hop > span else 0.0) + _MARGIN_SECONDS
        length = np.inf if item.end_seconds is None else item.end_seconds - origin
        decoded = (max(0.0, begin - _MARGIN_SECONDS), min(end, length))
        knows_end = end >= length or (piece.is_last and piece.count > 0)
        streams = self._of_file(item, *decoded, knows_end=knows_end)
        if not streams and piece.number == 0:
            reason = "outside" if origin else "empty"
            raise MediaError(reason, f"no {' and no '.join(self.spans)} from {origin:g} s on")
        is_long = any(stream.end > end - _MARGIN_SECONDS / 2 for stream in streams.values())
        cut = self._cut_streams(item, streams, begin if piece.number else -np.inf, next_begin)
        return dataclasses.replace(cut, continues=piece.is_last and is_long and end < length)

    def _cut_streams(
        self, item: Item, streams: Mapping[str, _Stream], begin: float, end: float
    ) -> CutPiece:
        clips = {}
        for modality, stream in streams.items():
            starts = clip_starts(stream.begin, stream.end, self.spans[modality], self.hop)
            starts = starts[(starts >= begin) & (starts < end)]
            if len(starts):
                values = stream.clips_at(starts.tolist())
                clips[modality] = Clips(item.start_seconds + starts, values)
        return CutPiece(clips)

    def _of_file(
        self, item: Item, begin: float, end: float, *, knows_end: bool
    ) -> dict[str, _Stream]:
        origin = item.start_seconds
        interval = (origin + begin, None if end == np.inf else origin + end)
        streams = {}
        for modality, spec in self._preprocess.items():
            if isinstance(spec, VideoPreprocessing):
                stream = self._video_of_file(item.path, origin, interval, spec)
                if stream is not None and not knows_end and stream.end < end - _MARGIN_SECONDS / 2:
                    # A still frame stays until the next one, which a recorded screen may have
                    # minutes later.
                    later = _scaled_frames(item.path, spec, origin + end, None)
                    if next(later, None) is not None:
                        stream = dataclasses.replace(stream, end=end)
            else:
                stream = self._audio_of_file(item.path, origin, interval, spec)
            if stream is not None:
                streams[modality] = dataclasses.replace(stream, end=min(stream.end, end))
        return streams

    def _video_of_file(
        self,
        path: str,
        origin: float,
        interval: tuple[float, float | None],
        spec: VideoPreprocessing,
    ) -> _Stream | None:
        size = spec.image_size
        images, times, duration = [], [], 0.0
        for frame in _scaled_frames(path, spec, *interval):
            # Cropped at once: whole frames of a minute would take much more memory.
            crop = center_crop(*frame.image.shape[:2])
            images.append(apply_crop(frame.image[None], crop, size)[0])
            times.append(frame.seconds - origin)
            duration = frame.duration_seconds
        if not images:
            return None
        seconds, pixels = np.array(times), np.stack(images)

        def clips_at(starts: Sequence[float]) -> np.ndarray:
            return pixels[spec.frames_at(starts, seconds, speed=self._speed)]

        return _Stream(times[0], _video_end(seconds, duration), clips_at)

    def _audio_of_file(
        self,
        path: str,
        origin: float,
        interval: tuple[float, float | None],
        spec: AudioPreprocessing,
    ) -> _Stream | None:
        rate = spec.log_mel.sample_rate_hz
        audio = decode_audio(
            path, sample_rate_hz=rate, start_seconds=interval[0], end_seconds=interval[1]
        )
        if audio is None:
            return None
        return self._audio(audio.waveform, rate, audio.start_seconds - origin, spec)

    def _audio(
        self, waveform: np.ndarray, rate: int, start: float, spec: AudioPreprocessing
    ) -> _Stream:
        clips_at = functools.partial(
            spec.spectrograms_at,
            waveform=spec.resample(waveform, rate),
            speed=self._speed,
            audio_start_seconds=start,
        )
        return _Stream(start, start + len(waveform) / rate, clips_at)

    def _of_record(self, item: Item) -> dict[str, _Stream]:
        assert item.records is not None
        record = item.records[item.index]
        streams = {}
        for modality, spec in self._preprocess.items():
            if isinstance(spec, VideoPreprocessing) and record.has_video:
                clips_at = functools.partial(_record_clips, record, spec, self._speed)
                seconds = record.frame_seconds
                streams[modality] = _Stream(float(seconds[0]), _video_end(seconds, 0.0), clips_at)
            elif isinstance(spec, AudioPreprocessing) and record.has_audio:
                streams[modality] = self._audio(
                    record.waveform, record.sample_rate_hz, record.audio_start_seconds, spec
                )
        if not streams:
            raise MediaError("empty", f"no {' and no '.join(self.spans)}")
        return streams


def _scaled_frames(
    path: str, spec: VideoPreprocessing, start: float, end: float | None
) -> Iterator[Frame]:
    side = spec.image_size
    return decode_frames(path, short_side=side, max_fps=None, start_seconds=start, end_seconds=end)


def _video_end(frame_seconds: np.ndarray, duration: float) -> float:
    """Returns the end of the last frame, whose duration is 0 if it is not known."""
    gap = float(np.diff(frame_seconds).mean()) if len(frame_seconds) > 1 else 0.0
    return float(frame_seconds[-1]) + (duration or gap)


def _record_clips(
    record: Record, spec: VideoPreprocessing, speed: int, starts: Sequence[float]
) -> np.ndarray:
    """Decodes the frames of clips of a record, each once."""
    shown = spec.frames_at(starts, record.frame_seconds, speed=speed)
    needed = np.unique(shown)
    crop = center_crop(record.height, record.width)
    frames = [record.frames[number] for number in needed]
    try:
        images = [
            apply_crop(image[None], crop, spec.image_size)[0]
            for image in each_jpeg(frames, (record.height, record.width))
        ]
    except ValueError as error:
        raise MediaError("damaged", str(error)) from error
    return np.stack(images)[np.searchsorted(needed, shown)]

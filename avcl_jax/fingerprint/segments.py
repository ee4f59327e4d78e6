"""Media to overlapping segments, and each segment to one feature vector per modality.

A segment is one clip with the encoder's own preprocessing, at a whole playback speed. Segment k of
a medium begins at k · hop seconds of its timeline, so that a segment's number is its time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import soxr

from avcl_jax.data.images import apply_crop, center_crop
from avcl_jax.data.media import DecodedMedia, MediaError, Source, decode_media
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.record_format import is_silent
from avcl_jax.data.spectrogram import log_mel, samples_at
from avcl_jax.encoder_source import MODALITIES, EncoderSource
from avcl_jax.export import Encoder
from avcl_jax.fingerprint.settings import FingerprintSettings

_BATCH = 32
# A segment may reach over the end by this fraction of its length, as containers round durations.
_SLACK = 0.05
# Frames below this standard deviation have one colour with codec noise: all black leaders are
# alike.
_FLAT_DEVIATION = 3.0
# Seconds decoded at a time, which bounds the memory for a long film.
_INTERVAL_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class SegmentFeatures:
    """Features of the segments of one medium.

    Attributes:
        features: modality -> float32 [segments, D], zeros where the segment is missing.
        present: modality -> bool [segments].
        duration_seconds: length of the medium.
    """

    features: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    duration_seconds: float

    def __len__(self) -> int:
        """Number of segments."""
        return len(next(iter(self.present.values())))


class Segmenter:
    """Cuts media into segments and encodes them."""

    def __init__(self, source: EncoderSource, settings: FingerprintSettings):
        """Takes encoders of one or both modalities, and the settings of an index."""
        self.source = source
        self.settings = settings
        self.dimensions = {
            modality: int(
                jax.eval_shape(
                    functools.partial(_structured, *self._fixed(modality)),
                    encoder.params,
                    self._empty(modality),
                ).shape[1]
            )
            for modality, encoder in source.encoders.items()
        }

    def span_seconds(self, modality: str) -> float:
        """Length of a segment."""
        return _clip_seconds(self.source.encoders[modality]) * self.settings.speed

    @property
    def shortest_seconds(self) -> float:
        """Length of the shortest medium that has a segment."""
        return min(map(self.span_seconds, self.source.encoders)) * (1 - _SLACK)

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `decode_media`, by which only what the encoders use is decoded."""
        arguments: dict[str, Any] = {"short_side": None, "max_fps": 1.0, "sample_rate_hz": 8000}
        arguments["modalities"] = tuple(m for m in MODALITIES if m in self.source.encoders)
        video, audio = (self.source.encoders.get(modality) for modality in MODALITIES)
        if video is not None:
            spec = video.preprocess
            assert isinstance(spec, VideoPreprocessing)
            # Twice the rate of the clip's frames: each is at most half a step from its time.
            arguments["max_fps"] = 2 * spec.num_frames / spec.clip_seconds
            arguments["short_side"] = spec.image_size
        if audio is not None:
            assert isinstance(audio.preprocess, AudioPreprocessing)
            arguments["sample_rate_hz"] = audio.preprocess.log_mel.sample_rate_hz
        return arguments

    def compile(self) -> None:
        """Compiles the encoders, so that the first media need not wait for it."""
        for modality, encoder in self.source.encoders.items():
            _structured(*self._fixed(modality), encoder.params, self._empty(modality))

    def of(self, media: Path | DecodedMedia) -> SegmentFeatures:
        """Encodes a file, or a medium in memory."""
        return self.of_file(media) if isinstance(media, Path) else self.of_media(media)

    def of_file(self, path: Source) -> SegmentFeatures:
        """Decodes and encodes a file of any length, two minutes at a time.

        Raises:
            MediaError: if it cannot be decoded.
        """
        hops = max(1, round(_INTERVAL_SECONDS / self.settings.hop_seconds))
        step = hops * self.settings.hop_seconds
        overlap = max(map(self.span_seconds, self.source.encoders)) + self.settings.hop_seconds
        parts: list[SegmentFeatures] = []
        start = 0.0
        while True:
            try:
                media = decode_media(
                    path, start_seconds=start, end_seconds=start + step + overlap, **self.decoding
                )
            except MediaError as error:
                # The file ended exactly with the interval before this one.
                if error.reason != "empty" or not parts:
                    raise
                break
            last = media.duration_seconds < step + self.shortest_seconds
            parts.append(self.of_media(media, count=None if last else hops))
            if last:
                break
            start += step
        return _joined(parts, step * (len(parts) - 1) + parts[-1].duration_seconds)

    def of_media(
        self,
        media: DecodedMedia,
        *,
        count: int | None = None,
        hop_seconds: float | None = None,
        rate: float = 1.0,
    ) -> SegmentFeatures:
        """Encodes a medium in memory.

        Args:
            media: video or audio or both.
            count: number of segments, from the first; None for all.
            hop_seconds: time from one segment to the next; None for that of the settings.
            rate: seconds that each second of the medium lasts on the timeline of the segments;
                above 1 is slower. The pitch of the audio stays.
        """
        hop = (hop_seconds or self.settings.hop_seconds) / rate
        spans = {m: self.span_seconds(m) / rate for m in self.source.encoders}
        if count is None:
            count = max(_count(media, modality, hop, span) for modality, span in spans.items())
        starts = hop * np.arange(count)
        features, present = {}, {}
        for modality, span in spans.items():
            here = _present(media, modality, starts, span)
            values = np.zeros((count, self.dimensions[modality]), np.float32)
            if here.any():
                cut = self._video_clips if modality == "video" else self._audio_clips
                clips = cut(media, starts[here], rate)
                values[here] = np.concatenate(list(self._encoded(modality, clips)))
            features[modality], present[modality] = values, here
        return SegmentFeatures(features, present, media.duration_seconds * rate)

    def _video_clips(
        self, media: DecodedMedia, starts: np.ndarray, rate: float
    ) -> Iterator[np.ndarray]:
        """Yields batches of the video encoder's input."""
        spec = self.source.encoders["video"].preprocess
        assert isinstance(spec, VideoPreprocessing)
        crop = center_crop(*media.frames.shape[1:3])
        images = apply_crop(media.frames, crop, spec.image_size)
        step = self.span_seconds("video") / spec.num_frames / rate
        for some in _batches(starts):
            times = some[:, None] + step * np.arange(spec.num_frames)
            # As a player: the last frame that began before.
            numbers = np.searchsorted(media.frame_seconds, times + 1e-6, side="right") - 1
            yield images[np.maximum(numbers, 0)]

    def _audio_clips(
        self, media: DecodedMedia, starts: np.ndarray, rate: float
    ) -> Iterator[np.ndarray]:
        """Yields batches of the audio encoder's input."""
        preprocess = self.source.encoders["audio"].preprocess
        assert isinstance(preprocess, AudioPreprocessing)
        spec = preprocess.log_mel
        waveform = media.waveform
        if media.sample_rate_hz != spec.sample_rate_hz:
            waveform = soxr.resample(waveform, media.sample_rate_hz, spec.sample_rate_hz)
        # As `gather_windows`: the windows keep their length and so their pitch, at every tempo.
        hops = spec.window * self.settings.speed / rate * np.arange(spec.frames)
        for some in _batches(starts):
            begins = np.round((some - media.audio_start_seconds) * spec.sample_rate_hz)
            places = (begins[:, None] + np.round(hops)).astype(int)[:, :, None]
            yield log_mel(samples_at(waveform, places + np.arange(spec.window)), spec)

    def _encoded(self, modality: str, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        params = self.source.encoders[modality].params
        for batch in batches:
            full = self._empty(modality)
            full[: len(batch)] = batch
            encoded = _structured(*self._fixed(modality), params, full)
            yield np.asarray(encoded)[: len(batch)]

    def _fixed(self, modality: str) -> tuple[Any, ...]:
        """Static arguments of `_structured`."""
        encoder = self.source.encoders[modality]
        return encoder.modality, encoder.module, encoder.preprocess, self.settings.time_bins

    def _empty(self, modality: str) -> np.ndarray:
        encoder = self.source.encoders[modality]
        dtype = np.uint8 if modality == "video" else np.float32
        return np.zeros((_BATCH, *encoder.input_shape), dtype)


# Compiled once per process, however many indexes it opens.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _structured(
    modality: Any, module: Any, preprocess: Any, time_bins: int, params: Any, batch: Any
) -> jax.Array:
    """Features averaged over space or frequency and over each part of time: [B, bins · C]."""
    encoder = Encoder(modality, {}, preprocess, {}, module)
    maps = encoder.apply(params, batch, pooled=False)
    places = maps.shape[1]
    maps = maps.mean(axis=tuple(range(2, maps.ndim - 1)))
    bins = min(time_bins, places)
    edges = np.linspace(0, places, bins + 1).round().astype(int)
    parts = [maps[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)]
    return jnp.concatenate(parts, axis=-1)


def not_empty(media: DecodedMedia) -> tuple[str, ...]:
    """Returns the modalities of a clip that are neither silent nor frames of one colour."""
    video = media.has_video and not _flat(media.frames).all()
    audio = media.has_audio and not is_silent(media.waveform)
    return ("video",) * video + ("audio",) * audio


def _clip_seconds(encoder: Encoder) -> float:
    preprocess = encoder.preprocess
    if isinstance(preprocess, VideoPreprocessing):
        return preprocess.clip_seconds
    return preprocess.log_mel.clip_seconds


def _extent(media: DecodedMedia, modality: str) -> tuple[float, float]:
    """Returns when a modality begins and ends; an empty interval without it."""
    if modality == "audio":
        if not media.has_audio:
            return np.inf, -np.inf
        start = media.audio_start_seconds
        return start, start + len(media.waveform) / media.sample_rate_hz
    if not media.has_video:
        return np.inf, -np.inf
    step = 1 / media.fps if media.fps else 0.0
    return float(media.frame_seconds[0]), float(media.frame_seconds[-1]) + step


def _count(media: DecodedMedia, modality: str, hop: float, span: float) -> int:
    """Returns the number of segments that begin before a modality ends."""
    first, last = _extent(media, modality)
    room = last - span * (1 - _SLACK)
    return 0 if room < first else int(room / hop + 1e-6) + 1


def _present(media: DecodedMedia, modality: str, starts: np.ndarray, span: float) -> np.ndarray:
    """Returns bool [segments], those with a modality; silence and one colour do not count."""
    first, last = _extent(media, modality)
    here = (starts >= first - _SLACK * span) & (starts + span <= last + _SLACK * span)
    if modality == "video" and here.any():
        shown = np.concatenate([[0], np.cumsum(~_flat(media.frames))])
        # From the frame that is on screen when the segment begins.
        before = np.searchsorted(media.frame_seconds, starts + 1e-6, side="right") - 1
        after = np.searchsorted(media.frame_seconds, starts + span - 1e-6, side="left")
        here &= shown[after] > shown[np.maximum(before, 0)]
    if modality == "audio":
        rate = media.sample_rate_hz
        for n in np.flatnonzero(here):
            begin = max(0, round((starts[n] - media.audio_start_seconds) * rate))
            here[n] = not is_silent(media.waveform[begin : begin + round(span * rate)])
    return here


def _flat(frames: np.ndarray) -> np.ndarray:
    """Returns bool [frames], those of one colour."""
    return np.array([cv2.meanStdDev(image)[1].max() < _FLAT_DEVIATION for image in frames])


def _batches(starts: np.ndarray) -> Iterator[np.ndarray]:
    for n in range(0, len(starts), _BATCH):
        yield starts[n : n + _BATCH]


def _joined(parts: list[SegmentFeatures], duration_seconds: float) -> SegmentFeatures:
    modalities = parts[0].present
    return SegmentFeatures(
        {m: np.concatenate([part.features[m] for part in parts]) for m in modalities},
        {m: np.concatenate([part.present[m] for part in parts]) for m in modalities},
        duration_seconds,
    )

"""Media to overlapping segments, and each segment to one feature vector per modality.

A segment is one clip with the encoder's own preprocessing, at a whole playback speed. Segment k of
a file begins at k · hop seconds of its timeline, so that a segment's number is its time.

JAX takes long to import, so functions import it when they encode: an index is opened without.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import soxr

from avcl_jax.data.images import apply_crop, center_crop
from avcl_jax.data.media import DecodedMedia, MediaError, Source, decode_media
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.record_format import is_silent
from avcl_jax.data.spectrogram import log_mel, samples_at
from avcl_jax.export.encoder import MODALITIES, Encoder
from avcl_jax.fingerprint.details import NO_DETAILS, Details, describe, joined
from avcl_jax.fingerprint.settings import FingerprintSettings

if TYPE_CHECKING:
    import jax

    from avcl_jax.export.runs import EncoderSource

_BATCH, _THREADS = 32, 2
# A segment may reach over the end by this fraction of its length, as containers round durations.
_SLACK = 0.05
# Frames below this standard deviation have one colour with codec noise: all black leaders are
# alike.
_FLAT_DEVIATION = 3.0
# Seconds decoded at a time, which bounds the memory for a long film.
_INTERVAL_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class SegmentFeatures:
    """Features of the segments of one file, or the vectors that were made of them."""

    features: Mapping[str, np.ndarray]  # float32 [segments, D], zeros where the segment is missing
    present: Mapping[str, np.ndarray]  # bool [segments], both by modality
    duration_seconds: float
    rate: float = 1.0  # seconds of the segments' timeline per second of the file
    details: Details = NO_DETAILS

    def __len__(self) -> int:
        """Number of segments."""
        return len(next(iter(self.present.values())))


class Segmenter:
    """Cuts media into segments and encodes them on all local devices.

    Attributes:
        dimensions: modality -> length of a feature vector.
        spans: modality -> length of a segment in seconds.
    """

    def __init__(
        self,
        source: EncoderSource,
        settings: FingerprintSettings,
        dimensions: Mapping[str, int] | None = None,
    ):
        """Takes encoders of one or both modalities, and the settings of an index.

        `dimensions` are known where they were recorded; to compute them, the encoders are traced.
        """
        import jax

        from avcl_jax.batched import batched_map

        self.source = source
        self.settings = settings
        self.dimensions = dict(dimensions or {})
        self.spans: dict[str, float] = {}
        self._encode = {}
        for name, encoder in source.encoders.items():
            spec = encoder.preprocess
            structured = _structured(encoder.description, spec, settings.time_bins)
            if dimensions is None:
                example = {"clips": self._empty(name)[None]}
                shapes = jax.eval_shape(structured, encoder.params, example)
                self.dimensions[name] = shapes["features"].shape[1]
            self.spans[name] = spec.clip_seconds * settings.speed
            self._encode[name] = batched_map(
                structured,
                {"encoder": encoder.params},
                inputs=("clips",),
                chunk=_BATCH,
                threads=_THREADS,
                identity=f"{encoder.description} {spec} {settings.time_bins}",
            )

    @property
    def shortest_seconds(self) -> float:
        """Length of the shortest file that has a segment."""
        return min(self.spans.values()) * (1 - _SLACK)

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `decode_media`, by which only what the encoders use is decoded."""
        arguments: dict[str, Any] = {"short_side": None, "max_fps": 1.0, "sample_rate_hz": 8000}
        arguments["modalities"] = tuple(m for m in MODALITIES if m in self.dimensions)
        for encoder in self.source.encoders.values():
            spec = encoder.preprocess
            if isinstance(spec, AudioPreprocessing):
                arguments["sample_rate_hz"] = spec.log_mel.sample_rate_hz
            else:
                # Twice the rate of the clip's frames: each is at most half a step from its time.
                arguments["max_fps"] = 2 * spec.num_frames / spec.clip_seconds
                arguments["short_side"] = spec.image_size
        return arguments

    def compile(self) -> None:
        """Compiles the encoders, so that the first media need not wait for it."""
        for modality, encode in self._encode.items():
            clip = {"clips": self._empty(modality)}
            encode({0: clip}.__getitem__, [0])

    def of(self, media: Path | DecodedMedia) -> SegmentFeatures:
        """Encodes a file, or decoded media."""
        if isinstance(media, Path):
            return self.of_file(media)
        details = describe(media, media.duration_seconds)
        return dataclasses.replace(self.of_media(media), details=details)

    def of_file(self, path: Source) -> SegmentFeatures:
        """Decodes and encodes a file of any length, two minutes at a time.

        Raises:
            MediaError: if it cannot be decoded.
        """
        hops = max(1, round(_INTERVAL_SECONDS / self.settings.hop_seconds))
        step = hops * self.settings.hop_seconds
        overlap = max(self.spans.values()) + self.settings.hop_seconds
        parts: list[SegmentFeatures] = []
        details: list[Details] = []
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
            seconds = media.duration_seconds if last else step
            details.append(describe(media, seconds, begin_seconds=start))
            if last:
                break
            start += step
        return SegmentFeatures(
            {m: np.concatenate([part.features[m] for part in parts]) for m in self.dimensions},
            {m: np.concatenate([part.present[m] for part in parts]) for m in self.dimensions},
            step * (len(parts) - 1) + parts[-1].duration_seconds,
            details=joined(details),
        )

    def of_media(
        self,
        media: DecodedMedia,
        *,
        count: int | None = None,
        hop_seconds: float | None = None,
        rate: float = 1.0,
    ) -> SegmentFeatures:
        """Encodes decoded media.

        Args:
            count: number of segments, from the first; None for all.
            hop_seconds: time from one segment to the next; None for that of the settings.
            rate: seconds that each second of the media lasts on the timeline of the segments;
                above 1 is slower. The pitch of the audio stays.
        """
        hop = (hop_seconds or self.settings.hop_seconds) / rate
        spans = {m: span / rate for m, span in self.spans.items()}
        if count is None:
            # Segments that begin before a modality ends.
            counts = [0]
            for modality, (begin, end) in _extents(media).items():
                room = end - (1 - _SLACK) * spans.get(modality, np.inf)
                counts += [int(room / hop + 1e-6) + 1] if room >= begin else []
            count = max(counts)
        starts = hop * np.arange(count)
        features, present = {}, {}
        for modality, span in spans.items():
            here = present[modality] = _present(media, modality, starts, span)
            features[modality] = np.zeros((count, self.dimensions[modality]), np.float32)
            if here.any():
                cut = self._cutter(modality, media, starts, rate)
                # Threads cut clips while devices encode others.
                outputs = self._encode[modality](cut, np.flatnonzero(here).tolist())
                features[modality][here] = outputs["encoder/features"]
        return SegmentFeatures(features, present, media.duration_seconds * rate, rate)

    def _empty(self, modality: str) -> np.ndarray:
        spec = self.source.encoders[modality].preprocess
        return np.zeros(spec.clip_shape, spec.clip_dtype)

    def _cutter(
        self, modality: str, media: DecodedMedia, starts: np.ndarray, rate: float
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """Returns a function from the number of a segment to the clip that its encoder takes."""
        preprocess = self.source.encoders[modality].preprocess
        if isinstance(preprocess, VideoPreprocessing):
            crop = center_crop(*media.frames.shape[1:3])
            images = apply_crop(media.frames, crop, preprocess.image_size)
            count = preprocess.num_frames
            times = self.spans[modality] / count / rate * np.arange(count)

            def cut_video(number: int) -> dict[str, np.ndarray]:
                return {"clips": images[media.shown_at(starts[number] + times)]}

            return cut_video
        spec = preprocess.log_mel
        waveform = media.waveform
        if media.sample_rate_hz != spec.sample_rate_hz:
            waveform = soxr.resample(waveform, media.sample_rate_hz, spec.sample_rate_hz)
        # As `gather_windows`: the windows keep their length and so their pitch, at every tempo.
        hops = np.round(spec.window * self.settings.speed / rate * np.arange(spec.frames))

        def cut_audio(number: int) -> dict[str, np.ndarray]:
            begin = np.round((starts[number] - media.audio_start_seconds) * spec.sample_rate_hz)
            places = (begin + hops).astype(int)[:, None] + np.arange(spec.window)
            return {"clips": log_mel(samples_at(waveform, places), spec)}

        return cut_audio


# Cached, because a function is compiled once per process, however many indexes are opened.
@functools.cache
def _structured(description: str, preprocess: Any, time_bins: int) -> Any:
    """Returns the function to features [B, bins · C], averaged but over the parts of time."""
    encoder = Encoder.without_weights(description, preprocess)

    def structured(params: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        import jax.numpy as jnp

        maps = encoder.apply(params, arrays["clips"], pooled=False)
        places = maps.shape[1]
        maps = maps.mean(axis=tuple(range(2, maps.ndim - 1)))
        bins = min(time_bins, places)
        edges = np.linspace(0, places, bins + 1).round().astype(int)
        parts = [maps[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)]
        return {"features": jnp.concatenate(parts, axis=-1)}

    return structured


def not_empty(media: DecodedMedia) -> tuple[str, ...]:
    """Returns the modalities of a clip that are neither silent nor frames of one colour."""
    video = media.has_video and not _flat(media.frames).all()
    audio = media.has_audio and not is_silent(media.waveform)
    return ("video",) * video + ("audio",) * audio


def _extents(media: DecodedMedia) -> dict[str, tuple[float, float]]:
    """Returns when each modality of media begins and ends."""
    extents = {}
    if media.has_video:
        step = 1 / media.fps if media.fps else 0.0
        extents["video"] = float(media.frame_seconds[0]), float(media.frame_seconds[-1]) + step
    if media.has_audio:
        start = media.audio_start_seconds
        extents["audio"] = start, start + len(media.waveform) / media.sample_rate_hz
    return extents


def _present(media: DecodedMedia, modality: str, starts: np.ndarray, span: float) -> np.ndarray:
    """Returns bool [segments], those with a modality; silence and one colour do not count."""
    first, last = _extents(media).get(modality, (np.inf, -np.inf))
    here = (starts >= first - _SLACK * span) & (starts + span <= last + _SLACK * span)
    if modality == "video" and here.any():
        varied = np.concatenate([[0], np.cumsum(~_flat(media.frames))])
        # From the frame that is on screen when the segment begins.
        before = media.shown_at(starts)
        after = np.searchsorted(media.frame_seconds, starts + span - 1e-6, side="left")
        here &= varied[after] > varied[before]
    if modality == "audio":
        rate = media.sample_rate_hz
        for n in np.flatnonzero(here):
            begin = max(0, round((starts[n] - media.audio_start_seconds) * rate))
            here[n] = not is_silent(media.waveform[begin : begin + round(span * rate)])
    return here


def _flat(frames: np.ndarray) -> np.ndarray:
    """Returns bool [frames], those of one colour."""
    return np.array([cv2.meanStdDev(image)[1].max() < _FLAT_DEVIATION for image in frames])

"""Videos in the report: records as cards that play, rows of them, and maps of features."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import librosa
import numpy as np
import simplejpeg
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from avcl_jax.data.encode import spectrogram_image, write_mp4
from avcl_jax.data.images import center_crop, decode_jpegs
from avcl_jax.data.record_format import Record
from avcl_jax.data.rendering import RenderSpec, render_views
from avcl_jax.data.selection import Modality, UsableRecords
from avcl_jax.data.views import FORWARD, Clip, Timeline, fitting_speed
from avcl_jax.evaluation.page import text

# t-SNE of more points takes minutes and shows no more.
_MAP_POINTS = 2000
# Deviations from the mean of the log-mel values that are drawn darkest and brightest.
_DARKEST, _BRIGHTEST = -1.5, 3.0
# Sample rates in use that AAC supports. FFmpeg's resampling before its encoder yields time stamps
# that its muxer refuses.
_AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


class Exhibits:
    """Shows records of one split as cards; each is rendered once, however often it is shown."""

    def __init__(self, source: UsableRecords, spec: RenderSpec, *, speed: int, stills: int):
        """Prepares to show records.

        Args:
            spec: rendering, with the spectrogram made on the host.
            speed: index into `spec.views.speeds`; the interval shown is that of such a view, or of
                one at the nearest speed that fits the record.
            stills: number of frames of the interval.
        """
        self.source = source
        self._spec = spec
        self._speed = speed
        self._stills = stills
        self._media = functools.cache(self._render)

    def card(
        self,
        position: int,
        tag: str,
        *,
        given: Modality | Literal["both"] = "both",
        kind: str = "",
        labels: str | None = None,
    ) -> str:
        """Returns the HTML of the record at `position`.

        Args:
            tag: line above the media, before the name.
            given: modality that the model was given; the other one is dimmed.
            kind: "query" or "hit", for a frame, or "".
            labels: line below the media; None for the labels of the record.
        """
        name, own, stills, spectrogram, clip = self._media(int(position))
        labels = text(own if labels is None else labels)
        unseen = {m: " unseen" if given not in (m, "both") else "" for m in ("video", "audio")}
        media = f'<span class="stills{unseen["video"]}">{stills}</span>' if stills else ""
        if spectrogram:
            image = f'alt="spectrogram" class="{unseen["audio"].strip()}" src="{spectrogram}"'
            media += f"<img {image}>"
        stage = f'data-clip="{clip}" aria-label="play {text(name)}"'
        return (
            f'<div class="video {kind}"><span class="tag"><b>{text(tag)}</b> {text(name)}</span>'
            f'<button class="stage" {stage}>{media}</button>'
            f'<span class="tag" title="{labels}">{labels}</span></div>'
        )

    def search(
        self,
        query: int,
        results: Sequence[int] | np.ndarray,
        given: tuple[Modality, Modality],
        remark: str,
    ) -> str:
        """Returns the HTML of a query and its results, best first.

        Args:
            given: modality of the query, and of the results.
            remark: line below.
        """
        cards = [self.card(query, "query", given=given[0], kind="query")]
        for number, position in enumerate(results, 1):
            hit = position == query
            tag = f"{number} · same video" if hit else str(number)
            cards.append(self.card(position, tag, given=given[1], kind="hit" if hit else ""))
        return row(cards, remark)

    def _render(self, position: int) -> tuple[str, str, str, str, str]:
        """Returns name, labels, stills, spectrogram and clip of the middle of a record."""
        _, record, use = self.source[position]
        spec = self._spec
        speed = fitting_speed(use, self._speed, spec.views)
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.duration_seconds - span, 0.0)
        clip = Clip(use.start_seconds + slack / 2, speed, FORWARD)
        crop = center_crop(max(record.height, 1), max(record.width, 1))
        arrays = render_views(record, use, [clip], [clip], [crop], spec)
        times = np.linspace(0, spec.views.num_frames - 1, self._stills).round().astype(int)
        stills = (f'<img alt="" src="{frame_uri(frame)}">' for frame in arrays["video"][0][times])
        return (
            record.record_id,
            labels_of(record, self.source.records.class_names),
            "".join(stills) if use.has_video else "",
            spectrogram_uri(arrays["spectrogram"][0], low=_DARKEST, high=_BRIGHTEST)
            if use.has_audio
            else "",
            clip_uri(record, use, clip.start_seconds, span),
        )


def labels_of(record: Record, class_names: Mapping[str, Sequence[str]]) -> str:
    """Returns the known labels of a record as text."""
    return ", ".join(
        class_names[label][number]
        for label, numbers in record.labels.items()
        for number in (numbers if isinstance(numbers, tuple) else (numbers,))
        if number >= 0
    )


def row(cards: Sequence[str], remark: str) -> str:
    """Returns the HTML of cards beside each other, with one line below."""
    below = f'<p class="caption">{text(remark)}</p>' if remark else ""
    return f'<div class="scroll"><div class="row">{"".join(cards)}</div></div>{below}'


def embedding_map(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places features on a plane by t-SNE.

    Args:
        features: float [n, C].

    Returns:
        The rows that are placed, and float [points, 2].
    """
    rows = np.arange(len(features))
    if len(rows) > _MAP_POINTS:
        rows = np.random.default_rng(seed).choice(rows, _MAP_POINTS, replace=False)
    scaled = StandardScaler().fit_transform(features[rows])
    perplexity = min(30.0, max(2.0, (len(rows) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    # Its threads spin while they wait: on two cores 24 seconds instead of one.
    with threadpool_limits(1):
        return rows, tsne.fit_transform(scaled)


def class_plane(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Places test features on the plane that keeps the classes of the training features apart.

    Linear discriminant analysis of the training features, with Ledoit–Wolf shrinkage; the test
    items have no part in choosing the plane.

    Args:
        train: float [n, C].
        train_labels: int [n], all known, of at least three classes.
        test: float [m, C].

    Returns:
        float [m, 2].
    """
    scaler = StandardScaler().fit(train)
    plane = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto", n_components=2)
    with threadpool_limits(1):
        plane.fit(scaler.transform(train), train_labels)
        return plane.transform(scaler.transform(test))


def frame_uri(frame: np.ndarray) -> str:
    """Returns a JPEG data URI of a uint8 [H, W, 3] frame."""
    return _uri("image/jpeg", simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=88))


def spectrogram_uri(spectrogram: np.ndarray, *, low: float, high: float) -> str:
    """Returns the data URI of a `spectrogram_image`."""
    return _uri("image/png", spectrogram_image(spectrogram, low=low, high=high))


def clip_uri(record: Record, use: Timeline, start_seconds: float, span_seconds: float) -> str:
    """Returns an MP4 data URI (H.264 and AAC) of an interval of a record, for the page to play."""
    frames: Iterable[tuple[float, np.ndarray]] = ()
    if use.has_video:
        times = record.frame_seconds
        inside = np.flatnonzero((times >= start_seconds) & (times < start_seconds + span_seconds))
        images = decode_jpegs([record.frames[int(index)] for index in inside])
        # H.264 with subsampled colour has even sides.
        images = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
        frames = zip(times[inside] - start_seconds, images, strict=True)
    rate = record.sample_rate_hz
    first = round((start_seconds - record.audio_start_seconds) * rate)
    waveform = record.waveform[max(first, 0) : first + round(span_seconds * rate)]
    if use.has_audio and rate not in _AAC_RATES:
        resampled = librosa.resample(waveform.astype(np.float32), orig_sr=rate, target_sr=16_000)
        waveform, rate = np.clip(resampled, -32768, 32767).astype(np.int16), 16_000
    stream = io.BytesIO()
    write_mp4(
        stream,
        frames,
        waveform if use.has_audio else None,
        fps=30,
        sample_rate_hz=rate,
        audio_bits_per_second=32_000,
        video_options={"crf": "26", "preset": "veryfast", "threads": "1"},
        variable_rate=True,
    )
    return _uri("video/mp4", stream.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"

"""Videos in the report: records as cards that play, searches among them, and maps of features."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from avcl_jax.data.rendering import RenderSpec, render_views
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import FORWARD, Clip, fitting_speed
from avcl_jax.evaluation.page import text
from avcl_jax.evaluation.retrieval import first_relevant_ranks, nearest

Modality = Literal["video", "audio"]
Side = Modality | Literal["both"]

# t-SNE of more points takes minutes and shows no more.
_MAP_POINTS = 2000
# Sample rates in use that AAC supports. FFmpeg's resampling before its encoder yields time stamps
# that its muxer refuses.
_AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


@dataclass(frozen=True)
class Exhibit:
    """One record as the page shows it.

    Attributes:
        name: id of the record.
        labels: its known labels, as text.
        stills: uint8 [K, H, W, 3] at uniform times over the interval; empty without video.
        spectrogram: float [F, M] log-mel over the same interval; empty without audio.
        clip: data URI of the playable interval, or "".
    """

    name: str
    labels: str
    stills: np.ndarray
    spectrogram: np.ndarray
    clip: str = ""


@dataclass(frozen=True)
class Search:
    """A query and its results.

    Attributes:
        query: record of the query.
        query_modality: modality that the model was given.
        found: the best results, best first.
        found_modality: modality of the results that was ranked.
        hits: True, by result, if it is the record of the query, or a positive.
        remark: one line below the results.
        tags: descriptions to show instead of the ranks of the results.
    """

    query: Exhibit
    query_modality: Side
    found: Sequence[Exhibit]
    found_modality: Side
    hits: Sequence[bool]
    remark: str
    tags: Sequence[str] = ()


class Exhibits:
    """Shows records of one split; each is rendered once, however often it is shown."""

    def __init__(self, source: UsableRecords, spec: RenderSpec, *, speed: int, stills: int):
        """Prepares to show records.

        Args:
            spec: rendering, with the spectrogram made on the host.
            speed: index into `spec.views.speeds`; the interval shown is that of such a view, or of
                one at the nearest speed that fits the record.
            stills: number of frames of the interval.
        """
        self._source = source
        self._spec = spec
        self._speed = speed
        self._stills = stills
        self.show = functools.cache(self._show)

    def search(
        self,
        query: int,
        found: Sequence[int] | np.ndarray,
        modalities: tuple[Modality, Modality],
        *,
        hits: Sequence[bool],
        remark: str,
    ) -> Search:
        """Shows a query and its results; `modalities` are those that the model was given."""
        results = [self.show(int(position)) for position in found]
        return Search(self.show(int(query)), modalities[0], results, modalities[1], hits, remark)

    def _show(self, position: int) -> Exhibit:
        """Returns the middle of the record at `position`."""
        _, record, use = self._source[position]
        spec = self._spec
        speed = fitting_speed(use, self._speed, spec.views)
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.duration_seconds - span, 0.0)
        clip = Clip(use.start_seconds + slack / 2, speed, FORWARD)
        crop = center_crop(max(record.height, 1), max(record.width, 1))
        arrays = render_views(record, use, [clip], [clip], [crop], spec)
        shown = np.linspace(0, spec.views.num_frames - 1, self._stills).round().astype(int)
        names = self._source.records.class_names
        labels = ", ".join(
            names[label][number]
            for label, numbers in record.labels.items()
            for number in (numbers if isinstance(numbers, tuple) else (numbers,))
            if number >= 0
        )
        return Exhibit(
            name=record.record_id,
            labels=labels,
            stills=arrays["video"][0][shown] if use.has_video else arrays["video"][0][:0],
            spectrogram=arrays["spectrogram"][0] if use.has_audio else arrays["spectrogram"][0][:0],
            clip=self._playable(position, clip.start_seconds, span),
        )

    def _playable(self, position: int, start_seconds: float, span_seconds: float) -> str:
        _, record, use = self._source[position]
        frames = np.zeros((0, 2, 2, 3), np.uint8)
        fps = 1.0
        if use.has_video:
            times = record.frame_seconds
            inside = np.flatnonzero(
                (times >= start_seconds) & (times < start_seconds + span_seconds)
            )
            fps = 1.0 / float(np.median(np.diff(times)))
            frames = decode_jpegs([record.frames[int(index)] for index in inside])
            # H.264 with subsampled colour has even sides.
            frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        first = round((start_seconds - record.audio_start_seconds) * record.sample_rate_hz)
        last = first + round(span_seconds * record.sample_rate_hz)
        return clip_uri(
            frames,
            fps=fps,
            waveform=record.waveform[max(first, 0) : last] if use.has_audio else np.zeros(0, "i2"),
            sample_rate_hz=record.sample_rate_hz,
        )


def cross_modal_searches(
    exhibits: Exhibits,
    queries: np.ndarray,
    gallery: np.ndarray,
    positions: np.ndarray,
    *,
    modalities: tuple[Modality, Modality],
    chosen: Sequence[int],
    results: int,
) -> list[Search]:
    """Searches for the other half of some videos.

    Args:
        queries: float [n, D] embeddings of one modality.
        gallery: float [n, D] embeddings of the other one, of the same videos.
        positions: int [n] of those videos in the source.
        modalities: modality of `queries`, and of `gallery`.
        chosen: rows of the queries.
    """
    ids = np.arange(len(gallery))
    ranks = first_relevant_ranks(queries, gallery, query_ids=ids, gallery_ids=ids)
    found = nearest(queries[list(chosen)], gallery, k=results)
    return [
        exhibits.search(
            *(positions[row], positions[items], modalities),
            hits=(items == row).tolist(),
            remark=f"The right {modalities[1]} is number {ranks[row]} of {len(gallery)}.",
        )
        for row, items in zip(chosen, found, strict=True)
    ]


def neighbour_searches(
    exhibits: Exhibits,
    features: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    *,
    modality: Modality,
    label: str,
    chosen: Sequence[int],
    results: int,
) -> tuple[str, list[Search]]:
    """Finds the nearest neighbours of some videos, and how often neighbours share a label.

    Args:
        features: float [n, C] of one modality.
        labels: int [n], all known.
        positions: int [n] of those videos in the source.
        modality: modality of `features`.
        label: name of the label.
        chosen: rows of the queries.
        results: neighbours of each.

    Returns:
        A title that gives the share over all videos and its chance level, and the searches.
    """
    scaled = StandardScaler().fit_transform(features)
    # A video is its own nearest neighbour, but twins may tie with it.
    others = np.array(
        [
            [item for item in items if item != own][:results]
            for own, items in enumerate(nearest(scaled, scaled, k=results + 1))
        ]
    )
    shares = labels[others] == labels[:, None]
    counts = np.bincount(labels)
    chance = float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))
    count = others.shape[1]
    title = (
        f"By {modality}: {100 * shares.mean():.0f} % of the {count} nearest neighbours share the "
        f"{label} (chance {100 * chance:.0f} %)"
    )
    return title, [
        exhibits.search(
            *(positions[row], positions[others[row]], (modality, modality)),
            hits=[False] * count,
            remark=f"{int(shares[row].sum())} of {count} share its {label}.",
        )
        for row in chosen
    ]


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


def search_blocks(
    by_title: Mapping[str, Sequence[Search]], spectrogram_range: tuple[float, float]
) -> list[str]:
    """Returns the HTML of titled searches: for each title a heading and its rows of cards.

    Args:
        by_title: title → searches.
        spectrogram_range: values drawn darkest and brightest.
    """
    blocks = []
    for title, searches in by_title.items():
        blocks.append(f"<h3>{text(title)}</h3>")
        blocks += [_row(search, spectrogram_range) for search in searches]
    return blocks


def _row(search: Search, spectrogram_range: tuple[float, float]) -> str:
    query_tag = "anchor" if search.tags else "query"
    cards = [_card(search.query, search.query_modality, "query", query_tag, spectrogram_range)]
    for number, (exhibit, hit) in enumerate(zip(search.found, search.hits, strict=True), start=1):
        kind = "hit" if hit else ""
        tag = f"{number} · same video" if hit else str(number)
        tag = search.tags[number - 1] if search.tags else tag
        cards.append(_card(exhibit, search.found_modality, kind, tag, spectrogram_range))
    remark = f'<p class="caption">{text(search.remark)}</p>' if search.remark else ""
    return f'<div class="scroll"><div class="row">{"".join(cards)}</div></div>{remark}'


def _card(
    exhibit: Exhibit,
    modality: Side,
    kind: str,
    tag: str,
    spectrogram_range: tuple[float, float],
) -> str:
    low, high = spectrogram_range
    media = ""
    if len(exhibit.stills):
        stills = "".join(f'<img alt="" src="{frame_uri(s)}">' for s in exhibit.stills)
        unseen = " unseen" if modality == "audio" else ""
        media += f'<span class="stills{unseen}">{stills}</span>'
    if len(exhibit.spectrogram):
        uri = spectrogram_uri(exhibit.spectrogram, low=low, high=high)
        unseen = ' class="unseen"' if modality == "video" else ""
        media += f'<img alt="spectrogram"{unseen} src="{uri}">'
    clip = f'data-clip="{exhibit.clip}" aria-label="play {text(exhibit.name)}"'
    labels = text(exhibit.labels)
    return (
        f'<div class="video {kind}">'
        f'<span class="tag"><b>{text(tag)}</b> {text(exhibit.name)}</span>'
        f'<button class="stage" {clip if exhibit.clip else "disabled"}>{media}</button>'
        f'<span class="tag" title="{labels}">{labels}</span></div>'
    )


def frame_uri(frame: np.ndarray) -> str:
    """Returns a JPEG data URI of a uint8 [H, W, 3] frame."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def spectrogram_uri(spectrogram: np.ndarray, *, low: float, high: float) -> str:
    """Returns the data URI of a `spectrogram_image`."""
    data = spectrogram_image(spectrogram, low=low, high=high)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def clip_uri(frames: np.ndarray, *, fps: float, waveform: np.ndarray, sample_rate_hz: int) -> str:
    """Returns an MP4 data URI (H.264 and AAC) of a short clip, so that the page can play it.

    Args:
        frames: uint8 [T, H, W, 3], even height and width; empty for audio alone.
        fps: frames per second.
        waveform: int16 [samples]; empty for a silent clip.
        sample_rate_hz: sample rate of the waveform.
    """
    if len(waveform) and sample_rate_hz not in _AAC_RATES:
        resampled = librosa.resample(
            waveform.astype(np.float32), orig_sr=sample_rate_hz, target_sr=16_000
        )
        waveform, sample_rate_hz = np.clip(resampled, -32768, 32767).astype(np.int16), 16_000
    stream = io.BytesIO()
    write_mp4(
        stream,
        ((number / fps, frame) for number, frame in enumerate(frames)),
        waveform,
        fps=fps,
        sample_rate_hz=sample_rate_hz,
        audio_bits_per_second=32_000,
        video_options={"crf": "26", "preset": "veryfast", "threads": "1"},
    )
    return "data:video/mp4;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

"""Videos, searches and maps for the report, made from records and features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from avcl_jax.data.crop import center_crop
from avcl_jax.data.decode import decode_jpegs
from avcl_jax.data.rendering import RenderSpec, render_views
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import FORWARD, Clip
from avcl_jax.evaluation.cards import clip_uri
from avcl_jax.evaluation.fixed_views import fitting_speed
from avcl_jax.evaluation.report_content import Exhibit, Search
from avcl_jax.evaluation.retrieval import first_relevant_ranks, nearest

# t-SNE of more points takes minutes and shows no more.
_MAP_POINTS = 2000


class Exhibits:
    """Shows records of one split; each is rendered once, however often it is shown."""

    def __init__(self, source: UsableRecords, spec: RenderSpec, *, speed: int, stills: int):
        """Prepares to show records.

        Args:
            source: usable records.
            spec: rendering, with the spectrogram made on the host.
            speed: index into `spec.views.speeds`; the interval shown is that of such a view, or of
                one at the nearest speed that fits the record.
            stills: pictures of the interval.
        """
        self._source = source
        self._spec = spec
        self._speed = speed
        self._stills = stills
        self.show = functools.cache(self._show)

    def _show(self, position: int) -> Exhibit:
        """Returns the middle of the record at `position`."""
        _, record, use = self._source[position]
        spec = self._spec
        speed = fitting_speed(use.timeline, self._speed, spec.views)
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.timeline.duration_seconds - span, 0.0)
        clip = Clip(use.timeline.start_seconds + slack / 2, speed, FORWARD)
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
    query_modality: Literal["video", "audio"],
    found_modality: Literal["video", "audio"],
    chosen: Sequence[int],
    results: int,
) -> list[Search]:
    """Searches for the other half of some videos.

    Args:
        exhibits: shows records.
        queries: float [n, D] embeddings of one modality.
        gallery: float [n, D] embeddings of the other one, of the same videos.
        positions: int [n] of those videos in the source.
        query_modality: that of `queries`.
        found_modality: that of `gallery`.
        chosen: rows to ask with.
        results: how many are shown.
    """
    ids = np.arange(len(gallery))
    ranks = first_relevant_ranks(queries, gallery, query_ids=ids, gallery_ids=ids)
    found = nearest(queries[list(chosen)], gallery, k=results)
    what = {"video": "picture", "audio": "sound"}[found_modality]
    return [
        Search(
            query=exhibits.show(int(positions[row])),
            query_modality=query_modality,
            found=[exhibits.show(int(positions[index])) for index in indices],
            found_modality=found_modality,
            hits=[bool(index == row) for index in indices],
            remark=f"The right {what} is number {ranks[row]} of {len(gallery)}.",
        )
        for row, indices in zip(chosen, found, strict=True)
    ]


def neighbour_searches(
    exhibits: Exhibits,
    features: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    *,
    modality: Literal["video", "audio"],
    label: str,
    chosen: Sequence[int],
    results: int,
) -> tuple[str, list[Search]]:
    """Finds the nearest neighbours of some videos, and how often neighbours share a label.

    Args:
        exhibits: shows records.
        features: float [n, C] of one modality.
        labels: int [n], all known.
        positions: int [n] of those videos in the source.
        modality: that of `features`.
        label: its name.
        chosen: rows to ask with.
        results: neighbours of each.

    Returns:
        A title that gives the share over all videos and its chance level, and the searches.
    """
    scaled = StandardScaler().fit_transform(features)
    indices = nearest(scaled, scaled, k=results + 1)
    # A video is its own nearest neighbour, but twins may tie with it.
    others = np.array(
        [
            [index for index in row if index != own][:results]
            for own, row in zip(range(len(indices)), indices, strict=True)
        ]
    )
    shares = labels[others] == labels[:, None]
    counts = np.bincount(labels)
    chance = float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))
    what = {"video": "picture", "audio": "sound"}[modality]
    title = (
        f"By the {what}: {100 * shares.mean():.0f} % of the {others.shape[1]} nearest neighbours "
        f"share the {label} (chance {100 * chance:.0f} %)"
    )
    return title, [
        Search(
            query=exhibits.show(int(positions[row])),
            query_modality=modality,
            found=[exhibits.show(int(positions[index])) for index in others[row]],
            found_modality=modality,
            hits=[False] * others.shape[1],
            remark=f"{int(shares[row].sum())} of {others.shape[1]} share its {label}.",
        )
        for row in chosen
    ]


def embedding_map(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places features on a plane by t-SNE.

    Args:
        features: float [n, C].
        seed: of t-SNE, and of the choice of points where there are too many.

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

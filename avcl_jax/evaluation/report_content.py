"""What the report shows, as plain data: videos, searches, curves, maps and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Modality = Literal["video", "audio"]
Side = Modality | Literal["both"]
# Title, positions float [n, 2], labels int [n] (-1 unknown) and names of the classes.
Map = tuple[str, np.ndarray, np.ndarray, Sequence[str]]
# Label -> (steps [n], values [n]).
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Exhibit:
    """One video as the page shows it.

    Attributes:
        name: id of the record.
        labels: what is known of it, in words.
        stills: uint8 [K, H, W, 3] at uniform times over the interval; empty without a picture.
        spectrogram: float [F, M] log-mel over the same interval; empty without a sound.
        clip: data URI of the playable interval, or "".
    """

    name: str
    labels: str
    stills: np.ndarray
    spectrogram: np.ndarray
    clip: str = ""


@dataclass(frozen=True)
class Search:
    """A query and what was found for it.

    Attributes:
        query: the video asked with.
        query_modality: which side of it the model was given.
        found: the best results, best first.
        found_modality: which side of them was ranked.
        hits: for each result, True if it is the video of the query, or a positive.
        remark: one line on where the right one stood.
        tags: for each result, a description to show instead of its rank.
    """

    query: Exhibit
    query_modality: Side
    found: Sequence[Exhibit]
    found_modality: Side
    hits: Sequence[bool]
    remark: str
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class Curves:
    """One chart of training.

    Attributes:
        title: what is shown.
        ylabel: its axis.
        series: curves by label.
        fractions: values are written in %.
        from_zero: the axis begins at zero.
        dashed: curves by label, to compare with those of the same label, or with all.
        further: shown only on demand.
    """

    title: str
    ylabel: str
    series: Series
    fractions: bool
    from_zero: bool
    dashed: Series = field(default_factory=dict)
    further: bool = False


@dataclass(frozen=True)
class ReportContent:
    """All that the page shows.

    Attributes:
        title: of the page.
        results: the contents of results.json.
        curves: charts of training, in order.
        bank_start: step from which training used the feature bank; None if it never did.
        searches: retrieval examples by direction, "audio_to_video" and "video_to_audio".
        neighbours: nearest neighbours within one modality.
        bank: positives and negatives from the feature bank by title; {} without a bank.
        maps: see `figures.scatter`; by t-SNE of the pretrained features.
        planes: see `figures.scatter`; a random beside the pretrained encoder, for each probe, in
            the plane that keeps the classes of the training videos apart.
        probe_confusions: probe → (confusion of the pretrained encoder, class names).
        task_classes: temporal task → names of its classes.
        protocol: how the numbers were made, sentence by sentence.
        run: what was run, name → value.
        config: the whole configuration as JSON text.
        spectrogram_range: values of a spectrogram drawn darkest and brightest.
    """

    title: str
    results: Mapping[str, Any]
    curves: Sequence[Curves]
    bank_start: int | None
    searches: Mapping[str, Sequence[Search]]
    neighbours: Mapping[str, Sequence[Search]]
    bank: Mapping[str, Sequence[Search]]
    maps: Sequence[Map]
    planes: Sequence[Sequence[Map]]
    probe_confusions: Mapping[str, tuple[Sequence[Sequence[int]], Sequence[str]]]
    task_classes: Mapping[str, Sequence[str]]
    protocol: Sequence[str]
    run: Mapping[str, object]
    config: str
    spectrogram_range: tuple[float, float]

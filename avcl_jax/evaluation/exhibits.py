"""Examples in the report: records as cards that play, searches, and samples of the feature bank."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import soxr
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.encode import data_uri, frame_uri, spectrogram_uri, write_mp4
from avcl_jax.data.images import center_crop, decode_jpegs
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.rendering import render_views
from avcl_jax.data.selection import Modality, Selection, UsableRecords
from avcl_jax.data.views import Timeline, fixed_clips
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import RowNumbers, views_of
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.objectives.views import Term
from avcl_jax.page import as_text, section, text
from avcl_jax.training.checkpoint import CheckpointError, load_bank, read_progress
from avcl_jax.training.program import bank_start, loss_spec

# Deviations from the mean of the log-mel values that are drawn darkest and brightest.
_DARKEST, _BRIGHTEST = -1.5, 3.0
# Sample rates in use that AAC supports. FFmpeg's resampling before its encoder yields time stamps
# that its muxer refuses.
_AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
# (modality of the anchor, of a row) pairs whose similarities rank the rows -> title.
_RANKINGS: Mapping[tuple[Term, ...], str] = {
    (("video", "video"), ("audio", "audio")): "By video and audio",
    (("video", "video"),): "By video",
    (("audio", "audio"),): "By audio",
    (("video", "audio"),): "Audio by video",
    (("audio", "video"),): "Video by audio",
}

Given = Modality | Literal["both"]  # modality that the model was given


class Exhibits:
    """Shows records of one split as cards; each is rendered once, however often it is shown."""

    def __init__(self, source: UsableRecords, spec: RenderSpec, *, stills: int):
        """Prepares to show records.

        Args:
            spec: rendering, with the spectrogram made on the host. The interval shown is that of a
                view at the middle one of its speeds, neither an instant nor all of a video, or at
                the nearest that fits the record.
            stills: number of frames of the interval.
        """
        self._source, self._spec, self._stills = source, spec, stills
        self._media = functools.cache(self._render)

    def card(
        self,
        position: int,
        tag: str,
        *,
        given: Given = "both",
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
        """Returns the HTML of a query and its results, best first, with a remark below.

        `given` are the modalities of the query and of the results.
        """
        cards = [self.card(query, "query", given=given[0], kind="query")]
        for number, position in enumerate(results, 1):
            hit = position == query
            tag = f"{number} · same video" if hit else str(number)
            cards.append(self.card(position, tag, given=given[1], kind="hit" if hit else ""))
        return _row(cards, remark)

    def _render(self, position: int) -> tuple[str, str, str, str, str]:
        """Returns name, labels, stills, spectrogram and clip of the middle of a record."""
        _, record, use = self._source[position]
        spec = self._spec
        (clip,) = fixed_clips(use, spec.views, [len(spec.views.speeds) // 2], 1)
        span = spec.views.clip_seconds * spec.views.speeds[clip.speed]
        crop = center_crop(record.height, record.width)
        arrays = render_views(record, use, [clip], [clip], [crop], spec)
        times = np.linspace(0, spec.views.num_frames - 1, self._stills).round().astype(int)
        stills = (f'<img alt="" src="{frame_uri(frame)}">' for frame in arrays["video"][0][times])
        return (
            record.record_id,
            _labels_of(record, self._source.records.class_names),
            "".join(stills) if use.has_video else "",
            spectrogram_uri(arrays["spectrogram"][0], low=_DARKEST, high=_BRIGHTEST)
            if use.has_audio
            else "",
            clip_uri(record, use, clip.start_seconds, span),
        )


def _labels_of(record: Record, class_names: Mapping[str, Sequence[str]]) -> str:
    """Returns the known labels of a record as text."""
    return ", ".join(
        class_names[label][number]
        for label, numbers in record.labels.items()
        for number in (numbers if isinstance(numbers, tuple) else (numbers,))
        if number >= 0
    )


def _row(cards: Sequence[str], remark: str) -> str:
    """Returns the HTML of cards beside each other, with one line below."""
    below = f'<p class="caption">{text(remark)}</p>' if remark else ""
    return f'<div class="scroll"><div class="row">{"".join(cards)}</div></div>{below}'


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
        waveform, rate = soxr.resample(waveform, rate, 16_000), 16_000
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
    return data_uri("video/mp4", stream.getvalue())


class BankRow(NamedTuple):
    """A row of the bank: an anchor, or a positive or negative with its cosines to the anchor.

    `labels` are those of the record at `position` and the playback of the view; the embedding of
    the modality `given` ranks the rows.
    """

    position: int
    labels: str
    kind: str
    given: Given
    cosines: Sequence[float] = ()


def open_bank(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, spec: RenderSpec, *, step: int
) -> tuple[UsableRecords, FeatureBank] | None:
    """Opens the bank of a run's newest checkpoint, of step `step`, and the records of its rows.

    Returns None if the run has not used a bank yet, another version wrote it, or the records are
    missing, for instance where a run is evaluated with its test records alone.
    """
    start = bank_start(config)
    if start is None or step <= start:
        return None
    with contextlib.suppress(RecordError, CheckpointError):
        records = RecordDataset(config.data.directory, config.data.split)
        source = UsableRecords(records, spec, Selection.parse(config.data.select))
        if source.fingerprint == read_progress(workdir, step).data_fingerprint:
            return source, load_bank(workdir)
    return None


def bank_searches(
    config: ml_collections.ConfigDict, source: UsableRecords, bank: FeatureBank
) -> dict[str, list[tuple[list[BankRow], str]]]:
    """Samples the bank for anchors that are rows of the bank, of records in `source`.

    Returns:
        Title of each ranking that the run uses -> by anchor: the anchor, positives from the most to
        the least similar, then negatives; and how many of all samples share labels with the anchor.
    """
    section, speeds = config.evaluation.report, config.views.speeds
    sampling, terms = experiment.bank_sampling(config), loss_spec(config).bank_terms
    rows, numbers = bank.rows, bank.rows.numbers
    z = {modality: np.asarray(e, np.float32) for modality, e in rows.embeddings.items()}
    views = jax.tree.map(lambda values: values.reshape(-1, 2, *values.shape[1:]), rows)
    row_of = {int(number): row for row, number in enumerate(numbers.insertion)}
    # The first record of each source.
    places = {int(name): place for place, name in reversed(list(enumerate(source.sources)))}

    def describe(row: int, kind: str, given: Given, cosines: Sequence[float] = ()) -> BankRow:
        position = places[int(numbers.source_id[row])]
        playback = numbers.playback("video" if rows.usable("video")[row] else "audio")[row]
        played = f"{speeds[playback // 2]}×{' backward' if playback % 2 else ''}"
        labels = _labels_of(source[position][1], source.records.class_names)
        return BankRow(position, ", ".join(filter(None, (labels, played))), kind, given, cosines)

    def search(
        anchor: int, drawn: Mapping[str, Any], pairs: tuple[Term, ...]
    ) -> tuple[list[BankRow], str]:
        cosines = np.stack([z[other] @ z[own][anchor] for own, other in pairs], axis=1)
        kinds = {
            kind: sorted((row_of[n] for n in numbers if n >= 0), key=lambda r: -cosines[r].min())
            for kind, numbers in drawn.items()
        }
        counts = {"positive": section.results // 2, "negative": -(-section.results // 2)}
        given: tuple[Given, Given] = pairs[0] if len(pairs) == 1 else ("both", "both")
        found = [describe(anchor, "anchor", given[0])]
        for kind, of_kind in kinds.items():
            known = [row for row in of_kind if numbers.source_id[row] in places]
            # Evenly spaced from the most to the least similar.
            spread = np.linspace(0, len(known) - 1, min(len(known), counts[kind])).round()
            chosen = [known[int(place)] for place in spread]
            found += [describe(row, kind, given[1], cosines[row].tolist()) for row in chosen]
        return found, _agreement(numbers, anchor, kinds, config.bank.health_labels)

    searches: dict[str, list[tuple[list[BankRow], str]]] = {}
    for anchor, target in terms:
        pairs = sampling.pairs(anchor)
        usable = views.usable(*(own for own, _ in pairs)).all(axis=1)
        usable = np.flatnonzero(usable & np.isin(numbers.source_id[::2], list(places)))
        if _RANKINGS[pairs] in searches or not len(usable):
            continue
        rng = np.random.default_rng(config.seed)
        videos = np.sort(rng.choice(usable, min(section.queries, len(usable)), replace=False))
        sample = functools.partial(
            feature_bank.sample, term=(anchor, target), terms=terms, sampling=sampling, active=True
        )
        anchors = jax.tree.map(lambda values, videos=videos: values[videos], views)
        batch = views_of(anchors, record_index=jnp.asarray(videos))
        drawn = jax.jit(sample)(bank, jax.random.key(config.seed), batch)
        # Insertion numbers of the rows drawn for the first view of each video.
        positives, negatives = (np.asarray(d.numbers.insertion)[:, 0].tolist() for d in drawn)
        searches[_RANKINGS[pairs]] = [
            search(2 * video, {"positive": near, "negative": far}, pairs)
            for video, near, far in zip(videos.tolist(), positives, negatives, strict=True)
        ]
    return searches


def bank_section(
    exhibits: Exhibits, searches: Mapping[str, Sequence[tuple[list[BankRow], str]]]
) -> str:
    """Returns the section of the report with the searches of `bank_searches`."""
    blocks, frames = [], {"anchor": "query", "positive": "hit", "negative": ""}
    for title, of_title in searches.items():
        blocks.append(f"<h3>{text(title)}</h3>")
        for rows, remark in of_title:
            cards = []
            for position, labels, kind, given, cosines in rows:
                tag = f"{kind} {' / '.join(f'{c:.2f}' for c in cosines)}"
                frame = frames[kind]
                cards.append(exhibits.card(position, tag, given=given, kind=frame, labels=labels))
            blocks.append(_row(cards, remark))
    return section(
        "Samples from the feature bank",
        "Random training videos, and rows that the bank of the last checkpoint returns for them: "
        "positives in green, negatives from the most to the least similar. Numbers are the cosines "
        "that rank the rows, before any correction for playback: of video, then of audio. The "
        "speed is that of the view whose embedding is in the bank; the frames are of the middle of "
        "the video, which may be another interval.",
        *blocks,
    )


def _agreement(
    rows: RowNumbers, query: int, kinds: Mapping[str, Sequence[int]], labels: Sequence[str]
) -> str:
    """Describes how many of the rows share labels with the row `query`, beside the base rate."""
    others = np.flatnonzero(rows.source_id != rows.source_id[query])
    sentences = []
    for column, label in enumerate(labels):
        values = rows.label[:, column]
        if values[query] < 0:
            continue
        counts = [
            f"{int((values[list(of_kind)] == values[query]).sum())} of {len(of_kind)} {kind}s"
            for kind, of_kind in kinds.items()
        ]
        chance = float((values[others] == values[query]).mean())
        sentences.append(
            f"{', '.join(counts)} share its {label}, {as_text(chance, digits=0)} of the bank do."
        )
    return " ".join(sentences)

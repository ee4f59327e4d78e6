"""Positives and negatives of some anchors from the feature bank of a run, for the report."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.selection import Modality, Selection, UsableRecords
from avcl_jax.evaluation.exhibits import Exhibits, labels_of, row
from avcl_jax.evaluation.page import as_text, section, text
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import RowNumbers, views_of
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.objectives.views import Term
from avcl_jax.training.checkpoint import CheckpointError, load_bank, read_progress
from avcl_jax.training.loop import bank_start, loss_spec

Side = Modality | Literal["both"]
# (modality of the anchor, of a row) pairs whose similarities rank the rows -> title.
_TITLES: Mapping[tuple[Term, ...], str] = {
    (("video", "video"), ("audio", "audio")): "By video and audio",
    (("video", "video"),): "By video",
    (("audio", "audio"),): "By audio",
    (("video", "audio"),): "Audio by video",
    (("audio", "video"),): "Video by audio",
}


class BankRow(NamedTuple):
    """A row of the bank, as an anchor or as a sample.

    Attributes:
        position: position of its record in the records.
        labels: labels of the record, and the playback of the view.
        kind: "anchor", "positive" or "negative".
        cosines: similarities to the anchor by which rows are ranked.
    """

    position: int
    labels: str
    kind: str
    cosines: Sequence[float] = ()


class BankSearch(NamedTuple):
    """An anchor and samples of the bank for it.

    Attributes:
        rows: the anchor, positives from the most to the least similar, then negatives.
        modalities: modality of the anchor, and of the samples.
        remark: how many of all samples share labels with the anchor.
    """

    rows: Sequence[BankRow]
    modalities: tuple[Side, Side]
    remark: str


def open_bank(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, spec: RenderSpec, *, step: int
) -> tuple[UsableRecords, FeatureBank] | None:
    """Opens the bank of a run's newest checkpoint, and the records of its rows.

    Args:
        config: config of the run.
        spec: rendering, with the spectrogram made on the host.
        step: step of the checkpoint.

    Returns:
        None if the run has not used a bank yet, another version wrote it, or the records are
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
) -> dict[str, list[BankSearch]]:
    """Samples the bank for anchors that are rows of the bank.

    Args:
        config: config of the run, with the sections of its evaluation.
        source: records of the rows.
        bank: feature bank.

    Returns:
        Title of each ranking that the run uses -> its searches.
    """
    section, speeds = config.evaluation.report, config.views.speeds
    sampling, terms = experiment.bank_sampling(config), loss_spec(config).bank_terms
    rows, numbers = bank.rows, bank.rows.numbers
    views = jax.tree.map(lambda values: values.reshape(-1, 2, *values.shape[1:]), rows)
    row_of = {int(number): row for row, number in enumerate(numbers.insertion)}
    # The first record of each source.
    places = {int(name): place for place, name in reversed(list(enumerate(source.sources)))}

    def describe(row: int, kind: str, cosines: Sequence[float] = ()) -> BankRow:
        position = places[int(numbers.source_id[row])]
        playback = numbers.playback("video" if rows.usable("video")[row] else "audio")[row]
        played = f"{speeds[playback // 2]}×{' backward' if playback % 2 else ''}"
        labels = labels_of(source[position][1], source.records.class_names)
        return BankRow(position, ", ".join(filter(None, (labels, played))), kind, cosines)

    def search(anchor: int, drawn: Mapping[str, Any], pairs: tuple[Term, ...]) -> BankSearch:
        def cosines(row: int) -> list[float]:
            z = rows.embeddings
            both = ((z[own][anchor], z[other][row]) for own, other in pairs)
            return [float(a.astype("f4") @ b.astype("f4")) for a, b in both]

        kinds = {
            kind: sorted((row_of[n] for n in numbers if n >= 0), key=lambda row: -min(cosines(row)))
            for kind, numbers in drawn.items()
        }
        counts = {"positive": section.results // 2, "negative": -(-section.results // 2)}
        found = [describe(anchor, "anchor")]
        for kind, of_kind in kinds.items():
            known = [row for row in of_kind if numbers.source_id[row] in places]
            found += [describe(row, kind, cosines(row)) for row in _spread(known, counts[kind])]
        sides: tuple[Side, Side] = pairs[0] if len(pairs) == 1 else ("both", "both")
        return BankSearch(
            found, sides, _agreement(numbers, anchor, kinds, config.bank.health_labels)
        )

    searches: dict[str, list[BankSearch]] = {}
    for anchor, target in terms:
        pairs = sampling.pairs(anchor)
        usable = views.usable(*(own for own, _ in pairs)).all(axis=1)
        usable = np.flatnonzero(usable & np.isin(numbers.source_id[::2], list(places)))
        if _TITLES[pairs] in searches or not len(usable):
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
        searches[_TITLES[pairs]] = [
            search(2 * video, {"positive": near, "negative": far}, pairs)
            for video, near, far in zip(videos.tolist(), positives, negatives, strict=True)
        ]
    return searches


def bank_section(exhibits: Exhibits, searches: Mapping[str, Sequence[BankSearch]]) -> str:
    """Returns the section of the report with the searches of `bank_searches`."""
    blocks = []
    for title, of_title in searches.items():
        blocks.append(f"<h3>{text(title)}</h3>")
        for rows, modalities, remark in of_title:
            cards = []
            for found in rows:
                anchor = found.kind == "anchor"
                cards.append(
                    exhibits.card(
                        found.position,
                        f"{found.kind} {' / '.join(f'{c:.2f}' for c in found.cosines)}",
                        given=modalities[not anchor],
                        kind={"anchor": "query", "positive": "hit"}.get(found.kind, ""),
                        labels=found.labels,
                    )
                )
            blocks.append(row(cards, remark))
    return section(
        "Samples from the feature bank",
        "Random training videos, and rows that the bank of the last checkpoint returns for them: "
        "positives in green, negatives from the most to the least similar. Numbers are the cosines "
        "that rank the rows, before any correction for playback: of video, then of audio. The "
        "speed is that of the view whose embedding is in the bank; the frames are of the middle of "
        "the video, which may be another interval.",
        *blocks,
    )


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` rows, evenly spaced from the first to the last."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


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

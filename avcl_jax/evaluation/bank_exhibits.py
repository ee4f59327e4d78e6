"""Positives and negatives of some anchors from the feature bank of a run, for the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.evaluation.exhibits import Exhibit, Exhibits, Search, Side
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import RowNumbers, views_of
from avcl_jax.objectives.bank_sampling import Term, ranking_pairs
from avcl_jax.training.checkpoint import CheckpointError, load_bank, read_progress
from avcl_jax.training.loop import bank_start, loss_spec

# (modality of the anchor, of a row) pairs whose similarities rank the rows -> title.
_TITLES: Mapping[tuple[Term, ...], str] = {
    (("video", "video"), ("audio", "audio")): "By video and audio",
    (("video", "video"),): "By video",
    (("audio", "audio"),): "By audio",
    (("video", "audio"),): "Audio by video",
    (("audio", "video"),): "Video by audio",
}


def bank_searches(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, spec: RenderSpec, *, step: int
) -> dict[str, list[Search]]:
    """Samples the bank of a run's newest checkpoint for anchors that are rows of the bank.

    Args:
        config: config of the run, with the sections of its evaluation.
        workdir: workdir of the run.
        spec: rendering, with the spectrogram made on the host.
        step: step of the checkpoint.

    Returns:
        Title of each ranking that the run uses → its searches; {} if the run has not used a bank
        yet, another version wrote it, or the records of its rows are missing.
    """
    start = bank_start(config)
    if start is None or step <= start:
        return {}
    try:
        records = RecordDataset(config.data.directory, config.data.split)
    except RecordError:  # Evaluated where only the test records are.
        return {}
    source = UsableRecords(records, spec, Selection.parse(config.data.select))
    if source.fingerprint != read_progress(workdir, step).data_fingerprint:
        return {}
    try:
        bank = load_bank(workdir)
    except CheckpointError:
        return {}
    section, speeds = config.evaluation.report, config.views.speeds
    exhibits = Exhibits(source, spec, speed=len(speeds) // 2, stills=section.stills)
    sampling, terms = experiment.bank_sampling(config), loss_spec(config).bank_terms
    rows, numbers = bank.rows, bank.rows.numbers
    views = jax.tree.map(lambda values: values.reshape(-1, 2, *values.shape[1:]), rows)
    row_of = {int(number): row for row, number in enumerate(numbers.insertion)}
    # The first record of each source.
    places = {int(name): place for place, name in reversed(list(enumerate(source.sources)))}

    def show(row: int) -> Exhibit:
        exhibit = exhibits.show(places[int(numbers.source_id[row])])
        playback = numbers.playback("video" if rows.usable("video")[row] else "audio")[row]
        played = f"{speeds[playback // 2]}×{' backward' if playback % 2 else ''}"
        labels = ", ".join(filter(None, (exhibit.labels, played)))
        return dataclasses.replace(exhibit, labels=labels)

    def search(query: int, drawn: Mapping[str, Sequence[int]], pairs: tuple[Term, ...]) -> Search:
        def cosines(row: int) -> list[float]:
            z = rows.embeddings
            both = ((z[own][query], z[other][row]) for own, other in pairs)
            return [float(a.astype("f4") @ b.astype("f4")) for a, b in both]

        kinds = {
            kind: sorted((row_of[n] for n in numbers if n >= 0), key=lambda row: -min(cosines(row)))
            for kind, numbers in drawn.items()
        }
        counts = {"positive": section.results // 2, "negative": -(-section.results // 2)}
        selected = [
            (kind, row)
            for kind, of_kind in kinds.items()
            for row in _spread([r for r in of_kind if numbers.source_id[r] in places], counts[kind])
        ]
        sides: tuple[Side, Side] = pairs[0] if len(pairs) == 1 else ("both", "both")
        return Search(
            query=show(query),
            query_modality=sides[0],
            found=[show(row) for _, row in selected],
            found_modality=sides[1],
            hits=[kind == "positive" for kind, _ in selected],
            remark=_agreement(numbers, query, kinds, config.bank.health_labels),
            tags=[f"{kind} {' / '.join(f'{c:.2f}' for c in cosines(r))}" for kind, r in selected],
        )

    searches: dict[str, list[Search]] = {}
    for anchor, target in terms:
        pairs = ranking_pairs(sampling, anchor)
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
        sentences.append(f"{', '.join(counts)} share its {label}, {chance:.0%} of the bank do.")
    return " ".join(sentences)

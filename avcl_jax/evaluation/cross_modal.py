"""Audio-video retrieval: a sound finds its picture, and a picture its sound.

python -m avcl_jax.main --config=configs/cross_modal.py:vggsound --config.encoder=RUN
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.selection import Selection
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import FORWARD
from avcl_jax.encoder_source import EncoderSource, heads_digest, source_of_run
from avcl_jax.evaluation.embed import check_pairs, encode_all, feature_function
from avcl_jax.evaluation.fixed_views import fixed_views
from avcl_jax.evaluation.parts import in_parts, key_of
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
)
from avcl_jax.evaluation.protocol_records import check_views
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.retrieval import RetrievalScores, retrieval_scores
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.export import load_run
from avcl_jax.paths import absolute_path

PROTOCOL = Protocol(
    name="audio_video_retrieval",
    version=2,
    title="Audio-video retrieval",
    definition=(
        "Records with picture and sound of at least one view; each is query and gallery item.",
        "Each record gives features.views_per_speed views at each of features.speeds, forward, "
        "uniformly spaced over the time that picture and sound share, the largest centred square; "
        "picture and sound of a view are of the same interval.",
        "Embeddings are the outputs of the projection heads, of unit length; those of all views "
        "stand one after another, so that the similarity of two records is the mean cosine of "
        "their views of the same place in the order.",
        "The one relevant item is the other half of the same record. R@k is the share of queries "
        "that have it among the k most similar, median rank is counted from 1; another item within "
        "1e-6 of its similarity stands before it.",
    ),
)
DIRECTIONS = {"audio_to_video": ("audio", "video"), "video_to_audio": ("video", "audio")}


def cross_modal_scores(
    features: Mapping[str, np.ndarray], network: str, recall_at: Sequence[int]
) -> dict[str, RetrievalScores]:
    """Ranks the other halves of all records, in both directions.

    Args:
        features: of `embed.feature_function` and `encode_all`.
        network: whose embeddings.
        recall_at: the k of R@k.

    Returns:
        By the names of `DIRECTIONS`; nothing if the network or the records lack a modality.
    """
    both = features["has_video"] & features["has_audio"]
    names = {m: f"{network}/{m}_embeddings" for m in ("video", "audio")}
    if not both.any() or any(name not in features for name in names.values()):
        return {}
    ids = features["record_index"][both]
    return {
        direction: retrieval_scores(
            features[names[query]][both],
            features[names[target]][both],
            query_ids=ids,
            gallery_ids=ids,
            recall_at=recall_at,
        )
        for direction, (query, target) in DIRECTIONS.items()
    }


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A pretraining run with its heads, and records to show to it.

    Attributes:
        source: encoders of the run, for their fingerprint.
        heads: digest of the projection and temporal heads.
        config: with which it ran.
        variables: of the joint model.
        spec: rendering, spectrograms made on the host.
        records: of the protocol's data set.
    """

    source: EncoderSource
    heads: str
    config: ml_collections.ConfigDict
    variables: Mapping[str, Any]
    spec: RenderSpec
    records: UsableRecords


def load_for(config: ml_collections.ConfigDict) -> LoadedRun:
    """Loads the run and the records that a protocol's config names.

    Raises:
        ExportError: if `config.encoder` is no run.
        ProtocolError: if records lack a modality of the run.
        SelectionError: if the selection does not fit the data set.
        UserError: if no view fits any record.
    """
    run, variables, step = load_run(config.encoder)
    spec = dataclasses.replace(experiment.render_spec(run), spectrogram_on_device=False)
    dataset = RecordDataset(config.data.directory, config.data.split)
    records = UsableRecords(dataset, spec, Selection.parse(config.data.select))
    source = source_of_run(config.encoder, run, variables, step)
    check_views(records, tuple(source.encoders), leave_out=config.data.leave_out)
    return LoadedRun(source, heads_digest(variables), run, variables, spec, records)


def audio_video_retrieval(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any]:
    """Runs the protocol and writes its results to `workdir`.

    Args:
        config: as `configs/cross_modal.py` returns it.
        workdir: of the results, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ProtocolError: if the run trained one modality, or too few records have both.
        ExportError: if `config.encoder` is no run.
    """
    workdir = absolute_path(workdir)
    section = config.features
    check_pairs(len(section.speeds) * section.views_per_speed)
    stages = Stages()
    run = load_for(config)
    if run.config.modalities != "audio_visual":
        raise ProtocolError(
            f"{config.encoder} was trained on {run.config.modalities} alone: audio-video retrieval "
            "needs a run of both"
        )
    trained = list(run.config.views.speeds)
    if unknown := [speed for speed in section.speeds if speed not in trained]:
        raise ProtocolError(
            f"features.speeds {', '.join(map(str, unknown))} were not trained, these were: "
            f"{', '.join(map(str, trained))}"
        )
    data = {"all": run.records.fingerprint}
    protocol_run = ProtocolRun(PROTOCOL, config, workdir, run.source, data, run.heads)
    if (done := protocol_run.finished()) is not None:
        return done
    check_not_trained_on(
        run.source,
        run.records.records,
        run.records.indices,
        allow=config.data.allow_trained_on,
        what="records",
    )
    speeds = [trained.index(speed) for speed in section.speeds]
    compute = feature_function(
        experiment.audio_visual_model(run.config),
        {"run": run.variables},
        run.spec,
        pixel_mean=run.config.pixels.mean,
        pixel_std=run.config.pixels.std,
    )

    def part(positions: Sequence[int]) -> Mapping[str, np.ndarray]:
        arrays = encode_all(
            lambda number: fixed_views(
                run.records,
                positions[number],
                run.spec,
                speeds=speeds,
                views_per_speed=section.views_per_speed,
                direction=FORWARD,
            ),
            len(positions),
            compute,
            chunk=section.chunk,
            threads=config.data.threads,
        )
        names = ("has_video", "has_audio", "record_index", *_EMBEDDINGS)
        return {name: arrays[name] for name in names}

    with stages("embeddings"):
        key = key_of(run.source.fingerprint, run.heads, data, section.to_dict())
        features = in_parts(
            protocol_run.features / key, len(run.records), part, rows=section.part_records
        )
    if jax.process_index():
        return {}
    with stages("ranking"):
        scores = cross_modal_scores(features, "run", tuple(config.evaluation.recall_at))
    if not scores:
        raise ProtocolError(f"no record of {run.records} has both picture and sound")
    measured = _measured(config, scores, features, run.records)
    return protocol_run.write(measured, stages)


_EMBEDDINGS = ("run/video_embeddings", "run/audio_embeddings")


def rank_outcomes(
    scores: Mapping[str, RetrievalScores], recall_at: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    """Returns outcomes [ranked records] of both directions, and their metrics.

    Args:
        scores: by direction, as `cross_modal_scores` returns them.
        recall_at: the k of R@k.
    """
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for direction, found in scores.items():
        what = direction.replace("_to_", " → ")
        values[f"rank_{direction}"] = found.ranks
        for k in recall_at:
            if k in found.recall:
                values[f"hit{k}_{direction}"] = (found.ranks <= k).astype(np.float64)
                metrics[f"{direction}_r{k}"] = Metric(
                    "mean",
                    (f"hit{k}_{direction}",),
                    f"R@{k}, {what}",
                    chance=found.chance[k],
                    headline=k in (1, 5),
                )
        metrics[f"{direction}_median_rank"] = Metric(
            "median",
            (f"rank_{direction}",),
            f"median rank, {what}",
            unit="number",
            chance=found.chance_median_rank,
        )
    return values, metrics


def _measured(
    config: ml_collections.ConfigDict,
    scores: Mapping[str, RetrievalScores],
    features: Mapping[str, np.ndarray],
    records: UsableRecords,
) -> Measured:
    both = features["has_video"] & features["has_audio"]
    values, metrics = rank_outcomes(scores, config.evaluation.recall_at)
    names, sources = np.array(records.record_ids), np.array(records.sources)
    return Measured(
        Outcomes(names[both].tolist(), sources[both].tolist(), values),
        metrics,
        details={
            "gallery": int(both.sum()),
            "left_out": records.num_selected - int(both.sum()),
            # The embeddings' spread over records: 0 says that all have become the same.
            "embedding_std": {
                name.removeprefix("run/"): float(features[name][both].std(axis=0).mean())
                for name in _EMBEDDINGS
            },
        },
        sections=[],
    )

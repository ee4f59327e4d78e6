"""What the evaluation of a run measured on each test record, and the metrics made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from avcl_jax.data.selected_records import SelectedRecords
from avcl_jax.evaluation.cross_modal import rank_outcomes
from avcl_jax.evaluation.probe import ProbeResult
from avcl_jax.evaluation.protocol import Metric, Outcomes
from avcl_jax.evaluation.retrieval import RetrievalScores
from avcl_jax.evaluation.temporal import TaskScore
from avcl_jax.evaluation.temporal_tasks import task_outcomes

# Of the networks that are probed, in the order in which the share of the gap takes them.
_NETWORKS = ("random", "pretrained", "supervised")


def run_outcomes(
    test: SelectedRecords,
    features: Mapping[str, np.ndarray],
    probes: Mapping[str, Mapping[str, ProbeResult]],
    ranked: Mapping[str, RetrievalScores],
    temporal: Mapping[str, TaskScore],
    *,
    recall_at: Sequence[int],
) -> tuple[Outcomes, dict[str, Metric]]:
    """Returns outcomes by test record, and the metrics of probes, retrieval and temporal tasks.

    Args:
        test: records.
        features: of the test records, as `embed.encode_all` returns them.
        probes: by LABEL_from_MODALITY and network.
        ranked: by direction, as `cross_modal_scores` returns them.
        temporal: by task.
        recall_at: the k of R@k.
    """
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for probe, by_network in probes.items():
        shown = features[f"has_{probe.rsplit('_from_', 1)[1]}"]
        for network, result in by_network.items():
            known = np.zeros(len(test), bool)
            known[shown] = result.known
            values[f"known_{probe}"] = known
            name = f"{probe}_{network}"
            values[f"correct_{name}"] = _of_all(result.correct, known)
            metrics[name] = Metric(
                "mean",
                (f"correct_{name}",),
                f"{probe.replace('_', ' ')}, {network} encoder",
                chance=result.chance,
                chosen=f"known_{probe}",
            )
        if all(network in by_network for network in _NETWORKS):
            metrics[f"{probe}_gap_closed"] = Metric(
                "gap_closed",
                [f"correct_{probe}_{network}" for network in _NETWORKS],
                f"{probe.replace('_', ' ')}, gap closed",
                headline=True,
                chosen=f"known_{probe}",
            )
    if ranked:
        both = features["has_video"] & features["has_audio"]
        values["has_both"] = both
        of_ranked, rank_metrics = rank_outcomes(ranked, recall_at)
        values |= {name: _of_all(array, both) for name, array in of_ranked.items()}
        metrics |= {
            name: dataclasses.replace(metric, chosen="has_both")
            for name, metric in rank_metrics.items()
        }
    of_tasks, task_metrics = task_outcomes(temporal, len(test))
    outcomes = Outcomes(test.record_ids, test.sources, values | of_tasks)
    return outcomes, metrics | task_metrics


def _of_all(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Returns the values of some records among all; the others are 0, and not to be read."""
    whole = np.zeros(len(where), values.dtype)
    whole[where] = values
    return whole

"""Answers of methods to queries, and their metrics."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.evaluation.protocol import Metric, Outcomes
from avcl_jax.evaluation.statistics import STATISTICS, bootstrap
from avcl_jax.fingerprint.benchmark.clips import Query
from avcl_jax.fingerprint.benchmark.families import FAMILIES, STRENGTHS, TRUNCATION
from avcl_jax.fingerprint.benchmark.searchers import OURS, Answer, Searcher

_NAMES = tuple(FAMILIES)
# Metrics of a method {}; `chosen` are its queries, None for all.
METRICS: Mapping[str, Metric] = {
    "r1": Metric("class_mean", ("r1_{}", "family"), "R@1", headline=True, chosen="findable"),
    "r5": Metric("class_mean", ("r5_{}", "family"), "R@5", chosen="findable"),
    "offset": Metric("class_mean", ("offset_{}", "family"), "offset", chosen="findable"),
    "recall_at_threshold": Metric(
        "class_mean", ("found_{}", "family"), "recall at the default threshold", chosen="findable"
    ),
    "false_match_rate": Metric(
        "mean", ("accepted_{}",), "false matches at the default threshold", chosen="distractor"
    ),
    **{
        f"{key}{suffix}": Metric(kind, (scores, "correct_{}", "findable"), what + of)
        for key, kind, what in (
            ("map", "micro_average_precision", "µAP"),
            ("recall_at_p90", "recall_at_precision_90", "recall at 90 % precision"),
        )
        for suffix, scores, of in (
            ("", "scores_{}", ""),
            ("_normalised", "normalised_{}", " of normalised scores"),
        )
    },
}
WITH_INTERVALS = ("r1", "recall_at_threshold", "false_match_rate")


def ask(
    queries: Iterable[Query],
    searchers: Sequence[Searcher],
    *,
    answers: int,
    tolerance_seconds: float,
    each: Callable[[Query, Mapping[str, Sequence[Answer]]], None] = lambda *_: None,
) -> Outcomes:
    """Asks every searcher every query; `each` is called with the query and answers by method.

    Args:
        answers: number of answers that count; searchers give one more, to reveal a tie.
        tolerance_seconds: largest error of an offset.

    Returns:
        Per query `family` and `strength` (places in `FAMILIES` and `STRENGTHS`), `findable`,
        `distractor`, each also at `medium` strength without truncation, and per method M

        - `scores_M` float [n, answers], best first, -inf for a missing answer; `normalised_M`, the
          same minus the background;
        - `correct_M` bool [n, answers], whether the answer names the query's source;
        - `r1_M`, `r5_M` 1 where fewer than 1 or 5 other answers score as high as the right one;
        - `offset_M` 1 where the best answer names the source and the right time;
        - `accepted_M` 1 where the best answer is accepted as a match, `found_M` 1 where it is also
          right; only of methods that accept or reject.
    """
    units, videos = [], []
    columns: dict[str, list[Any]] = defaultdict(list)
    for query in queries:
        units.append(query.unit)
        videos.append(query.clip.video)
        columns["family"].append(_NAMES.index(query.family))
        columns["strength"].append(STRENGTHS.index(query.strength))
        columns["findable"].append(query.findable)
        source = query.clip.name if query.findable else None
        ranked: dict[str, Sequence[Answer]] = {}
        for searcher in searchers:
            for method, ranking in searcher.query(query.transformed.media).items():
                # Of equal scores the right one last, so that a tie at the cut costs it its place.
                ranked[method] = sorted(
                    ranking.answers, key=lambda a: (-a.score, a.source == source)
                )
                counted = ranked[method][:answers]
                missing = answers - len(counted)
                scores = np.array([a.score for a in counted] + [-np.inf] * missing)
                correct = np.array([a.source == source for a in counted] + [False] * missing)
                first = counted[0] if counted else Answer("", -np.inf, 0.0)
                timely = query.transformed.has_offset(first.offset_seconds, tolerance_seconds)
                columns[f"scores_{method}"].append(scores)
                columns[f"normalised_{method}"].append(scores - ranking.background)
                columns[f"correct_{method}"].append(correct)
                columns[f"offset_{method}"].append(float(correct[0] and timely))
                columns[f"accepted_{method}"].append(
                    np.nan if first.accepted is None else float(first.accepted)
                )
        each(query, ranked)
    values = {name: np.array(column) for name, column in columns.items()}
    for method in _methods(values):
        ranks = ranks_of(values[f"scores_{method}"], values[f"correct_{method}"])
        values |= {f"r{k}_{method}": (ranks <= k).astype(float) for k in (1, 5)}
        accepted = values.pop(f"accepted_{method}")
        if not np.isnan(accepted).all():  # the method has a threshold
            values[f"accepted_{method}"] = accepted = np.nan_to_num(accepted)
            values[f"found_{method}"] = accepted * values[f"r1_{method}"]
    values["distractor"] = ~values["findable"]
    values["medium"] = medium = selected(values, "medium")
    values |= {f"medium_{name}": medium & values[name] for name in ("findable", "distractor")}
    return Outcomes(units, videos, values)


def ranks_of(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Returns float [n], the rank of the right answer, inf without one; last among equal scores."""
    own = np.where(correct, scores, np.inf).min(axis=1)
    return np.where(correct.any(axis=1), (scores >= own[:, None]).sum(axis=1), np.inf)


def selected(
    values: Mapping[str, np.ndarray], strength: str, family: str | None = None
) -> np.ndarray:
    """Returns bool [n]: queries of a strength, and of a family or of all but truncation."""
    at_strength = values["strength"] == STRENGTHS.index(strength)
    if family is None:
        return at_strength & (values["family"] != _NAMES.index(TRUNCATION))
    return at_strength & (values["family"] == _NAMES.index(family))


def _methods(values: Mapping[str, np.ndarray]) -> list[str]:
    return [name.removeprefix("scores_") for name in values if name.startswith("scores_")]


def metrics_of(values: Mapping[str, np.ndarray], method: str) -> dict[str, Metric]:
    """Returns the metrics for which a method has outcomes."""
    defined = {
        key: dataclasses.replace(metric, inputs=[name.format(method) for name in metric.inputs])
        for key, metric in METRICS.items()
    }
    return {key: metric for key, metric in defined.items() if values.keys() >= set(metric.inputs)}


def metrics(outcomes: Outcomes) -> dict[str, Metric]:
    """Returns the metrics of all methods at medium strength."""
    return {
        f"{method}_{key}": dataclasses.replace(
            metric,
            what=f"{metric.what} {method}, {'ours' if method in OURS else 'baseline'}",
            chosen=f"medium_{metric.chosen}" if metric.chosen else "medium",
        )
        for method in _methods(outcomes.values)
        for key, metric in metrics_of(outcomes.values, method).items()
    }


# Metrics by method, strength and family; family "all" is the mean over families.
Tables = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]


def make_tables(outcomes: Outcomes, *, resamples: int, seed: int) -> Tables:
    """Returns the metrics, some with intervals from `resamples` draws of videos."""
    values, videos = outcomes.values, np.array(outcomes.sources)

    def cell(method: str, mask: np.ndarray, family: str | None) -> dict[str, Any]:
        findable = mask & values["findable"]
        results: dict[str, Any] = {
            "queries": int(findable.sum()),
            "distractors": int((mask & values["distractor"]).sum()),
            "videos": len(set(videos[findable].tolist())),
        }
        for key, metric in metrics_of(values, method).items():
            rows = mask & values[metric.chosen] if metric.chosen else mask
            kind, inputs = metric.kind, [values[name][rows] for name in metric.inputs]
            if family and kind == "class_mean":  # the same of one family, and faster
                kind, inputs = "mean", inputs[:1]
            if key in WITH_INTERVALS:
                estimate = bootstrap(kind, inputs, videos[rows], resamples=resamples, seed=seed)
                results |= zip((key, f"{key}_low", f"{key}_high"), estimate, strict=True)
            else:
                results[key] = STATISTICS[kind](*inputs)
        return results

    return {
        method: {
            strength: {
                name: cell(method, mask, family)
                for name, family in [("all", None), *((f, f) for f in FAMILIES)]
                if (values["findable"] & (mask := selected(values, strength, family))).any()
            }
            for strength in STRENGTHS
        }
        for method in _methods(values)
    }


def error_ratio(tables: Tables) -> float | None:
    """Returns the fused error over that of the better single modality; None if that is 0.

    Errors are 1 - R@1, means over families at medium strength; one modality for all families.
    """
    errors = {m: 1 - tables[m]["medium"]["all"]["r1"] for m in OURS}
    best = min(errors["video"], errors["audio"])
    return errors["fused"] / best if best else None

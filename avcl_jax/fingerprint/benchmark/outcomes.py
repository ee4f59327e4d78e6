"""What methods answered to queries, and the figures that come out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.evaluation.statistics import STATISTICS, Interval, bootstrap
from avcl_jax.fingerprint.benchmark.clips import Query
from avcl_jax.fingerprint.benchmark.families import FAMILIES, STRENGTHS, TRUNCATION
from avcl_jax.fingerprint.benchmark.searchers import Answer, Searcher

# The mean over families: truncated queries are a row of their own.
IN_MEAN = tuple(name for name in FAMILIES if name != TRUNCATION)


@dataclasses.dataclass(frozen=True)
class Asked:
    """All queries, and what one method answered to each.

    Attributes:
        units: names of the queries.
        videos: [n] what each query's clip was cut from.
        family: int [n], place in `FAMILIES`.
        strength: int [n], place in `STRENGTHS`.
        findable: bool [n].
        answers: method to its `Answered`.
    """

    units: Sequence[str]
    videos: np.ndarray
    family: np.ndarray
    strength: np.ndarray
    findable: np.ndarray
    answers: Mapping[str, Answered]

    def chosen(self, *, family: str | None = None, strength: str) -> np.ndarray:
        """Returns bool [n]: queries of a strength, and of a family or of all in the mean."""
        at_strength = self.strength == STRENGTHS.index(strength)
        names = list(FAMILIES)
        wanted = IN_MEAN if family is None else (family,)
        return at_strength & np.isin(self.family, [names.index(name) for name in wanted])


@dataclasses.dataclass(frozen=True)
class Answered:
    """What one method answered.

    Attributes:
        scores: float64 [n, answers], best first; -inf where there is no answer.
        correct: bool [n, answers], whether it names the query's source; the last of its score.
        background: float64 [n].
        offset: bool [n], whether the best answer names the source and the right time.
        accepted: bool [n], whether the best answer is accepted as a match.
        has_threshold: whether the method accepts or rejects at all.
    """

    scores: np.ndarray
    correct: np.ndarray
    background: np.ndarray
    offset: np.ndarray
    accepted: np.ndarray
    has_threshold: bool

    @property
    def normalised(self) -> np.ndarray:
        """Scores minus the background."""
        return self.scores - self.background[:, None]

    def hits(self, k: int) -> np.ndarray:
        """Returns float64 [n], 1 where fewer than k other answers score as high as the right one.

        The order in which a method lists answers of one score is worth nothing.
        """
        own = np.where(self.correct, self.scores, np.inf).min(axis=1)
        rank = (self.scores >= own[:, None]).sum(axis=1)
        return (self.correct.any(axis=1) & (rank <= k)).astype(np.float64)


def ask(
    queries: Iterable[Query],
    searchers: Sequence[Searcher],
    *,
    answers: int,
    tolerance_seconds: float,
    each: Callable[[Query, Mapping[str, Sequence[Answer]]], None] = lambda *_: None,
) -> Asked:
    """Asks every searcher every query.

    Args:
        queries: made one at a time.
        searchers: with their references.
        answers: how many of each ranking count; searchers give one more, to show a tie.
        tolerance_seconds: of offsets.
        each: is shown each query with its answers by method.
    """
    units, videos, family, strength, findable = [], [], [], [], []
    rows: dict[str, list[tuple[Any, ...]]] = {m: [] for s in searchers for m in s.methods}
    names = list(FAMILIES)
    for query in queries:
        units.append(query.unit)
        videos.append(query.clip.video)
        family.append(names.index(query.family))
        strength.append(STRENGTHS.index(query.strength))
        findable.append(query.findable)
        shown: dict[str, Sequence[Answer]] = {}
        for searcher in searchers:
            for method, ranking in searcher.query(query.transformed.media).items():
                # Of equal scores the right one last, so that a tie at the cut costs it its place.
                kept = sorted(ranking.answers, key=lambda a: (-a.score, _is_right(query, a)))
                shown[method] = kept
                rows[method].append(
                    _row(query, kept[:answers], ranking.background, answers, tolerance_seconds)
                )
        each(query, shown)
    return Asked(
        units,
        np.array(videos),
        np.array(family),
        np.array(strength),
        np.array(findable),
        {method: _answered(found) for method, found in rows.items()},
    )


def _row(
    query: Query,
    answers: Sequence[Answer],
    background: float,
    count: int,
    tolerance_seconds: float,
) -> tuple[Any, ...]:
    scores = np.full(count, -np.inf)
    correct = np.zeros(count, bool)
    for place, answer in enumerate(answers):
        scores[place] = answer.score
        correct[place] = _is_right(query, answer)
    offset = bool(correct[0]) and query.is_offset(answers[0].offset_seconds, tolerance_seconds)
    accepted = answers[0].accepted if answers else None
    return scores, correct, background, offset, bool(accepted), accepted is not None


def _is_right(query: Query, answer: Answer) -> bool:
    return query.findable and answer.source == query.clip.name


def _answered(rows: Sequence[tuple[Any, ...]]) -> Answered:
    scores, correct, background, offset, accepted, judged = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    return Answered(scores, correct, background, offset, accepted, bool(judged.any()))


def table_of(
    asked: Asked, method: str, *, resamples: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns strength to family to figures of one method; family "all" is the mean over families.

    Args:
        asked: the queries.
        method: which.
        resamples: of the bootstrap over videos, for the interval of R@1.
        seed: of the draws.
    """
    return {
        strength: {
            name: _cell(asked, method, strength, family, resamples, seed)
            for name, family in [("all", None), *((f, f) for f in FAMILIES)]
            if (asked.chosen(family=family, strength=strength) & asked.findable).any()
        }
        for strength in STRENGTHS
    }


def _cell(
    asked: Asked, method: str, strength: str, family: str | None, resamples: int, seed: int
) -> dict[str, Any]:
    chosen = asked.chosen(family=family, strength=strength)
    findable = chosen & asked.findable
    answered = asked.answers[method]
    videos, classes = asked.videos[findable], asked.family[findable]
    hits = answered.hits(1)[findable]
    kind, inputs = ("mean", [hits]) if family else ("class_mean", [hits, classes])
    whole = bootstrap(kind, inputs, videos, resamples=resamples, seed=seed)

    def of_ranking(kind: str, scores: np.ndarray) -> float:
        return STATISTICS[kind](scores[chosen], answered.correct[chosen], asked.findable[chosen])

    cell: dict[str, Any] = {
        "queries": int(findable.sum()),
        "distractors": int((chosen & ~asked.findable).sum()),
        "videos": len(set(videos.tolist())),
        **_with_bounds("r1", whole),
        "r5": mean_over(answered.hits(5)[findable], classes),
        "offset": mean_over(answered.offset[findable].astype(float), classes),
        "map": of_ranking("micro_average_precision", answered.scores),
        "recall_at_p90": of_ranking("recall_at_precision_90", answered.scores),
        "map_normalised": of_ranking("micro_average_precision", answered.normalised),
        "recall_at_p90_normalised": of_ranking("recall_at_precision_90", answered.normalised),
    }
    if answered.has_threshold:
        foreign = chosen & ~asked.findable
        found = [hits * answered.accepted[findable], *inputs[1:]]
        accepted = [answered.accepted[foreign].astype(float)]
        recall = bootstrap(kind, found, videos, resamples=resamples, seed=seed)
        wrong = bootstrap("mean", accepted, asked.videos[foreign], resamples=resamples, seed=seed)
        cell |= _with_bounds("recall_at_threshold", recall)
        cell |= _with_bounds("false_match_rate", wrong)
    return cell


def _with_bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def mean_over(values: np.ndarray, families: np.ndarray) -> float:
    """Returns the mean over families of the mean over their queries."""
    return float(np.mean([values[families == family].mean() for family in np.unique(families)]))


def error_ratio(asked: Asked, *, strength: str = "medium") -> float | None:
    """Returns the fused error over that of the better fixed single modality; None without error.

    Errors are 1 - R@1, means over families; the better modality is chosen once for all families.
    """
    chosen = asked.chosen(strength=strength) & asked.findable
    errors = {
        method: 1 - mean_over(asked.answers[method].hits(1)[chosen], asked.family[chosen])
        for method in ("fused", "video", "audio")
    }
    best = min(errors["video"], errors["audio"])
    return errors["fused"] / best if best else None

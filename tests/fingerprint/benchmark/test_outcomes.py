"""The fingerprinting protocol with searchers whose figures are known."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from avcl_jax.data.media import DecodedMedia
from avcl_jax.evaluation.protocol import inputs_of
from avcl_jax.evaluation.statistics import STATISTICS
from avcl_jax.fingerprint.benchmark.clips import ClipSets, SourceClip, make_queries
from avcl_jax.fingerprint.benchmark.families import FAMILIES
from avcl_jax.fingerprint.benchmark.outcomes import ask, error_ratio, make_tables, metrics, ranks_of
from avcl_jax.fingerprint.benchmark.searchers import (
    Answer,
    Ranking,
    background_score,
    load_baselines,
)
from tests.fingerprint.benchmark.clips import clip

FAMILY_NAMES = ("flip", "pitch", "trim", "audio_removed", "truncation")
COUNTS = {"weak": 1, "medium": 3, "strong": 1}


_clip = functools.cache(clip)


def clips_of(first: int, count: int, **lacking: bool) -> list[SourceClip]:
    return [
        SourceClip(f"clip{n}", f"video{n}", functools.partial(_clip, n, **lacking))
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def sets() -> ClipSets:
    return ClipSets(
        references=clips_of(0, 4),
        fillers=[],
        distractors=clips_of(10, 2),
        others=clips_of(20, 1),
        background=clips_of(30, 1),
    )


class Knowing:
    """Answers by what the protocol tells nobody: told the truth of each query in advance."""

    def __init__(self, methods: Sequence[str], answer):
        self.methods = methods
        self._answer = answer
        self.queries: list[DecodedMedia] = []

    def index(self, references, background) -> None:
        self.names = [name for name, _ in references]

    def query(self, media: DecodedMedia) -> Mapping[str, Ranking]:
        self.queries.append(media)
        return {method: self._answer(method, len(self.queries) - 1) for method in self.methods}


def asked_with(sets: ClipSets, answer, methods=("fused", "video", "audio")):
    queries = list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))
    searcher = Knowing(methods, lambda method, n: answer(method, queries[n]))
    searcher.index(((c.name, c.load()) for c in sets.references), ())
    asked = ask(queries, [searcher], answers=3, tolerance_seconds=0.5)
    return queries, asked


def truth(query, score: float = 1.0) -> Answer:
    pieces = query.transformed.video_pieces or query.transformed.audio_pieces
    offset = pieces[0].source_seconds - pieces[0].begin_seconds
    return Answer(query.clip.name, score, offset, accepted=score > 0.5)


def medium(asked):
    return make_tables(asked, resamples=20, seed=0)["fused"]["medium"]


def perfect(method: str, query) -> Ranking:
    if not query.findable:
        return Ranking([Answer("clip0", 0.1, 0.0, accepted=False)], 0.0)
    return Ranking([truth(query), Answer("other", 0.2, 0.0, accepted=False)], 0.0)


def test_queries_and_distractors_are_as_many_and_never_the_same_clip(sets: ClipSets) -> None:
    queries, asked = asked_with(sets, perfect)
    assert len(set(asked.units)) == len(queries)
    for family in FAMILY_NAMES:
        for strength, count in COUNTS.items():
            chosen = [q for q in queries if (q.family, q.strength) == (family, strength)]
            expected = count if FAMILIES[family].settings or strength == "medium" else 0
            assert sum(q.findable for q in chosen) == expected
            assert sum(not q.findable for q in chosen) == expected
    names = {clip.name for clip in sets.references}
    assert all((q.clip.name in names) == q.findable for q in queries)
    # Families ask for clips of their own.
    assert len({q.clip.name for q in queries if q.findable}) == len(names)
    again = list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))
    assert [q.unit for q in again] == [q.unit for q in queries]


def test_donors_are_decoded_for_families_that_need_them_alone(sets: ClipSets) -> None:
    loaded = []

    def load() -> DecodedMedia:
        loaded.append(1)
        return _clip(20)

    sets = dataclasses.replace(sets, others=[SourceClip("donor", "donor", load)])
    assert len(list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))) > 20
    assert not loaded
    queries = list(make_queries(sets, {"medium": 2}, ("audio_swapped",), seed=0))
    assert len(loaded) == 2  # one for each reference and its distractor
    assert len(queries) == 4


def test_clips_that_lack_what_a_family_changes_are_not_asked_for() -> None:
    sets = ClipSets(
        references=[*clips_of(0, 2), *clips_of(2, 2, audio=False)],
        fillers=[],
        distractors=[*clips_of(10, 1, video=False), *clips_of(11, 1)],
        others=clips_of(20, 1),
        background=clips_of(30, 1),
    )
    queries = list(make_queries(sets, {"medium": 4}, ("pitch", "flip"), seed=0))
    asked = {(q.family, q.clip.name) for q in queries}
    assert {name for family, name in asked if family == "pitch"} == {
        *("clip0", "clip1"),
        *("clip10", "clip11"),
    }
    assert {name for family, name in asked if family == "flip"} == {
        *("clip0", "clip1", "clip2", "clip3"),
        "clip11",
    }
    blind = dataclasses.replace(sets, distractors=clips_of(10, 1, video=False))
    with pytest.raises(ValueError, match="no distractor has what flip changes"):
        list(make_queries(blind, {"medium": 1}, ("flip",), seed=0))


def test_roles_that_share_a_video_or_are_empty_are_refused(sets: ClipSets) -> None:
    with pytest.raises(ValueError, match="video3 is among the references and the distractors"):
        dataclasses.replace(sets, distractors=clips_of(3, 1))
    with pytest.raises(ValueError, match="no clips for the background"):
        dataclasses.replace(sets, background=[])


def test_who_knows_everything_has_full_marks(sets: ClipSets) -> None:
    _, asked = asked_with(sets, perfect)
    figures = medium(asked)["all"]
    for name in ("r1", "r5", "offset", "map", "recall_at_p90", "recall_at_threshold"):
        assert figures[name] == 1.0, name
    assert figures["false_match_rate"] == 0.0
    assert figures["queries"] == figures["distractors"] == 3 * 4  # truncation is apart
    assert error_ratio(make_tables(asked, resamples=1, seed=0)) is None


def test_one_score_for_everything_is_worth_nothing(sets: ClipSets) -> None:
    def undecided(method: str, query) -> Ranking:
        return Ranking([truth(query, 0.7), Answer("other", 0.7, 0.0)], 0.0)

    _, asked = asked_with(sets, undecided)
    figures = medium(asked)["all"]
    assert figures["r1"] == 0.0
    assert figures["r5"] == 1.0
    assert figures["recall_at_p90"] == 0.0
    # All the wrong answers come first: of 24 queries two answers each, the 12 right ones last.
    assert figures["map"] == pytest.approx(np.mean([k / (36 + k) for k in range(1, 13)]))


def test_names_that_are_not_the_source_are_wrong_and_distractors_have_none(sets: ClipSets) -> None:
    def mistaken(method: str, query) -> Ranking:
        wrong = "clip0" if query.clip.name != "clip0" else "clip1"
        return Ranking([Answer(wrong, 0.9, 0.0, accepted=True)], 0.0)

    _, asked = asked_with(sets, mistaken)
    figures = medium(asked)["all"]
    assert (figures["r1"], figures["map"], figures["recall_at_threshold"]) == (0, 0, 0)
    assert figures["false_match_rate"] == 1.0


def test_shuffled_truth_is_chance(sets: ClipSets) -> None:
    rng = np.random.default_rng(0)
    names = [c.name for c in sets.references]

    def guess(method: str, query) -> Ranking:
        order = rng.permutation(names)[:3]
        return Ranking([Answer(name, 3.0 - n, 0.0) for n, name in enumerate(order)], 0.0)

    queries = [
        q
        for seed in range(25)
        for q in make_queries(sets, {"medium": 4}, ("audio_removed",), seed=seed)
    ]
    searcher = Knowing(("fused",), lambda method, n: guess(method, queries[n]))
    asked = ask(queries, [searcher], answers=3, tolerance_seconds=0.5)
    found = asked.values["r1_fused"][asked.values["findable"]]
    assert np.mean(found) == pytest.approx(1 / 4, abs=0.13)


def test_the_right_clip_at_the_wrong_time_is_a_hit_without_offset(sets: ClipSets) -> None:
    def late(method: str, query) -> Ranking:
        answer = truth(query)
        return Ranking([Answer(answer.source, 1.0, answer.offset_seconds + 3.0)], 0.0)

    _, asked = asked_with(sets, late)
    figures = medium(asked)["trim"]
    assert (figures["r1"], figures["offset"]) == (1.0, 0.0)


def test_normalised_scores_forgive_queries_that_resemble_everything(sets: ClipSets) -> None:
    def biased(method: str, query) -> Ranking:
        level = 0.0 if query.findable else 5.0  # a distractor is like everything, and so the cohort
        answer = truth(query, 1.0 + level) if query.findable else Answer("clip0", 0.5 + level, 0.0)
        return Ranking([answer], level)

    _, asked = asked_with(sets, biased)
    figures = medium(asked)["all"]
    assert figures["recall_at_p90"] == 0.0
    assert figures["recall_at_p90_normalised"] == figures["map_normalised"] == 1.0
    assert figures["map"] < 0.5
    for name, metric in metrics(asked).items():
        if name in ("fused_map", "fused_map_normalised"):
            value = STATISTICS[metric.kind](*inputs_of(metric, asked)[0])
            assert value == figures[name.removeprefix("fused_")]


def test_the_error_is_compared_with_one_modality_for_all_families(sets: ClipSets) -> None:
    def modal(method: str, query) -> Ranking:
        changed = FAMILIES[query.family].changes
        lost = method in changed or (method == "fused" and query.family == "trim")
        return Ranking([] if lost or not query.findable else [truth(query)], 0.0)

    _, asked = asked_with(sets, modal)
    # Video misses flip and trim, audio pitch, trim and the removed sound; fused trim alone.
    assert error_ratio(make_tables(asked, resamples=1, seed=0)) == pytest.approx((1 / 4) / (2 / 4))


def test_average_precision_over_rankings_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 3))
    correct = np.zeros((40, 3), bool)
    correct[np.arange(30), rng.integers(0, 3, 30)] = True
    findable = np.arange(40) < 30
    value = STATISTICS["micro_average_precision"](scores, correct, findable)
    assert value == pytest.approx(average_precision_score(correct.reshape(-1), scores.reshape(-1)))
    scores[:5] = -np.inf  # unanswered: the recall that is lost
    correct[:5] = False
    kept = scores[5:].reshape(-1), correct[5:].reshape(-1)
    value = STATISTICS["micro_average_precision"](scores, correct, findable)
    assert value == pytest.approx(average_precision_score(kept[1], kept[0]) * 25 / 30)


@pytest.mark.parametrize(
    ("scores", "correct", "rank"),
    [
        ([3.0, 2.0, 1.0], [True, False, False], 1),
        ([3.0, 3.0, 1.0], [True, False, False], 2),
        ([3.0, 3.0, 3.0], [False, True, False], 3),
        ([3.0, 2.0, -np.inf], [False, True, False], 2),
        ([3.0, 2.0, 1.0], [False, False, False], None),
        ([-np.inf, -np.inf, -np.inf], [False, False, False], None),
    ],
)
def test_ranks_in_the_worst_order_of_ties(scores, correct, rank) -> None:
    assert ranks_of(np.array([scores]), np.array([correct])) == (rank or np.inf)


@pytest.mark.parametrize(("rivals", "hit"), [(4, 1.0), (5, 0.0)])
def test_a_tie_at_the_cut_counts_as_if_the_wrong_ones_came_first(
    sets: ClipSets, rivals: int, hit: float
) -> None:
    def tied(method: str, query) -> Ranking:
        wrong = [Answer(f"other{n}", 1.0, 0.0) for n in range(rivals)]
        return Ranking([truth(query), *wrong], 0.0)

    queries = list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))
    searcher = Knowing(("fused", "video", "audio"), lambda method, n: tied(method, queries[n]))
    searcher.index(((c.name, c.load()) for c in sets.references), ())
    asked = ask(queries, [searcher], answers=5, tolerance_seconds=0.5)
    figures = medium(asked)["all"]
    assert figures["r5"] == hit
    assert (figures["r1"], figures["offset"]) == (0.0, 0.0)
    # What is cut off is not in the list that µAP is of.
    assert (figures["map"] > 0) == bool(hit)
    kept = asked.values
    assert kept["scores_fused"].shape == kept["correct_fused"].shape == (len(queries), 5)
    assert (kept["r5_fused"][kept["findable"]] == hit).all()


def test_every_metric_has_its_outcomes(sets: ClipSets) -> None:
    _, asked = asked_with(sets, perfect)
    for name, metric in metrics(asked).items():
        value = STATISTICS[metric.kind](*inputs_of(metric, asked)[0])
        assert value == (0.0 if "false_match" in name else 1.0), name


def test_a_missing_answer_lowers_the_background() -> None:
    answers = [Answer(str(n), score, 0.0) for n, score in enumerate((6.0, 3.0))]
    assert background_score(answers) == pytest.approx(3.0)
    assert background_score([]) == 0.0


def test_a_baseline_whose_package_is_absent_is_left_out_with_a_reason(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    found, skipped = load_baselines(["image_hash"], answers=5)
    assert found == []
    assert "imagehash" in skipped["image_hash"]

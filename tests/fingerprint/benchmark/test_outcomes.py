"""The fingerprinting protocol with searchers whose figures are known."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

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
def sets():
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
        self._number = -1

    def query(self, media: DecodedMedia) -> Mapping[str, Ranking]:
        self._number += 1
        return {method: self._answer(method, self._number) for method in self.methods}


def asked_with(sets: ClipSets, answer, *, answers=3):
    queries = list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))
    searcher = Knowing(("fused", "video", "audio"), lambda method, n: answer(method, queries[n]))
    return queries, ask(queries, [searcher], answers=answers, tolerance_seconds=0.5)


def truth(query, score: float = 1.0, late: float = 0.0) -> Answer:
    pieces = query.transformed.video_pieces or query.transformed.audio_pieces
    offset = pieces[0].source_seconds - pieces[0].begin_seconds
    return Answer(query.clip.name, score, offset + late, accepted=score > 0.5)


def medium(asked, family="all"):
    return make_tables(asked, resamples=20, seed=0)["fused"]["medium"][family]


def perfect(method: str, query) -> Ranking:
    if not query.findable:
        return Ranking([Answer("clip0", 0.1, 0.0, accepted=False)], 0.0)
    return Ranking([truth(query), Answer("other", 0.2, 0.0, accepted=False)], 0.0)


def test_queries_and_distractors_are_as_many_and_never_the_same_clip(sets):
    queries, asked = asked_with(sets, perfect)
    assert len(set(asked.units)) == len(queries)
    counted = collections.Counter((q.family, q.strength, q.findable) for q in queries)
    assert counted == {
        (family, strength, findable): count
        for family in FAMILY_NAMES
        for strength, count in COUNTS.items()
        for findable in (True, False)
        if FAMILIES[family].settings or strength == "medium"
    }
    names = {clip.name for clip in sets.references}
    assert all((q.clip.name in names) == q.findable for q in queries)
    # Families ask for clips of their own.
    assert len({q.clip.name for q in queries if q.findable}) == len(names)
    again = list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))
    assert [q.unit for q in again] == [q.unit for q in queries]


def test_donors_are_decoded_for_families_that_need_them_alone(sets):
    loaded = []
    donor = SourceClip("donor", "donor", lambda: loaded.append(1) or _clip(20))
    sets = dataclasses.replace(sets, others=[donor])
    assert len(list(make_queries(sets, COUNTS, FAMILY_NAMES, seed=0))) > 20
    assert not loaded
    assert len(list(make_queries(sets, {"medium": 2}, ("audio_swapped",), seed=0))) == 4
    assert len(loaded) == 2  # one for each reference and its distractor


def test_clips_that_lack_what_a_family_changes_are_not_asked_for():
    sets = ClipSets(
        references=[*clips_of(0, 2), *clips_of(2, 2, audio=False)],
        fillers=[],
        distractors=[*clips_of(10, 1, video=False), *clips_of(11, 1)],
        others=clips_of(20, 1),
        background=clips_of(30, 1),
    )
    queries = list(make_queries(sets, {"medium": 4}, ("pitch", "flip"), seed=0))
    by_family = {
        family: {q.clip.name for q in queries if q.family == family} for family in ("pitch", "flip")
    }
    assert by_family == {
        "pitch": {"clip0", "clip1", "clip10", "clip11"},
        "flip": {"clip0", "clip1", "clip2", "clip3", "clip11"},
    }
    blind = dataclasses.replace(sets, distractors=clips_of(10, 1, video=False))
    with pytest.raises(ValueError, match="no distractor has what flip changes"):
        list(make_queries(blind, {"medium": 1}, ("flip",), seed=0))


def test_roles_that_share_a_video_or_are_empty_are_refused(sets):
    with pytest.raises(ValueError, match="video3 is among the references and the distractors"):
        dataclasses.replace(sets, distractors=clips_of(3, 1))
    with pytest.raises(ValueError, match="no clips for the background"):
        dataclasses.replace(sets, background=[])


def test_who_knows_everything_has_full_marks(sets):
    _, asked = asked_with(sets, perfect)
    figures = medium(asked)
    for name in ("r1", "r5", "offset", "map", "recall_at_p90", "recall_at_threshold"):
        assert figures[name] == 1.0, name
    assert figures["false_match_rate"] == 0.0
    assert figures["queries"] == figures["distractors"] == 3 * 4  # truncation is apart
    assert error_ratio(make_tables(asked, resamples=1, seed=0)) is None
    for name, metric in metrics(asked).items():
        value = STATISTICS[metric.kind](*inputs_of(metric, asked)[0])
        assert value == (0.0 if "false_match" in name else 1.0), name


def test_one_score_for_everything_is_worth_nothing(sets):
    def undecided(method: str, query) -> Ranking:
        return Ranking([truth(query, 0.7), Answer("other", 0.7, 0.0)], 0.0)

    figures = medium(asked_with(sets, undecided)[1])
    assert (figures["r1"], figures["r5"], figures["recall_at_p90"]) == (0.0, 1.0, 0.0)
    # All the wrong answers come first: of 24 queries two answers each, the 12 right ones last.
    assert figures["map"] == pytest.approx(np.mean([k / (36 + k) for k in range(1, 13)]))


def test_another_source_is_wrong_and_the_right_one_at_the_wrong_time_has_no_offset(sets):
    def mistaken(method: str, query) -> Ranking:
        wrong = "clip0" if query.clip.name != "clip0" else "clip1"
        return Ranking([Answer(wrong, 0.9, 0.0, accepted=True)], 0.0)

    figures = medium(asked_with(sets, mistaken)[1])
    assert (figures["r1"], figures["map"], figures["recall_at_threshold"]) == (0, 0, 0)
    assert figures["false_match_rate"] == 1.0
    _, asked = asked_with(sets, lambda _, query: Ranking([truth(query, late=3.0)], 0.0))
    figures = medium(asked, "trim")
    assert (figures["r1"], figures["offset"]) == (1.0, 0.0)


def test_normalised_scores_forgive_queries_that_resemble_everything(sets):
    def biased(method: str, query) -> Ranking:
        level = 0.0 if query.findable else 5.0  # a distractor is like everything, and so the cohort
        answer = truth(query, 1.0 + level) if query.findable else Answer("clip0", 0.5 + level, 0.0)
        return Ranking([answer], level)

    _, asked = asked_with(sets, biased)
    figures = medium(asked)
    assert figures["recall_at_p90"] == 0.0
    assert figures["recall_at_p90_normalised"] == figures["map_normalised"] == 1.0
    assert figures["map"] < 0.5
    for name, metric in metrics(asked).items():
        if name in ("fused_map", "fused_map_normalised"):
            value = STATISTICS[metric.kind](*inputs_of(metric, asked)[0])
            assert value == figures[name.removeprefix("fused_")]


def test_the_error_is_compared_with_one_modality_for_all_families(sets):
    def modal(method: str, query) -> Ranking:
        changed = FAMILIES[query.family].changes
        lost = method in changed or (method == "fused" and query.family == "trim")
        return Ranking([] if lost or not query.findable else [truth(query)], 0.0)

    _, asked = asked_with(sets, modal)
    # Video misses flip and trim, audio pitch, trim and the removed sound; fused trim alone.
    assert error_ratio(make_tables(asked, resamples=1, seed=0)) == pytest.approx((1 / 4) / (2 / 4))


def test_ranks_in_the_worst_order_of_ties():
    nothing = [-np.inf] * 3
    scores = np.array([[3, 2, 1], [3, 3, 1], [3, 3, 3], [3, 2, -np.inf], [3, 2, 1], nothing])
    correct = np.zeros((6, 3), bool)
    correct[np.arange(4), [0, 0, 1, 1]] = True
    assert ranks_of(scores, correct).tolist() == [1, 2, 3, 2, np.inf, np.inf]


@pytest.mark.parametrize(("rivals", "hit"), [(4, 1.0), (5, 0.0)])
def test_a_tie_at_the_cut_counts_as_if_the_wrong_ones_came_first(sets, rivals, hit):
    def tied(method: str, query) -> Ranking:
        wrong = [Answer(f"other{n}", 1.0, 0.0) for n in range(rivals)]
        return Ranking([truth(query), *wrong], 0.0)

    queries, asked = asked_with(sets, tied, answers=5)
    figures = medium(asked)
    assert (figures["r5"], figures["r1"], figures["offset"]) == (hit, 0.0, 0.0)
    # What is cut off is not in the list that µAP is of.
    assert (figures["map"] > 0) == bool(hit)
    kept = asked.values
    assert kept["scores_fused"].shape == kept["correct_fused"].shape == (len(queries), 5)
    assert (kept["r5_fused"][kept["findable"]] == hit).all()


def test_a_missing_answer_lowers_the_background_and_an_absent_baseline_is_named(monkeypatch):
    answers = [Answer(str(n), score, 0.0) for n, score in enumerate((6.0, 3.0))]
    assert background_score(answers) == pytest.approx(3.0)
    assert background_score([]) == 0.0
    monkeypatch.setitem(sys.modules, "imagehash", None)
    found, skipped = load_baselines(["image_hash"], answers=5)
    assert found == []
    assert "imagehash" in skipped["image_hash"]

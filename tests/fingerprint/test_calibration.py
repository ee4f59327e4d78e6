"""Scores are chances of a Gumbel distribution, which doubles in the library hardly move."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats

from avcl_jax.fingerprint import calibration, scores
from avcl_jax.fingerprint.calibration import DEFAULT, THRESHOLD, Calibration
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.matching import Alignment
from tests.fingerprint.conftest import SETTINGS
from tests.fingerprint.synthetic import clip

KNOWN = Calibration(location=3.0, growth=0.5, scale=0.7, segments=1000)


@pytest.mark.parametrize("evidence", [1.0, 3.0, 6.0, 10.0, 30.0])
def test_the_score_is_the_chance_of_scipys_gumbel(evidence):
    chance = scipy.stats.gumbel_r.logsf(evidence, 3.0 + 0.5 * np.log(4.0), 0.7)
    score = KNOWN.score(evidence, query_seconds=4.0, segments=1000)
    assert score == pytest.approx(-chance / np.log(10), rel=1e-6, abs=1e-12)


def test_scores_rise_with_evidence_without_end_and_never_overflow():
    scores = [
        KNOWN.score(e, query_seconds=2.0, segments=1000) for e in np.linspace(-1000, 1000, 400)
    ]
    assert np.isfinite(scores).all()
    assert (np.diff(scores) >= 0).all()
    assert (np.diff(scores)[250:] > 0).all()


def test_in_a_library_k_times_as_large_a_false_match_is_k_times_as_likely():
    small = KNOWN.score(8.0, query_seconds=2.0, segments=1000)
    large = KNOWN.score(8.0, query_seconds=2.0, segments=10_000)
    assert small - large == pytest.approx(1.0, abs=0.01)


def alignment(by_segment: dict[str, np.ndarray], *, rate: float, starts: np.ndarray) -> Alignment:
    agrees = np.ones(len(starts), bool)
    return Alignment(0, rate, 0.0, {}, starts, agrees, by_segment)


@pytest.mark.parametrize("rate", [1.0, 1.25])
def test_evidence_of_a_part_is_the_mean_over_its_segments_and_grows_with_their_time(rate):
    by_segment = {"video": np.full(9, 3.0), "audio": np.array([4.0] * 5 + [np.nan] * 4)}
    query = alignment(by_segment, rate=rate, starts=(1.0 + 0.25 * np.arange(9)) / rate)
    spans = {"video": 0.5, "audio": 1.0}
    video, audio = 3.0 * ((9 * 0.25 + 0.5) / 0.5) ** 0.5, 4.0 * (5 * 0.25 + 1.0) ** 0.5
    everything = scores._evidence(query, np.ones(9, bool), spans)
    assert everything == pytest.approx(np.hypot(video, audio))
    silent = scores._evidence(query, np.arange(9) > 6, spans)
    assert silent == pytest.approx(3.0 * ((2 * 0.25 + 0.5) / 0.5) ** 0.5)


def test_parts_are_halves_and_quarters_of_three_seconds_or_more():
    query = alignment({}, rate=2.0, starts=np.arange(12.0))
    parts = scores._parts(query, 12.0, span_seconds=2.0)
    assert [seconds for _, seconds in parts] == [6.0] * 3 + [3.0] * 7
    assert [int(inside.sum()) for inside, _ in parts] == [6, 6, 6, 3, 2, 3, 2, 3, 2, 3]
    assert [int(inside.argmax()) for inside, _ in parts] == [0, 3, 6, 0, 2, 3, 5, 6, 8, 9]


def constant(source: int, value: float, whole: float, *, seconds: float = 12.0) -> Alignment:
    """An alignment of one strength all along a query, by segments of 0.5 s."""
    starts = np.arange(0.0, seconds, 0.5)
    alike = alignment({"video": np.full(len(starts), value)}, rate=1.0, starts=starts)
    return dataclasses.replace(alike, source=source, by_modality={"video": whole, "audio": -1.0})


def test_sources_match_equally_well_by_their_strength_averaged_over_two_seconds():
    single = alignment({"video": np.eye(5)[2] * 6}, rate=1.0, starts=np.arange(5.0))
    assert scores._smoothed(single).tolist() == [0, 2, 2, 2, 0]
    mixed = alignment(
        {"video": np.array([3.0, -1.0]), "audio": np.array([4.0, np.nan])},
        rate=1.0,
        starts=np.arange(2.0),
    )
    assert scores.strength(mixed).tolist() == [5, 0]
    own = constant(0, 4.0, 9.0, seconds=2.0)
    for other, equally in ((2.0, True), (1.9, False)):
        assert (scores._equally_well(own, constant(1, other, 9.0)) == equally).all()
    weak = constant(0, 2.0, 9.0)
    assert not scores._equally_well(weak, weak).any()
    # Where the other source has no segment it resembles nothing.
    assert scores._equally_well(constant(0, 4.0, 9.0), own).tolist() == [True] * 4 + [False] * 20


def test_the_score_of_a_whole_query_is_of_its_evidence_and_of_a_part_of_its_segments():
    query = constant(0, 3.0, 8.0)
    whole = scores._Part(query, np.ones(24, bool), 12.0, 1000)
    spans = {"video": 0.5, "audio": 0.5}
    assert whole.score(KNOWN, spans) == KNOWN.score(8.0, query_seconds=12.0, segments=1000)
    video_only = dataclasses.replace(query, by_modality={"video": 8.0})
    other = dataclasses.replace(whole, alignment=video_only)
    assert other.score(KNOWN, spans) == whole.score(KNOWN, spans)
    one = dataclasses.replace(whole, inside=np.arange(24) == 3, seconds=0.5)
    assert one.without(np.zeros(24, bool)).seconds == 0.5
    assert one.without(one.inside).seconds == 0.0
    rest = whole.without(np.arange(24) < 18)
    assert (rest.inside.sum(), rest.seconds) == (6, 3.0)
    evidence = 3.0 * ((6 * 0.5 + 0.5) / 0.5) ** 0.5
    expected = KNOWN.score(evidence, query_seconds=3.0, segments=1000)
    assert rest.score(KNOWN, spans) == pytest.approx(expected)


def test_sources_that_share_the_only_part_are_rivals_and_a_part_counts_as_one_of_many_queries():
    first, second = constant(0, 5.0, 12.0), constant(1, 5.0, 0.0)
    half = np.where(second.query_seconds < 6, 0.0, 5.0)
    second = dataclasses.replace(second, by_segment={"video": half})
    alone = scores.score_alignments(
        [constant(2, 0.0, 3.0), second, first],
        lambda modalities: KNOWN,
        spans={"video": 0.5},
        query_seconds=12.0,
        segments=1000,
    )
    # Of equal scores the one with more evidence for the whole query comes first.
    assert [found.alignment.source for found in alone] == [0, 1, 2]
    by_source = {found.alignment.source: found for found in alone}
    # Ten halves and quarters are tried.
    evidence = 5.0 * ((12 * 0.5 + 0.5) / 0.5) ** 0.5
    assert by_source[1].score == pytest.approx(
        KNOWN.score(evidence, query_seconds=6.0, segments=10_000)
    )
    assert by_source[1].rivals == (0,)
    assert by_source[0].rivals == ()  # its first half suffices
    assert by_source[0].shared_by.tolist() == [1] * 12 + [2] * 12
    assert (by_source[2].rivals, by_source[2].matched) == ((), ())
    assert by_source[0].matched == ("video",)


def test_a_score_at_the_threshold_is_a_match_of_the_whole_and_of_each_modality():
    class Limit:
        def score(self, evidence, **_):
            return THRESHOLD

    found = scores.score_alignments(
        [constant(number, 5.0, 8.0, seconds=2.0) for number in range(2)],
        lambda modalities: Limit(),
        spans={"video": 0.5},
        query_seconds=2.0,
        segments=1000,
    )
    for one in found:
        assert (one.score, one.matched, one.rivals) == (THRESHOLD, ("video",), ())
        assert one.shared_by.tolist() == [2] * 4


def test_few_sources_have_the_default(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    index.add((f"{n}", clip(n, 2.0)) for n in range(3))
    assert index.calibration(("video", "audio")) == DEFAULT


def test_a_modality_is_fitted_as_if_the_other_were_not_there(library):
    spans = {"video": 0.5, "audio": 0.5}
    both = calibration.fit(library._library, spans)
    assert set(both) == {"audio+video", "video", "audio"}
    for modality in spans:
        alone = calibration.fit(library._library, {modality: 0.5})
        assert alone == {modality: both[modality]}
    assert len({found.location for found in both.values()}) == 3


@pytest.mark.parametrize(("seconds", "count"), [(0.8, 1), (1.5, 2), (3.0, 5), (60.0, 40)])
def test_an_excerpt_lasts_the_seconds_that_are_asked_as_far_as_the_source_has_them(
    references, seconds, count
):
    window, _ = references.vectors_of("video", 1, 0, 40)
    firsts = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        excerpt = calibration._excerpt(references, 1, seconds, {"video": 1.0}, rng)
        assert len(excerpt) == 2 * count  # each twice: a query has segments at half a hop
        assert excerpt.duration_seconds == 0.5 * (count - 1) + 1.0
        vectors = excerpt.features["video"]
        assert excerpt.present["video"].all()
        first = int(np.argmax(window @ vectors[0]))
        np.testing.assert_array_equal(vectors[::2], window[first : first + count])
        np.testing.assert_array_equal(vectors[::2], vectors[1::2])
        firsts.add(first)
    assert firsts == set(range(41 - count))


def test_a_distribution_is_fitted_to_quartiles_and_to_the_growth_with_the_length(references):
    seconds = np.tile(np.log([1.5, 3.0, 6.0, 12.0]), 500)
    gumbel = scipy.stats.gumbel_r.rvs(4.0, 0.8, len(seconds), random_state=0)
    fitted = calibration._distribution(
        np.stack([seconds, gumbel + 1.5 * seconds], axis=1), references
    )
    # A query is tried as two renderings, between the segments, at each of three rates.
    assert fitted.location == pytest.approx(4.0 + 0.8 * np.log(6), abs=0.2)
    assert fitted.growth == pytest.approx(1.5, abs=0.1)
    assert fitted.scale == pytest.approx(0.8, abs=0.05)
    assert fitted.segments == 80
    shrinking = calibration._distribution(
        np.stack([seconds, gumbel - 1.5 * seconds], axis=1), references
    )
    assert shrinking.growth == 0.0
    # Of eight queries, half the weight is the default's.
    alike = calibration._distribution(np.array([[1.0, 4.0]] * 8), references)
    assert alike.scale == DEFAULT.scale / 2


def test_doubles_in_the_library_hardly_move_what_is_unrelated(library, encoders, tmp_path):
    doubled = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    doubled.add((f"clip {n}", clip(n)) for n in range(16))
    doubled.add((f"double of {n}", clip(n)) for n in range(2))
    plain, other = (
        calibration.fit(index._library, {"video": 0.5, "audio": 0.5})["audio+video"]
        for index in (library, doubled)
    )
    assert plain != DEFAULT
    assert other.location == pytest.approx(plain.location, abs=1.0)
    assert other.scale < 2 * plain.scale
    result = doubled.query(clip(0))
    assert {m.source for m in result.matches if m.accepted} == {"clip 0", "double of 0"}

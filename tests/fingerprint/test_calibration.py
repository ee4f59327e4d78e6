"""Scores are chances of a Gumbel distribution, which doubles in the library hardly move."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from avcl_jax.fingerprint import calibration
from avcl_jax.fingerprint.calibration import DEFAULTS, Calibration
from avcl_jax.fingerprint.index import FingerprintIndex
from tests.fingerprint.synthetic import SETTINGS, clip

KNOWN = Calibration(location=3.0, growth=0.5, scale=0.7, segments=1000)


def score(evidence, segments=1000):
    return KNOWN.score(evidence, query_seconds=4.0, segments=segments)


def test_the_score_is_the_chance_of_scipys_gumbel_and_rises_without_end():
    for evidence in (1.0, 3.0, 6.0, 10.0, 30.0):
        chance = scipy.stats.gumbel_r.logsf(evidence, 3.0 + 0.5 * np.log(4.0), 0.7)
        assert score(evidence) == pytest.approx(-chance / np.log(10), rel=1e-6, abs=1e-12)
    # In a library k times as large a false match is k times as likely.
    assert score(8.0) - score(8.0, 10_000) == pytest.approx(1.0, abs=0.01)
    scores = [score(evidence) for evidence in np.linspace(-1000, 1000, 400)]
    assert np.isfinite(scores).all()
    assert (np.diff(scores) >= 0).all()
    assert (np.diff(scores)[250:] > 0).all()


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
    assert alike.scale == calibration._PRIOR_SCALE / 2


def test_doubles_in_the_library_hardly_move_what_is_unrelated(library, encoders, tmp_path):
    doubled = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    doubled.add((f"clip {n}", clip(n)) for n in range(16))
    doubled.add((f"double of {n}", clip(n)) for n in range(2))
    plain, other = (
        calibration.fit(index._library, {"video": 0.5, "audio": 0.5})["audio+video"]
        for index in (library, doubled)
    )
    assert plain != DEFAULTS["audio+video"]
    assert other.location == pytest.approx(plain.location, abs=1.0)
    assert other.scale < 2 * plain.scale
    result = doubled.query(clip(0))
    assert {m.source for m in result.matches if m.accepted} == {"clip 0", "double of 0"}

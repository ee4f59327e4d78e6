"""Intervals and paired tests: coverage, sources drawn together, exchanges counted by hand."""

import warnings

import numpy as np
import pytest

from avcl_jax.evaluation.statistics import STATISTICS, bootstrap, compare, holm


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = (rng.random(100) < 0.7).astype(float)
        interval = bootstrap("mean", [hits], np.arange(100), resamples=200, seed=trial)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 0.7 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99  # 95 % meant, 3 standard errors of 200 trials below


def test_units_of_one_source_are_drawn_together() -> None:
    hits = np.repeat(np.random.default_rng(0).random(20) < 0.5, 10).astype(float)
    alone = bootstrap("mean", [hits], np.arange(200), resamples=500, seed=0)
    together = bootstrap("mean", [hits], np.repeat(np.arange(20), 10), resamples=500, seed=0)
    # Ten copies of 20 sources know as much as 20: the interval is √10 times as wide.
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)
    # Either source alone, in whatever order its units are.
    hits, sources = np.array([1.0, 0.0, 0.0, 1.0]), np.array(list("baab"))
    assert bootstrap("mean", [hits], sources, resamples=200, seed=0) == (0.5, 0, 1)


def test_fast_and_general_way_to_resample_a_mean_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, sources = rng.random(50), rng.integers(0, 12, 50)
    fast = bootstrap("mean", [values], sources, resamples=100, seed=3)
    monkeypatch.setitem(STATISTICS, "slow mean", STATISTICS["mean"])
    assert bootstrap("slow mean", [values], sources, resamples=100, seed=3) == pytest.approx(fast)


def test_a_paired_test_counts_all_exchanges() -> None:
    # Second run right on 8 sources where the first is wrong, equal elsewhere: of 2^8 exchanges two
    # are as extreme, so p is 2/256.
    first, second = np.zeros(30), np.zeros(30)
    second[:8] = 1
    result = compare("mean", [first], [second], np.arange(30), resamples=20_000, seed=0)
    assert result.difference.value == pytest.approx(8 / 30)
    assert result.p_value == pytest.approx(2 / 256, rel=0.35)
    assert result.difference.low > 0


def test_pairing_makes_a_small_difference_certain_and_equal_runs_are_equal() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(300) * 10
    second = first + 0.1 + 0.01 * rng.normal(size=300)
    result, same = (
        compare("mean", [first], [other], np.arange(300), resamples=300, seed=0)
        for other in (second, first)
    )
    assert result.p_value < 0.01
    assert 0.09 < result.difference.low < result.difference.high < 0.11
    assert same == ((0, 0, 0), 1)


def test_under_the_hypothesis_p_values_are_uniform() -> None:
    rng = np.random.default_rng(1)
    p_values = []
    for trial in range(150):
        first, second = (rng.random((2, 40)) < 0.6).astype(float)
        p_values.append(
            compare("mean", [first], [second], np.arange(40), resamples=99, seed=trial).p_value
        )
    assert np.mean(np.array(p_values) <= 0.05) <= 0.11  # 5 %, and three standard errors
    assert 0.4 < np.mean(p_values) < 0.75  # discrete outcomes tie, which makes p larger


def test_every_statistic_takes_resampled_units() -> None:
    rng = np.random.default_rng(0)
    scores, relevant = rng.random((40, 3)), rng.random((40, 3)) < 0.5
    labels, findable = rng.integers(0, 3, 40), rng.random(40) < 0.7
    right = np.zeros((40, 3), bool)
    right[findable, rng.integers(0, 3, int(findable.sum()))] = True
    scores[right] += 0.3
    arrays = {
        "mean": [scores[:, 0]],
        "median": [scores[:, 0]],
        "class_mean": [scores[:, 0], labels],
        "gap_closed": [right[:, 0] * 0.0, scores[:, 0], np.ones(40)],
        "ratio": [scores[:, 0], 1 + scores[:, 1]],
        "micro_average_precision": [scores, right, findable],
        "recall_at_precision_90": [scores, right, findable],
        "mean_average_precision": [scores, relevant],
        "mean_auc": [scores, relevant],
        "d_prime": [scores, relevant],
    }
    assert arrays.keys() == STATISTICS.keys()
    for kind, inputs in arrays.items():
        interval = bootstrap(kind, inputs, np.arange(40), resamples=50, seed=0)
        assert interval.low < interval.high
        assert interval.low - 0.2 < interval.value < interval.high + 0.2


def test_where_all_units_are_alike_bounds_are_exact_for_their_sources() -> None:
    videos = np.array([str(n % 30) for n in range(276)])
    nothing = bootstrap("mean", [np.zeros(276)], videos, resamples=50, seed=0)
    assert nothing.low == nothing.value == 0.0
    assert nothing.high == pytest.approx(1 - 0.025 ** (1 / 30))
    families = np.arange(276) % 23
    everything = bootstrap("class_mean", [np.ones(276), families], videos, resamples=50, seed=0)
    assert everything.low == pytest.approx(0.025 ** (1 / 30))
    assert everything.high == everything.value == 1.0
    # A temporal task counts right answers among a varying number of answers, of some videos none.
    totals = np.array([3.0, 0.0, 2.0, 3.0])
    for correct, value, low, high in (
        (totals, 1.0, 0.025 ** (1 / 3), 1.0),
        (totals * 0, 0.0, 0.0, 1 - 0.025 ** (1 / 3)),
    ):
        interval = bootstrap("ratio", [correct, totals], np.arange(4), resamples=50, seed=0)
        assert interval == pytest.approx((value, low, high))
    # Resamples of the videos without an answer alone have no ratio; numpy would warn of them.
    with warnings.catch_warnings(action="error"):
        few = bootstrap("ratio", [totals[:2] / 3, totals[:2]], np.arange(2), resamples=50, seed=0)
    assert few == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # Units count by their number of answers.
    assert STATISTICS["ratio"](np.array([1, 0, 8]), np.array([1, 1, 10])) == 9 / 12
    # The mean of what is no share has no such bounds.
    assert bootstrap("median", [np.ones(9)], np.arange(9), resamples=9, seed=0) == (1, 1, 1)
    even = bootstrap("mean", [np.array([0.5, 1.5])], np.zeros(2), resamples=9, seed=0)
    assert even == (1, 1, 1)


def test_a_metric_that_is_not_defined_has_neither_interval_nor_p_value() -> None:
    # A random encoder as good as the supervised one leaves no gap, though resamples may have one.
    even, odd, ones = np.arange(8) % 2 == 0, np.arange(8) % 2 == 1, np.ones(8)
    settings = {"sources": np.arange(8), "resamples": 50, "seed": 0}
    assert np.isnan(bootstrap("gap_closed", [even, even, odd], **settings)).all()
    pair = compare("gap_closed", [even, ones, ones], [ones, even, ones], **settings)
    assert np.isnan([*pair.difference, pair.p_value]).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    np.testing.assert_allclose(holm([0.03, float("nan"), 0.02]), [0.04, np.nan, 0.04])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"one length above 0, got \[2, 3\]"):
        bootstrap("mean", [np.zeros(2)], np.arange(3), resamples=1, seed=0)

"""Metrics by ground truth of the kind of the Video Similarity Challenge 2022."""

from __future__ import annotations

import math

import numpy as np
import pytest

from avcl_jax.fingerprint.ground_truth import (
    Names,
    Segment,
    pair_curve,
    read_segments,
    segment_curve,
)
from avcl_jax.fingerprint.settings import FingerprintError


def segment(*times: float, query: str = "q", reference: str = "r") -> Segment:
    return Segment(query, reference, *times)


def test_pairs_by_hand():
    true = [("q1", "a"), ("q2", "b")]
    scores = {("q1", "a"): 8.0, ("q3", "a"): 5.0, ("q2", "b"): 4.0, ("q2", "a"): 1.0}
    curve = pair_curve(scores, true)
    assert curve.scores.tolist() == [8, 5, 4, 1]
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4])
    assert curve.recall.tolist() == [0.5, 0.5, 1, 1]
    assert curve.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert [curve.recall_at_precision(p) for p in (1.0, 0.9, 0.6)] == [0.5, 0.5, 1]
    assert curve.at(4.5) == (0.5, 0.5)
    assert curve.at(4.0) == (pytest.approx(2 / 3), 1)
    assert curve.at(9.0) == (None, 0)
    # A source that no answer names.
    assert pair_curve({("q1", "a"): 8.0}, true).average_precision == 0.5
    # Equal scores count together: one of two is right.
    ties = pair_curve({("q1", "b"): 2.0, ("q1", "a"): 2.0}, true[:1])
    assert (ties.average_precision, ties.precision.tolist()) == (0.5, [0.5])
    nothing = pair_curve({}, true)
    assert (nothing.average_precision, nothing.recall_at_precision(0.5)) == (0, 0)
    assert nothing.at(0.0) == (None, 0)


def test_segments_by_hand():
    true = [segment(4, 14, 10, 18)]
    assert segment_curve([(true[0], 1.0)], true).average_precision == 1
    # Half of the query's interval and a quarter of the reference's, exactly.
    part = segment_curve([(segment(4, 9, 10, 12), 1.0)], true)
    assert part.precision.tolist() == [1]
    assert part.recall.tolist() == pytest.approx([math.sqrt(1 / 2 * 1 / 4)])
    # Twice as long as it should be, in both.
    long = segment_curve([(segment(-1, 19, 6, 22), 1.0)], true)
    assert long.precision.tolist() == pytest.approx([1 / 2])
    assert long.recall.tolist() == [1]
    # First half of it, then a prediction of another pair, then the rest.
    predicted = [
        (segment(4, 9, 10, 14), 3.0),
        (segment(0, 10, 0, 8, reference="other"), 2.0),
        (segment(9, 14, 14, 18), 1.0),
    ]
    curve = segment_curve(predicted, true)
    wrong = math.sqrt(5 / 15 * 4 / 12)
    right = math.sqrt(10 / 20 * 8 / 16)
    assert curve.precision.tolist() == pytest.approx([1, wrong, right])
    assert curve.recall.tolist() == pytest.approx([0.5, 0.5, 1])
    assert curve.average_precision == pytest.approx(0.5 + 0.5 * right)
    assert curve.at(2.5) == (1, 0.5)
    # Twice as long as it should be, then as much again of the same pair.
    repeated = segment_curve([(segment(4, 24, 10, 26), 2.0), (segment(30, 40, 30, 38), 1.0)], true)
    assert repeated.precision.tolist() == pytest.approx([1 / 2, 1 / 3])
    assert segment_curve([], true).average_precision == 0


def test_a_true_segment_counts_only_where_a_prediction_overlaps_it_in_both():
    """Figure 4 (f) of VCSL (He et al., CVPR 2022): the references are exchanged."""
    true = [segment(4, 14, 10, 18), segment(20, 28, 21, 29)]
    exchanged = [(segment(4, 14, 21, 29), 1.0), (segment(20, 28, 10, 18), 1.0)]
    assert segment_curve(exchanged, true).average_precision == 0
    # Touching is not overlapping.
    other = segment(0, 10, 0, 8, reference="other")
    touching = [(segment(14, 20, 10, 18), 1.0), (other, 1.0)]
    assert segment_curve(touching, [true[0], other]).recall.tolist() == pytest.approx([0.5])


def drawn(rng: np.random.Generator) -> Segment:
    start, other = rng.integers(0, 20, 2).tolist()
    names = {"query": f"q{rng.integers(3)}", "reference": f"r{rng.integers(3)}"}
    times = (start, start + int(rng.integers(1, 9)), other, other + int(rng.integers(1, 9)))
    return segment(*map(float, times), **names)


@pytest.mark.parametrize("seed", range(20))
def test_properties_of_segments(seed):
    rng = np.random.default_rng(seed)
    true = [drawn(rng) for _ in range(6)]
    assert segment_curve([(t, 1.0) for t in true], true).average_precision == pytest.approx(1)
    predicted = [(drawn(rng), float(rng.integers(4))) for _ in range(8)]
    predicted += [(true[n], float(rng.integers(4))) for n in rng.integers(6, size=3)]
    curve = segment_curve(predicted, true)
    assert (np.diff(curve.scores) < 0).all()
    assert (np.diff(curve.recall) >= -1e-12).all()
    assert 0 <= curve.average_precision <= 1 + 1e-12
    assert (curve.precision <= 1 + 1e-12).all()
    # Neither the order, nor repeats, nor exchanging the roles, changes a value.
    order = rng.permutation(len(predicted))
    np.testing.assert_allclose(segment_curve([predicted[n] for n in order], true), curve)
    np.testing.assert_allclose(segment_curve(predicted * 2, true * 2), curve)

    def exchange(s: Segment) -> Segment:
        return Segment(s.reference, s.query, *s[4:], *s[2:4])

    exchanged = [(exchange(s), score) for s, score in predicted]
    np.testing.assert_allclose(segment_curve(exchanged, map(exchange, true)), curve)
    # A prediction where there is nothing lowers precision below its score alone.
    lowest = float(curve.scores.min()) - 1
    more = segment_curve([*predicted, (segment(0, 5, 0, 5, query="q9"), lowest)], true)
    np.testing.assert_allclose(more.precision[:-1], curve.precision)
    assert more.precision[-1] < curve.precision[-1] or curve.precision[-1] == 0
    assert more.average_precision == pytest.approx(curve.average_precision)


def test_an_id_is_the_end_of_a_path():
    names = Names(["/films/a b/Q1.mp4", "/films/Q2.v2.mkv", "/music/Q2.v2.ogg", "from memory"])
    for text in ("Q1", "Q1.mp4", "a b/Q1", "/films/a b/Q1.mp4", "./a b/../a b/Q1.mp4"):
        assert names.find(text, among="the queries") == "/films/a b/Q1.mp4"
    assert names.find("from memory", among="") == "from memory"
    assert names.find("Q2.v2.ogg", among="") == "/music/Q2.v2.ogg"
    assert names.find("films/Q2.v2", among="") == "/films/Q2.v2.mkv"
    with pytest.raises(FingerprintError, match=r"^'Q2.v2' may be /films/.* or /music/.*: write"):
        names.find("Q2.v2", among="")
    for text in ("q1", "b/Q1", "", "Q1.mkv"):
        with pytest.raises(FingerprintError, match=f"^'{text}' is not among the queries"):
            names.find(text, among="the queries")


HEADER = "query_id,ref_id,query_start,query_end,ref_start,ref_end"


@pytest.fixture
def read(tmp_path):
    """Function that reads the segments of a text."""

    def read(text: str) -> list[Segment]:
        path = tmp_path / "matches.csv"
        path.write_text(text, encoding="utf-8")
        return read_segments(
            path,
            queries=Names(["/q/Q1.mp4", "/q/Q2.mp4"]),
            references=Names(["/r/R1.mp4", "/r/R,2.mp4"]),
            among=("the queries", "the media of INDEX"),
            lengths=({"/q/Q1.mp4": 20.0}.get, {"/r/R1.mp4": 30.0, "/r/R,2.mp4": 10.0}.get),
        )

    return read


def test_ground_truth_is_read_whatever_the_order_of_its_columns(read):
    plain = f"{HEADER}\nQ1,R1,0.5,4,10,13.5\n"
    assert read(plain) == [Segment("/q/Q1.mp4", "/r/R1.mp4", 0.5, 4, 10, 13.5)]
    shuffled = 'ref_id,score,ref_end,ref_start,query_end,query_start,query_id\n"R,2",1,2,1,4,3,Q2\n'
    assert read("\ufeff" + shuffled) == [Segment("/q/Q2.mp4", "/r/R,2.mp4", 3, 4, 1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column query_id in nothing: it needs query_id, ref_id, query_start"),
        ("query_id, ref_id\nQ1,R1\n", "line 1: no column ref_id in 'query_id', ' ref_id': it"),
        (HEADER, "has no segments"),
        (f"{HEADER}\nQ1,R1,0,4,0,4\nQ3,R1,0,4,0,4", "line 3: 'Q3' is not among the queries"),
        (f"{HEADER}\nQ1,R9,0,4,0,4", "line 2: 'R9' is not among the media of INDEX"),
        (f"{HEADER}\nQ1,R1,0,x,0,4", "line 2: query_end 'x' must be a number of seconds"),
        (f"{HEADER}\nQ1,R1,0,4,0,inf", "line 2: ref_end 'inf' must be a number of seconds"),
        (f"{HEADER}\nQ1,R1,0,4,0", "line 2: ref_end '' must be a number of seconds"),
        (f"{HEADER}\nQ1,R1,0,4,nan,4", "line 2: ref_start 'nan' must be a number of seconds"),
        (f"{HEADER}\nQ1,R1,-1,4,0,4", "line 2: query_start '-1' must be a number of seconds, at"),
        (f"{HEADER}\nQ1,R1,4,4,0,4", "line 2: query_end 4 must be after query_start 4"),
        (f"{HEADER}\nQ1,R1,0,4,5,4", "line 2: ref_end 4 must be after ref_start 5"),
        (f"{HEADER}\nQ1,R1,0,20.5,0,31", None),  # rounded
        (f"{HEADER}\nQ2,R1,0,2000,0,4", None),  # of a length that is not known
        (
            f"{HEADER}\nQ1,R1,0,21.5,0,4",
            "line 2: query_end 21.5 is after the end of /q/Q1.mp4, at 20.00 s: give times in sec",
        ),
        (f"{HEADER}\nQ1,R1,20.5,21,0,4", "line 2: query_start 20.5 is after the end of /q/Q1"),
        (f'{HEADER}\nQ1,"R,2",0,4,9,9000', "line 2: ref_end 9000 is after the end of /r/R,2.mp4"),
    ],
)
def test_errors_name_the_line_and_the_value(read, text, message):
    if message is None:
        assert len(read(text)) == 1
        return
    with pytest.raises(FingerprintError) as raised:
        read(text)
    assert message in str(raised.value)
    assert "matches.csv" in str(raised.value)


def test_a_file_of_other_content_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    nothing = {"queries": Names([]), "references": Names([]), "among": ("a", "b"), "lengths": ()}
    path.write_bytes(f"{HEADER}\n\xff\n".encode("latin-1"))
    with pytest.raises(FingerprintError, match=r"a\.csv, line 1: .*utf-8"):
        read_segments(path, **nothing)

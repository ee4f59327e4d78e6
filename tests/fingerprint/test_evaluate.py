"""`avcl-fingerprint evaluate`: metrics of queries whose sources are known."""

from __future__ import annotations

import json

import pytest

from avcl_jax.fingerprint.benchmark.timeline import excerpt, joined
from avcl_jax.fingerprint.command import main
from tests.fingerprint.synthetic import clip, write

HEADER = "query_id,ref_id,query_start,query_end,ref_start,ref_end\n"


@pytest.fixture(scope="module")
def index(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    for n in range(12):
        write(folder / f"R{n}.mp4", clip(n))
    directory = folder / "an index"
    assert main(["index", str(folder), "--index", str(directory), "--encoder", str(encoders)]) == 0
    return directory


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Excerpts of two references, one of them cut together from two, and a clip of none."""
    folder = tmp_path_factory.mktemp("queries")
    write(folder / "Q0.mp4", excerpt(clip(3), 1.5, 5.5))
    write(folder / "Q1.mp4", joined([excerpt(clip(5), 0.5, 4.5), excerpt(clip(7), 1, 5)]))
    write(folder / "-Q 2.mp4", clip(60, 4.0))
    return folder


@pytest.fixture
def evaluate(index, queries, tmp_path, capsys):
    """Function that evaluates by lines of ground truth, and returns status, output and errors."""

    def evaluate(lines: str, *options: str, at=index, of=queries) -> tuple[int, str, str]:
        path = tmp_path / "matches.csv"
        path.write_text(HEADER + lines)
        capsys.readouterr()
        where = ["--index", str(at), "--queries", str(of), "--ground-truth", str(path)]
        status = main(["evaluate", *where, *options])
        return status, *capsys.readouterr()

    return evaluate


TRUE = "Q0,R3,0,4,1.5,5.5\nQ1,R5,0,4,0.5,4.5\nQ1.mp4,R7.mp4,4,8,1,5\n"


def test_what_is_found_is_measured(evaluate):
    status, out, _ = evaluate(TRUE, "--json")
    assert status == 0
    results = json.loads(out)
    assert (results["queries"], results["queries_with_ground_truth"]) == (3, 2)
    assert results["failed"] == {}
    pairs, segments = results["pairs"], results["segments"]
    assert pairs == {
        "count": 3,
        "micro_average_precision": 1,
        "recall_at_precision_90": 1,
        "precision_at_threshold": 1,
        "recall_at_threshold": 1,
    }
    assert segments["count"] == 3
    assert 0.7 < segments["micro_average_precision"] <= 1
    assert segments["precision_at_threshold"] > 0.9
    assert 0.7 < segments["recall_at_threshold"] <= 1
    # The same with other sources, and with intervals that are elsewhere.
    wrong = json.loads(evaluate(TRUE.replace("R3", "R4"), "--json")[1])["pairs"]
    assert wrong["recall_at_threshold"] == pytest.approx(2 / 3)
    assert wrong["precision_at_threshold"] == pytest.approx(2 / 3)
    assert wrong["micro_average_precision"] < 0.9
    moved = "Q0,R3,0,4,0,1\nQ1,R5,7,8,0.5,4.5\nQ1,R7,0,4,1,5\n"
    results = json.loads(evaluate(moved, "--json")[1])
    assert results["pairs"] == pairs
    assert results["segments"]["micro_average_precision"] < 0.1


def test_in_words(evaluate):
    lines = evaluate(TRUE)[1].splitlines()
    assert lines[0] == "3 queries, 2 with ground truth"
    assert lines[1] == (
        "3 pairs (query and reference): µAP 1.000, recall 1.000 at precision 0.9; "
        "at the threshold precision 1.000, recall 1.000"
    )
    assert lines[2].startswith("3 segments (their intervals): µAP 0.")
    assert len(lines) == 3
    status, out, err = evaluate(TRUE, "--max-seconds", "0.3")
    assert status == 1
    assert "µAP 0.000" in out.splitlines()[1]
    assert out.splitlines()[1].endswith("at the threshold no precision, recall 0.000")
    assert err.count("not compared, the query lasts 0.3") == 3


def test_a_query_that_cannot_be_compared_finds_nothing(evaluate, queries, tmp_path):
    (tmp_path / "Q0.mp4").write_text("no film")
    (tmp_path / "Q1.mp4").write_bytes((queries / "Q1.mp4").read_bytes())
    status, out, err = evaluate(TRUE, "--json", of=tmp_path)
    assert status == 1
    results = json.loads(out)
    assert results["pairs"]["recall_at_threshold"] == pytest.approx(2 / 3)
    assert list(results["failed"]) == [str(tmp_path / "Q0.mp4")]
    assert err.startswith(f"avcl-fingerprint: {tmp_path / 'Q0.mp4'}: not compared, not_media: ")


def test_mistakes_are_one_line_before_the_first_query(evaluate, index, queries, tmp_path):
    for lines, options, message in (
        ("Q9,R1,0,4,0,4\n", {}, "line 2: 'Q9' is not among the queries"),
        ("Q0,R99,0,4,0,4\n", {}, f"line 2: 'R99' is not among the media in {index}"),
        (TRUE, {"of": tmp_path / "none"}, "none does not exist"),
        (TRUE, {"at": tmp_path / "none"}, "there is no fingerprint index in"),
        ("", {}, "has no segments"),
        # Milliseconds, for which every prediction is wrong.
        (
            "Q0,R3,0,4,1.5,5.5\nQ1,R5,0,4000,500,4500\n",
            {},
            f"line 3: query_end 4000 is after the end of {queries / 'Q1.mp4'}, at 8.0",
        ),
        ("Q0,R3,0,4,1500,5500\n", {}, "line 2: ref_start 1500 is after the end of "),
    ):
        status, out, err = evaluate(lines, **options)
        assert (status, out) == (2, ""), lines
        assert message in err
        assert err.count("\n") == 1

"""The benchmark of media that share a template, and its drawn families."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.media import probe
from benchmarks import look_alikes, templates
from benchmarks.measure import SkipError
from tests.evaluation.labelled import write_encoders

needs_speech = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed"
)


@needs_speech
@pytest.mark.parametrize("family", templates.FAMILIES)
def test_sources_of_a_family_share_their_template_and_differ_in_text_and_speech(family: str):
    first, again, other = (templates.FAMILIES[family](number) for number in (0, 0, 4))
    for seconds in (2.0, 7.5):
        image = first.image_at(seconds).astype(int)
        np.testing.assert_array_equal(image, again.image_at(seconds))
        difference = np.abs(image - other.image_at(seconds)).max(axis=-1)
        # Some letters differ, and all of the rest is equal but for a pointer.
        assert 0.002 < (difference > 30).mean() < 0.2
    np.testing.assert_array_equal(first.waveform, again.waveform)
    for source in (first, other):
        assert len(source.waveform) == templates.SECONDS * 22_050
        assert source.waveform.dtype == np.int16
        assert np.abs(source.waveform.astype(int)).max() > 3000
    assert abs(np.corrcoef(first.waveform, other.waveform)[0, 1]) < 0.9


def test_without_espeak_the_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SkipError, match="apt-get install espeak-ng"):
        templates.make_sources("slides", tmp_path / "slides", range(1))
    assert not list(tmp_path.iterdir())


def test_only_the_right_source_alone_counts_as_accepted():
    def answer(**changes: object) -> dict[str, object]:
        usual = {"right": True, "first": "a", "accepted": ["a"], "offset_error": -0.1, "score": 4.0}
        return usual | changes

    own = [
        answer(),
        answer(accepted=[]),
        answer(accepted=["a", "b"]),
        answer(right=False, offset_error=3.0),
    ]
    others = [answer(accepted=[], score=1.0), answer(accepted=["b"], score=2.6)]
    benchmark = look_alikes._Benchmark(argparse.Namespace())
    benchmark.answers = lambda family: {"own": own, "others": others, "unrelated": others[:1]}
    value, detail = benchmark.accepted("karaoke")
    assert value == 1 / 4
    assert (detail["accepted"], detail["first"], detail["wrong_accepted"]) == (1, 3, 1)
    assert (detail["largest_offset_error"], detail["held_out"]) == (0.1, True)
    value, detail = benchmark.others_accepted("slides")
    assert value == 1
    assert (detail["others_queries"], detail["others_highest_score"]) == (2, 2.6)
    assert (detail["unrelated_queries"], detail["unrelated_highest_score"]) == (1, 1.0)


@needs_speech
@pytest.mark.slow
def test_a_small_run_of_one_family(tmp_path: Path):
    write_encoders(tmp_path / "run" / "export")
    rows, media = tmp_path / "rows.json", tmp_path / "media"
    where = [f"--json={rows}", f"--encoder={tmp_path / 'run'}", f"--workdir={media}"]
    look_alikes.main([*where, "--small", "--rows", "screens", "screens_others"])
    values = {row["name"]: row for row in json.loads(rows.read_text())}
    assert values["screens"]["detail"]["queries"] == 4
    assert values["screens_others"]["detail"]["others_queries"] == 4
    assert values["screens_others"]["detail"]["unrelated_queries"] == 6
    queries = sorted((media / "screens" / "queries").iterdir())
    assert len(queries) == 8
    info = probe(queries[0])
    assert info.video == ("h264", 480, 270)
    assert info.audio is not None
    assert 2.4 < (info.duration_seconds or 0) < 9.2

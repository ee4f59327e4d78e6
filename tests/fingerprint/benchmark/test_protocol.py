"""The fingerprinting protocol and its benchmark from the command to the report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest
import simplejpeg
from etils import epath

from avcl_jax.configs import fingerprint
from avcl_jax.data.media import DecodedMedia
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import RecordDataset, shard_name
from avcl_jax.errors import UserError
from avcl_jax.evaluation.protocol import OUTCOMES, Outcomes, read_outcomes, write_outcomes
from avcl_jax.export.runs import open_encoders
from avcl_jax.fingerprint.benchmark import clips as benchmark_clips
from avcl_jax.fingerprint.benchmark import protocol
from avcl_jax.fingerprint.benchmark.protocol import clip_sets, fingerprinting
from avcl_jax.fingerprint.benchmark.searchers import BASELINES
from avcl_jax.fingerprint.benchmark.timeline import joined
from avcl_jax.fingerprint.settings import FingerprintSettings
from benchmarks import fingerprint as benchmark
from benchmarks import measure
from benchmarks.measure import SkipError
from tests.data.synthetic_media import write_clip
from tests.data.synthetic_records import make_record, write_shard
from tests.fingerprint import synthetic
from tests.fingerprint.benchmark.clips import clip
from tests.training.small import run


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    made = [make_record(n, seconds=4.0, side=24) for n in range(9)]
    # A reference that shows and tells nothing ends no run.
    grey = simplejpeg.encode_jpeg(np.full((24, 24, 3), 90, np.uint8))
    silence = np.zeros_like(made[1].waveform)
    made[1] = dataclasses.replace(made[1], frames=[grey] * 64, waveform=silence)
    shards = {"test": [write_shard(directory / shard_name("small", "test", 0, 1), made)]}
    names = {label: [str(n) for n in range(5)] for label in ("motion", "material")}
    write_dataset_metadata(directory, name="small", class_names=names, splits=shards)
    return directory


def here(target: str, arguments: dict[str, Any], **_: Any) -> Any:
    """What `run_child` does, in this process."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def test_rows_of_the_benchmark_and_the_report_beside_them(
    encoders, records, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(measure, "run_child", here)
    monkeypatch.setattr(measure, "need", lambda _: None)  # baselines may be left out here
    arguments = [
        "--small",
        f"--encoder={encoders}",
        f"--records={records}",
        f"--workdir={tmp_path / 'runs'}",
        f"--json={tmp_path / 'rows.json'}",
        f"--media={tmp_path / 'absent'}",
        "--rows",
        *("foley_fused_r1", "false_match_rate", "recall_at_threshold", "real_fused_r1"),
    ]
    benchmark.main(arguments)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["real_fused_r1"]["value"] is None
    assert "--media" in rows["real_fused_r1"]["detail"]["skipped"]
    assert not (tmp_path / "runs" / "foley").exists()
    workdir = tmp_path / "runs" / "small" / "foley"
    results = json.loads((workdir / "results.json").read_text())
    assert rows["foley_fused_r1"]["value"] == results["metrics"]["fused_r1"]["value"]
    assert rows["foley_fused_r1"]["detail"]["queries"] == 3
    for name in ("false_match_rate", "recall_at_threshold"):
        low, high = rows[name]["detail"]["interval"]
        assert low <= rows[name]["value"] <= high
        assert low < high
    # Without its sound a clip is not found by it; unchanged, a picture is found by any weights.
    families = results["details"]["tables"]["audio"]["medium"]
    assert families["audio_removed"]["r1"] == 0.0
    assert families["flip"]["r1"] == 1.0
    assert results["details"]["tables"]["video"]["medium"]["audio_removed"]["r1"] == 1.0
    assert set(results["details"]["tables"]["fused"]) == {"weak", "medium", "strong"}
    report = (workdir / "report.html").read_text()
    for words in ("R@1 by family, medium strength", "audio removed", "data:image/jpeg;base64"):
        assert words in report
    assert list(results["details"]["unused"]) == ["record 1"]
    kept = read_outcomes(workdir / "outcomes.npz")
    assert "test/0000001" not in kept.sources
    assert set(kept.sources) <= {f"test/{n:07d}" for n in range(6)}
    assert kept.values["findable"].mean() == 0.5
    capsys.readouterr()
    benchmark.main(arguments)
    assert "already holds these results" in capsys.readouterr().out


def small_config(encoders: Path, records: Path) -> ml_collections.ConfigDict:
    config = fingerprint.get_config()
    config.update_from_flattened_dict(benchmark._SMALL)
    config.encoder, config.data.directory = str(encoders), str(records)
    return config


def test_results_without_a_baseline_are_not_those_with_it(encoders, records, tmp_path, monkeypatch):
    config = small_config(encoders, records)
    config.families = ("flip",)
    config.baselines = ("image_hash",)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    results = fingerprinting(config, tmp_path)
    assert list(results["details"]["skipped_baselines"]) == ["image_hash"]
    assert fingerprinting(config, tmp_path) == results
    asked_for: list[int] = []
    monkeypatch.setitem(BASELINES, "image_hash", lambda answers: asked_for.append(answers))
    with pytest.raises(UserError, match="other settings"):
        fingerprinting(config, tmp_path)
    assert asked_for == [config.answers + 1]  # or a tie at the cut would not be seen


def test_encoders_that_met_a_clip_of_any_role_are_refused(encoders, records):
    config = small_config(encoders, records)
    source = open_encoders(encoders)
    met = RecordDataset(records, "test").fingerprint
    trained = dataclasses.replace(source, trained_on=met)
    with pytest.raises(UserError, match="pretrained, without labels, on 9 of the 9 clips"):
        clip_sets(config.data, trained)
    clips, _, _ = clip_sets(config.data, source)
    assert [len(getattr(clips, f.name)) for f in dataclasses.fields(clips)] == [4, 0, 2, 1, 2]


@pytest.fixture
def benchmark_with(tmp_path, monkeypatch):
    """Function of what every child process returns, to the rows of the benchmark."""

    def benchmark_with(child: Any) -> benchmark._Benchmark:
        monkeypatch.setattr(measure, "run_child", child)
        monkeypatch.setattr(measure, "need", lambda _: None)
        places = dict.fromkeys(("encoder", "records", "workdir"), tmp_path)
        places |= {name: tmp_path / name for name in ("media", "clips")}
        return benchmark._Benchmark(argparse.Namespace(**places, small=False, repeats=1))

    return benchmark_with


def test_a_comparison_without_a_baseline_is_skipped_with_the_reason(benchmark_with):
    details = {"skipped_baselines": {"chromaprint": "no libchromaprint"}}
    with pytest.raises(SkipError, match="chromaprint: no libchromaprint"):
        benchmark_with(lambda *_: {"details": details}).minus_baseline()
    with pytest.raises(SkipError, match="choose another --workdir"):
        benchmark_with(lambda *_: {"refused": "choose another --workdir"}).fused_r1("foley")


def test_the_figure_of_indexing_is_that_of_films_with_the_demos_clips_beside_it(
    tmp_path, monkeypatch, benchmark_with
):
    for name in ("media", "clips"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    films = [tmp_path / f"{n}.mp4" for n in range(3)]
    monkeypatch.setattr(benchmark.footage, "make_videos", lambda *_, **__: films)

    def seconds(_: str, arguments: dict[str, Any]) -> float:
        count = len(arguments["files"])
        if arguments["only_decode"]:
            return 1.0 * count
        return 2.0 * count if count > 1 else 4.0

    measured = benchmark_with(seconds)
    ratio, detail = measured.over_decoding()
    assert (ratio, detail["files"]) == (0.5, 3)
    assert detail["clips_as_the_demos"]["ratio"] == 0.25
    assert detail["clips_as_the_demos"]["files"] == 1
    measured._args.media = tmp_path / "absent"
    with pytest.raises(SkipError, match="--media"):
        measured.over_decoding()


def test_the_difference_to_a_baseline_has_the_same_videos_on_both_sides(tmp_path):
    videos = [f"video {n // 2}" for n in range(12)]
    image_hash = np.array([1, 0] * 6, float)
    values = {
        "r1_fused": np.ones(12),
        "r1_image_hash": image_hash,
        "family": np.array([0, 1] * 6),
        "medium_findable": np.arange(12) < 10,
    }
    write_outcomes(
        epath.Path(tmp_path / OUTCOMES), Outcomes([*map(str, range(12))], videos, values)
    )
    found = benchmark.difference_of_recalls(tmp_path, "image_hash", resamples=50, seed=0)
    # Every video has one query that the hash finds and one that it does not.
    assert found == (0.5, 0.5, 0.5)


def test_settings_that_cannot_be_met_are_one_line(encoders, records, tmp_path):
    config = fingerprint.get_config()
    config.encoder, config.data.directory = str(encoders), str(records)
    with pytest.raises(ValueError, match=r"needs 400 records of .*, only 9 can be found:"):
        fingerprinting(config, tmp_path)
    with pytest.raises(ValueError, match="unknown preset 'foly': use one of foley, real"):
        fingerprint.get_config("foly")
    for preset in ("foley", "real", "vggsound"):
        config = fingerprint.get_config(preset)
        assert FingerprintSettings(**config.index.to_dict()) == FingerprintSettings()
        assert set(config.baselines) == set(BASELINES)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"families": ("flip", "mirror")}, "families has mirror, not among"),
        ({"families": ("truncation",)}, "families has truncation alone"),
        ({"baselines": ("image_hush",)}, "baselines has image_hush, not among"),
        ({"index.time_bins": 0}, "time_bins 0 must be at least 1"),
        ({"data.audio_files": "absent"}, "absent"),
        ({"data.audio_clips.fillers": 9}, "the protocol needs 13 recordings, only 1 can be found"),
    ],
)
def test_settings_are_checked_before_anything_is_decoded(
    encoders, records, tmp_path, monkeypatch, overrides, said
):
    monkeypatch.setattr(protocol, "segments_of_files", None)
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    config = fingerprint.get_config("real")
    config.update_from_flattened_dict(benchmark._SMALL | benchmark._SMALL_REAL)
    for name in ("films", "sounds"):
        (tmp_path / name).mkdir()
    (tmp_path / "films" / "a.mp4").touch()
    (tmp_path / "sounds" / "1-1-A-0.ogg").touch()
    config.encoder, config.data.directory = str(encoders), str(records)
    config.data.files, config.data.audio_files = str(tmp_path / "films"), str(tmp_path / "sounds")
    config.update_from_flattened_dict(overrides)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        fingerprinting(config, tmp_path / "w")


def test_listing_the_clips_of_records_reads_no_record(records, monkeypatch):
    dataset = RecordDataset(records, "test")
    sources = [dataset[n].source_id for n in range(4)]
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    clips = benchmark_clips.clips_of_records(dataset)[:4]
    # Videos are told apart as the records' sources are.
    assert len({clip.video for clip in clips}) == len(set(sources))


def test_decoded_files_are_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    decoded = []

    def decode(path: Path, **_: object) -> DecodedMedia:
        decoded.append(path.name)
        return clip(0)

    monkeypatch.setattr(benchmark_clips, "decode_media", decode)
    paths = [tmp_path / name for name in "ab"]
    settings = {"segment_seconds": 2.0, "short_side": 32, "max_fps": 10.0, "sample_rate_hz": 8000}
    size = clip(0).frames.nbytes + clip(0).waveform.nbytes
    for room, expected in ((3 * size, "ab"), (size + 1, "ababa"), (1, "ababa")):
        decoded.clear()
        monkeypatch.setattr(benchmark_clips, "_BYTES", room)
        segments, _ = benchmark_clips.segments_of_files(paths, **settings)
        for segment in (*segments, segments[0]):  # one file after the other, then back
            segment.load()
        assert "".join(decoded) == expected


def test_files_are_cut_into_segments_or_named_with_a_reason(tmp_path):
    write_clip(tmp_path / "long.mp4", 70)
    (tmp_path / "text.mp4").write_text("no film")
    # Its sound ends before the second segment, which has none.
    write_clip(tmp_path / "quiet.mp4", 70, sound_seconds=2.5)
    # In the second segment only dither sounds, or there is nothing at all; from a quarter of a
    # second before it, as the coding of sound spreads it.
    film, black = synthetic.clip(0, 2.75), synthetic.leader(3.25)
    synthetic.write(tmp_path / "black.mkv", joined([film, black]))
    dither = np.arange(len(black.waveform), dtype=np.int16) % 2
    later = dataclasses.replace(synthetic.clip(1, 3.25), waveform=dither)
    synthetic.write(tmp_path / "dither.mkv", joined([film, later]))
    write_clip(tmp_path / "tiny.mp4", 70, side=8)
    settings = {"segment_seconds": 3.0, "short_side": 32, "max_fps": 10.0, "sample_rate_hz": 16_000}
    segments, unused = benchmark_clips.segments_of_files(sorted(tmp_path.iterdir()), **settings)
    assert [s.name for s in segments] == [
        *("black.mkv@0s", "black.mkv@3s", "dither.mkv@0s", "dither.mkv@3s"),
        *("long.mp4@0s", "long.mp4@3s"),
        *("quiet.mp4@0s", "quiet.mp4@3s"),
    ]
    assert {s.video for s in segments} == {"black.mkv", "dither.mkv", "long.mp4", "quiet.mp4"}
    assert list(unused) == ["text.mp4", "tiny.mp4"]
    heard = [s.load().has_audio for s in segments]
    assert heard == [True, False, True, False, True, True, True, False]
    with_content = [name for name, _ in benchmark_clips.not_empty_clips(segments, unused)]
    assert with_content == [s.name for s in segments if s.name != "black.mkv@3s"]
    assert list(unused) == ["text.mp4", "tiny.mp4", "black.mkv@3s"]
    media = segments[5].load()
    assert media.duration_seconds == pytest.approx(3.0, abs=0.11)
    assert media.frames.shape[1:3] == (32, 32)
    white = media.frame_seconds[media.frames.mean(axis=(1, 2, 3)) > 200]
    np.testing.assert_allclose(white, [0.0, 1.0, 2.0], atol=0.01)


def test_clips_of_the_preset_are_not_the_demos(tmp_path):
    data = fingerprint.get_config("foley").data
    few = data.prepare.replace("--test=400", "--test=2").split("foley_fingerprint ")[1].split()
    run(["demo", f"--out={tmp_path / 'other'}", *few, "--workers=1"], module="avcl_jax.data_prep")
    options = ("--train=2", "--test=2", "--null=0", "--workers=1")
    run(["demo", f"--out={tmp_path / 'demo'}", *options], module="avcl_jax.data_prep")
    made = RecordDataset(tmp_path / "other" / "records", data.split)
    audio = {made[n].waveform.tobytes() for n in range(2)}
    for split in ("train", "test"):
        demo = RecordDataset(tmp_path / "demo" / "records", split)
        assert demo.fingerprint != made.fingerprint
        assert not audio & {demo[n].waveform.tobytes() for n in range(2)}

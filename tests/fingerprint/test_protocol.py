"""The fingerprinting protocol and its benchmark from the command to the report."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcl_jax.data.record_metadata import write_dataset_metadata
from avcl_jax.data.records import shard_name, write_shard
from avcl_jax.evaluation.fingerprint_clips import clips_of_records, segments_of_files
from avcl_jax.evaluation.fingerprinting import fingerprinting
from avcl_jax.evaluation.protocol import read_outcomes
from avcl_jax.fingerprint.settings import FingerprintSettings
from benchmarks import fingerprint as benchmark
from configs import fingerprint
from tests.data.synthetic_media import write_flash_and_click
from tests.data.synthetic_records import make_record


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("records")
    splits = {"test": range(5), "train": range(10, 16)}
    shards = {
        name: [
            write_shard(
                directory / shard_name("small", name, 0, 1),
                [make_record(n, seconds=4.0, side=24) for n in numbers],
            )
        ]
        for name, numbers in splits.items()
    }
    names = {label: [str(n) for n in range(5)] for label in ("motion", "material")}
    write_dataset_metadata(directory, name="small", class_names=names, splits=shards)
    return directory


def here(target: str, arguments: dict[str, Any], **_: Any) -> Any:
    """What `run_child` does, in this process."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def test_rows_of_the_benchmark_and_the_report_beside_them(
    encoders: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "run_child", here)
    monkeypatch.setattr(benchmark, "need", lambda _: None)  # baselines may be left out here
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
    assert benchmark.main(arguments) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["real_fused_r1"]["value"] is None
    assert "--media" in rows["real_fused_r1"]["detail"]["skipped"]
    results = json.loads((tmp_path / "runs" / "foley" / "results.json").read_text())
    assert rows["foley_fused_r1"]["value"] == results["metrics"]["fused_r1"]["value"]
    assert rows["foley_fused_r1"]["detail"]["queries"] == 3
    # Without its sound a clip is not found by it; unchanged, a picture is found by any weights.
    families = results["details"]["tables"]["audio"]["medium"]
    assert families["audio_removed"]["r1"] == 0.0
    assert families["flip"]["r1"] == 1.0
    assert results["details"]["tables"]["video"]["medium"]["audio_removed"]["r1"] == 1.0
    assert set(results["details"]["tables"]["fused"]) == {"weak", "medium", "strong"}
    report = (tmp_path / "runs" / "foley" / "report.html").read_text()
    for words in ("R@1 by family, medium strength", "audio removed", "data:image/jpeg;base64"):
        assert words in report
    kept = read_outcomes(tmp_path / "runs" / "foley" / "outcomes.npz")
    assert set(kept.sources) <= {f"source {n}" for n in (0, 1, 2, 3, 10, 11)}
    assert kept.values["findable"].mean() == 0.5
    capsys.readouterr()
    assert benchmark.main(arguments) == 0
    assert "already holds these results" in capsys.readouterr().out


def test_settings_that_cannot_be_met_are_one_line(encoders: Path, records: Path, tmp_path) -> None:
    config = fingerprint.get_config()
    config.encoder, config.data.directory = str(encoders), str(records)
    with pytest.raises(ValueError, match="has 6 records in 'train', the protocol needs 100"):
        fingerprinting(config, tmp_path)
    with pytest.raises(ValueError, match="unknown preset 'foly': use one of foley, real"):
        fingerprint.get_config("foly")
    with pytest.raises(ValueError, match="needs 7"):
        clips_of_records(str(records), "train", 4, first=3)


def test_files_are_cut_into_segments_or_named_with_a_reason(tmp_path: Path) -> None:
    written = {
        "video_codec": "libx264",
        "audio_codec": "aac",
        "frame_times": np.arange(70) / 10,
        "sound_seconds": 7.0,
    }
    write_flash_and_click(tmp_path / "long.mp4", **written)
    (tmp_path / "text.mp4").write_text("no film")
    # Its sound ends before the second segment, which has none.
    write_flash_and_click(tmp_path / "quiet.mp4", **{**written, "sound_seconds": 2.5})
    write_flash_and_click(tmp_path / "tiny.mp4", **written, side=8)
    segments, unused = segments_of_files(
        sorted(tmp_path.iterdir()),
        segment_seconds=3.0,
        short_side=32,
        max_fps=10.0,
        sample_rate_hz=16_000,
    )
    assert [s.name for s in segments] == [
        *("long.mp4@0s", "long.mp4@3s"),
        *("quiet.mp4@0s", "quiet.mp4@3s"),
    ]
    assert {s.video for s in segments} == {"long.mp4", "quiet.mp4"}
    assert list(unused) == ["text.mp4", "tiny.mp4"]
    assert [s.load().has_audio for s in segments] == [True, True, True, False]
    media = segments[1].load()
    assert media.duration_seconds == pytest.approx(3.0, abs=0.11)
    assert media.frames.shape[1:3] == (32, 32)
    white = media.frame_seconds[media.frames.mean(axis=(1, 2, 3)) > 200]
    np.testing.assert_allclose(white, [0.0, 1.0, 2.0], atol=0.01)


@pytest.mark.parametrize("preset", ["foley", "real", "vggsound"])
def test_presets_name_settings_of_the_index_and_baselines_that_exist(preset: str) -> None:
    config = fingerprint.get_config(preset)
    assert FingerprintSettings(**config.index.to_dict()) == FingerprintSettings()
    for name in config.baselines:
        module, _, attribute = name.partition(":")
        path = Path(benchmark.__file__).parents[1] / (module.replace(".", "/") + ".py")
        assert f"class {attribute}:" in path.read_text()

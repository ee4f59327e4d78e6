"""Tools of the benchmarks, and equal results of the alternatives that they compare."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import types
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from av.video.reformatter import VideoReformatter

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data import rendering as data_rendering
from avcl_jax.data.augment import SpectralSpec
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import RecordDataset, shard_name
from avcl_jax.data.views import BACKWARD, FORWARD, Clip, frame_indices
from avcl_jax.errors import UserError
from avcl_jax.objectives import feature_bank
from avcl_jax.training import inputs
from avcl_jax.training.run_steps import STEPS_AHEAD
from benchmarks import (
    audio_settings,
    bank,
    bank_benefit,
    esc10,
    footage,
    jpeg_quality,
    measure,
    on_gpu,
    preparation,
    record_features,
    rendering,
    scale,
    startup,
    steps,
)
from benchmarks.baselines import pyav_dataloader
from benchmarks.batches import complete_views
from benchmarks.formats import FORMATS
from benchmarks.measure import (
    ChildError,
    Row,
    SkipError,
    Target,
    interleave,
    need,
    peak_growth_bytes,
    ratio,
    report,
    run_child,
    run_command,
)
from tests.data.synthetic_records import make_record, write_shard
from tests.evaluation.labelled import write_encoders
from tests.fingerprint import synthetic


def test_targets_in_both_directions() -> None:
    assert [Target(">=", 2).met(value) for value in (1.9, 2, 2.1)] == [False, True, True]
    assert [Target("<=", 2).met(value) for value in (1.9, 2, 2.1)] == [True, True, False]


def test_measurements_take_turns_and_the_turns_alternate() -> None:
    order = []
    measured = {name: lambda name=name: float(len(order.append(name) or order)) for name in "ab"}
    values = interleave(measured, repeats=3)
    assert "".join(order) == "abbaab"
    assert values == {"a": [1, 4, 5], "b": [2, 3, 6]}
    value, detail = ratio(values, "a", "b", quantity="seconds")
    assert value == 4 / 3
    assert detail["seconds_a"] == {"median": 4, "all": [1, 4, 5]}


def test_rows_as_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("fast", 2.5, "ratio", Target(">=", 2), {"interval": [2.25, 2.75]}),
        Row("large", 3.0, "GB", Target("<=", 2), {"parts": [1, 2]}),
        Row("absent", None, "s", Target("<=", 1), {"skipped": "no such machine"}),
        Row("reported", 7.0, "bytes"),
    ]
    report(tmp_path / "new" / "rows.json", rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["met", "MISSED", "SKIPPED"]
    assert "2.25 to 2.75" in lines[1]
    assert "no such machine" in lines[4]
    stored = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [row["value"] for row in stored] == [2.5, 3.0, None, 7.0]
    assert [row["target"] for row in stored] == [">= 2", "<= 2", "<= 1", "report"]
    assert stored[0]["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert stored[1]["detail"] == {"parts": [1, 2]}


def test_children_run_on_their_cores_and_report_failures() -> None:
    first = sorted(os.sched_getaffinity(0))[:1]
    assert run_child("tests.benchmark_children:cores", {}, cores=first) == first
    with pytest.raises(ChildError, match="ValueError: because of this"):
        run_child("tests.benchmark_children:fail", {"message": "because of this"})
    with pytest.raises(UserError, match=r"^no run at runs/x$"):
        run_child("tests.benchmark_children:refuse", {"message": "no run at\nruns/x"})


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (bank, ["--json=/proc/rows.json"], "argument --json: /proc/rows.json: No such file"),
        (bank, ["--rows=speed"], "argument --rows: invalid choice: 'speed'"),
        (startup, ["--demo=absent"], "absent does not exist: avcl-data demo"),
        (esc10, ["--records=absent"], "absent does not exist: see the first command"),
        (jpeg_quality, ["--run=absent"], "does not exist: run `make demo`"),
        (record_features, ["absent", "--encoder=absent"], "absent/export/video"),
    ],
)
def test_user_errors_are_one_line_without_traceback(
    module: Any,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(module.main, ["--json=rows.json", *arguments])
    assert ended.value.code
    printed = capsys.readouterr().err
    last = printed.splitlines()[-1]
    assert f"{module.__name__}: error: " in last
    assert said in last
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_missing_package_skips_a_row_with_the_command_that_installs_it() -> None:
    need("numpy")
    with pytest.raises(SkipError, match=r"pip install -r benchmarks/requirements\.txt"):
        need("no_such_package")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A GPU that fits 128 clips of ours and 64 of PyTorch's; returns the runs on it."""
    runs = []

    def run(target: str, arguments: dict[str, Any], *, limit_s: float) -> Any:
        assert 0 < limit_s <= 0.42 * 60  # agreement and PyTorch have 42 % of the time
        batch, ours = arguments["batch"], "pytorch" not in target
        assert (arguments["dtype"], arguments["steps"]) == ("bfloat16", 20)
        assert ours or arguments["device"] == "cuda"
        runs.append((target, batch))
        if batch > (128 if ours else 64):
            raise ChildError(
                "XlaRuntimeError: RESOURCE_EXHAUSTED" if ours else "CUDA out of memory"
            )
        return [0.2 if ours else 0.5 if arguments["compiled"] else 0.6]

    monkeypatch.setattr(measure, "run_child", run)
    monkeypatch.setattr(measure, "need", lambda _: None)
    return runs


def _run_on_h200() -> on_gpu.Run:
    return on_gpu.Run(seconds=60, small=False, gpu="NVIDIA H200")


def test_the_step_on_a_gpu_at_the_largest_batch_that_fits_both(gpu: list[tuple[str, int]]) -> None:
    value, detail = _run_on_h200().row("pytorch", "step_over_pytorch_gpu")
    assert (value, detail["batch"], detail["better"]) == (2.5, 64, "compiled")
    assert [batch for _, batch in gpu] == [256, 128, 128, 64, 64, 64]


def test_only_an_out_of_memory_error_halves_the_batch(
    gpu: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(target: str, arguments: dict[str, Any], **_: Any) -> Any:
        gpu.append((target, arguments["batch"]))
        raise ChildError("no kernel image is available")

    monkeypatch.setattr(measure, "run_child", run)
    measured = _run_on_h200()
    for _ in range(2):  # the part has failed, and is not tried again
        with pytest.raises(SkipError, match="no kernel image"):
            measured.row("pytorch", "step_over_pytorch_gpu")
    assert [batch for _, batch in gpu] == [256]


def test_a_gpu_is_compared_with_its_own_peak() -> None:
    assert _run_on_h200().peak_share(98.9e12, 0.2) == pytest.approx(0.5)
    with pytest.raises(SkipError, match="peak of NVIDIA B1 is unknown"):
        on_gpu.Run(seconds=60, small=False, gpu="NVIDIA B1").peak_share(1.0, 1.0)


def test_a_process_ends_at_its_time_limit() -> None:
    with pytest.raises(ChildError, match="subprocess:run took longer than 1 s"):
        run_child("subprocess:run", {"args": ["sleep", "600"]}, limit_s=1)


def test_kernels_are_those_of_the_streams_of_a_gpu(tmp_path: Path) -> None:
    def named(thread: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": "thread_name", "pid": 1, "tid": thread, "args": {"name": name}}

    def event(thread: int, name: str, microseconds: float) -> dict[str, Any]:
        return {"ph": "X", "pid": 1, "tid": thread, "name": name, "ts": 0, "dur": microseconds}

    # A row of XLA's operations shows the same time again.
    events = [named(7, "Stream #7(Compute)"), named(8, "XLA Ops"), event(8, "fusion", 9e6)]
    events += [event(7, "conv", 2e6), event(7, "conv", 1e6), event(7, "norm", 5e5)]
    path = tmp_path / "plugins" / "host.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert on_gpu.kernel_seconds(tmp_path) == {"conv": 3.0, "norm": 0.5}


@pytest.mark.slow
def test_all_that_a_borrowed_gpu_is_asked_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as ended:
        run_command(on_gpu.main, ["--small", "--minutes=60", f"--json={path}"])
    assert ended.value.code == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    skipped = {name for name, row in rows.items() if row["value"] is None}
    # What a CPU has not.
    assert skipped == {"step_over_pytorch_gpu", "gpu_step_memory_over_estimate"}
    # The CPU is compared with itself.
    assert rows["gpu_gradient_error_ratio"]["value"] == 1.0
    errors = rows["gpu_gradient_error_ratio"]["detail"]
    assert errors["gpu_float32"] == 0.0
    assert 0.001 < errors["gpu_bfloat16"] < 0.2
    assert rows["gpu_demo_loss_last_over_first"]["value"] < 1.0
    assert 0 < rows["gpu_step_top_kernels_share"]["value"] <= 1.0


def test_flops_of_the_encoder_that_is_timed() -> None:
    # 40.52 G multiplications forward, as torchvision publishes, and nothing back to the pixels.
    assert steps.encoder_flops() == pytest.approx(3 * 2 * 40.52e9, rel=0.01)


def test_neighbours_differ_unless_rounding_can_exchange_them(tmp_path: Path) -> None:
    scores = np.array([[0.9, 0.8, 0.5], [0.7, 0.6, 0.6]], np.float32)
    found = {
        "ours": [[4, 2, 7], [1, 3, 5]],
        "last": [[4, 2, 9], [1, 5, 6]],  # the last one, or ties with it, may differ
        "wrong": [[4, 8, 7], [1, 3, 5]],
    }
    for name, rows in found.items():
        np.savez(tmp_path / name, scores=scores, rows=np.array(rows))
    counts = {
        name: bank.differing_neighbours(str(tmp_path / "ours.npz"), str(tmp_path / f"{name}.npz"))
        for name in found
    }
    assert counts == {"ours": 0, "last": 0, "wrong": 1}


def test_features_of_a_record_are_compared_with_those_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        synthetic.write(media / f"{number}.mp4", synthetic.clip(number, 2.0))
    (media / "note.mp4").write_text("no film")
    write_encoders(tmp_path / "run" / "export")
    kept: dict[str, dict[str, tuple[np.ndarray, np.ndarray, float | None]]] = {}
    measure = record_features.measure

    def keeping(path: Path, *arguments: Any) -> Any:
        return kept.setdefault(path.name, measure(path, *arguments))

    monkeypatch.setattr(record_features, "measure", keeping)
    encoder, rows = f"--encoder={tmp_path / 'run'}", tmp_path / "rows.json"
    record_features.main([str(media), encoder, f"--json={rows}"])
    values = {row["name"]: row["value"] for row in json.loads(rows.read_text())}
    assert sorted(kept) == ["0.mp4", "1.mp4", "2.mp4"]

    def angle(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.dot(first, second) / np.sqrt(np.dot(first, first) * np.dot(second, second)))

    for modality in ("video", "audio"):
        of_file, of_record = (
            [kept[name][modality][side].astype(np.float64) for name in sorted(kept)]
            for side in (0, 1)
        )
        own = [list(map(angle, *pair)) for pair in zip(of_file, of_record, strict=True)]
        for number, cosines in enumerate(own):
            assert values[f"{modality} {number}.mp4"] == pytest.approx(np.mean(cosines), abs=1e-5)
        everything = [cosine for cosines in own for cosine in cosines]
        assert values[f"{modality}: lowest clip"] == pytest.approx(min(everything), abs=1e-5)
        assert max(everything) < 1  # a record is not its file
        # A clip of another file is less similar.
        wrong = [angle(of_file[n].mean(0), of_record[n - 1].mean(0)) for n in range(3)]
        assert max(wrong) < min(everything)


def test_positives_of_an_oracle_have_the_given_purity() -> None:
    config = pretrain.get_config("demo")
    config.bank.update({"size": 256, "num_positives": 4, "num_negatives": 64})
    sampling = experiment.bank_sampling(config)
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 8, 160)  # of sources; the bank has 0 to 127
    bank_ = feature_bank.create(256, 4, jnp.float32, labels=1)

    def views(video, sources):
        embeddings = {"video": jnp.asarray(video, jnp.float32)}
        embeddings["audio"] = -embeddings["video"]
        made = complete_views(embeddings, jnp.asarray(sources), playbacks=1, labels=1)
        return made._replace(label=jnp.asarray(classes[sources, None]))

    for batch in range(4):
        sources = np.arange(32 * batch, 32 * batch + 32)
        video = np.broadcast_to(sources[:, None, None], (32, 2, 4))
        bank_ = feature_bank.insert(bank_, views(video, sources))
    sources = np.arange(112, 144)  # half of them are in the bank
    anchors = views(rng.normal(size=(32, 2, 4)), sources)
    term = ("video", "audio")
    draw = functools.partial(
        bank_benefit.oracle(classes, 0.6, feature_bank.sample),
        bank_,
        views=anchors,
        term=term,
        terms=(term,),
        sampling=sampling,
    )
    drawn = [draw(jax.random.key(k), active=True) for k in range(12)]
    positives, negatives = jax.tree.map(lambda *values: np.stack(values), *drawn)
    own = np.broadcast_to(sources[:, None, None], positives.mask.shape)
    assert positives.mask.all()
    same = positives.numbers.label[..., 0] == classes[own]
    # 3,072 positives: three standard errors are 0.027.
    assert same.mean() == pytest.approx(0.6, abs=0.027)
    source = positives.numbers.source_id
    assert (source != own).all()
    np.testing.assert_array_equal(positives.embeddings[..., 0], -source)
    assert negatives.mask.mean() > 0.8
    clash = negatives.numbers.source_id[..., None] == source[..., None, :]
    assert not (clash.any(-1) & negatives.mask).any()
    assert not draw(jax.random.key(0), active=False).positives.mask.any()


def test_variants_of_level_have_their_effect() -> None:
    rng = np.random.default_rng(0)
    spec = experiment.render_spec(pretrain.get_config("esc10"))
    waveform = (rng.integers(-900, 900, 80_000) + 100).astype(np.int16)
    quiet = dataclasses.replace(make_record(0, seconds=5.0, has_video=False), waveform=waveform)
    loud = dataclasses.replace(quiet, waveform=(5 * quiet.waveform).astype(np.int16))

    def spectrogram(record: Any, name: str) -> np.ndarray:
        with audio_settings.rendered_as(audio_settings.VARIANTS[name]):
            return data_rendering.render_audio(record, Clip(1.0, 1, BACKWARD), spec)[0]

    usual = spectrogram(quiet, "full")
    assert spectrogram(loud, "full").mean() - usual.mean() > 0.5
    equal = spectrogram(quiet, "files_of_equal_power")
    np.testing.assert_allclose(spectrogram(loud, "files_of_equal_power"), equal, atol=1e-3)
    powers = np.exp(equal * spec.log_mel.std + spec.log_mel.mean)
    raised = np.exp(usual * spec.log_mel.std + spec.log_mel.mean)
    middle = slice(10, 30)  # bands that neither the constant nor the floor reaches
    gain = (0.1 * 32768 / quiet.waveform.std()) ** 2
    np.testing.assert_allclose(powers[:, middle], gain * raised[:, middle], rtol=0.05)
    removed = spectrogram(quiet, "level_of_views_removed")
    np.testing.assert_allclose(removed, usual - usual.mean(), atol=1e-5)
    assert spectrogram(quiet, "mean_removed_floor_1e-8")[:, 0].mean() < usual[:, 0].mean()


def test_random_gain_moves_whole_views_up_to_its_range() -> None:
    strength = SpectralSpec(equalizer=0.0, equalizer_knots=5, mask_mels=0, noise=0.0)
    with audio_settings.rendered_as(audio_settings.VARIANTS["gain_6_db"]):
        moved = inputs.spectral(jax.random.key(0), jnp.zeros((500, 2, 3, 4)), strength)
    by_view = np.asarray(moved).reshape(1000, 12)
    assert (np.ptp(by_view, axis=1) == 0).all()
    decibels = by_view[:, 0] * pretrain.demo().spectrogram.std * 10 / np.log(10)
    assert (abs(decibels) <= 6).all()
    assert decibels.std() == pytest.approx(12 / np.sqrt(12), rel=0.05)


def test_the_other_view_is_found_if_it_alone_is_nearest() -> None:
    first = np.array([[0.0], [10.0], [20.0], [30.0]])
    second = np.array([[1.0], [9.0], [26.0], [25.0]])
    # The third is nearer to the fourth's; the fourth is as near to both.
    assert audio_settings.finds_other_view(first, second).tolist() == [True, True, False, False]
    assert not audio_settings.finds_other_view(first[:3], np.zeros((3, 1))).any()


def test_growth_of_memory_is_that_during_the_call() -> None:
    # Allocated before the call and not counted: memory in use, and a larger peak.
    kept = np.ones(100_000_000, np.uint8)
    np.ones(400_000_000, np.uint8)
    assert 198e6 < peak_growth_bytes(lambda: np.ones(200_000_000, np.uint8)) < 220e6
    assert kept.all()


def test_the_compared_spectrograms_are_equal() -> None:
    compared = rendering.compare_log_mel(repeats=5)
    assert compared["largest_difference"] < 1e-4
    microseconds = compared["microseconds"]
    assert compared["speedup"] == pytest.approx(
        microseconds["librosa"] / microseconds["ours"], rel=0.01
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_returns_the_requested_frames(name: str) -> None:
    # Each frame has its own grey value, and a gradient that reveals flips.
    height, width, count = 48, 64, 30
    gradient = np.linspace(0, 60, width)[None, :, None]
    frames = np.stack(
        [np.broadcast_to(20 + 5 * n + gradient, (height, width, 3)) for n in range(count)]
    ).astype(np.uint8, order="C")
    stored, size = FORMATS[name].encode(frames)
    assert size > 0
    for wanted in ([0], [29], [3, 4, 5], [0, 7, 13, 14, 29], [11, 12], list(range(30))):
        decoded = FORMATS[name].decode(stored, wanted)
        assert len(decoded) == len(wanted)
        for index, image in zip(wanted, decoded, strict=True):
            assert np.abs(image.astype(int) - frames[index]).mean() < 2, (wanted, index)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("start", "speed"), [(0.0, 0), (1.3, 1), (0.5, 2)])
def test_the_dataloader_decodes_the_same_frames(
    tmp_path: Path, direction: int, start: float, speed: int
) -> None:
    times = np.arange(150) / 25
    path = tmp_path / "a.mp4"

    def grey(number: np.ndarray | int) -> np.ndarray | int:
        return 30 + number * 37 % 190

    side = rendering.SHORT_SIDE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = side
        stream.options = {"g": "40"}
        for number in range(150):  # each frame with its own grey value
            image = np.full((side, side, 3), grey(number), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    clip = Clip(start, speed, direction)
    wanted = frame_indices(clip, times, rendering.VIEWS)
    with av.open(str(path)) as container:
        shown = pyav_dataloader.view_frames(container, clip)
    # Neighbours differ by 37 and more.
    assert np.abs(np.mean(shown, axis=(1, 2, 3)) - grey(wanted)).max() < 9


class Commands:
    """Replaces the commands that benchmarks.esc10 runs.

    A run's training takes as many seconds as it has steps; a fold's accuracy is the percentage
    of its number, one fold further for an encoder of more steps.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, Path, dict[str, str]]] = []

    def __call__(self, config: str, workdir: Path, records: Path, *options: str) -> None:
        settings = dict(option.removeprefix("--config.").split("=", 1) for option in options)
        self.given.append((config, workdir, settings))
        workdir.mkdir(parents=True, exist_ok=True)
        if config == "pretrain":
            line = {"train_seconds": int(settings.get("steps", 60))}
            (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            return
        further = int("/long600/" in settings["encoder"])
        seed = int(settings["seed"])
        metrics = {"top1": {"value": 0.9 + seed / 100, "low": 0.85, "high": 0.95}}
        others = {"random": 0.7, "mfcc_rbf": 0.6, "log_mel_rbf": 0.8, "log_mel_linear": 0.75}
        metrics |= {f"top1_{name}": {"value": value} for name, value in others.items()}
        by_fold = [int(fold) / 100 + further for fold in esc10.FOLDS]
        splits = [{"chosen": {"encoder": {"top1": value}}} for value in by_fold]
        found = {"metrics": metrics, "encoder": {"step": 60}, "details": {"splits": splits}}
        (workdir / "results.json").write_text(json.dumps(found))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(esc10, "_main", made)
    return made


def test_each_fold_of_esc_has_an_encoder_trained_without_it(
    commands: Commands, tmp_path: Path
) -> None:
    found = esc10.folds_rows(tmp_path, tmp_path / "records", [0, 2], options=["--config.steps=50"])
    rows = {row.name: row for row in found}
    trained = {
        str(workdir.relative_to(tmp_path)): (settings["data.select"], settings["seed"])
        for config, workdir, settings in commands.given
        if config == "pretrain"
    }
    assert trained == {
        f"seed{seed}/fold{fold}": (f"fold!={fold}", str(seed))
        for seed in (0, 2)
        for fold in (1, 2, 3, 4, 5)
    }
    encoders = [
        settings["encoder"] for config, _, settings in commands.given if config == "linear_probe"
    ]
    assert encoders == [f"{tmp_path}/seed{seed}/fold{{fold}}" for seed in (0, 2)]
    assert not any("allow_trained_on" in name for *_, given in commands.given for name in given)
    assert rows["esc10_accuracy"].value == pytest.approx(0.91)
    assert rows["esc10_over_random"].value == pytest.approx(0.21)
    assert rows["esc10_over_classical"].value == pytest.approx(0.11)
    # Only pretraining gets the setting.
    assert {settings.get("steps") for config, _, settings in commands.given} == {"50", None}
    assert rows["esc10_pretraining_minutes"].value == pytest.approx(50 / 60)


@pytest.mark.parametrize("own", [True, False])
def test_views_of_a_file_are_compared_by_the_encoder_trained_without_it(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"fold": list(esc10.FOLDS)}
    records = [
        dataclasses.replace(make_record(n, seconds=5.0, has_video=False), labels={"fold": n % 5})
        for n in range(15)
    ]
    shard = write_shard(tmp_path / shard_name("esc10", "all", 0, 1), records)
    write_dataset_metadata(tmp_path, name="esc10", class_names=names, splits={"all": [shard]})

    def hits(run: Any, usable: Any) -> dict[str, np.ndarray]:
        folds = np.array([usable[n][1].labels["fold"] for n in range(len(usable))])
        return {
            "other_view": (folds == esc10.FOLDS.index(run.path.name.removeprefix("fold"))) == own
        }

    spec = experiment.render_spec(pretrain.get_config("esc10"))
    monkeypatch.setattr(
        esc10.PretrainedRun, "load", lambda run: types.SimpleNamespace(spec=spec, path=run)
    )
    monkeypatch.setattr(esc10, "other_view_hits", hits)
    row = esc10.own_file_row(tmp_path / "runs", tmp_path, [0, 1])
    assert row.value == own
    assert row.detail == {"other_view": [own, own], "chance": pytest.approx(1 / 15)}


def test_a_longer_run_on_esc_and_the_usual_one_are_tested_on_its_fold_alone(
    commands: Commands, tmp_path: Path
) -> None:
    row = esc10.long_row(tmp_path, tmp_path / "records", steps=600, fold="3")
    assert row.value == 1.03
    assert row.detail == {"fold": "3", "steps": 600, "minutes": 10, "of_usual_length": 0.03}
    trained = [settings for config, _, settings in commands.given if config == "pretrain"]
    assert [settings["data.select"] for settings in trained] == ["fold!=3", "fold!=3"]
    longer, usual = trained
    assert (longer["steps"], longer["bank.warmup_steps"]) == ("600", "360")
    assert set(usual) == {"data.select", "seed"}


def test_linked_records_have_sources_of_their_own(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    records = [dataclasses.replace(make_record(n, seconds=1.0), labels={"take": 0}) for n in (0, 1)]
    info = write_shard(made / shard_name(footage.NAME, "train", 0, 1), records)
    names = {"take": ["a"]}
    write_dataset_metadata(made, name=footage.NAME, class_names=names, splits={"train": [info]})
    RecordDataset(made, "train")  # makes the index
    linked = RecordDataset(footage.link_records(made, tmp_path / "linked", count=5), "train")
    assert len(linked) == 6
    assert len(set(linked.source_numbers.tolist())) == 6
    assert linked[5].frames == records[1].frames


def test_workers_share_the_memory_of_four_batches() -> None:
    assert 3 <= scale.batches_in_memory(held=STEPS_AHEAD, workers=3, count=20) <= 4


def test_growth_is_that_after_the_first_sixth_whatever_a_save_needs() -> None:
    hours = np.arange(0, 1, 1 / 3600)
    megabytes = 800 * (1 + 0.02 * hours) - 500 * np.exp(-hours / 0.01)  # as it starts
    megabytes[::30] += 200  # as it saves
    growth, curve = scale.growth_per_hour(3600 * hours, megabytes)
    assert growth == pytest.approx(2, rel=0.01)
    assert len(curve) == 60
    flat, _ = scale.growth_per_hour(3600 * hours, megabytes - 16 * hours)
    assert flat == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_every_row_of_scale_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The children compile longer than they run.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    out = tmp_path / "rows.json"
    options = [f"--json={out}", f"--data={tmp_path}", "--small", "--minutes=0.2"]
    scale.main([*options, "--rows", *scale._ROWS])
    rows = {row["name"]: row["value"] for row in json.loads(out.read_text())}
    assert set(rows) == set(scale._ROWS)
    assert all(np.isfinite(value) for value in rows.values())
    assert rows["requests_per_record"] == 1
    assert 3 <= rows["shm_batches_in_flight"] <= 4


@pytest.mark.parametrize("planes", [False, True], ids=["rgb", "planes"])
def test_both_routes_of_preparation_show_the_colours_of_bt601(planes: bool) -> None:
    """Halves of two colours in limited range, scaled to odd sizes."""
    yuv = np.full((96, 128), 128, np.uint8)  # chroma 128: grey
    yuv[:64, :64], yuv[:64, 64:] = 235, 81  # white; red by its luma
    chroma = yuv[64:].reshape(2, 32, 64)
    chroma[0, :, 32:], chroma[1, :, 32:] = 90, 240
    frame = av.VideoFrame.from_ndarray(yuv, format="yuv420p")
    data = preparation.encode(frame, (85, 43), VideoReformatter(), planes=planes)
    image = simplejpeg.decode_jpeg(data)
    assert image.shape == (43, 85, 3)
    np.testing.assert_allclose(image[5:-5, 5:30].astype(int), 255, atol=3)
    np.testing.assert_allclose(image[5:-5, 55:-5].astype(int) - [254, 0, 0], 0, atol=4)

"""The foley generator: same files for any worker count, real codecs, in sync, no give-aways."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.foley import command
from avcl_jax.data_prep.foley.audio import render_audio
from avcl_jax.data_prep.foley.material import draw_response
from avcl_jax.data_prep.foley.scene import (
    DECAY_SECONDS,
    MATERIALS,
    MOTIONS,
    SAMPLE_RATE_HZ,
    VIDEO_FPS,
    Scene,
    classes_of,
    draw_scene,
)
from avcl_jax.data_prep.foley.video import marks, render_video

COUNTS = {"train": 3, "test": 2, "null_train": 3, "null_test": 1}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small collection, written by one process."""
    out = tmp_path_factory.mktemp("foley") / "media"
    command.write_collection(out, COUNTS, seed=3, workers=1)
    return out


def _decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = [f.to_ndarray()[0] for f in container.decode(audio=0)]
    return np.stack(frames), np.concatenate(sound)


def test_two_workers_write_the_same_files(collection: Path, tmp_path: Path) -> None:
    command.write_collection(tmp_path, COUNTS, seed=3, workers=2)
    names = sorted(str(p.relative_to(collection)) for p in collection.rglob("*.*"))
    assert len([n for n in names if n.endswith(".mp4")]) == sum(COUNTS.values())
    for name in names:
        assert (tmp_path / name).read_bytes() == (collection / name).read_bytes(), name


def test_another_seed_split_or_index_is_another_video() -> None:
    waves = [
        render_audio(draw_scene(*key))[:SAMPLE_RATE_HZ]
        for key in ((0, "train", 0), (1, "train", 0), (0, "test", 0), (0, "train", 1))
    ]
    correlation = np.abs(np.corrcoef(waves) - np.eye(len(waves)))
    assert correlation.max() < 0.5


def test_files_are_h264_and_aac_and_complete(collection: Path) -> None:
    for path in sorted(collection.rglob("*.mp4")):
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate) == (64, 64, VIDEO_FPS)
            assert (audio.rate, audio.channels) == (SAMPLE_RATE_HZ, 1)
            assert all(packet.is_keyframe for packet in container.demux(video) if packet.size)
        frames, sound = _decode(path)
        assert 8.0 <= len(frames) / VIDEO_FPS <= 10.0
        # The last AAC packet may be filled up, nothing may be missing.
        assert 0 <= len(sound) - len(frames) / VIDEO_FPS * SAMPLE_RATE_HZ < 1024


def test_no_silence_and_no_fade_at_either_end(collection: Path) -> None:
    for path in sorted(collection.rglob("*.mp4")):
        frames, sound = _decode(path)
        sound = sound[: len(frames) * SAMPLE_RATE_HZ // VIDEO_FPS]
        blocks = sound[: len(sound) // 800 * 800].reshape(-1, 800).std(axis=1)
        assert min(blocks[0], blocks[-1]) > 0.5 * np.percentile(blocks, 2), path
        brightness = frames.mean(axis=(1, 2, 3))
        assert min(brightness[0], brightness[-1]) > 0.6 * np.median(brightness), path


def test_codecs_keep_picture_and_sound(collection: Path) -> None:
    for split, index in (("train", 0), ("test", 1)):
        scene = draw_scene(3, split, index)
        frames, sound = _decode(collection / f"{split}/{split}_{index:05d}.mp4")
        drawn, rendered = render_video(scene), render_audio(scene)
        error = np.mean((frames.astype(float) - drawn) ** 2)
        assert 10 * np.log10(255**2 / error) > 30
        middle = slice(SAMPLE_RATE_HZ, 7 * SAMPLE_RATE_HZ)
        noise = np.mean((sound[middle] - rendered[middle]) ** 2)
        assert 10 * np.log10(np.mean(rendered[middle] ** 2) / noise) > 20


def test_flash_and_contact_coincide(collection: Path) -> None:
    """Onsets of light near the object and of sound line up best without any shift."""
    scores = collections.Counter()
    for split, index in (("train", 0), ("train", 1), ("train", 2), ("test", 0), ("test", 1)):
        frames, sound = _decode(collection / f"{split}/{split}_{index:05d}.mp4")
        step = SAMPLE_RATE_HZ // VIDEO_FPS
        power = np.log(sound[: len(frames) * step].reshape(-1, step).std(axis=1) + 1e-4)
        # Block j of the sound ends where frame j + 1 is taken.
        heard = np.maximum(np.diff(power), 0)[:-1]
        rise = np.maximum(np.diff(frames.astype(float), axis=0), 0).mean(axis=-1)
        seen = np.sort(rise.reshape(len(rise), -1), axis=1)[:, -40:].mean(axis=1)[1:]
        for lag in range(-3, 4):
            pair = (heard[3:-3], np.roll(seen, -lag)[3:-3])
            scores[lag] += np.corrcoef(*pair)[0, 1] / 5
    assert max(scores, key=scores.get) == 0, scores
    assert scores[0] > max(s for lag, s in scores.items() if lag) + 0.1, scores


def test_contacts_are_where_the_object_is_and_where_sound_starts() -> None:
    rises = []
    for index in range(10):
        scene = draw_scene(0, "train", index)
        assert np.all(np.diff(scene.contact_seconds) > 0.15)
        np.testing.assert_allclose(scene.place(scene.contact_seconds), scene.contact_place)
        sound = render_audio(scene)
        for time in scene.contact_seconds:
            at = round(time * SAMPLE_RATE_HZ)
            if 400 < at < len(sound) - 400:
                before, after = sound[at - 320 : at], sound[at : at + 320]
                rises.append(np.log(after.std() / before.std()))
    assert len(rises) > 80
    assert np.mean(np.array(rises) > 0.2) > 0.8


@pytest.mark.parametrize("name", MATERIALS)
def test_a_material_keeps_its_mean_pitch_and_no_more_than_its_loudness(name: str) -> None:
    """What a contact does over time may differ by material, not what is left of it on average."""
    seconds = np.linspace(0, 6, 60_001)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        decay = rng.uniform(*DECAY_SECONDS)
        octaves, amplitude = draw_response(rng, name, decay)
        weight = np.exp(-2 * seconds / decay)
        assert abs(np.sum(weight * octaves(seconds)) / np.sum(weight)) < 1e-3
        assert np.ptp(octaves(seconds)) > 0.5 or name not in ("drop", "drum")
        assert 0 <= amplitude(seconds).min() <= amplitude(seconds).max() <= 1 + 1e-9


def test_the_ring_of_a_contact_shows_its_pitch_and_loudness() -> None:
    """Against the same scene whose contacts are steady: rings of a drop shrink, of a drum grow."""

    def light(scene: Scene, **change: object) -> np.ndarray:
        return marks(dataclasses.replace(scene, **change)).sum(axis=(1, 2))

    seen = collections.Counter()
    for index in range(40):
        scene = draw_scene(0, "train", index)
        first = scene.contact_seconds[scene.contact_seconds > 0][0]
        # One contact alone in the middle, so that no other ring is in the way.
        alone = dataclasses.replace(
            scene,
            contact_seconds=np.array([first]),
            contact_strength=np.array([0.2]),  # a small ring stays inside the picture
            contact_place=np.array([[32.0, 32.0]]),
        )
        after = slice(round(first * VIDEO_FPS) + 5, round(first * VIDEO_FPS) + 9)
        plain = light(alone, octaves=np.zeros_like, amplitude=np.ones_like)[after]
        ratio = light(alone)[after] / plain
        if scene.material == "drop":
            assert np.all(np.diff(ratio) < 0), index
        elif scene.material == "drum":
            assert np.all(np.diff(ratio) > 0), index
        elif scene.material == "bar":
            np.testing.assert_allclose(ratio, 1, rtol=1e-5)
        else:
            assert np.ptp(ratio) > 0.1, index
        seen[scene.material] += 1
    assert min(seen[name] for name in MATERIALS) >= 5, seen


def test_size_binds_pitch_and_energy_binds_loudness() -> None:
    slopes, quieter = [], []
    for index in range(20):
        scene = draw_scene(0, "test", index)
        times = np.array([0.0, scene.duration_seconds])
        slopes.append(np.diff(np.log(scene.pitch_hz(times))) / np.diff(np.log(scene.radius(times))))
        sound = render_audio(scene)
        third = len(sound) // 3
        quieter.append(np.log(sound[-third:].std() / sound[:third].std()))
    np.testing.assert_allclose(slopes, -1.0)
    assert np.mean(np.array(quieter) < -0.2) >= 0.9, quieter


def test_labels_are_balanced_and_independent() -> None:
    for split, count in (("train", 600), ("test", 200)):
        pairs = collections.Counter(classes_of(0, split, index) for index in range(count))
        assert set(pairs.values()) == {count // 25}
        assert len(pairs) == len(MOTIONS) * len(MATERIALS) == 25
    # Not by index: neighbours and different seeds differ.
    assert [classes_of(0, "train", i) for i in range(25)] != [
        classes_of(1, "train", i) for i in range(25)
    ]


def _probe(statistics: list[np.ndarray], labels: list[str]) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return float(np.mean(cross_val_score(model, np.stack(statistics), labels, cv=4)))


def test_trivial_statistics_do_not_tell_the_classes() -> None:
    """Chance is 20 %; the last probe of each class shows that such a probe can see a give-away."""
    scenes = [draw_scene(0, "train", index) for index in range(300)]
    places = [s.place(np.arange(s.num_frames) / VIDEO_FPS) for s in scenes]
    limits = [[0, 64], [0, 64]]
    histograms = [np.histogram2d(*p.T, bins=8, range=limits)[0].ravel() / len(p) for p in places]
    motions = [s.motion for s in scenes]
    assert _probe(histograms, motions) < 0.45
    speeds = [np.percentile(s.speed(), [5, 25, 50, 75, 95]) / s.speed().mean() for s in scenes]
    assert _probe(speeds, motions) > 0.7

    scenes = scenes[:150]
    materials = [s.material for s in scenes]
    spectra, loudness = [], []
    for scene in scenes:
        sound = render_audio(scene)
        blocks = sound[: len(sound) // 250 * 250].reshape(-1, 250)
        power = np.abs(np.fft.rfft(blocks * np.hanning(250), 256)) ** 2
        bands = np.log(np.add.reduceat(power, np.geomspace(1, 120, 24).astype(int), axis=1) + 1e-6)
        spectra.append(bands.mean(axis=0))
        loudness.append(np.array([np.log(sound.std()), bands.mean(), bands.std()]))
    assert _probe(spectra, materials) < 0.4
    assert _probe(loudness, materials) < 0.4
    leaking = [
        s + 3.0 * (m == "gong") - 3.0 * (m == "drum")
        for s, m in zip(spectra, materials, strict=True)
    ]
    assert _probe(leaking, materials) > 0.4

    colours = [render_video(scene).mean(axis=(0, 1, 2)) for scene in scenes[:75]]
    assert _probe(colours, motions[:75]) < 0.4


def test_null_media_are_stationary_after_decoding(collection: Path) -> None:
    """Neighbouring frames are as alike at every speed, forwards and backwards, and so is sound."""
    stills = 0
    for path in sorted(collection.glob("null_*/*.mp4")):
        frames, sound = _decode(path)
        grey = frames.astype(float).mean(axis=-1).reshape(len(frames), -1)
        still = np.array_equal(frames[0], frames[1])
        if still:
            assert np.ptp(frames, axis=0).max() == 0
            stills += 1
        else:
            for step in (1, 2, 4, 8):
                alike = [
                    np.corrcoef(a, b)[0, 1] for a, b in zip(grey[:-8], grey[step:], strict=False)
                ]
                assert abs(np.mean(alike)) < 0.05, (path, step)
        sound = sound[: len(frames) * SAMPLE_RATE_HZ // VIDEO_FPS]
        windows = sound[: len(sound) // 250 * 250].reshape(-1, 250)
        level = np.log(windows.std(axis=1))
        early, late = np.array_split(level, 2)
        assert abs(early.mean() - late.mean()) < 0.1, path
    assert stills == 1  # of every third


def test_manifest_lists_every_file_with_its_labels(collection: Path) -> None:
    with (collection / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert collections.Counter(row["split"] for row in rows) == COUNTS
    assert len({row["id"] for row in rows}) == len({row["source"] for row in rows}) == len(rows)
    for row in rows:
        assert (collection / row["path"]).is_file()
        labels = (row["label_motion"], row["label_material"])
        if row["split"].startswith("null"):
            assert labels == ("", "")
        else:
            assert labels == classes_of(3, row["split"], int(row["id"].rsplit("_")[-1]))


def test_finished_files_are_kept_and_missing_ones_made(tmp_path: Path) -> None:
    counts = {"train": 2}
    command.write_collection(tmp_path, counts, seed=0, workers=1)
    first, second = (tmp_path / f"train/train_0000{i}.mp4" for i in (0, 1))
    kept, made = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    # What an interrupted run leaves is not taken for a file.
    (tmp_path / "train/.train_00001.mp4.1.partial").write_bytes(made[:100])
    command.write_collection(tmp_path, {"train": 3}, seed=0, workers=1)
    assert first.stat().st_mtime_ns == kept
    assert second.read_bytes() == made
    assert (tmp_path / "train/train_00002.mp4").exists()


def test_command_reports_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def status(*arguments: str) -> int:
        return main(["foley", "--out", str(tmp_path / "m"), *arguments])

    assert status("--train=1", "--test=0", "--workers=1") == 0
    assert capsys.readouterr().out.strip().endswith("manifest.csv")
    assert status("--train=1", "--test=0", "--workers=1", "--seed=1") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "choose another --out" in message
    assert json.loads((tmp_path / "m/foley.json").read_text())["seed"] == 0
    assert status("--train=0", "--test=0") == 1
    for option in ("--workers=0", "--seed=-1", "--null=x"):
        with pytest.raises(SystemExit, match="2"):
            status("--train=1", option)

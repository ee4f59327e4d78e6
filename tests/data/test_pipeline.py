"""Pipeline: the same batches whatever runs it, exact positions, true masks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.augment import PhotometricSpec, photometric
from avcl_jax.data.images import Crop, apply_crop, random_crop
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.record_format import is_silent, parse_record
from avcl_jax.data.records import RecordDataset, RecordReader
from avcl_jax.data.render_spec import CropSpec, RenderSpec
from avcl_jax.data.rendering import render_video
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.spectrogram import LogMelSpec, log_mel
from avcl_jax.data.views import BACKWARD, FORWARD, Clip, ViewSpec
from tests.data.synthetic_records import make_record, write_records

VIEWS = ViewSpec(num_frames=8, clip_seconds=0.5, speeds=(1, 2, 4, 8), audio_transform="shared")
MEL = LogMelSpec(16_000, 32, 20, 0.5, 100.0, 7_000.0, 1e-6, -7.0, 3.0)
SPEC = RenderSpec(
    views=VIEWS,
    log_mel=MEL,
    crop=CropSpec(image_size=32, min_area=0.5, flip=True, quarter_turns=False),
    spectrogram_on_device=False,
    modalities="audio_visual",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    records = [make_record(n, seconds=4.5 + n % 3) for n in range(20)]
    records[3] = make_record(3, seconds=5.0, has_audio=False)
    records[7] = make_record(7, seconds=5.0, has_video=False)
    records[11] = dataclasses.replace(records[11], source_id="source 10")
    rng = np.random.default_rng(0)
    for number, start in ((2, 0), (5, 24_000), (8, 40_000)):
        waveform = records[number].waveform.copy()
        # Silence with dither from there on.
        waveform[start:] = rng.integers(-33, 34, len(waveform) - start)
        records[number] = dataclasses.replace(records[number], waveform=waveform)
    records.append(make_record(20, seconds=0.3))
    directory = write_records(tmp_path_factory.mktemp("pipeline") / "records", records)
    return UsableRecords(RecordDataset(directory, "train"), SPEC)


def batches(source, number, **options):
    settings = {"seed": 5, "global_batch_size": 8} | options
    return list(itertools.islice(iter(train_batches(source, SPEC, **settings)), number))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_silent_records_are_not_called_too_short(source):
    audio = UsableRecords(source.records, dataclasses.replace(SPEC, modalities="audio"))
    silent = sum(is_silent(record.waveform) for record in source.records)
    assert silent >= 2
    assert (audio.num_empty, audio.num_too_short) == (silent, 1)
    assert len(audio) == 21 - silent - 1
    assert (source.num_empty, source.num_too_short) == (0, 1)


def test_shapes_dtypes_and_masks(source):
    assert len(source) == 20
    assert source.num_too_short == 1
    seen = {}
    some = 0
    for batch in batches(source, 10):
        assert batch["video"].shape == (8, 2, 8, 32, 32, 3)
        assert batch["video"].dtype == np.uint8
        assert batch["spectrogram"].shape == (8, 2, 32, 20)
        assert batch["spectrogram"].dtype == np.float32
        for name in ("source_id", "record_index", "order", "label_motion", "label_material"):
            assert batch[name].dtype == np.int32
        for row, index in enumerate(batch["record_index"]):
            record = source.records[int(index)]
            seen[record.record_id] = int(batch["source_id"][row])
            assert batch["has_video"][row] == record.has_video
            assert batch["video"][row].any() == record.has_video
            silent = record.record_id in ("record 2", "record 3")
            assert batch["spectrogram"][row].any() != silent
            assert not (silent and batch["has_audio"][row].any())
            partly = record.record_id in ("record 5", "record 8")
            assert batch["has_audio"][row].all() or silent or partly
            some += partly and len(set(batch["has_audio"][row].tolist())) == 2
            assert batch["label_motion"][row] == record.labels["motion"]
    assert some > 0  # of two views of one record one is silent and the other is not
    assert seen["record 10"] == seen["record 11"]
    assert len(set(seen.values())) == 19


def test_every_epoch_shows_every_record_once(source):
    indices = np.concatenate([b["record_index"] for b in batches(source, 5, global_batch_size=4)])
    assert sorted(indices) == sorted(source.indices)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("workers", 1), pytest.param("workers", 4, marks=pytest.mark.slow), ("threads", 5)],
)
def test_same_batches_for_any_number_of_workers_and_threads(source, kind, count):
    expected = batches(source, 5, threads=1)
    for left, right in zip(expected, batches(source, 5, **{kind: count}), strict=True):
        assert_same(left, right)
    assert (batches(source, 1, seed=6)[0]["record_index"] != expected[0]["record_index"]).any()


def test_same_batches_from_frames_of_views_as_from_whole_records(source, monkeypatch):
    expected = batches(source, 5)
    places = []

    @contextlib.contextmanager
    def whole(reader, place):
        places.append(place)
        path = epath.Path(place.shard)
        payload = record_files.read(path, reader.file_format, place.place, where="x")
        yield parse_record(payload, reader.class_names, reader.multilabel, where="x")

    monkeypatch.setattr(RecordReader, "open", whole)
    for left, right in zip(expected, batches(source, 5), strict=True):
        assert_same(left, right)
    assert len(places) >= 40


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_resuming_at_any_step_gives_the_batch_that_would_have_come(source, step):
    expected = batches(source, step + 2)[step:]
    for left, right in zip(expected, batches(source, 2, first_step=step), strict=True):
        assert_same(left, right)


def test_a_host_renders_its_rows_of_the_whole_batch(source):
    rows = [0, 1, 6]
    for batch, part in zip(batches(source, 3), batches(source, 3, rows=rows), strict=True):
        assert_same(part, {name: values[rows] for name, values in batch.items()})


def test_views_show_what_their_labels_say(source):
    """The same view rendered directly from the record, at the label's speed and direction."""

    def render(clip):
        out = np.empty(SPEC.video_shape, np.uint8)
        return render_video(source.records[0], clip, Crop(0, 0, 64, False), VIEWS, out)

    for speed in range(4):
        clip = Clip(0.25, speed, FORWARD)
        forward = render(clip)
        backward = render(dataclasses.replace(clip, direction=BACKWARD))
        np.testing.assert_array_equal(backward, forward[::-1])
        faster = render(Clip(0.25, 0, FORWARD))
        step = VIEWS.speeds[speed]
        shared = faster[::step]
        np.testing.assert_array_equal(forward[: len(shared)], shared)


def test_one_crop_for_all_frames_of_a_clip():
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), np.uint8), 6, 0)
    rng = np.random.default_rng(1)
    spec = CropSpec(image_size=24, min_area=0.4, flip=True, quarter_turns=False)
    crops = [random_crop(rng, 40, 60, spec) for _ in range(200)]
    assert 0.35 < np.mean([crop.flip for crop in crops]) < 0.65
    for crop in crops:
        assert 0.39 * 1600 <= crop.size**2 <= 1600
        assert crop.top + crop.size <= 40
        assert crop.left + crop.size <= 60
        out = apply_crop(frames, crop, 24)
        np.testing.assert_array_equal(out, out[:1].repeat(6, 0))
    plain = Crop(3, 5, 24, False)
    np.testing.assert_array_equal(apply_crop(frames, plain, 24), frames[:, 3:27, 5:29])
    mirrored = apply_crop(frames, dataclasses.replace(plain, flip=True), 24)
    np.testing.assert_array_equal(mirrored, frames[:, 3:27, 5:29][:, :, ::-1])


def test_photometric_jitter_is_constant_within_a_clip():
    import jax

    video = jax.numpy.full((3, 2, 5, 4, 4, 3), 0.25)
    spec = PhotometricSpec(0.3, 0.3, 0.3, 0.5, 0.2, per_frame=False)
    out = np.asarray(photometric(jax.random.key(0), video, spec))
    np.testing.assert_array_equal(out, out[:, :, :1].repeat(5, 2))
    assert len(np.unique(out[:, :, 0, 0, 0, 0])) == 6
    per_frame = photometric(jax.random.key(0), video, dataclasses.replace(spec, per_frame=True))
    assert len(np.unique(np.asarray(per_frame)[:, :, :, 0, 0, 0])) == 30
    off = PhotometricSpec(0.0, 0.0, 0.0, 0.0, 0.0, per_frame=False)
    np.testing.assert_allclose(photometric(jax.random.key(0), video, off), video, atol=1e-6)


def test_hue_turns_about_the_axis_of_greys():
    """Every clip keeps its mean and its distance from grey, and its hue is anywhere."""
    import jax

    colour = np.array([0.7, 0.4, 0.2])
    video = jax.numpy.broadcast_to(colour, (40, 2, 3, 1, 1, 3))
    spec = PhotometricSpec(0.0, 0.0, 0.0, 0.5, 0.0, per_frame=False)
    out = np.asarray(photometric(jax.random.key(0), video, spec), np.float64)
    np.testing.assert_allclose(out.mean(-1), colour.mean(), atol=1e-6)
    distance = np.linalg.norm(out - out.mean(-1, keepdims=True), axis=-1)
    np.testing.assert_allclose(distance, np.linalg.norm(colour - colour.mean()), atol=1e-6)
    # Hue as the angle that the HSI model defines, spread over the whole circle.
    red, green, blue = np.moveaxis(out[:, :, 0, 0, 0], -1, 0)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue).ravel()
    assert np.all(np.histogram(hue, bins=6, range=(-np.pi, np.pi))[0] > 4)
    still = dataclasses.replace(spec, hue=0.0)
    np.testing.assert_allclose(photometric(jax.random.key(0), video, still), video, atol=1e-6)


def test_device_windows_give_the_same_spectrograms(source):
    on_device = dataclasses.replace(SPEC, spectrogram_on_device=True)
    there = next(iter(train_batches(source, on_device, seed=5, global_batch_size=8)))
    here = batches(source, 1)[0]
    assert there["audio_windows"].dtype == np.int16
    peaks = np.abs(there["audio_windows"].astype(int)).max(axis=(2, 3))
    np.testing.assert_array_equal(there["has_audio"], peaks > 33)
    np.testing.assert_array_equal(here["has_audio"], peaks > 33)
    present = here["spectrogram"].any(axis=(2, 3), keepdims=True)  # zeros: there is no track
    made = np.where(present, log_mel(there["audio_windows"], MEL), 0)
    np.testing.assert_array_equal(made, here["spectrogram"])


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_training_on_one_modality_is_one_line(source, modality):
    spec = dataclasses.replace(SPEC, modalities=modality)
    alone = UsableRecords(source.records, spec)
    # One record has no picture; one has no sound and one only silence.
    assert len(alone) == {"video": 19, "audio": 18}[modality]
    batch = next(iter(train_batches(alone, spec, seed=0, global_batch_size=4)))
    other = {"video": "audio", "audio": "video"}[modality]
    assert batch[f"has_{modality}"].all() or modality == "audio"
    assert batch[f"has_{modality}"].any()
    assert not batch[f"has_{other}"].any()


def test_what_does_not_fit_is_one_clear_error(source, tmp_path):
    with pytest.raises(ValueError, match="larger than the 20 usable records"):
        train_batches(source, SPEC, seed=0, global_batch_size=21)
    wrong = dataclasses.replace(SPEC, log_mel=dataclasses.replace(MEL, sample_rate_hz=32_000))
    with pytest.raises(ValueError, match="audio at 16000 Hz, the spectrogram is defined at 32000"):
        UsableRecords(source.records, wrong)
    short = write_records(tmp_path / "short", [make_record(n, seconds=0.3) for n in range(2)])
    with pytest.raises(ValueError, match="none of the 2 records"):
        UsableRecords(RecordDataset(short, "train"), SPEC)


@pytest.mark.parametrize("on_device", [False, True])
def test_shapes_are_told_without_data(source, on_device):
    spec = dataclasses.replace(SPEC, spectrogram_on_device=on_device)
    labels = [name for name in source.records.labels if name not in source.records.multilabel]
    assert labels
    dataset = train_batches(source, spec, seed=5, global_batch_size=8)
    (batch,) = itertools.islice(iter(dataset), 1)
    told = spec.batch_shapes(8, labels)
    assert {name: (shape, np.dtype(kind)) for name, (shape, kind) in told.items()} == {
        name: (values.shape, values.dtype) for name, values in batch.items()
    }

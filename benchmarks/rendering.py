"""Task of all input pipelines that are compared: the same rendering, the same order of samples.

Two views of 16 frames of 112 x 112 pixels from frames of short side 128, a random square crop,
mirroring, a log-mel spectrogram of the same interval, batches of 32: the full-size presets, except
that the spectrogram is computed on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from avcl_jax.data.images import crop_frame, each_jpeg, random_crop
from avcl_jax.data.pipeline import RandomViews, train_batches
from avcl_jax.data.records import Record, RecordDataset
from avcl_jax.data.render_spec import CropSpec, RenderSpec
from avcl_jax.data.rendering import render_audio
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows, log_mel
from avcl_jax.data.views import FORWARD, Clip, Timeline, ViewSpec, draw_views, frame_indices
from benchmarks.measure import rate, seconds_in_turns

SHORT_SIDE = 128
BATCH_SIZE = 32
WARMUP_BATCHES = 4
VIEWS = ViewSpec(num_frames=16, clip_seconds=1.0, speeds=(1, 2, 4, 8), audio_transform="shared")
LOG_MEL = LogMelSpec(
    sample_rate_hz=16_000,
    frames=64,
    mels=40,
    clip_seconds=1.0,
    min_hz=60.0,
    max_hz=7_600.0,
    floor=1e-6,
    mean=-7.0,
    std=3.0,
)
CROP = CropSpec(image_size=112, min_area=0.3, flip=True, quarter_turns=False)
SPEC = RenderSpec(
    views=VIEWS, log_mel=LOG_MEL, crop=CROP, spectrogram_on_device=False, modalities="audio_visual"
)
_LOG_MEL_CALLS = 200


class _FramesOfViews(grain.transforms.RandomMap):
    """JPEG frames that `RenderRandomViews` decodes, given the same random numbers."""

    def random_map(
        self, element: tuple[int, Record, Timeline], rng: np.random.Generator
    ) -> list[bytes]:
        _, record, timeline = element
        pair = draw_views(rng, timeline, VIEWS, record.frame_seconds)
        return [frame for clip in pair.video for frame in _frames_of(record, clip)]


def shown_bytes(source: UsableRecords, position: int, rng: np.random.Generator) -> int:
    """Bytes of the frames and the audio that two views of a record show, each frame once."""
    _, record, timeline = source[position]
    pair = draw_views(rng, timeline, VIEWS, record.frame_seconds)
    audio = len(pair.audio) * LOG_MEL.frames * LOG_MEL.window * record.waveform.itemsize
    frames = {frame for clip in pair.video for frame in _frames_of(record, clip)}
    return sum(map(len, frames)) + audio * timeline.has_audio


def _frames_of(record: Record, clip: Clip) -> list[bytes]:
    indices = frame_indices(clip, record.frame_seconds, VIEWS)
    return [record.frames[index] for index in indices.tolist()]


def open_records(directory: str | Path) -> UsableRecords:
    """Opens the training split of a prepared data set for the rendering."""
    return UsableRecords(RecordDataset(directory, "train"), SPEC)


def decoded_frames(directory: str, *, samples: int) -> list[list[bytes]]:
    """JPEG frames that the pipeline decodes for each of its first samples, in its order."""
    records = grain.MapDataset.source(open_records(directory)).seed(0).shuffle().repeat()
    frames = records.random_map(_FramesOfViews())
    return [frames[number] for number in range(samples)]


def pipeline(directory: str, *, workers: int, threads: int) -> Iterator[Any]:
    """Batches of this project's input pipeline."""
    return train_batches(
        open_records(directory),
        SPEC,
        seed=0,
        global_batch_size=BATCH_SIZE,
        workers=workers,
        threads=threads,
    )


def pipeline_rate(*, directory: str, workers: int, threads: int, count: int) -> float:
    """Samples per second of the input pipeline over `count` batches."""
    batches = pipeline(directory, workers=workers, threads=threads)
    return rate(batches, batch_size=BATCH_SIZE, warmup=WARMUP_BATCHES, count=count)


def parts(*, directory: str, repeats: int) -> dict[str, float]:
    """Median milliseconds per sample of rendering and of its parts, in turns on one core.

    Returns:
        `all`, the whole rendering; `read` what views show of records, `decode` frames, `crop` and
        resize them, `log_mel`; and `read_whole` records. The remaining time is Python between the
        parts.
    """
    source = open_records(directory)
    batches = RandomViews(source, SPEC, skip_unreadable=False)
    whole = {name: np.zeros(*array) for name, array in batches.shapes(BATCH_SIZE).items()}
    positions = np.random.default_rng(0).permutation(len(source))[:BATCH_SIZE]
    views, reader = [], source.records.reader
    places = [source.records.place_of(source.indices[position]) for position in positions]
    for number, position in enumerate(positions):
        _, record, timeline = source[position]
        rng = np.random.default_rng(number)
        views.append((record, draw_views(rng, timeline, VIEWS, record.frame_seconds)))
    jpegs = [_frames_of(record, clip) for record, pair in views for clip in pair.video]
    size = CROP.image_size
    out = np.empty((size, size, 3), np.uint8)

    def crops() -> None:
        for number, (record, _) in enumerate(views):
            image = np.zeros((record.height, record.width, 3), np.uint8)
            for view in range(2):
                rng = np.random.default_rng([number, view])
                crop = random_crop(rng, record.height, record.width, CROP)
                for _ in range(VIEWS.num_frames):
                    crop_frame(image, crop, out)

    def read() -> None:
        for place, (_, pair) in zip(places, views, strict=True):
            with reader.open(place) as record:
                for clip in pair.video:
                    _frames_of(record, clip)

    calls = {
        "all": lambda: batches.render(
            batches.requests(positions),
            [np.random.default_rng(n) for n in range(BATCH_SIZE)],
            whole,
        ),
        # Counted instead of kept: records that stay in memory cause page faults.
        "read": read,
        "read_whole": lambda: sum(source[position][0] >= 0 for position in positions),
        "decode": lambda: [list(each_jpeg(frames)) for frames in jpegs],
        "crop": crops,
        "log_mel": lambda: [
            render_audio(record, clip, SPEC) for record, pair in views for clip in pair.audio
        ],
    }
    return {
        name: round(1e3 * statistics.median(seconds) / len(positions), 3)
        for name, seconds in seconds_in_turns(calls, repeats=repeats).items()
    }


def compare_log_mel(*, repeats: int) -> dict[str, Any]:
    """Times the log-mel spectrogram of a clip, ours and librosa's, in turns.

    Returns:
        `speedup`, `microseconds` of each, and their `largest_difference`.
    """
    from benchmarks.baselines.pyav_dataloader import librosa_log_mel

    clip = Clip(0.0, 0, FORWARD)
    samples = round(LOG_MEL.sample_rate_hz * VIEWS.clip_seconds)
    waveform = np.random.default_rng(0).integers(-8000, 8000, samples, dtype=np.int16)
    floats = waveform.astype(np.float32) / 32768

    def ours() -> np.ndarray:
        windows = gather_windows(waveform, clip, LOG_MEL, VIEWS, audio_start_seconds=0.0)
        return np.asarray(log_mel(windows, LOG_MEL))

    def librosas() -> np.ndarray:
        return librosa_log_mel(floats, clip)

    difference = float(np.abs(ours() - librosas()).max())
    assert difference < 1e-4, f"the spectrograms differ by {difference}"
    calls = {
        "ours": lambda: [ours() for _ in range(_LOG_MEL_CALLS)],
        "librosa": lambda: [librosas() for _ in range(_LOG_MEL_CALLS)],
    }
    microseconds = {
        name: 1e6 * statistics.median(seconds) / _LOG_MEL_CALLS
        for name, seconds in seconds_in_turns(calls, repeats=max(repeats, 5)).items()
    }
    return {
        "speedup": microseconds["librosa"] / microseconds["ours"],
        "microseconds": {name: round(value, 1) for name, value in microseconds.items()},
        "largest_difference": difference,
    }

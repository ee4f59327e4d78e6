"""The work that every input pipeline compared here does: one rendering, one order of samples.

2 views of 16 frames of 112 x 112 pixels from frames of 128 pixels' short side, a random square
crop, mirroring, a log-mel spectrogram of the same interval, batches of 32: the full-size presets,
except that the spectrogram is made on the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from avcl_jax.data.images import CropSpec, crop_frame, each_jpeg, random_crop
from avcl_jax.data.pipeline import Draw, RenderBatch, train_batches
from avcl_jax.data.records import Record, RecordDataset
from avcl_jax.data.rendering import RenderSpec, render_audio
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import Timeline, ViewSpec, draw_views, frame_indices
from benchmarks.measure import rate

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
    views=VIEWS,
    log_mel=LOG_MEL,
    crop=CROP,
    spectrogram_on_device=False,
    modalities="audio_visual",
)


class _FramesOfViews(grain.transforms.RandomMap):
    """The JPEG frames that `RenderRandomViews` decodes, given the same random numbers."""

    def random_map(
        self, element: tuple[int, Record, Timeline], rng: np.random.Generator
    ) -> list[bytes]:
        _, record, use = element
        pair = draw_views(rng, use, VIEWS, record.frame_seconds)
        return [
            record.frames[index]
            for clip in pair.video
            for index in frame_indices(clip, record.frame_seconds, VIEWS).tolist()
        ]


def open_records(directory: str | Path, split: str = "train") -> UsableRecords:
    """Opens a prepared data set for the rendering."""
    return UsableRecords(RecordDataset(directory, split), SPEC)


def decoded_frames(source: UsableRecords, *, samples: int) -> list[list[bytes]]:
    """The JPEG frames that the pipeline decodes for its first samples, in its order."""
    chosen = grain.MapDataset.source(source).seed(0).shuffle().repeat().random_map(_FramesOfViews())
    return [chosen[number] for number in range(samples)]


def pipeline(
    directory: str | Path, *, workers: int, threads: int, batch_size: int = BATCH_SIZE
) -> Iterator[Any]:
    """Batches of this project's input pipeline."""
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
    batches = train_batches(
        open_records(directory),
        SPEC,
        seed=0,
        global_batch_size=batch_size,
        workers=workers,
        threads=threads,
        prefetch=max(2, threads),
    )
    return iter(batches)


def pipeline_rate(*, directory: str, workers: int, threads: int, count: int) -> float:
    """Samples per second of the input pipeline over `count` batches."""
    batches = pipeline(directory, workers=workers, threads=threads)
    return rate(batches, batch_size=BATCH_SIZE, warmup=WARMUP_BATCHES, count=count)


def parts(*, directory: str, repeats: int) -> dict[str, float]:
    """Milliseconds a sample on one core of what rendering consists of, in turns.

    Returns:
        Medians of `all` rendering, and of its parts: `read` records, `decode` pictures, `crop` and
        resize them, `log_mel`. Python between the parts is what they leave of `all`.
    """
    source = open_records(directory)
    render = RenderBatch(source, SPEC, skip_unreadable=False, shared=False)
    positions = np.random.default_rng(0).permutation(len(source))[:BATCH_SIZE].tolist()
    known = []
    for number, position in enumerate(positions):
        _, record, use = source[position]
        rng = np.random.default_rng(number)
        pair = draw_views(rng, use, VIEWS, record.frame_seconds)
        known.append((record, pair))
    shown = [
        [record.frames[k] for k in frame_indices(clip, record.frame_seconds, VIEWS).tolist()]
        for record, pair in known
        for clip in pair.video
    ]
    size = CROP.image_size
    out = np.empty((size, size, 3), np.uint8)

    def crops() -> None:
        for number, (record, _) in enumerate(known):
            image = np.zeros((record.height, record.width, 3), np.uint8)
            for view in range(2):
                rng = np.random.default_rng([number, view])
                crop = random_crop(rng, record.height, record.width, CROP)
                for _ in range(VIEWS.num_frames):
                    crop_frame(image, crop, out)

    measured = {
        "all": lambda: render([Draw(p, np.random.default_rng(n)) for n, p in enumerate(positions)]),
        # Counted and not kept: records that stay in memory cost page faults.
        "read": lambda: sum(source[position][0] >= 0 for position in positions),
        "decode": lambda: [list(each_jpeg(frames)) for frames in shown],
        "crop": crops,
        "log_mel": lambda: [
            render_audio(record, clip, SPEC) for record, pair in known for clip in pair.audio
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats):
        for name, function in measured.items():
            begin = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - begin) / len(positions))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}

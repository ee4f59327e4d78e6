"""A tf.data pipeline over SequenceExamples as DMVR writes and reads them, tuned.

Tuned: all stages map in parallel and prefetch under AUTOTUNE, records are read in parallel and
shuffled before they are parsed, only the frames of a view are decoded, and batches come in any
order. Views are drawn in a simpler way than in the pipeline (labels are not balanced): less work.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.spectrogram import mel_constants
from benchmarks import rendering
from benchmarks.measure import rate

_SHUFFLE_RECORDS = 64


def write_sequence_examples(*, directory: str, out: str, shards: int) -> None:
    """Writes the records of a prepared data set as DMVR's SequenceExamples, unless they exist."""
    if (Path(out) / "done").exists():
        return
    import tensorflow as tf

    Path(out).mkdir(parents=True, exist_ok=True)
    records = RecordDataset(directory, "train")
    for number in range(shards):
        with tf.io.TFRecordWriter(f"{out}/clips-{number:05d}-of-{shards:05d}") as writer:
            for index in range(number, len(records), shards):
                record = records[index]
                example = tf.train.SequenceExample()
                for frame in record.frames:
                    jpegs = example.feature_lists.feature_list["image/encoded"]
                    jpegs.feature.add().bytes_list.value.append(frame)
                floats = record.waveform.astype(np.float32) / 32768
                audio = example.feature_lists.feature_list["WAVEFORM/feature/floats"]
                audio.feature.add().float_list.value.extend(floats.tolist())
                context = example.context.feature
                context["clip/label/index"].int64_list.value.append(record.labels["take"])
                duration = record.frame_seconds[-1] - record.frame_seconds[0]
                fps = (len(record.frames) - 1) / duration
                context["image/frame_rate"].float_list.value.append(fps)
                writer.write(example.SerializeToString())
    (Path(out) / "done").touch()


def _render(serialized: Any) -> dict[str, Any]:
    import tensorflow as tf

    views, mel, crop = rendering.VIEWS, rendering.LOG_MEL, rendering.CROP
    context, lists = tf.io.parse_single_sequence_example(
        serialized,
        context_features={
            "clip/label/index": tf.io.FixedLenFeature((), tf.int64),
            "image/frame_rate": tf.io.FixedLenFeature((), tf.float32),
        },
        sequence_features={
            "image/encoded": tf.io.FixedLenSequenceFeature((), tf.string),
            "WAVEFORM/feature/floats": tf.io.VarLenFeature(tf.float32),
        },
    )
    jpegs = lists["image/encoded"]
    waveform = lists["WAVEFORM/feature/floats"].values
    fps = context["image/frame_rate"]
    duration = tf.minimum(
        tf.cast(tf.shape(jpegs)[0], tf.float32) / fps,
        tf.cast(tf.size(waveform), tf.float32) / mel.sample_rate_hz,
    )
    shape = tf.image.extract_jpeg_shape(jpegs[0])
    hann, filters = mel_constants(mel)
    clips, spectrograms, speeds, directions = [], [], [], []
    for _ in range(2):
        speed_index = tf.random.uniform((), 0, len(views.speeds), tf.int32)
        speed = tf.gather(tf.constant(views.speeds, tf.float32), speed_index)
        backward = tf.random.uniform(()) < 0.5
        start = tf.random.uniform(()) * (duration - speed * views.clip_seconds)
        steps = tf.range(views.num_frames, dtype=tf.float32) * views.frame_seconds * speed
        indices = tf.cast((start + steps) * fps, tf.int32)
        indices = tf.minimum(indices, tf.shape(jpegs)[0] - 1)
        selected = tf.gather(jpegs, tf.where(backward, indices[::-1], indices))
        side = tf.minimum(shape[0], shape[1])
        area = tf.random.uniform((), crop.min_area, 1.0)
        size = tf.cast(tf.round(tf.cast(side, tf.float32) * tf.sqrt(area)), tf.int32)
        top = tf.random.uniform((), 0, shape[0] - size + 1, tf.int32)
        left = tf.random.uniform((), 0, shape[1] - size + 1, tf.int32)
        frames = tf.map_fn(
            functools.partial(tf.io.decode_jpeg, channels=3),
            selected,
            fn_output_signature=tf.TensorSpec((None, None, 3), tf.uint8),
        )[:, top : top + size, left : left + size]
        frames = tf.image.resize(frames, (crop.image_size, crop.image_size))
        frames = tf.cast(frames, tf.uint8)
        flip = tf.random.uniform(()) < 0.5
        clips.append(tf.cond(flip, lambda f=frames: tf.reverse(f, [2]), lambda f=frames: f))
        hop = mel.window * tf.cast(speed, tf.int32)
        first = tf.cast(tf.round(start * mel.sample_rate_hz), tf.int32)
        first = tf.minimum(first, tf.size(waveform) - hop * mel.frames)
        windows = tf.reshape(waveform[first : first + hop * mel.frames], (mel.frames, hop))
        windows = windows[:, : mel.window]
        windows = tf.cond(backward, lambda w=windows: w[::-1, ::-1], lambda w=windows: w)
        spectrum = tf.signal.rfft(windows * hann, fft_length=[mel.window])
        power = tf.square(tf.math.real(spectrum)) + tf.square(tf.math.imag(spectrum))
        logarithm = tf.math.log(tf.matmul(power, filters.T) + mel.floor)
        spectrograms.append((logarithm - mel.mean) / mel.std)
        speeds.append(speed_index)
        directions.append(tf.cast(backward, tf.int32))
    return {
        "video": tf.stack(clips),
        "spectrogram": tf.stack(spectrograms),
        "video_speed": tf.stack(speeds),
        "video_direction": tf.stack(directions),
        "label": context["clip/label/index"],
    }


def samples_per_second(*, folder: str, count: int) -> float:
    """Samples per second of the baseline over `count` batches."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    files = sorted(str(path) for path in Path(folder).glob("clips-*"))
    dataset = (
        tf.data.TFRecordDataset(files, num_parallel_reads=tf.data.AUTOTUNE)
        .shuffle(_SHUFFLE_RECORDS)
        .repeat()
        .map(_render, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(rendering.BATCH_SIZE, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )
    options = tf.data.Options()
    options.deterministic = False
    return rate(
        dataset.with_options(options).as_numpy_iterator(),
        batch_size=rendering.BATCH_SIZE,
        warmup=3 * rendering.WARMUP_BATCHES,  # until AUTOTUNE has found its parallelism
        count=count,
    )

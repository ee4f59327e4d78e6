"""PyTorch's DataLoader that decodes videos with PyAV during training, without any preparation.

Tuned: it seeks to the key frame before a view and decodes only to the end of the view, converts
and scales only the frames of the view, and decodes audio only around it; one persistent worker per
core decodes in one thread and prefetches. Views, crops and spectrogram are those of the pipeline.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import av
import cv2
import librosa
import numpy as np
from av.video.reformatter import VideoReformatter

from avcl_jax.data.images import crop_frame, random_crop
from avcl_jax.data.views import BACKWARD, FORWARD, Clip, Timeline, draw_views, frame_indices
from benchmarks import rendering
from benchmarks.footage import list_videos
from benchmarks.measure import rate

# Audio decoders need a little before the first correct sample.
_AUDIO_MARGIN_SECONDS = 0.1


def timeline(path: Path) -> Timeline:
    """Timeline of a video with a constant frame rate, from its header."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        fps, unit, length = video.average_rate, audio.time_base, audio.duration
        assert fps is not None, f"{path} states no frame rate"
        assert unit is not None, f"{path} states no unit of time"
        assert length is not None, f"{path} states no length of its audio"
        return Timeline(0.0, float(min(video.frames / fps, length * unit)), float(1 / fps))


class VideoDataset:
    """Two rendered views of each video, decoded from its file (a map-style PyTorch dataset)."""

    def __init__(self, paths: list[Path], seed: int):
        """Reads the headers of the videos."""
        self._paths = paths
        self._timelines = [timeline(path) for path in paths]
        self._seed = seed

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Renders video `key[0]`; `key[1]` numbers the visit and seeds it."""
        index, visit = key
        rng = np.random.default_rng([self._seed, visit])
        # A constant rate, at least that of the views: all videos are in the speed task.
        pair = draw_views(rng, self._timelines[index], rendering.VIEWS, np.empty(0))
        size = rendering.CROP.image_size
        video = np.empty((2, rendering.VIEWS.num_frames, size, size, 3), np.uint8)
        with av.open(str(self._paths[index])) as container:
            container.streams.video[0].codec_context.thread_count = 1  # one worker on each core
            for clip, out in zip(pair.video, video, strict=True):
                frames = view_frames(container, clip)
                height, width, _ = frames[0].shape
                crop = random_crop(rng, height, width, rendering.CROP)
                for frame, target in zip(frames, out, strict=True):
                    crop_frame(frame, crop, target)
            spectrograms = [
                librosa_log_mel(view_waveform(container, clip), clip) for clip in pair.audio
            ]
        return {
            "video": video,
            "spectrogram": np.stack(spectrograms),
            "order": np.int32(pair.order),
            "video_speed": np.array([clip.speed for clip in pair.video], np.int32),
            "video_direction": np.array([clip.direction for clip in pair.video], np.int32),
            "source_id": np.int32(index),
        }


def view_frames(container: Any, clip: Clip) -> list[np.ndarray]:
    """Decodes the frames of a view, from the key frame before it to its end.

    Returns:
        uint8 [height, width, 3] with a short side of `SHORT_SIDE`, in playback order.
    """
    stream = container.streams.video[0]
    fps = float(stream.average_rate)
    forward = dataclasses.replace(clip, direction=FORWARD)
    begins = np.arange(stream.frames) / fps
    times = begins[frame_indices(forward, begins, rendering.VIEWS)] + 0.5 / fps
    container.seek(int(times[0] / stream.time_base), stream=stream, backward=True)
    reformatter = VideoReformatter()
    scale = rendering.SHORT_SIDE / min(stream.width, stream.height)
    size = round(stream.width * scale), round(stream.height * scale)

    def scaled(frame: Any) -> np.ndarray:
        return reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()

    frames: list[np.ndarray] = []
    last = None
    for frame in container.decode(stream):
        # The frame of a time is the last one that began before it.
        while last is not None and len(frames) < len(times) and times[len(frames)] < frame.time:
            frames.append(scaled(last))
        if len(frames) == len(times):
            break
        last = frame
    while len(frames) < len(times):
        frames.append(scaled(last))
    return frames[::-1] if clip.direction == BACKWARD else frames


def view_waveform(container: Any, clip: Clip) -> np.ndarray:
    """Decodes the audio of a view at 16 kHz, mono, as float32 [samples]."""
    stream = container.streams.audio[0]
    hz = rendering.LOG_MEL.sample_rate_hz
    span = rendering.VIEWS.clip_seconds * rendering.VIEWS.speeds[clip.speed]
    first = max(0.0, clip.start_seconds - _AUDIO_MARGIN_SECONDS)
    container.seek(int(first / stream.time_base), stream=stream, backward=True)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=hz)
    parts, begin = [], None
    for frame in container.decode(stream):
        if frame.time >= clip.start_seconds + span + _AUDIO_MARGIN_SECONDS:
            break
        begin = frame.time if begin is None else begin
        parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    assert begin is not None, "the view has no audio"
    start = max(0, round((clip.start_seconds - begin) * hz))
    length = round(span * hz)
    waveform = np.concatenate(parts)[start : start + length]
    return np.pad(waveform, (0, length - len(waveform)), mode="edge")


def librosa_log_mel(waveform: np.ndarray, clip: Clip) -> np.ndarray:
    """Computes the pipeline's log-mel with librosa: windows as long as the hop at speed 1."""
    mel = rendering.LOG_MEL
    hop = mel.window * rendering.VIEWS.speeds[clip.speed]
    if clip.direction == BACKWARD:
        # The windows of the forward view, each reversed: they start at the same samples.
        waveform = waveform[::-1][hop - mel.window :]
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=mel.sample_rate_hz,
        n_fft=mel.window,
        hop_length=hop,
        win_length=mel.window,
        window="hann",
        center=False,
        power=2.0,
        n_mels=mel.mels,
        fmin=mel.min_hz,
        fmax=mel.max_hz,
    )
    logarithm = np.log(power.T[: mel.frames] + mel.floor)
    return ((logarithm - mel.mean) / mel.std).astype(np.float32)


def _pin_threads(worker: int) -> None:
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def samples_per_second(*, folder: str, count: int) -> float:
    """Samples per second of the baseline, over `count` batches of each worker."""
    import torch.utils.data

    os.environ["OMP_NUM_THREADS"] = "1"
    workers = len(os.sched_getaffinity(0))
    videos = list_videos(folder)
    # The workers finish their batches at nearly the same time: count whole rounds of them.
    batches = math.ceil(count / workers) * workers
    rng = np.random.default_rng(0)
    # Twice as many samples as are counted or warm up, so that prefetching never ends.
    rounds = math.ceil(2 * (workers + batches) * rendering.BATCH_SIZE / len(videos))
    order = np.concatenate([rng.permutation(len(videos)) for _ in range(rounds)])
    loader = torch.utils.data.DataLoader(
        VideoDataset(videos, seed=0),
        batch_size=rendering.BATCH_SIZE,
        sampler=[(index, visit) for visit, index in enumerate(order.tolist())],
        num_workers=workers,
        worker_init_fn=_pin_threads,
        persistent_workers=True,
        prefetch_factor=2,
        drop_last=True,
    )
    return rate(iter(loader), batch_size=rendering.BATCH_SIZE, warmup=workers, count=batches)

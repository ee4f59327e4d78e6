"""PyTorch's DataLoader that decodes films with PyAV while training: no preparation at all.

Tuned: it seeks to the key frame before a view and decodes to the view's end only, converts and
scales only the pictures that are shown, one decoding thread in each of as many persistent workers
as there are cores, prefetching; the sound is decoded around the view only. The views, crops and
spectrogram are those of the pipeline.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterator
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
from benchmarks.measure import rate

# Sound decoders need a little before the first good sample.
_AUDIO_MARGIN_SECONDS = 0.1


def films(folder: Path) -> list[Path]:
    """The films that `manifest.csv` lists."""
    with (folder / "manifest.csv").open(newline="") as file:
        return [folder / row["path"] for row in csv.DictReader(file)]


def timeline(path: Path) -> Timeline:
    """Where views of a film may be drawn; of constant frame rate, as its header says."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        rate, unit, length = video.average_rate, audio.time_base, audio.duration
        assert rate is not None, f"{path} states no frame rate"
        assert unit is not None, f"{path} states no unit of time"
        assert length is not None, f"{path} states no length of its sound"
        return Timeline(0.0, float(min(video.frames / rate, length * unit)), float(1 / rate))


class FilmClips:
    """Two rendered views of each film, decoded from it (a map-style PyTorch dataset)."""

    def __init__(self, paths: list[Path], seed: int):
        """Takes the films, whose headers are read here once."""
        self._paths = paths
        self._timelines = [timeline(path) for path in paths]
        self._seed = seed

    def __len__(self) -> int:
        """Number of films."""
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Renders film `key[0]`; `key[1]` numbers the visit and seeds it."""
        index, visit = key
        rng = np.random.default_rng([self._seed, visit])
        # A constant rate, not below that of the views: all videos are in the speed task.
        pair = draw_views(rng, self._timelines[index], rendering.VIEWS, np.empty(0))
        size = rendering.CROP.image_size
        video = np.empty((2, rendering.VIEWS.num_frames, size, size, 3), np.uint8)
        sounds = []
        with av.open(str(self._paths[index])) as container:
            container.streams.video[0].codec_context.thread_count = 1  # one worker on each core
            for clip, out in zip(pair.video, video, strict=True):
                self._render_video(container, clip, rng, out)
            sounds = [self._render_audio(container, clip) for clip in pair.audio]
        return {
            "video": video,
            "spectrogram": np.stack(sounds),
            "order": np.int32(pair.order),
            "video_speed": np.array([clip.speed for clip in pair.video], np.int32),
            "video_direction": np.array([clip.direction for clip in pair.video], np.int32),
            "source_id": np.int32(index),
        }

    def _render_video(
        self, container: Any, clip: Clip, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Decodes one view's pictures into `out`."""
        images = view_pictures(container, clip)
        height, width, _ = images[0].shape
        crop = random_crop(rng, height, width, rendering.CROP)
        for image, target in zip(images, out, strict=True):
            crop_frame(image, crop, target)

    def _render_audio(self, container: Any, clip: Clip) -> np.ndarray:
        """Decodes one view's sound to its log-mel."""
        return librosa_log_mel(view_sound(container, clip), clip)


def view_pictures(container: Any, clip: Clip) -> list[np.ndarray]:
    """Decodes the pictures of a view: seeks before it, stops after it, converts what is shown.

    Returns:
        uint8 [height, width, 3] of `SHORT_SIDE`, in playback order.
    """
    stream = container.streams.video[0]
    rate = float(stream.average_rate)
    forward = dataclasses.replace(clip, direction=FORWARD)
    begins = np.arange(stream.frames) / rate
    times = begins[frame_indices(forward, begins, rendering.VIEWS)] + 0.5 / rate
    container.seek(int(times[0] / stream.time_base), stream=stream, backward=True)
    reformatter = VideoReformatter()
    scale = rendering.SHORT_SIDE / min(stream.width, stream.height)
    size = round(stream.width * scale), round(stream.height * scale)

    def picture(frame: Any) -> np.ndarray:
        scaled = reformatter.reformat(frame, *size, format="rgb24", threads=1)
        return scaled.to_ndarray()

    images: list[np.ndarray] = []
    shown = None
    for frame in container.decode(stream):
        # The picture shown at a time is the last one that began before it.
        while shown is not None and len(images) < len(times) and times[len(images)] < frame.time:
            images.append(picture(shown))
        if len(images) == len(times):
            break
        shown = frame
    while len(images) < len(times):
        images.append(picture(shown))
    return images[::-1] if clip.direction == BACKWARD else images


def view_sound(container: Any, clip: Clip) -> np.ndarray:
    """Decodes the sound of a view at 16 kHz, mono.

    Returns:
        float32 [samples].
    """
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
    sound = np.concatenate(parts)
    assert begin is not None, "no sound where the view is"
    start = max(0, round((clip.start_seconds - begin) * hz))
    wanted = round(span * hz)
    sound = sound[start : start + wanted]
    return np.pad(sound, (0, wanted - len(sound)), mode="edge")


def librosa_log_mel(sound: np.ndarray, clip: Clip) -> np.ndarray:
    """The same log-mel by librosa: windows of the hop at speed 1, never overlapping."""
    mel = rendering.LOG_MEL
    hop = mel.window * rendering.VIEWS.speeds[clip.speed]
    if clip.direction == BACKWARD:
        # The windows of the forward view, each reversed: they start at the same samples.
        sound = sound[::-1][hop - mel.window :]
    power = librosa.feature.melspectrogram(
        y=sound,
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


class _Visits:
    """An endless shuffled order of (film, visit)."""

    def __init__(self, films: int, seed: int):
        self._films = films
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng(self._seed)
        visit = 0
        while True:
            for index in rng.permutation(self._films).tolist():
                yield index, visit
                visit += 1

    def __len__(self) -> int:
        return 2**31


def _pin_threads(worker: int) -> None:
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def batches(folder: Path, *, workers: int) -> Iterator[Any]:
    """Batches of the baseline."""
    import torch.utils.data

    loader = torch.utils.data.DataLoader(
        FilmClips(films(folder), seed=0),
        batch_size=rendering.BATCH_SIZE,
        sampler=_Visits(len(films(folder)), seed=0),
        num_workers=workers,
        worker_init_fn=_pin_threads,
        persistent_workers=True,
        prefetch_factor=2,
        drop_last=True,
    )
    return iter(loader)


def samples_per_second(*, folder: str, count: int) -> float:
    """Samples per second of the baseline, over `count` batches of each worker."""
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = len(os.sched_getaffinity(0))
    # The workers finish their batches at nearly the same time: count whole rounds of them.
    return rate(
        batches(Path(folder), workers=workers),
        batch_size=rendering.BATCH_SIZE,
        warmup=workers,
        count=math.ceil(count / workers) * workers,
    )

"""Clips of a record to arrays: video, spectrograms, masks and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.data.images import Crop, crop_frame, each_jpeg, random_crop
from avcl_jax.data.record_format import LABEL_PREFIX, UNKNOWN_LABEL, Record, is_silent
from avcl_jax.data.records import Place, RecordDataset, RecordError, RecordReader
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.spectrogram import gather_windows, log_mel
from avcl_jax.data.views import Clip, Timeline, ViewSpec, draw_views, frame_indices

# Writes rows of a batch, given requests for records and a generator for each; see
# `pipeline.Batches`. Worker processes import this module, so it must not import JAX.
Renderer = Callable[[Any, Sequence[np.random.Generator], Mapping[str, np.ndarray]], None]


def render_video(
    record: Record, clip: Clip, crop: Crop, views: ViewSpec, out: np.ndarray
) -> np.ndarray:
    """Decodes only the frames of a clip, and crops each into its place.

    Returns:
        `out`, uint8 [num_frames, image_size, image_size, 3].

    Raises:
        RecordError: if a frame cannot be decoded, or is not of the record's size.
    """
    shown = frame_indices(clip, record.frame_seconds, views).tolist()
    # Slow video shows a frame more than once, one after the other: it is decoded once.
    new = [n for n, index in enumerate(shown) if n == 0 or index != shown[n - 1]]
    jpegs = [record.frames[shown[n]] for n in new]
    try:
        images = each_jpeg(jpegs, (record.height, record.width))
        for n, image in zip(new, images, strict=True):
            crop_frame(image, crop, out[n])
    except ValueError as error:
        raise RecordError(
            f"record {record.record_id!r} cannot be decoded: {error}; prepare this data set again"
        ) from error
    for n in sorted(set(range(len(shown))).difference(new)):
        out[n] = out[n - 1]
    return out


def render_audio(record: Record, clip: Clip, spec: RenderSpec) -> tuple[np.ndarray, bool]:
    """Returns the audio of a clip as int16 windows or as log-mel, and whether it is audible.

    A silent clip counts as having no audio: one silence cannot be told from another, so it must be
    neither a positive nor a negative, nor have a speed or direction.
    """
    start = record.audio_start_seconds
    windows = gather_windows(
        record.waveform, clip, spec.log_mel, spec.views, audio_start_seconds=start
    )
    arrays = windows if spec.spectrogram_on_device else log_mel(windows, spec.log_mel)
    return arrays, not is_silent(windows)


def render_views(
    record: Record,
    use: Timeline,
    video: Sequence[Clip],
    audio: Sequence[Clip],
    crops: Sequence[Crop],
    spec: RenderSpec,
    pixels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Renders clips of a record, a video, an audio and a crop for each view; `pixels` is an array
    to render `video` into. A modality that is missing from the usable part is zeros.

    Returns:
        `video` uint8 [views, time, height, width, 3], `spectrogram` float32 [views, frames, mels]
        or `audio_windows` int16 [views, frames, window], `has_video` and `video_moves` bool,
        `has_audio` bool [views], False for silent views too, and the speeds and directions int32
        [views].
    """
    if pixels is None:
        pixels = np.empty((len(video), *spec.video_shape), np.uint8)
    if use.has_video:
        for clip, crop, out in zip(video, crops, pixels, strict=True):
            render_video(record, clip, crop, spec.views, out)
    else:
        pixels[...] = 0
    name, shape, dtype = spec.audio_array()
    if use.has_audio:
        rendered = [render_audio(record, clip, spec) for clip in audio]
    else:
        rendered = [(np.zeros(shape, dtype), False) for _ in audio]
    return {
        "video": pixels,
        name: np.stack([array for array, _ in rendered]),
        "has_video": np.bool_(use.has_video),
        "has_audio": np.array([audible for _, audible in rendered]),
        "video_moves": np.bool_(use.has_video and not record.is_still),
        "video_speed": np.array([clip.speed for clip in video], np.int32),
        "audio_speed": np.array([clip.speed for clip in audio], np.int32),
        "video_direction": np.array([clip.direction for clip in video], np.int32),
        "audio_direction": np.array([clip.direction for clip in audio], np.int32),
    }


def render_drawn(render: Renderer, request: Any, out: Mapping[str, np.ndarray]) -> None:
    """Renders requests with their generators, given key and counter of each."""
    states, requests = request
    philox = (np.random.Philox(key=key, counter=counter) for key, counter in states)
    render(requests, list(map(np.random.Generator, philox)), out)


def render_random_views(
    reader: RecordReader,
    spec: RenderSpec,
    skip_unreadable: bool,
    requests: Any,
    rngs: Sequence[np.random.Generator],
    out: Mapping[str, np.ndarray],
) -> None:
    """Draws and renders two views of each record, straight into the batch.

    Arrays of single videos, copied into a batch, would cost twice the memory, and page faults that
    took as long as a third of the decoding.
    """
    places, uses, numbers = requests
    for name, values in out.items():
        if name != "video":
            values[...] = numbers.get(name, 0)
    for row, (place, use, rng) in enumerate(zip(places, uses, rngs, strict=True)):
        try:
            rendered = _random_views(reader, spec, place, use, rng, out["video"][row])
        except RecordError:
            if not skip_unreadable:
                raise
            unknown = dict.fromkeys((n for n in out if n.startswith(LABEL_PREFIX)), UNKNOWN_LABEL)
            rendered = {"video": 0, "unreadable": True} | unknown
            out["video"][row] = 0
        for name in rendered.keys() - {"video"}:
            out[name][row] = rendered[name]


def _random_views(
    reader: RecordReader,
    spec: RenderSpec,
    place: Place,
    use: Timeline,
    rng: np.random.Generator,
    pixels: np.ndarray,
) -> dict[str, Any]:
    with reader.open(place) as record:
        pair = draw_views(rng, use, spec.views, record.frame_seconds)
        size = max(record.height, 1), max(record.width, 1)
        crops = [random_crop(rng, *size, spec.crop) for _ in pair.video]
        row = render_views(record, use, pair.video, pair.audio, crops, spec, pixels)
    return row | pair.labels()


def describe(index: int | np.ndarray, records: RecordDataset) -> dict[str, Any]:
    """Returns numbers of one record, or of several, that travel with their views into the batch.

    `source_id` and `record_index` int32; `label_NAME` int32 of each label of one class per record,
    -1 unknown.
    """
    return {
        "source_id": records.source_numbers[index],
        "record_index": np.asarray(index, np.int32),
        **{f"label_{name}": classes[index] for name, classes in records.labels.items()},
    }

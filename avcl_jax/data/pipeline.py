"""Records to global batches of rendered views (design section 3).

The chain is: records, global shuffle, repeat, render two random views, take this host's rows of
each global batch, batch. Everything random is a pure function of (seed, position in the order),
and hosts are sliced last, so batches do not depend on the number of workers or of hosts, and the
position of the pipeline is the number of steps taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from avcl_jax.data.crop import Crop, CropSpec, center_crop, crop_frame, random_crop
from avcl_jax.data.decode import each_jpeg
from avcl_jax.data.record_format import UNKNOWN_LABEL, Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows, log_mel
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.data.views import (
    FORWARD,
    Clip,
    Timeline,
    ViewPair,
    ViewSpec,
    draw_views,
    feasible_speeds,
    frame_indices,
    views_fit,
)

Modalities = Literal["audio_visual", "video", "audio"]


@dataclasses.dataclass(frozen=True)
class RenderSpec:
    """Everything that turns an interval of a record into arrays.

    Attributes:
        views: timing of views.
        log_mel: definition of the spectrogram.
        crop: spatial crop.
        spectrogram_on_device: deliver `audio_windows` and leave the log-mel to the jitted step.
        modalities: "audio_visual", or train on "video" or "audio" alone.
    """

    views: ViewSpec
    log_mel: LogMelSpec
    crop: CropSpec
    spectrogram_on_device: bool
    modalities: Modalities


@dataclasses.dataclass(frozen=True)
class UsableRecord:
    """Which modalities of a record can be shown, and when.

    Attributes:
        timeline: where views may be drawn.
        has_video: the picture can be shown.
        has_audio: the sound can be heard.
    """

    timeline: Timeline
    has_video: bool
    has_audio: bool


def _usable_parts(times: Mapping[str, np.ndarray], spec: RenderSpec) -> dict[str, np.ndarray]:
    """Decides what of each record can be used.

    Views are drawn where picture and sound both exist. When that is too short for a view, the
    picture alone is used, then the sound alone.

    Args:
        times: of all records, [records] of each field of `RecordTimeline`.
        spec: rendering.

    Returns:
        `start`, `end` and `gap` in seconds, `has_video`, `has_audio`; neither where no view fits.
    """
    # The last frame stays until the next would have come.
    gap = times["max_frame_gap_seconds"]
    video_end = np.minimum(times["duration_seconds"], times["last_frame_seconds"] + gap)
    video_start = times["first_frame_seconds"]
    rate = np.maximum(times["sample_rate_hz"], 1)
    audio_start = times["audio_start_seconds"]
    audio_end = audio_start + times["num_samples"] / rate
    both_start, both_end = np.maximum(video_start, audio_start), np.minimum(video_end, audio_end)
    video = np.asarray(times["num_frames"] > 1) & (spec.modalities != "audio")
    audio = np.asarray(times["num_samples"] > 0) & (spec.modalities != "video")
    wrong = np.flatnonzero(audio & (times["sample_rate_hz"] != spec.log_mel.sample_rate_hz))
    if len(wrong):
        raise ValueError(
            f"records have sound at {times['sample_rate_hz'][wrong[0]]} Hz, the spectrogram is "
            f"defined at {spec.log_mel.sample_rate_hz} Hz: set spectrogram.sample_rate_hz or "
            "prepare again with --sample-rate"
        )

    def fits(start: np.ndarray, end: np.ndarray, frame_gap: np.ndarray) -> np.ndarray:
        return np.asarray(views_fit(end - start, frame_gap, spec.views).any(axis=-1))

    use_both = video & audio & fits(both_start, both_end, gap)
    use_video = ~use_both & video & fits(video_start, video_end, gap)
    use_audio = ~use_both & ~use_video & audio & fits(audio_start, audio_end, 0.0 * gap)
    which = [use_both, use_video, use_audio]
    return {
        "start": np.select(which, [both_start, video_start, audio_start]),
        "end": np.select(which, [both_end, video_end, audio_end]),
        "gap": np.select(which, [gap, gap, 0.0 * gap]),
        "has_video": use_both | use_video,
        "has_audio": use_both | use_audio,
    }


class UsableRecords(grain.sources.RandomAccessDataSource):
    """The records of a data set on which a view fits, with what can be used of each.

    Attributes:
        records: the underlying data set.
        indices: int64 positions in it that are used.
        fingerprint: that of the data set.
    """

    def __init__(self, records: RecordDataset, spec: RenderSpec):
        """Looks at every timeline of `records`, which reads no record.

        Raises:
            ValueError: if no view fits any record.
        """
        self.records = records
        self._spec = spec
        parts = _usable_parts(records.timelines, spec)
        self.indices = np.flatnonzero(parts["has_video"] | parts["has_audio"])
        self._parts = {name: values[self.indices] for name, values in parts.items()}
        self.fingerprint = records.fingerprint
        if not len(self.indices):
            raise ValueError(
                f"none of the {len(records)} records of {records!r} is long enough for a view of "
                f"{spec.views.clip_seconds:g} s with {spec.views.num_frames} pictures; shorten "
                "views.clip_seconds or reduce views.num_frames"
            )

    @property
    def num_too_short(self) -> int:
        """Records on which no view fits."""
        return len(self.records) - len(self.indices)

    def __len__(self) -> int:
        """Number of usable records."""
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Record, UsableRecord]:
        """(index in the data set, record, what can be used of it)."""
        index = int(self.indices[position])
        return index, self.records[index], self.usable(position)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what it is made from: workers would receive a million numbers through a pipe."""
        return UsableRecords, (self.records, self._spec)

    def usable(self, position: int) -> UsableRecord:
        """What can be used of the record at `position`, without reading it."""
        start, end, gap, video, audio = (
            self._parts[name][position].item()
            for name in ("start", "end", "gap", "has_video", "has_audio")
        )
        return UsableRecord(Timeline(start, end, gap), video, audio)

    def __repr__(self) -> str:
        """Constant description: grain puts it into its checkpoints."""
        return f"UsableRecords({self.fingerprint}, {len(self)})"


def render_video(
    record: Record, clip: Clip, crop: Crop, spec: RenderSpec, out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes only the frames of a clip, and crops each into its place.

    Args:
        record: source.
        clip: interval and playback.
        crop: spatial crop.
        spec: rendering.
        out: where to render; None for a new array.

    Returns:
        uint8 [num_frames, image_size, image_size, 3], `out` if it was given.

    Raises:
        RecordError: if a frame cannot be decoded, or is not of the record's size.
    """
    if out is None:
        out = np.empty((spec.views.num_frames, *2 * (spec.crop.image_size,), 3), np.uint8)
    indices = frame_indices(clip, record.frame_seconds, spec.views).tolist()
    shown = [record.frames[index] for index in indices]
    try:
        images = each_jpeg(shown, (record.height, record.width))
        for image, target in zip(images, out, strict=True):
            crop_frame(image, crop, target)
    except ValueError as error:
        raise RecordError(
            f"record {record.record_id!r} cannot be decoded: {error}; prepare this data set again"
        ) from error
    return out


def render_audio(record: Record, clip: Clip, spec: RenderSpec) -> np.ndarray:
    """Sound of a clip: int16 windows [frames, window], or the log-mel [frames, mels]."""
    windows = gather_windows(
        record.waveform,
        clip,
        spec.log_mel,
        spec.views,
        audio_start_seconds=record.audio_start_seconds,
    )
    return windows if spec.spectrogram_on_device else log_mel(windows, spec.log_mel)


def _empty_audio(spec: RenderSpec) -> np.ndarray:
    width = spec.log_mel.window if spec.spectrogram_on_device else spec.log_mel.mels
    dtype = np.int16 if spec.spectrogram_on_device else np.float32
    return np.zeros((spec.log_mel.frames, width), dtype)


def render_views(
    record: Record,
    use: UsableRecord,
    video: Sequence[Clip],
    audio: Sequence[Clip],
    crops: Sequence[Crop],
    spec: RenderSpec,
) -> dict[str, Any]:
    """Renders the given clips of a record; a missing modality is zeros.

    Args:
        record: source.
        use: which of its modalities can be shown.
        video: picture of each view.
        audio: sound of each view.
        crops: spatial crop of each view.
        spec: rendering.

    Returns:
        `video` uint8 [views, time, height, width, 3], `spectrogram` float32 [views, frames, mels]
        or `audio_windows` int16 [views, frames, window], `has_video`, `has_audio` bool, and the
        speeds and directions int32 [views].
    """
    size = spec.crop.image_size
    pixels = np.zeros((len(video), spec.views.num_frames, size, size, 3), np.uint8)
    if use.has_video:
        for clip, crop, out in zip(video, crops, pixels, strict=True):
            render_video(record, clip, crop, spec, out)
    if use.has_audio:
        sounds = [render_audio(record, clip, spec) for clip in audio]
    else:
        sounds = [_empty_audio(spec) for _ in audio]
    return {
        "video": pixels,
        "audio_windows" if spec.spectrogram_on_device else "spectrogram": np.stack(sounds),
        "has_video": np.bool_(use.has_video),
        "has_audio": np.bool_(use.has_audio),
        "video_speed": np.array([clip.speed for clip in video], np.int32),
        "audio_speed": np.array([clip.speed for clip in audio], np.int32),
        "video_direction": np.array([clip.direction for clip in video], np.int32),
        "audio_direction": np.array([clip.direction for clip in audio], np.int32),
    }


def describe(index: int, record: Record, records: RecordDataset) -> dict[str, Any]:
    """Numbers that travel with a record into the batch: source, index and labels.

    Returns:
        `source_id`, `record_index` int32; `label_NAME` int32 class, -1 unknown, or for a label of
        which a record may have several bool [classes].
    """
    fields: dict[str, Any] = {
        "source_id": np.int32(records.source_numbers[index]),
        "record_index": np.int32(index),
    }
    for name, value in record.labels.items():
        if isinstance(value, tuple):
            fields[f"label_{name}"] = np.zeros(len(records.class_names[name]), bool)
            fields[f"label_{name}"][list(value)] = True
        else:
            fields[f"label_{name}"] = np.int32(value)
    return fields


def unreadable_row(source: UsableRecords, position: int, spec: RenderSpec) -> dict[str, Any]:
    """A row for a record that cannot be read: neither picture nor sound, no task, no label.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.

    Returns:
        The arrays of a row of a training batch, with `unreadable` set.
    """
    records, index = source.records, int(source.indices[position])
    nothing = Record(
        record_id=records.record_ids[index],
        source_id="",
        frames=(),
        frame_seconds=np.empty(0),
        waveform=np.empty(0, np.int16),
        sample_rate_hz=0,
        audio_start_seconds=0.0,
        duration_seconds=0.0,
        height=0,
        width=0,
        labels={
            label: () if label in records.multilabel else UNKNOWN_LABEL
            for label in records.class_names
        },
    )
    use = dataclasses.replace(source.usable(position), has_video=False, has_audio=False)
    clips = [Clip(0.0, 0, FORWARD)] * 2
    arrays = render_views(nothing, use, clips, clips, [center_crop(1, 1)] * 2, spec)
    masks = dict.fromkeys(("speed_mask", "direction_mask", "order_mask"), np.bool_(False))
    other = {"order": np.int32(0), "unreadable": np.bool_(True)}
    return arrays | masks | other | describe(index, nothing, records)


@dataclasses.dataclass(frozen=True)
class RenderRandomViews(grain.transforms.RandomMap):
    """Reads the record at a position, draws two views of it and renders them.

    Attributes:
        source: usable records.
        spec: rendering.
        skip_unreadable: a record that cannot be read becomes an `unreadable_row`, not an error.
    """

    source: UsableRecords
    spec: RenderSpec
    skip_unreadable: bool

    def random_map(self, position: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the arrays of `render_views`, labels, masks and numbers of one record.

        Raises:
            RecordError: if it cannot be read, with its name and shard.
        """
        try:
            return self._render(int(position), rng)
        except RecordError:
            if not self.skip_unreadable:
                raise
            return unreadable_row(self.source, int(position), self.spec)

    def _render(self, position: int, rng: np.random.Generator) -> dict[str, Any]:
        index, record, use = self.source[position]
        pair: ViewPair = draw_views(rng, use.timeline, self.spec.views)
        crops = [
            random_crop(rng, max(record.height, 1), max(record.width, 1), self.spec.crop)
            for _ in pair.video
        ]
        try:
            arrays = render_views(record, use, pair.video, pair.audio, crops, self.spec)
        except RecordError as error:
            raise RecordError(f"{self.source.records.shard_of(index)}, {error}") from error
        return arrays | {
            "order": np.int32(pair.order),
            "speed_mask": np.bool_(pair.speed_mask),
            "direction_mask": np.bool_(pair.direction_mask),
            "order_mask": np.bool_(pair.order_mask),
            "unreadable": np.bool_(False),
            **describe(index, record, self.source.records),
        }


class HostSlice(grain.MapDataset):
    """This host's contiguous rows of every global batch, from a given batch on.

    Element i is row `host * local + i % local` of global batch `first_batch + i // local`. It is
    the last step before batching: slicing earlier would give each host other random numbers.
    """

    def __init__(
        self, parent: grain.MapDataset, *, global_batch_size: int, host: int, hosts: int, first: int
    ):
        """Slices `parent` for `host` of `hosts`, starting at global batch `first`.

        Raises:
            ValueError: if the global batch does not divide over the hosts.
        """
        super().__init__(parent)
        if global_batch_size % hosts:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by the {hosts} processes"
            )
        self._global = global_batch_size
        self._local = global_batch_size // hosts
        self._host = host
        self._first = first

    def __len__(self) -> int:
        """Rows that this host will see."""
        return (len(self._parent) // self._global - self._first) * self._local

    def __getitem__(self, index: int | slice) -> Any:
        """Row `index`, or a slice of rows."""
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local)
        return self._parent[(self._first + batch) * self._global + self._host * self._local + row]

    def __str__(self) -> str:
        """Constant description."""
        return f"HostSlice({self._host}, {self._local} of {self._global}, from {self._first})"


def check_enough(source: UsableRecords, global_batch_size: int) -> None:
    """Refuses a batch that holds more videos than there are.

    Raises:
        ValueError: if it does.
    """
    if global_batch_size > len(source):
        raise ValueError(
            f"global_batch_size {global_batch_size} is larger than the {len(source)} usable "
            "records: reduce it or prepare more videos"
        )


def train_batches(
    source: UsableRecords,
    spec: RenderSpec,
    *,
    seed: int,
    global_batch_size: int,
    host: int = 0,
    hosts: int = 1,
    first_step: int = 0,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    skip_unreadable: bool = False,
) -> grain.IterDataset:
    """Endless batches of rendered random views.

    Args:
        source: usable records.
        spec: rendering.
        seed: of the order and of every draw.
        global_batch_size: videos in a batch over all hosts.
        host: number of this process.
        hosts: number of processes.
        first_step: batches to skip; a resumed run gets the batch that would have come.
        workers: worker processes; 0 renders in threads of this process.
        threads: reading threads (of each worker).
        prefetch: batches kept ready (by each worker).
        skip_unreadable: a record that cannot be read becomes an `unreadable_row`, and is otherwise
            an error when its batch is taken.

    Returns:
        Dataset of dicts of arrays with `global_batch_size / hosts` rows.

    Raises:
        ValueError: if a batch holds more videos than there are records, or does not divide.
    """
    check_enough(source, global_batch_size)
    dataset = (
        # Positions, and not records: what cannot be read is dealt with where it is rendered.
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(RenderRandomViews(source, spec, skip_unreadable))
    )
    local = HostSlice(
        dataset, global_batch_size=global_batch_size, host=host, hosts=hosts, first=first_step
    )
    batches = local.batch(global_batch_size // hosts, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterable = batches.to_iter_dataset(options)
    if workers:
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    return iterable


def fixed_views(
    source: UsableRecords,
    position: int,
    spec: RenderSpec,
    *,
    speeds: Sequence[int],
    views_per_speed: int,
    direction: int,
) -> dict[str, Any]:
    """Uniformly spaced centre-crop views of one record, for evaluation.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.
        speeds: indices into `spec.views.speeds`; one that is too fast for the record falls back
            to the fastest that fits.
        views_per_speed: clips at each speed, from the first possible start to the last.
        direction: `FORWARD` or `BACKWARD`.

    Returns:
        As `render_views`, plus `describe`, with len(speeds) * views_per_speed views.
    """
    index, record, use = source[position]
    feasible = feasible_speeds(use.timeline, spec.views)
    clips = []
    for speed in speeds:
        speed = min(speed, feasible[-1]) if speed not in feasible else speed
        if speed not in feasible:
            speed = feasible[0]
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.timeline.duration_seconds - span, 0.0)
        for start in np.linspace(0.0, slack, views_per_speed):
            clips.append(Clip(use.timeline.start_seconds + float(start), speed, direction))
    crop = center_crop(max(record.height, 1), max(record.width, 1))
    arrays = render_views(record, use, clips, clips, [crop] * len(clips), spec)
    return arrays | describe(index, record, source.records)


def to_device_batch(batch: Mapping[str, np.ndarray], sharding: Any) -> dict[str, Any]:
    """This host's rows of a batch as global arrays.

    Args:
        batch: local rows.
        sharding: JAX sharding of the leading dimension.

    Returns:
        Global `jax.Array`s.
    """
    import jax  # Not at the top: worker processes render without JAX.

    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }

"""What MediaSequence and DMVR keep in a tf.train.SequenceExample.

Key names: mediapipe/util/sequence/media_sequence.py, dmvr/modalities.py and
dmvr/examples/generate_from_file.py. Times are microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from avcl_jax.data.example_proto import DecodeError, sequence_example_class
from avcl_jax.data.media_error import MediaError
from data_prep.example_layout import SequenceLayout
from data_prep.sources.example_clip import ExampleFootage
from data_prep.sources.footage import Footage
from data_prep.sources.media_file import MediaFootage
from data_prep.sources.samples import Samples

ENCODED_MEDIA = "clip/encoded_media_bytes"
_MICROSECONDS = 1e-6


def parse(payload: bytes | memoryview) -> Any:
    """Returns a serialized tf.train.SequenceExample.

    Raises:
      MediaError: If it is none.
    """
    try:
        return sequence_example_class().FromString(bytes(payload))
    except DecodeError as error:
        raise MediaError("bad_example", f"no tf.train.SequenceExample: {error}") from error


def beside(key: str, name: str) -> str:
    """Returns the key of what describes a feature: `image/timestamp` for `image/encoded`."""
    return f"{key.rpartition('/')[0]}/{name}"


def context(example: Any, key: str) -> list[Any]:
    """Returns the values of a context feature; none if there is no such feature."""
    features = example.context.feature
    return _values(features[key]) if key in features else []


def steps(example: Any, key: str) -> list[list[Any]]:
    """Returns the values of each step of a feature list; none if there is no such list."""
    lists = example.feature_lists.feature_list
    return [_values(feature) for feature in lists[key].feature] if key in lists else []


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def features(example: Any) -> set[str]:
    """Returns the names of the feature lists that are not empty, and of the encoded media file."""
    lists = {key for key in example.feature_lists.feature_list if _has(example, key)}
    return lists | ({ENCODED_MEDIA} if context(example, ENCODED_MEDIA) else set())


def _has(example: Any, key: str | None) -> bool:
    """Whether there is a feature list of this name with something in it."""
    lists = example.feature_lists.feature_list
    return key is not None and key in lists and len(lists[key].feature) > 0


def needs(example: Any, layout: SequenceLayout) -> list[str]:
    """Returns the options that must be given because the example does not say."""
    missing = []
    image, audio = layout.image_key, layout.audio_key
    if image and _has(example, image) and not layout.fps:
        rate = context(example, beside(image, "frame_rate"))
        missing += [] if rate or _has(example, beside(image, "timestamp")) else ["--fps"]
    if audio and _has(example, audio) and not layout.sample_rate_hz:
        known = context(example, beside(audio, "sample_rate"))
        missing += [] if known else ["--sample-rate-of-source"]
    return missing


def footage(
    payload: bytes | memoryview,
    layout: SequenceLayout,
    start_seconds: float,
    end_seconds: float | None,
) -> Footage:
    """Returns the clip of a serialized tf.train.SequenceExample.

    The clip's time zero is its first frame; sound without times of its own starts with it.

    Raises:
      MediaError: If it is none, or its times make no sense.
    """
    example = parse(payload)
    media = context(example, ENCODED_MEDIA)
    if media and not _has(example, layout.image_key) and not _has(example, layout.audio_key):
        return MediaFootage(media[0], start_seconds, end_seconds)
    images, times, interval = _images(example, layout)
    zero = times[0] if len(times) else None
    audio = _audio(example, layout, zero)
    if zero is None and audio is None:
        wanted = [key for key in (layout.image_key, layout.audio_key) if key]
        raise MediaError(
            "empty",
            f"the example has no {' or '.join(wanted) or 'feature list that is used'}; it has "
            f"{', '.join(sorted(features(example))) or 'no feature lists'}",
        )
    if zero is None:
        zero = audio.packets[0][0] if audio else 0.0
    if audio is not None:
        packets = [(start - zero, data) for start, data in audio.packets]
        audio = Samples(packets, audio.sample_rate_hz, audio.full_scale)
    return ExampleFootage(images, times - zero, interval, audio, start_seconds, end_seconds)


def _number(example: Any, key: str) -> float:
    """Returns a context feature that is a positive number; 0 if there is none."""
    found = context(example, key)
    if not found:
        return 0.0
    if isinstance(found[0], bytes) or not np.isfinite(found[0]) or found[0] <= 0:
        raise MediaError("bad_example", f"{key} is {found[0]!r}")
    return float(found[0])


def _single(example: Any, key: str, kind: type) -> list[Any]:
    """Returns the only value of each step of a feature list."""
    found = steps(example, key)
    if any(len(values) != 1 or not isinstance(values[0], kind) for values in found):
        raise MediaError("bad_example", f"a step of {key} does not hold one value of its type")
    return [values[0] for values in found]


def _images(example: Any, layout: SequenceLayout) -> tuple[list[bytes], np.ndarray, float]:
    """Returns encoded images, when each appears in seconds, and the interval if that is known."""
    key = layout.image_key
    images = _single(example, key, bytes) if key else []
    if not key or not images:
        return [], np.empty(0), 0.0
    stamps = _single(example, beside(key, "timestamp"), int)
    if stamps:
        return images, np.array(stamps, np.float64) * _MICROSECONDS, 0.0
    fps = _number(example, beside(key, "frame_rate")) or layout.fps
    if not fps:
        raise MediaError("bad_timestamps", "the frames have neither times nor a rate: say --fps")
    return images, np.arange(len(images)) / fps, 1 / fps


def _audio(example: Any, layout: SequenceLayout, zero: float | None) -> Samples | None:
    key = layout.audio_key
    if not key or not _has(example, key):
        return None
    rate = _number(example, beside(key, "sample_rate")) or layout.sample_rate_hz
    if not rate or rate != round(rate):
        raise MediaError("bad_example", f"the sound's rate is {rate}: say --sample-rate-of-source")
    channels = round(_number(example, beside(key, "num_channels")) or 1)
    stamps = [time * _MICROSECONDS for time in _single(example, beside(key, "timestamp"), int)]
    data = [
        np.array(step.float_list.value, np.float32)
        for step in example.feature_lists.feature_list[key].feature
    ]
    if any(len(values) % channels for values in data):
        raise MediaError("bad_example", f"{key} is not a multiple of {channels} channels")
    data = [values.reshape(-1, channels) for values in data]
    if not stamps:
        data, stamps = [np.concatenate(data)], [zero or 0.0]
    if len(stamps) != len(data):
        raise MediaError("bad_timestamps", f"{len(data)} packets of sound, {len(stamps)} times")
    packets = [(start, values) for start, values in zip(stamps, data, strict=True) if len(values)]
    return Samples(packets, round(rate), layout.full_scale) if packets else None

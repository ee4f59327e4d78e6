"""What TFDS keeps in a tf.train.Example."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from avcl_jax.data.example_proto import DecodeError, example_class
from avcl_jax.data.media_error import MediaError
from avcl_jax.data.record_format import to_text
from data_prep.example_layout import FILE, IMAGES, Stored, TfdsLayout
from data_prep.sources.example_clip import ExampleFootage
from data_prep.sources.samples import Samples


def parse(payload: bytes | memoryview) -> Any:
    """Returns the features of a serialized tf.train.Example by name.

    Raises:
      MediaError: If it is none.
    """
    try:
        return example_class().FromString(bytes(payload)).features.feature
    except DecodeError as error:
        raise MediaError("bad_example", f"no tf.train.Example: {error}") from error


def read_numbers(features: Any, stored: Stored) -> np.ndarray:
    """Returns a feature of numbers or classes.

    Raises:
      MediaError: If the example lacks it, or holds something else.
    """
    key, shape = stored.key, list(stored.shape)
    if shape.count(-1) > 1:  # stored beside the values
        shape = read_numbers(features, Stored(f"{key}/shape", stored.kind, "int64", (-1,))).tolist()
        key = f"{key}/value"
    if key not in features:
        raise _lacks(features, key)
    feature = features[key]
    dtype = np.dtype(stored.dtype)
    try:
        if stored.encoding == "none":
            values = feature.float_list.value if dtype.kind == "f" else feature.int64_list.value
            return np.array(values, dtype).reshape(shape)
        data = feature.bytes_list.value[0]
        if stored.encoding == "zlib":
            data = zlib.decompress(data)
        return np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, IndexError, OverflowError, zlib.error) as error:
        raise MediaError("bad_example", f"feature {key!r}: {error}") from error


def _lacks(features: Any, key: str) -> MediaError:
    there = ", ".join(sorted(features)) or "none"
    return MediaError("bad_example", f"no feature {key!r}, there are {there}")


def read_bytes(features: Any, stored: Stored) -> list[bytes]:
    """Returns a feature of images, files or text.

    Raises:
      MediaError: If the example lacks it.
    """
    if stored.key not in features:
        raise _lacks(features, stored.key)
    return list(features[stored.key].bytes_list.value)


def read_name(features: Any, stored: Stored) -> str:
    """Returns a feature that names something, text or a number.

    Raises:
      MediaError: If the example lacks it.
    """
    if stored.dtype:
        return str(read_numbers(features, stored).item())
    found = read_bytes(features, stored)
    if not found:
        raise MediaError("bad_example", f"feature {stored.key!r} is empty")
    return to_text(found[0])


def footage(
    payload: bytes | memoryview,
    layout: TfdsLayout,
    start_seconds: float,
    end_seconds: float | None,
) -> ExampleFootage:
    """Returns the clip of a serialized tf.train.Example.

    Raises:
      MediaError: If it is none, or lacks what the layout names.
    """
    features = parse(payload)
    images: list[bytes] | np.ndarray = []
    if layout.video is not None:
        is_encoded = layout.video.kind == IMAGES
        images = (read_bytes if is_encoded else read_numbers)(features, layout.video)
    # Frames without a rate do not pass the command that lists them.
    interval = 1 / layout.fps if layout.fps else 0.0
    audio: Samples | bytes | None = None
    if layout.audio is not None and layout.audio.kind == FILE:
        audio = next(iter(read_bytes(features, layout.audio)), None) or None
    elif layout.audio is not None and layout.sample_rate_hz:
        data = read_numbers(features, layout.audio)
        data = data[:, None] if data.ndim == 1 else data
        packets = [(0.0, data)] if len(data) else []
        audio = Samples(packets, layout.sample_rate_hz, layout.full_scale) if packets else None
    return ExampleFootage(
        images,
        np.arange(len(images)) * interval,
        interval,
        audio,
        start_seconds,
        end_seconds,
    )

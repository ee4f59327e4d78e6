"""Alternatives to JPEG frames in records: `python -m benchmarks.formats --json F`.

The same videos at the same size in each format, and the same frames of the same views decoded on
one core, in turns. Sizes and fidelity are those of video without audio. The table and its
conclusions are in docs/data/pipeline_speed.md.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import simplejpeg

from avcl_jax.data import media
from avcl_jax.data.views import Timeline, draw_views, frame_indices
from avcl_jax.paths import local_path
from benchmarks import footage, measure, rendering
from benchmarks.measure import Row

_VIDEOS, _SAMPLES = 16, 48


class Format(NamedTuple):
    """A storage format for the frames of a clip.

    Attributes:
        encode: frames [time, height, width, 3] -> stored form and its size in bytes.
        decode: stored form and distinct frame indices in ascending order -> frames.
    """

    encode: Callable[[np.ndarray], tuple[Any, int]]
    decode: Callable[[Any, Sequence[int]], list[np.ndarray]]


def _each(encode: Callable[[np.ndarray], bytes], decode: Callable[[bytes], np.ndarray]) -> Format:
    """Stores each frame by itself."""

    def encode_all(frames: np.ndarray) -> tuple[list[bytes], int]:
        stored = [encode(frame) for frame in frames]
        return stored, sum(map(len, stored))

    return Format(encode_all, lambda stored, indices: [decode(stored[index]) for index in indices])


def _jpeg(quality: int) -> Format:
    return _each(
        lambda frame: simplejpeg.encode_jpeg(frame, quality=quality, colorsubsampling="420"),
        lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB"),
    )


def _opencv(suffix: str, *options: int) -> Format:
    def decode(data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image is not None, f"{suffix} cannot be decoded"
        return image

    return _each(
        lambda frame: cv2.imencode(suffix, frame[:, :, ::-1], options)[1].tobytes(), decode
    )


def _h264(gop: int, crf: int) -> Format:
    """One packet per frame, a key frame every `gop`; no frame refers to a later one."""

    def encode(frames: np.ndarray) -> tuple[list[tuple[bytes, bool]], int]:
        codec = av.CodecContext.create("libx264", "w")
        height, width = (side // 2 * 2 for side in frames.shape[1:3])
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.framerate, codec.time_base = Fraction(25), Fraction(1, 25)
        keys = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
        codec.options = {"crf": str(crf), "tune": "zerolatency", "preset": "slow", **keys}
        packets = []
        for number, image in enumerate(frames):
            even = np.ascontiguousarray(image[:height, :width])
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = number
            packets += codec.encode(frame)
        packets += codec.encode(None)
        stored = [(bytes(packet), packet.is_keyframe) for packet in packets]
        assert len(stored) == len(frames), "not one packet per frame"
        return stored, sum(len(data) for data, _ in stored)

    def decode(stored: list[tuple[bytes, bool]], indices: Sequence[int]) -> list[np.ndarray]:
        codec = av.CodecContext.create("h264", "r")
        codec.thread_count = 1
        codec.options = {"flags": "low_delay"}
        frames, last = [], -1
        for index in indices:
            key = max(n for n in range(index + 1) if stored[n][1])
            for n in range(max(key, last + 1), index + 1):
                (frame,) = codec.decode(av.Packet(stored[n][0]))
            last = index
            frames.append(frame.to_ndarray(format="rgb24"))
        return frames

    return Format(encode, decode)


FORMATS: dict[str, Format] = {
    "jpeg_75": _jpeg(75),
    "jpeg_90": _jpeg(90),
    "jpeg_95": _jpeg(95),
    "webp_90": _opencv(".webp", cv2.IMWRITE_WEBP_QUALITY, 90),
    "png": _opencv(".png"),
    # Copied, as if read from a file.
    "uint8": Format(
        lambda frames: (frames, frames.nbytes),
        lambda stored, indices: [stored[index].copy() for index in indices],
    ),
    "h264_intra": _h264(1, 18),
    "h264_gop12": _h264(12, 18),
}


def _draw(seconds: np.ndarray, number: int) -> list[list[int]]:
    """Frame indices of the two views of a sample, distinct and in ascending order."""
    rng = np.random.default_rng(number)
    timeline = Timeline(0.0, float(seconds[-1]), float(np.diff(seconds).mean()))
    pair = draw_views(rng, timeline, rendering.VIEWS, seconds)
    return [
        sorted({*frame_indices(clip, seconds, rendering.VIEWS).tolist()}) for clip in pair.video
    ]


def _decibels(kind: Format, frames: Sequence[np.ndarray], stored: Sequence[Any]) -> float | None:
    """PSNR over the middle frames of all clips; None if they are exact."""
    errors = []
    for clip, content in zip(frames, stored, strict=True):
        middle = len(clip) // 2
        (decoded,) = kind.decode(content, [middle])
        original = clip[middle, : decoded.shape[0], : decoded.shape[1]]
        errors.append(np.square(decoded.astype(float) - original).mean())
    error = float(np.mean(errors))
    return round(10 * np.log10(255**2 / error), 1) if error else None


def compare(*, folder: str, repeats: int) -> dict[str, Any]:
    """Measures every format.

    Returns:
        By format: median `milliseconds` for the frames of a sample; `together`, the same where
        frames in both views are decoded once; `all_` of both; `megabytes_per_hour`; `decibels`
        (PSNR).
    """
    cv2.setNumThreads(0)
    frames, times = [], []
    for path in footage.list_videos(folder)[:_VIDEOS]:
        decoded = list(media.decode_frames(path, short_side=rendering.SHORT_SIDE, max_fps=None))
        frames.append(np.stack([frame.image for frame in decoded]))
        times.append(np.array([frame.seconds - decoded[0].seconds for frame in decoded]))
    hours = sum(len(t) * float(np.diff(t).mean()) for t in times) / 3600
    clips = [number % len(times) for number in range(_SAMPLES)]
    views = [(clip, _draw(times[clip], number)) for number, clip in enumerate(clips)]
    once = [(clip, [sorted({*first, *second})]) for clip, (first, second) in views]
    stored: dict[str, list[Any]] = {}
    result: dict[str, Any] = {}
    for name, kind in FORMATS.items():
        encoded = [kind.encode(clip) for clip in frames]
        stored[name] = [content for content, _ in encoded]
        result[name] = {
            "megabytes_per_hour": round(sum(size for _, size in encoded) / hours / 1e6, 1),
            "decibels": _decibels(kind, frames, stored[name]),
        }

    def decode(name: str, samples: Sequence[tuple[int, list[list[int]]]]) -> None:
        for clip, runs in samples:
            for indices in runs:
                FORMATS[name].decode(stored[name][clip], indices)

    for label, samples in (("milliseconds", views), ("together", once)):
        calls = {name: functools.partial(decode, name, samples) for name in FORMATS}
        for name, seconds in measure.seconds_in_turns(calls, repeats=repeats).items():
            values = [1e3 * each / _SAMPLES for each in seconds]
            result[name][label] = round(statistics.median(values), 2)
            result[name][f"all_{label}"] = measure.spread(values)["all"]
    return result


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("formats", __doc__, repeats=True)
    parser.add_argument(
        "--data", type=local_path, default="data/benchmark", help="benchmark data, made if absent"
    )
    args = parser.parse_args(arguments)
    folder = footage.make_footage(args.data)[0]
    results = measure.run_child(
        "benchmarks.formats:compare",
        {"folder": str(folder), "repeats": args.repeats},
        cores=sorted(os.sched_getaffinity(0))[:1],
    )
    rows = [
        Row(name, values["milliseconds"], "ms", detail=values) for name, values in results.items()
    ]
    measure.report(args.json, rows)
    for name, values in results.items():
        print(name, {key: values[key] for key in ("megabytes_per_hour", "decibels", "together")})


if __name__ == "__main__":
    measure.run_command(main)

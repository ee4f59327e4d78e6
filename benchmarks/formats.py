"""What records could hold instead of JPEG frames: `python -m benchmarks.formats --json F`.

The same films at the same size in each format; the same frames of the same views got out of it on
one core, in turns. Sizes and fidelity are of the pictures alone. docs/data/pipeline_speed.md has
the table and what follows from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import simplejpeg

from avcl_jax.data import media
from avcl_jax.data.views import Timeline, draw_views, frame_indices
from avcl_jax.paths import local_path
from benchmarks import footage, rendering
from benchmarks.baselines.pyav_dataloader import films
from benchmarks.measure import (
    REPEATS,
    Row,
    print_table,
    run_child,
    run_command,
    spread,
    writable_path,
    write_json,
)

_FILMS, _SAMPLES = 16, 48
Stored = Any
# Pictures of a clip [time, height, width, 3] to what is stored, with its size in bytes.
Encode = Callable[[np.ndarray], tuple[Stored, int]]
# What is stored and the indices wanted, ascending and distinct, to pictures.
Decode = Callable[[Stored, Sequence[int]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to store the pictures of a clip.

    Attributes:
        encode: pictures to what is stored.
        decode: some of them back.
    """

    encode: Encode
    decode: Decode


def _each(encode: Callable[[np.ndarray], bytes]) -> Encode:
    def all_of(frames: np.ndarray) -> tuple[list[bytes], int]:
        stored = [encode(frame) for frame in frames]
        return stored, sum(map(len, stored))

    return all_of


def _jpeg(quality: int) -> Format:
    return Format(
        _each(lambda frame: simplejpeg.encode_jpeg(frame, quality=quality, colorsubsampling="420")),
        lambda stored, wanted: [
            simplejpeg.decode_jpeg(stored[index], colorspace="RGB") for index in wanted
        ],
    )


def _opencv(suffix: str, *options: int) -> Format:
    def encode(frame: np.ndarray) -> bytes:
        _, data = cv2.imencode(suffix, frame[:, :, ::-1], options)
        return data.tobytes()

    def decode(stored: list[bytes], wanted: Sequence[int]) -> list[np.ndarray]:
        found = []
        for index in wanted:
            image = cv2.imdecode(np.frombuffer(stored[index], np.uint8), cv2.IMREAD_COLOR_RGB)
            assert image is not None, f"{suffix} cannot be decoded"
            found.append(image)
        return found

    return Format(_each(encode), decode)


def _raw() -> Format:
    # Copied, as reading from a file does.
    return Format(
        lambda frames: (frames, frames.nbytes),
        lambda stored, wanted: [stored[index].copy() for index in wanted],
    )


def _h264(gop: int, crf: int) -> Format:
    """A packet for each frame, a key frame every `gop`; no frame refers to a later one."""

    def encode(frames: np.ndarray) -> tuple[list[tuple[bytes, bool]], int]:
        codec = av.CodecContext.create("libx264", "w")
        height, width = (side // 2 * 2 for side in frames.shape[1:3])
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.framerate, codec.time_base = Fraction(25), Fraction(1, 25)
        keys = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
        codec.options = {"crf": str(crf), "tune": "zerolatency", "preset": "slow", **keys}
        packets = []
        for number, image in enumerate(frames):
            cut = np.ascontiguousarray(image[:height, :width])
            frame = av.VideoFrame.from_ndarray(cut, format="rgb24")
            frame.pts = number
            packets += codec.encode(frame)
        packets += codec.encode(None)
        stored = [(bytes(packet), packet.is_keyframe) for packet in packets]
        assert len(stored) == len(frames), "one packet for each frame"
        return stored, sum(len(data) for data, _ in stored)

    def decode(stored: list[tuple[bytes, bool]], wanted: Sequence[int]) -> list[np.ndarray]:
        codec = av.CodecContext.create("h264", "r")
        codec.thread_count = 1
        codec.options = {"flags": "low_delay"}
        found, done = [], -1
        for index in wanted:
            key = max(n for n in range(index + 1) if stored[n][1])
            for n in range(max(key, done + 1), index + 1):
                (frame,) = codec.decode(av.Packet(stored[n][0]))
            done = index
            found.append(frame.to_ndarray(format="rgb24"))
        return found

    return Format(encode, decode)


FORMATS: dict[str, Format] = {
    "jpeg_75": _jpeg(75),
    "jpeg_90": _jpeg(90),
    "jpeg_95": _jpeg(95),
    "webp_90": _opencv(".webp", cv2.IMWRITE_WEBP_QUALITY, 90),
    "png": _opencv(".png"),
    "uint8": _raw(),
    "h264_intra": _h264(1, 18),
    "h264_gop12": _h264(12, 18),
}


def _draw(seconds: np.ndarray, end: float, number: int) -> list[list[int]]:
    """Indices that the two views of a sample show, ascending and distinct."""
    rng = np.random.default_rng(number)
    timeline = Timeline(0.0, end, float(np.diff(seconds).mean()))
    pair = draw_views(rng, timeline, rendering.VIEWS, seconds)
    return [
        sorted({*frame_indices(clip, seconds, rendering.VIEWS).tolist()}) for clip in pair.video
    ]


def compare(*, folder: str, repeats: int) -> dict[str, Any]:
    """Measures every format.

    Returns:
        By format: `milliseconds` for the pictures of a sample, `together` where frames that both
        views show are decoded once, `megabytes_an_hour`, `decibels` (PSNR).
    """
    cv2.setNumThreads(0)
    clips = []
    for path in films(Path(folder))[:_FILMS]:
        shown = list(media.decode_frames(path, short_side=rendering.SHORT_SIDE, max_fps=None))
        seconds = np.array([frame.seconds for frame in shown])
        clips.append((np.stack([frame.image for frame in shown]), seconds - seconds[0]))
    hours = sum(len(frames) * float(np.diff(times).mean()) for frames, times in clips) / 3600
    samples = [
        (number % len(clips), _draw(times, float(times[-1]), number))
        for number in range(_SAMPLES)
        for times in [clips[number % len(clips)][1]]
    ]
    stored: dict[str, list[Stored]] = {}
    result: dict[str, Any] = {}
    for name, kind in FORMATS.items():
        encoded = [kind.encode(frames) for frames, _ in clips]
        stored[name] = [content for content, _ in encoded]
        errors = []
        for (frames, _), content in zip(clips, stored[name], strict=True):
            (decoded,) = kind.decode(content, [len(frames) // 2])
            height, width = decoded.shape[:2]
            original = frames[len(frames) // 2, :height, :width]
            errors.append(np.square(decoded.astype(float) - original).mean())
        error = float(np.mean(errors))
        result[name] = {
            "megabytes_an_hour": round(sum(size for _, size in encoded) / hours / 1e6, 1),
            "decibels": round(10 * np.log10(255**2 / error), 1) if error else None,
        }
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    together: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(repeats):
        for name, kind in FORMATS.items():
            for found, merge in ((times, False), (together, True)):
                begin = time.perf_counter()
                for clip, views in samples:
                    runs = [sorted({*views[0], *views[1]})] if merge else views
                    for wanted in runs:
                        kind.decode(stored[name][clip], wanted)
                found[name].append(1e3 * (time.perf_counter() - begin) / len(samples))
    for name, found in result.items():
        found["milliseconds"] = round(statistics.median(times[name]), 2)
        found["together"] = round(statistics.median(together[name]), 2)
        found["all_milliseconds"] = spread(times[name])["all"]
    return result


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formats", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--data", type=local_path, default="data/benchmark", help="made if absent")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of every measurement")
    args = parser.parse_args(arguments)
    folder = footage.make_footage(args.data)[0]
    found = run_child(
        "benchmarks.formats:compare",
        {"folder": str(folder), "repeats": args.repeats},
        cores=sorted(os.sched_getaffinity(0))[:1],
    )
    rows = [Row(name, value["milliseconds"], "ms", None, value) for name, value in found.items()]
    write_json(args.json, rows)
    print_table(rows)
    for name, value in found.items():
        print(name, {key: value[key] for key in ("megabytes_an_hour", "decibels", "together")})
    return 0


if __name__ == "__main__":
    run_command(main)

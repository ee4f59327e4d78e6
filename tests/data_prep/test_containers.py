"""Flash and click of every full second, through every container and codec that PyAV writes.

The truth is what was encoded. A record must hold it to within one frame, in the first second as in
the last, whatever the file does between.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import simplejpeg

from avcl_jax.data.record_format import Record
from data_prep.clip import ClipOptions, prepare_clip
from data_prep.manifest import Entry
from tests.data.synthetic_media import flash_seconds, write_flash_and_click

FPS = 25
OPTIONS = ClipOptions(
    short_side=64,
    max_fps=None,
    quality=90,
    sample_rate_hz=16000,
    min_seconds=0.0,
    max_seconds=60.0,
    min_side=16,
    require=("audio", "video"),
)
# Encoders at their fastest, on one thread.
VIDEO: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"preset": "ultrafast", "threads": "1"}),
    "hevc": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    ),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
}
AUDIO: dict[str, tuple[str, dict[str, str]]] = {
    "aac": ("aac", {}),
    "opus": ("libopus", {}),
    "mp3": ("libmp3lame", {}),
    "vorbis": ("vorbis", {"strict": "experimental"}),
}
CONTAINERS = ("mp4", "mkv", "webm", "mov", "avi")
# What the containers take. Written down, so that a PyAV that writes less is noticed.
TAKES = {
    "mp4": ("h264 hevc vp9 av1", "aac opus mp3 vorbis"),
    "mkv": ("h264 hevc vp9 av1", "aac opus mp3 vorbis"),
    "webm": ("vp9 av1", "opus vorbis"),
    "mov": ("h264 hevc", "aac mp3"),
    "avi": ("h264 vp9 av1", "aac mp3 vorbis"),
}
WRITTEN = [
    (video, audio, container)
    for container, (videos, audios) in TAKES.items()
    for video, audio in itertools.product(videos.split(), audios.split())
]
# Every container, every codec and every pair of a container with a sound codec.
CHOSEN = [
    ("h264", "aac", "mp4"),
    ("vp9", "opus", "mp4"),
    ("av1", "mp3", "mp4"),
    ("hevc", "vorbis", "mp4"),
    ("hevc", "aac", "mkv"),
    ("h264", "opus", "mkv"),
    ("vp9", "mp3", "mkv"),
    ("av1", "vorbis", "mkv"),
    ("vp9", "opus", "webm"),
    ("av1", "vorbis", "webm"),
    ("h264", "aac", "mov"),
    ("hevc", "mp3", "mov"),
    ("h264", "aac", "avi"),
    ("av1", "mp3", "avi"),
    ("h264", "vorbis", "avi"),
]


def steady(seconds: float) -> list[float]:
    return [number / FPS for number in range(round(seconds * FPS))]


def write(path: Path, video: str, audio: str | None, **changes: Any) -> None:
    """Writes a clip at 25 frames a second unless told otherwise."""
    seconds = changes.pop("seconds", 4.4)
    arguments: dict[str, Any] = {
        "video_codec": VIDEO[video][0],
        "audio_codec": audio and AUDIO[audio][0],
        "options": VIDEO[video][1],
        "sound_options": audio and AUDIO[audio][1],
        "layout": "stereo",
        "frame_times": steady(seconds),
        "sound_seconds": seconds,
    }
    if path.suffix == ".avi":  # which counts frames
        arguments["ticks"] = Fraction(1, FPS)
    write_flash_and_click(path, **arguments | changes)


def prepare(path: Path, **changes: Any) -> Record:
    options = dataclasses.replace(OPTIONS, **changes)
    return prepare_clip(Entry(str(path), "train", "x", "x", 0.0, None, {}), options)


def shown_flashes(record: Record) -> np.ndarray:
    pictures = [simplejpeg.decode_jpeg(frame) for frame in record.frames]
    bright = [p[p.shape[0] // 2 :, p.shape[1] // 2 :].mean() > 128 for p in pictures]
    return record.frame_seconds[np.flatnonzero(bright)]


def heard_clicks(record: Record) -> np.ndarray:
    loud = np.flatnonzero(np.abs(record.waveform.astype(int)) > 3000)
    starts = loud[np.diff(loud, prepend=-99999) > 1600]
    return record.audio_start_seconds + starts / record.sample_rate_hz


def assert_in_time(
    record: Record,
    flashes: Any,
    clicks: Any,
    *,
    error_seconds: float = 0.0022,
) -> None:
    """Flash and click are where they were put, and as far apart as they were put."""
    found, heard = shown_flashes(record), heard_clicks(record)
    np.testing.assert_allclose(found, flashes, atol=error_seconds)
    np.testing.assert_allclose(heard, clicks, atol=error_seconds)
    both = min(len(found), len(heard))
    apart = (found[-both:] - heard[-both:]) - (np.array(flashes) - np.array(clicks))[-both:]
    assert np.abs(apart).max() < 1 / FPS + 0.001, "apart"
    assert np.ptp(apart) < 0.0031, "drift"


def check(path: Path, video: str, audio: str, seconds: float) -> None:
    write(path, video, audio, seconds=seconds)
    record = prepare(path)
    assert len(record.frames) == round(seconds * FPS)
    truth = np.arange(1, int(seconds) + 1.0)
    # The AVI muxer moves everything by the encoder's delay, and the picture to whole frames.
    error = 1 / FPS + 0.001 if path.suffix == ".avi" else 0.0022
    assert_in_time(record, truth, truth, error_seconds=error)


def test_the_matrix_is_what_pyav_writes(tmp_path: Path) -> None:
    found = []
    for container, video, audio in itertools.product(CONTAINERS, VIDEO, AUDIO):
        try:
            write(tmp_path / f"clip.{container}", video, audio, seconds=0.2)
        except (ValueError, av.error.FFmpegError):
            continue
        found.append((video, audio, container))
    assert sorted(found) == sorted(WRITTEN)
    assert len(WRITTEN) == 49


def test_the_chosen_ones_cover_containers_and_codecs() -> None:
    assert {(a, c) for _, a, c in CHOSEN} == {(a, c) for _, a, c in WRITTEN}
    assert {v for v, _, _ in CHOSEN} == set(VIDEO)
    assert set(CHOSEN) <= set(WRITTEN)


@pytest.mark.parametrize(("video", "audio", "container"), CHOSEN)
def test_flash_and_click_stay_in_time(
    tmp_path: Path, video: str, audio: str, container: str
) -> None:
    check(tmp_path / f"clip.{container}", video, audio, seconds=4.4)


@pytest.mark.slow
@pytest.mark.parametrize(("video", "audio", "container"), WRITTEN)
def test_flash_and_click_do_not_drift(
    tmp_path: Path, video: str, audio: str, container: str
) -> None:
    check(tmp_path / f"clip.{container}", video, audio, seconds=26.4)


# How the sound lies relative to the picture, the picture's own clock, and the codecs' habits:
# (file, codecs, how it differs).
UNSTEADY = tuple(np.cumsum([0.0, *np.random.default_rng(1).choice([0.02, 0.04, 0.1], 80)]))
B_FRAMES = {"preset": "medium", "bf": "3", "threads": "1"}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "variable rate, mp4": ("a.mp4", "h264", "aac", {"frame_times": UNSTEADY}),
    "variable rate, webm": ("a.webm", "vp9", "opus", {"frame_times": UNSTEADY}),
    "variable rate, mkv": ("a.mkv", "av1", "mp3", {"frame_times": UNSTEADY}),
    "variable rate, B-frames": (
        "a.mp4",
        "h264",
        "aac",
        {"frame_times": UNSTEADY, "options": B_FRAMES},
    ),
    "B-frames, mp4": ("a.mp4", "h264", "aac", {"options": B_FRAMES}),
    "B-frames, mkv": ("a.mkv", "h264", "opus", {"options": B_FRAMES}),
    "B-frames, avi": ("a.avi", "h264", "mp3", {"options": B_FRAMES}),
    "B-frames, hevc": (
        "a.mp4",
        "hevc",
        "aac",
        {"options": {"preset": "fast", "x265-params": "log-level=none:pools=none:bframes=3"}},
    ),
    "MPEG-4 in avi": ("a.avi", "h264", "mp3", {"video_codec": "mpeg4", "options": {}}),
    "MPEG-4 with B-frames in avi": (
        "a.avi",
        "h264",
        "mp3",
        {"video_codec": "mpeg4", "options": {"bf": "2"}},
    ),
    "MPEG-2 with B-frames in avi": (
        "a.avi",
        "h264",
        "mp3",
        {"video_codec": "mpeg2video", "options": {"bf": "2"}},
    ),
    "sound later, mp4": ("a.mp4", "h264", "aac", {"sound_offset_seconds": 0.7}),
    "sound later, mkv": ("a.mkv", "h264", "mp3", {"sound_offset_seconds": 0.7}),
    "sound later, webm": ("a.webm", "vp9", "opus", {"sound_offset_seconds": 0.7}),
    "sound later, mov": ("a.mov", "h264", "aac", {"sound_offset_seconds": 0.7}),
    "sound after the first second": ("a.mp4", "h264", "aac", {"sound_offset_seconds": 1.5}),
    "sound ends earlier, mp4": ("a.mp4", "h264", "aac", {"sound_seconds": 2.5}),
    "sound ends earlier, mkv": ("a.mkv", "hevc", "vorbis", {"sound_seconds": 2.5}),
    "sound lasts longer": ("a.mp4", "h264", "aac", {"sound_seconds": 6.0}),
    "picture later, mp4": (
        "a.mp4",
        "h264",
        "aac",
        {"frame_times": [t + 0.4 for t in steady(4.4)]},
    ),
    "picture later, webm": (
        "a.webm",
        "vp9",
        "vorbis",
        {"frame_times": [t + 0.4 for t in steady(4.4)]},
    ),
    "picture later, mov": (
        "a.mov",
        "h264",
        "mp3",
        {"frame_times": [t + 0.4 for t in steady(4.4)]},
    ),
    "5.1, mp4": ("a.mp4", "h264", "aac", {"layout": "5.1"}),
    "5.1, opus": ("a.mkv", "h264", "opus", {"layout": "5.1"}),
    "mono": ("a.mp4", "h264", "mp3", {"layout": "mono"}),
    "8 kHz, aac": ("a.mp4", "h264", "aac", {"sample_rate_hz": 8000}),
    "8 kHz, mp3": ("a.mkv", "h264", "mp3", {"sample_rate_hz": 8000, "layout": "mono"}),
    "8 kHz, opus": ("a.webm", "vp9", "opus", {"sample_rate_hz": 8000}),
    "44.1 kHz": ("a.mp4", "h264", "aac", {"sample_rate_hz": 44100}),
    "10 bit, h264": ("a.mp4", "h264", "aac", {"pixel_format": "yuv420p10le"}),
    "10 bit, hevc": ("a.mkv", "hevc", "aac", {"pixel_format": "yuv420p10le"}),
    "10 bit, av1": ("a.webm", "av1", "opus", {"pixel_format": "yuv420p10le"}),
    "4:4:4": ("a.mp4", "h264", "aac", {"pixel_format": "yuv444p"}),
    "4:2:2": ("a.mp4", "h264", "aac", {"pixel_format": "yuv422p"}),
    "odd size, h264": ("a.mp4", "h264", "aac", {"size": (63, 47), "pixel_format": "yuv444p"}),
    "odd size, vp9": ("a.webm", "vp9", "opus", {"size": (63, 47)}),
    "odd size, av1": ("a.mkv", "av1", "opus", {"size": (67, 65)}),
    "interlaced, h264": (
        "a.mp4",
        "h264",
        "aac",
        {"options": {"preset": "medium", "x264opts": "tff=1", "threads": "1"}},
    ),
    "interlaced, mpeg2": (
        "a.mkv",
        "h264",
        "mp3",
        {
            "video_codec": "mpeg2video",
            "options": {"flags": "+ildct+ilme", "bf": "2"},
            "ticks": Fraction(1, FPS),
        },
    ),
    "fragmented mp4": (
        "a.mp4",
        "h264",
        "aac",
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "header first": ("a.mp4", "h264", "aac", {"container_options": {"movflags": "faststart"}}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_kinds_of_time_and_form(tmp_path: Path, case: str) -> None:
    name, video, audio, changes = CASES[case]
    write(tmp_path / name, video, audio, **changes)
    record = prepare(tmp_path / name)
    times = np.array(changes.get("frame_times", steady(4.4)))
    assert len(record.frames) == len(times)
    if not name.endswith("avi"):
        np.testing.assert_allclose(record.frame_seconds, times - times[0], atol=0.0011)
    begin = changes.get("sound_offset_seconds", 0.0)
    end = begin + changes.get("sound_seconds", 4.4)
    clicks = [s - times[0] for s in range(1, int(end) + 1) if begin <= s < end]
    flashes = np.array(flash_seconds(times)) - times[0]
    shared = [f for f in flashes if any(abs(f - c) < 0.2 for c in clicks)]
    error = 1 / FPS + 0.001 if name.endswith("avi") else 0.0022
    np.testing.assert_allclose(shown_flashes(record), flashes, atol=error)
    np.testing.assert_allclose(heard_clicks(record), clicks, atol=error)
    assert shared
    if "size" in changes:
        width, height = changes["size"]
        scale = min(1.0, 64 / min(width, height))
        assert (record.height, record.width) == (round(height * scale), round(width * scale))

"""Flash and click of every full second, through every container and codec that PyAV writes.

The truth is what was encoded. A record must hold it to within one frame, in the first second as in
the last, whatever the file does between.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import simplejpeg

from avcl_jax.data.media import probe
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import prepare_clip
from tests.data.synthetic_media import (
    OPTIONS,
    entry,
    flash_seconds,
    heard_clicks,
    shown_flashes,
    write_flash_and_click,
)

FPS = 25
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
# Codecs that PyAV writes into each container.
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
    tuple(pair.split())
    for pair in (
        *("h264 aac mp4", "vp9 opus mp4", "av1 mp3 mp4", "hevc vorbis mp4", "hevc aac mkv"),
        *("h264 opus mkv", "vp9 mp3 mkv", "av1 vorbis mkv", "vp9 opus webm", "av1 vorbis webm"),
        *("h264 aac mov", "hevc mp3 mov", "h264 aac avi", "av1 mp3 avi", "h264 vorbis avi"),
    )
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
    # SVT-AV1 makes a thread of root's real-time, at the highest priority, and with it all threads
    # that it starts later: the rest of the tests would keep other programs from the processors.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def prepare(path: Path, **changes: Any) -> Record:
    options = dataclasses.replace(OPTIONS, **{"require": ("audio", "video"), **changes})
    return prepare_clip(entry(path), options)[0]


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


@pytest.mark.parametrize(("video", "audio", "container"), CHOSEN)
def test_flash_and_click_stay_in_time(tmp_path, video, audio, container):
    check(tmp_path / f"clip.{container}", video, audio, seconds=4.4)


@pytest.mark.slow
@pytest.mark.parametrize(("video", "audio", "container"), WRITTEN)
def test_flash_and_click_do_not_drift(tmp_path, video, audio, container):
    check(tmp_path / f"clip.{container}", video, audio, seconds=26.4)


# How the sound lies relative to the picture, the picture's own clock, and the codecs' habits:
# (file, codecs, how it differs).
GAPS = np.random.default_rng(1).choice([0.02, 0.04, 0.1], 80)
UNSTEADY = {"frame_times": tuple(np.cumsum([0.0, *GAPS]))}
TICK = Fraction(1, FPS)
B_FRAMES = {"preset": "medium", "bf": "3", "threads": "1"}
# By the preset "fast" x265 makes other streams on a busy machine, some of dim flashes.
B_HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:bframes=3"}
TOP_FIRST = {"preset": "medium", "x264opts": "tff=1", "threads": "1"}
INTERLACED = {"flags": "+ildct+ilme", "bf": "2"}
FRAGMENTS = {"movflags": "frag_keyframe+delay_moov"}
MPEG4, MPEG2 = {"video_codec": "mpeg4"}, {"video_codec": "mpeg2video"}
PCM = {"audio_codec": "pcm_s16le", "sound_options": {}, "layout": "mono"}
VIDEO_LATER = {"frame_times": [t + 0.4 for t in steady(4.4)]}
AUDIO_LATER = {"sound_offset_seconds": 0.7}
TEN_BITS = {"pixel_format": "yuv420p10le"}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "variable rate, mp4": ("mp4", "h264", "aac", UNSTEADY),
    "variable rate, webm": ("webm", "vp9", "opus", UNSTEADY),
    "variable rate, mkv": ("mkv", "av1", "mp3", UNSTEADY),
    "variable rate, B-frames": ("mp4", "h264", "aac", UNSTEADY | {"options": B_FRAMES}),
    "B-frames, mp4": ("mp4", "h264", "aac", {"options": B_FRAMES}),
    "B-frames, mkv": ("mkv", "h264", "opus", {"options": B_FRAMES}),
    "B-frames, avi": ("avi", "h264", "mp3", {"options": B_FRAMES}),
    "B-frames, hevc": ("mp4", "hevc", "aac", {"options": B_HEVC}),
    "MPEG-4 in avi": ("avi", "h264", "mp3", MPEG4 | {"options": {}}),
    "MPEG-4 with B-frames in avi": ("avi", "h264", "mp3", MPEG4 | {"options": {"bf": "2"}}),
    "MPEG-2 with B-frames in avi": ("avi", "h264", "mp3", MPEG2 | {"options": {"bf": "2"}}),
    "sound later, mp4": ("mp4", "h264", "aac", AUDIO_LATER),
    "sound later, mkv": ("mkv", "h264", "mp3", AUDIO_LATER),
    "sound later, webm": ("webm", "vp9", "opus", AUDIO_LATER),
    "sound later, mov": ("mov", "h264", "aac", AUDIO_LATER),
    "sound after the first second": ("mp4", "h264", "aac", {"sound_offset_seconds": 1.5}),
    "sound ends earlier, mp4": ("mp4", "h264", "aac", {"sound_seconds": 2.5}),
    "sound ends earlier, mkv": ("mkv", "hevc", "vorbis", {"sound_seconds": 2.5}),
    "sound lasts longer": ("mp4", "h264", "aac", {"sound_seconds": 6.0}),
    "gap in the sound": ("mkv", "h264", "mp3", PCM | {"sound_gap": (1.3, 1.8)}),
    "start after zero": ("ts", "h264", "aac", {}),
    "picture later, mp4": ("mp4", "h264", "aac", VIDEO_LATER),
    "picture later, webm": ("webm", "vp9", "vorbis", VIDEO_LATER),
    "picture later, mov": ("mov", "h264", "mp3", VIDEO_LATER),
    "5.1, mp4": ("mp4", "h264", "aac", {"layout": "5.1"}),
    "5.1, opus": ("mkv", "h264", "opus", {"layout": "5.1"}),
    "mono": ("mp4", "h264", "mp3", {"layout": "mono"}),
    "8 kHz, aac": ("mp4", "h264", "aac", {"sample_rate_hz": 8000}),
    "8 kHz, mp3": ("mkv", "h264", "mp3", {"sample_rate_hz": 8000, "layout": "mono"}),
    "8 kHz, opus": ("webm", "vp9", "opus", {"sample_rate_hz": 8000}),
    "44.1 kHz": ("mp4", "h264", "aac", {"sample_rate_hz": 44100}),
    "10 bit, h264": ("mp4", "h264", "aac", TEN_BITS),
    "10 bit, hevc": ("mkv", "hevc", "aac", TEN_BITS),
    "10 bit, av1": ("webm", "av1", "opus", TEN_BITS),
    "4:4:4": ("mp4", "h264", "aac", {"pixel_format": "yuv444p"}),
    "4:2:2": ("mp4", "h264", "aac", {"pixel_format": "yuv422p"}),
    "odd size, h264": ("mp4", "h264", "aac", {"size": (63, 47), "pixel_format": "yuv444p"}),
    "odd size, vp9": ("webm", "vp9", "opus", {"size": (63, 47)}),
    "odd size, av1": ("mkv", "av1", "opus", {"size": (67, 65)}),
    "interlaced, h264": ("mp4", "h264", "aac", {"options": TOP_FIRST}),
    "interlaced, mpeg2": ("mkv", "h264", "mp3", MPEG2 | {"options": INTERLACED, "ticks": TICK}),
    "fragmented mp4": ("mp4", "h264", "aac", {"container_options": FRAGMENTS, "options": B_FRAMES}),
    "header first": ("mp4", "h264", "aac", {"container_options": {"movflags": "faststart"}}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_kinds_of_time_and_form(tmp_path: Path, case: str) -> None:
    suffix, video, audio, changes = CASES[case]
    name = f"a.{suffix}"
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
    error = 1 / FPS + 0.001 if name.endswith("avi") else 0.0022
    np.testing.assert_allclose(shown_flashes(record), flashes, atol=error)
    np.testing.assert_allclose(heard_clicks(record), clicks, atol=error)
    if "size" in changes:
        width, height = changes["size"]
        scale = min(1.0, 64 / min(width, height))
        assert (record.height, record.width) == (round(height * scale), round(width * scale))


# Container, codecs and options: groups of pictures that a cut begins inside of.
CUT_FILES = {
    "a.mp4": ("h264", "aac", B_FRAMES),
    "b.mkv": ("h264", "mp3", B_FRAMES),
    "c.webm": ("vp9", "opus", VIDEO["vp9"][1]),
    "d.mov": ("hevc", "aac", VIDEO["hevc"][1]),
    "e.avi": ("h264", "mp3", VIDEO["h264"][1]),
    "f.ts": ("h264", "aac", B_FRAMES),
    "g.ts": ("h264", "aac", B_FRAMES | {"g": "50"}),
    "live.mkv": ("h264", "opus", B_FRAMES),  # states no duration
}
CUTS = ((0.337, 3.871), (1.0623, 4.39), (1.937, 3.131), (2.71828, None), (3.14159, 99.0))


def test_cuts_of_a_table_at_any_fraction_of_a_second(tmp_path: Path) -> None:
    """What is cut is what a player shows and sounds there, also where no container says its end."""
    lines = ["path,id,start,end"]
    for name, (video, audio, options) in CUT_FILES.items():
        live = {"container_options": {"live": "1"}} if name.startswith("live") else {}
        write(tmp_path / name, video, audio, options=options, **live)
        for number, (start, end) in enumerate(CUTS):
            lines.append(f"{name},{name}-{number},{start},{'' if end is None else end}")
    assert probe(tmp_path / "live.mkv").duration_seconds is None
    (tmp_path / "cuts.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "records"
    assert main(["prepare", str(tmp_path / "cuts.csv"), f"--out={out}", "--workers=1"]) == 0
    records = RecordDataset(out, "train")
    assert len(records) == len(lines) - 1
    for record in records:
        name, _, number = record.record_id.rpartition("-")
        start, end = CUTS[int(number)]
        # A record begins with its first frame: the first that appears at the start or later.
        begin = np.ceil(start * FPS) / FPS
        seconds = np.arange(int(start) + 1, min(end or 9, 4.4), 1.0)
        within = 1 / FPS + 0.001
        np.testing.assert_allclose(
            shown_flashes(record), seconds - begin, atol=within, err_msg=record.record_id
        )
        np.testing.assert_allclose(
            heard_clicks(record), seconds - begin, atol=within, err_msg=record.record_id
        )
        apart = shown_flashes(record) - heard_clicks(record)
        assert np.abs(apart).max() < (0.0022 if name != "e.avi" else within), record.record_id
        assert record.duration_seconds == pytest.approx(min(end or 9, 4.4) - begin, abs=0.06)


def boxes(data: bytes | bytearray, kind: bytes) -> list[int]:
    """Returns where the content of each box of a kind begins."""
    found, at = [], data.find(kind)
    while at >= 0:
        found.append(at + 4)
        at = data.find(kind, at + 4)
    return found


# Seconds that an edit list leaves out at the beginning: within a group of pictures, so that frames
# are decoded which are not shown, and within a sound packet.
@pytest.mark.parametrize("left_out", [0.4, 1.52])
@pytest.mark.parametrize("options", [VIDEO["h264"][1], B_FRAMES], ids=["plain", "B-frames"])
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_edit_lists_are_obeyed(tmp_path, suffix, options, left_out):
    path = tmp_path / f"clip.{suffix}"
    write(path, "h264", "aac", options=options)
    data = bytearray(path.read_bytes())
    scales = [struct.unpack_from(">I", data, at + 12)[0] for at in boxes(data, b"mdhd")]
    lists = boxes(data, b"elst")
    assert len(lists) == len(scales) == 2
    for at, scale in zip(lists, scales, strict=True):
        version, count, seconds, first = struct.unpack_from(">IIIi", data, at)
        assert (version, count) == (0, 1)
        # The length is in thousandths, the time of the first sample in the track's own unit.
        edit = struct.pack(">Ii", seconds - round(left_out * 1000), first + round(left_out * scale))
        data[at + 8 : at + 16] = edit
    path.write_bytes(data)
    record = prepare(path)
    seconds = np.arange(int(left_out) + 1, 5) - left_out
    assert len(record.frames) == pytest.approx((4.4 - left_out) * FPS, abs=1)
    assert_in_time(record, seconds, seconds)


def test_an_empty_edit_delays_the_sound(tmp_path: Path) -> None:
    """What the muxer writes for sound that starts later, made longer by a second."""
    path = tmp_path / "clip.mp4"
    write(path, "h264", "aac", sound_offset_seconds=0.5)
    data = bytearray(path.read_bytes())
    (at,) = [a for a in boxes(data, b"elst") if struct.unpack_from(">I", data, a + 4)[0] == 2]
    seconds, first = struct.unpack_from(">Ii", data, at + 8)
    assert first == -1
    struct.pack_into(">I", data, at + 8, seconds + 1000)
    path.write_bytes(data)
    assert_in_time(prepare(path), np.arange(1, 5), np.arange(2, 6))


# Quarter turns clockwise, and the matrix that asks for them.
MATRICES = {0: (1, 0, 0, 1), 1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


@pytest.mark.parametrize("turns", sorted(MATRICES))
def test_rotated_pictures_come_out_upright(tmp_path: Path, turns: int) -> None:
    path = tmp_path / "clip.mp4"
    write(path, "h264", "aac", size=(64, 48))
    data = bytearray(path.read_bytes())
    at = boxes(data, b"tkhd")[0] + 40
    a, b, c, d = (value << 16 for value in MATRICES[turns])
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    record = prepare(path)
    assert (record.height, record.width) == ((48, 64), (64, 48))[turns % 2]
    picture = simplejpeg.decode_jpeg(record.frames[0]).astype(int)
    quarters = {
        0: picture[:8, :8],
        1: picture[:8, -8:],
        2: picture[-8:, -8:],
        3: picture[-8:, :8],
    }
    red = [number for number, part in quarters.items() if part[..., 0].mean() > 120]
    assert red == [turns]  # the patch was stored top left
    assert_in_time(record, np.arange(1, 5), np.arange(1, 5))


@pytest.mark.parametrize("container", ["webm", "mkv"])
def test_transparency_is_ignored(tmp_path: Path, container: str) -> None:
    """The colours stored under transparent pixels are those of the opaque clip."""
    write(tmp_path / f"opaque.{container}", "vp9", "opus", pixel_format="yuv420p")
    write(tmp_path / f"clear.{container}", "vp9", "opus", pixel_format="yuva420p")
    with av.open(str(tmp_path / f"clear.{container}")) as file:
        assert file.streams.video[0].metadata.get("alpha_mode") == "1"
    opaque, clear = (prepare(tmp_path / f"{n}.{container}") for n in ("opaque", "clear"))
    assert_in_time(clear, np.arange(1, 5), np.arange(1, 5))
    for ours, theirs in zip(clear.frames, opaque.frames, strict=True):
        left, right = simplejpeg.decode_jpeg(ours), simplejpeg.decode_jpeg(theirs)
        assert np.abs(left.astype(int) - right).mean() < 4


def test_transparent_frames_of_a_decoder_with_alpha_are_ignored_too(tmp_path: Path) -> None:
    """FFV1 gives frames with an alpha channel, where VP9's decoder leaves it out."""
    path = tmp_path / "clip.mkv"
    write(path, "h264", "aac", video_codec="ffv1", options={}, pixel_format="yuva420p")
    record = prepare(path)
    assert_in_time(record, np.arange(1, 5), np.arange(1, 5))
    flash = simplejpeg.decode_jpeg(record.frames[25])
    assert flash[32:, 8:24].mean() > 240  # white under transparency, not black


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p"])
def test_ten_bits_and_full_chroma_show_the_same_colours(tmp_path: Path, pixel_format: str) -> None:
    write(tmp_path / "plain.mp4", "h264", "aac")
    write(tmp_path / "other.mp4", "h264", "aac", pixel_format=pixel_format)
    plain, other = (prepare(tmp_path / f"{name}.mp4") for name in ("plain", "other"))
    for number in (0, 25):
        left, right = (simplejpeg.decode_jpeg(r.frames[number]) for r in (plain, other))
        assert np.abs(left[24:, 24:].astype(int) - right[24:, 24:]).mean() < 3


def leave_uncoded(vop: bytearray, start: int) -> None:
    """Clears the bit by which an MPEG-4 picture at 25 ticks a second says that it holds one."""
    bit = 8 * (start + 4) + 2  # after start code and type
    while vop[bit // 8] >> (7 - bit % 8) & 1:  # full seconds, in unary
        bit += 1
    bit += 1 + 1 + 5 + 1  # its end, marker, ticks, marker
    vop[bit // 8] &= ~(1 << (7 - bit % 8)) & 0xFF


def test_xvid_frames_that_repeat_the_one_before_cause_no_drift(tmp_path: Path) -> None:
    """An N-VOP in AVI is a packet from which no frame comes."""
    path = tmp_path / "clip.avi"
    write(path, "h264", "mp3", video_codec="mpeg4", options={})
    data = bytearray(path.read_bytes())
    lost = 0
    for number, at in enumerate(boxes(data, b"00dc")):
        start = data.find(b"\x00\x00\x01\xb6", at, at + 40)
        # Some P-frames, but not around a flash.
        is_p = start >= 0 and data[start + 4] >> 6 == 1
        if is_p and 5 < number % FPS < 20 and number % 7 < 3:
            leave_uncoded(data, start)
            lost += 1
    path.write_bytes(data)
    record = prepare(path)
    assert lost > 5
    assert len(record.frames) == 110 - lost
    truth = np.arange(1, 5)
    assert_in_time(record, truth, truth, error_seconds=1 / FPS + 0.001)

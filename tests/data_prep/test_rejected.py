"""Every reason of the closed list comes out of preparation, for a file made to have it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avcl_jax.data.media import MediaError, decode_frames
from avcl_jax.data.record_index import load_table
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import NOTES, REASONS
from tests.data.synthetic_media import write_channels, write_clip, write_stretches
from tests.data_prep.conftest import listed
from tests.data_prep.test_prepare import signal_workers, when_reached

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data" / "rejected.md"
TIMES = tuple(number / 10 for number in range(22))


def write(path: Path, **changes: object) -> Path:
    return write_clip(path, len(TIMES), **changes)


def edit(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def fifo(path: Path) -> Path:
    """A file that never arrives, as on a network disk that stalls."""
    os.mkfifo(path)
    return path


def tracks_of_another_kind(data: bytes) -> bytes:
    """Neither picture nor sound, but time codes."""
    return re.sub(b"avc1|mp4a", b"zzzz", re.sub(b"vide|soun", b"tmcd", data))


def overwrite_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(800) + data[middle + 800 :]


def last_cluster_at_zero(data: bytes) -> bytes:
    """Matroska's time of the last group of packets, E7, becomes that of the first."""
    at = data.index(b"\xe7", data.rindex(bytes.fromhex("1f43b675"))) + 1
    size = data[at] & 0x7F
    return data[: at + 1] + bytes(size) + data[at + 1 + size :]


def sound_alone(path: Path) -> Path:
    write_channels(path, np.zeros((1, 48_000), np.int16), layout="mono", codec="pcm_s16le")
    return path


def channels(path: Path, *factors: float) -> Path:
    samples = np.outer(factors, 3000 * np.sin(np.arange(9600))).astype(np.int16)
    write_channels(path, samples, layout="stereo", codec="pcm_s16le")
    return path


def huge_picture(path: Path, *, side: int = 10_000, rgb: bool = False) -> Path:
    """A hundred million black pixels in 15 kB, in a container that says 32 by 32."""
    depth, colour, row = (8, 2, 1 + 3 * side) if rgb else (1, 0, 1 + side // 8)

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    png = b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)),
            chunk(b"IDAT", zlib.compress(bytes(row * side))),
            chunk(b"IEND", b""),
        ]
    )
    with av.open(str(path), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "rgb24"
        for number in range(3):
            packet = av.Packet(png)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base = Fraction(1, 10)
            file.mux(packet)
    return path


def two_sizes(path: Path) -> Path:
    write_stretches(path, [((96, 64), Fraction(1)), ((64, 128), Fraction(1))], seconds=1.0)
    return path


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a file in a folder, arguments of the command, and the start of the clip."""

    make: Callable[[Path], Path]
    arguments: tuple[str, ...] = ()
    start: str = ""


CASES = {
    "not_found": Case(lambda d: d / "gone.mp4"),
    "unreadable": Case(lambda d: folder(d / "folder.mp4")),
    "not_media": Case(lambda d: edit(write(d / "a.mp4"), lambda data: bytes(64) + data[64:])),
    "empty": Case(lambda d: edit(write(d / "a.mp4"), tracks_of_another_kind)),
    "unsupported_codec": Case(
        lambda d: edit(write(d / "a.mp4"), lambda data: data.replace(b"avc1", b"zzzz"))
    ),
    "damaged": Case(lambda d: edit(write(d / "a.mp4"), overwrite_middle)),
    "truncated": Case(lambda d: edit(write(d / "a.mkv"), lambda data: data[: len(data) // 2])),
    "too_large": Case(lambda d: huge_picture(d / "a.mov")),
    "bad_timestamps": Case(
        lambda d: edit(
            write(d / "a.mkv", container_options={"cluster_time_limit": "500"}, options={"g": "5"}),
            last_cluster_at_zero,
        )
    ),
    "mixed_sizes": Case(lambda d: two_sizes(d / "a.ts")),
    "outside": Case(lambda d: write(d / "a.mp4"), start="7"),
    "no_video": Case(lambda d: sound_alone(d / "a.wav"), ("--require=video",)),
    "no_audio": Case(lambda d: write(d / "a.mp4", audio_codec=None), ("--require=audio",)),
    "too_short": Case(lambda d: write(d / "a.mp4"), ("--min-seconds=3",)),
    "too_long": Case(lambda d: write(d / "a.mp4"), ("--max-seconds=1",)),
    "too_small": Case(lambda d: write(d / "a.mp4"), ("--min-side=48",)),
    "timeout": Case(lambda d: fifo(d / "a.mp4"), ("--timeout-seconds=2",)),
    "crashed": Case(lambda d: fifo(d / "a.mp4")),
    "antiphase": Case(lambda d: channels(d / "a.wav", 1, -1), ("--reject=antiphase",)),
    "dead_channel": Case(lambda d: channels(d / "a.wav", 0, 1), ("--reject=silent,dead_channel",)),
    "silent": Case(lambda d: sound_alone(d / "a.wav"), ("--reject=silent",)),
    "still": Case(
        lambda d: write(d / "a.mp4", frame_times=TIMES[:9], sound_seconds=0.9), ("--reject=still",)
    ),
}


# Only examples of record files have these: test_record_sources.py makes such files.
OF_EXAMPLES = {"bad_example", "bad_samples"}


def test_a_picture_that_leaps_back_is_seen_without_sound(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.mkv",
        audio_codec=None,
        container_options={"cluster_time_limit": "500"},
        options={"g": "5"},
    )
    edit(path, last_cluster_at_zero)
    with pytest.raises(MediaError, match="bad_timestamps: the video leaps back"):
        list(decode_frames(path, short_side=None, max_fps=None))


def test_every_reason_has_a_case() -> None:
    assert list(CASES) == [reason for reason in REASONS if reason not in OF_EXAMPLES]
    assert set(REASONS) >= OF_EXAMPLES


@pytest.mark.parametrize("reason", CASES)
def test_a_file_is_rejected_for_this_reason(tmp_path, capsys, reason):
    case = CASES[reason]
    path = case.make(tmp_path)
    table, out = tmp_path / "clips.csv", tmp_path / "out"
    table.write_text(f"path,start\n{path},{case.start}\n")
    reached = None
    if reason == "crashed":
        reached = when_reached(path, signal_workers(signal.SIGSEGV))
    arguments = ["prepare", str(table), f"--out={out}", "--workers=1", *case.arguments]
    assert main(arguments) == 1  # nothing at all was prepared
    if reached:
        reached.join()
    (line,) = listed(out)
    assert line["reason"] == reason
    assert line["path"] == str(path)
    assert line["message"]
    assert "\n" not in line["message"]
    assert reason in capsys.readouterr().err
    assert not list(out.rglob("*.tmp"))


PRELUDE = """
import resource, sys
from pathlib import Path
from etils import epath
from avcl_jax.data.record_format import message_class
from avcl_jax.data_prep.clip import ClipOptions
from avcl_jax.data_prep.manifest import Entry
from avcl_jax.data_prep.shards import Part, prepare_part
from avcl_jax.data_prep.source_files import state_of

def prepare(number, entries):
    options = ClipOptions(32, None, 90, 16000, 0.0, 60.0, 16, (), "tfrecord")
    states = {entry.path: state_of(entry.path) for entry in entries}
    part = Part(number, "train", tuple(entries), options, epath.Path(sys.argv[1]), states)
    prepare_part(part, begin=lambda number: None)

def pages(column):
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()
"""
WITH_LITTLE_MEMORY = """
message_class("Example")  # imports TFDS, which the limit is not about
resource.setrlimit(resource.RLIMIT_AS, (pages(0) + (150 << 20),) * 2)
prepare(0, [Entry(p, "train", p, p, 0.0, None, {}) for p in sys.argv[2:]])
"""
FIVE_HUNDRED = """
for number in range(10):
    paths = [sys.argv[2 + k % (len(sys.argv) - 2)] for k in range(50)]
    entries = [Entry(p, "train", f"{k}", "", 0.7 * (k % 2), None, {}) for k, p in enumerate(paths)]
    prepare(number, entries)
    print(pages(1))
"""


def run_program(text: str, folder: Path, paths: list[Path]) -> str:
    command = [sys.executable, "-c", PRELUDE + text, str(folder), *map(str, paths)]
    run = subprocess.run(command, cwd=PAGE.parents[2], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_clip_for_which_memory_is_too_small_is_rejected_and_the_next_prepared(tmp_path):
    # Within the limit on pixels, and 192 MB large.
    paths = [huge_picture(tmp_path / "a.mov", side=8000, rgb=True), write(tmp_path / "b.mp4")]
    run_program(WITH_LITTLE_MEMORY, tmp_path, paths)
    lines = json.loads((tmp_path / "train-00000.json").read_text())
    assert [outcome for line in lines for _, outcome, _ in line["clips"]] == [
        "too_large",
        "prepared",
    ]
    assert len(load_table(tmp_path / "train-00000.table")) == 1


def test_memory_is_flat_over_five_hundred_preparations(tmp_path: Path) -> None:
    """Whole files and cuts of several containers, and files that are rejected in several ways."""
    paths = [
        write(tmp_path / "a.mp4"),
        write(tmp_path / "b.webm", video_codec="libvpx-vp9", audio_codec="libopus"),
        write(tmp_path / "c.mkv", audio_codec="libmp3lame"),
        two_sizes(tmp_path / "d.ts"),
        edit(write(tmp_path / "e.mp4"), overwrite_middle),
    ]
    out = run_program(FIVE_HUNDRED, tmp_path, paths)
    first, *later = map(int, out.split())
    assert len(later) == 9
    assert max(later) < 1.05 * first, (first, later)
    assert len(load_table(tmp_path / "train-00009.table")) == 30


def test_workers_have_a_limit_on_their_memory(tmp_path: Path) -> None:
    fifo(tmp_path / "a.mp4")
    limits = []

    def look() -> None:
        for child in multiprocessing.active_children():
            limits.append(resource.prlimit(child.pid, resource.RLIMIT_AS)[0])
            os.kill(child.pid, signal.SIGSEGV)

    reached = when_reached(tmp_path / "a.mp4", look)
    assert main(["prepare", str(tmp_path), f"--out={tmp_path / 'out'}", "--workers=1"]) == 1
    reached.join()
    assert limits == [8 << 30]  # as docs/data/rejected.md says


def test_the_page_explains_exactly_the_reasons_and_the_notes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _, _ in rows] == [*REASONS, *NOTES]
    for reason, meaning, advice in rows:
        assert len(meaning) > 20, reason
        assert len(advice) > 5, reason

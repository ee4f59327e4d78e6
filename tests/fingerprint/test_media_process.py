"""What reads foreign media may hang, crash or eat memory: its process ends, ours goes on."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading

import pytest

pytest.importorskip("faiss", reason="the extra fingerprint is not installed")
pytest.importorskip("starlette", reason="the extra fingerprint is not installed")

from avcl_jax.data.decoded import decode_media
from avcl_jax.data.media_error import MediaError
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.web.desk import Desk
from avcl_jax.fingerprint.web.media_process import MediaProcess, MediaProcessError
from avcl_jax.fingerprint.web.refusal import Refusal
from avcl_jax.fingerprint.web.shelf import Shelf
from tests.fingerprint.hungry import bytes_taken
from tests.fingerprint.page_server import ROOT
from tests.fingerprint.synthetic import clip, excerpt, write

# Hours in C, in which no handler of Python runs.
HANG = (sum, range(10**12))
LONG = 600.0
# No film is decoded in it.
SHORT = 1e-4


@pytest.fixture
def process():
    made = MediaProcess(LONG)
    yield made
    made.close()


def test_one_process_does_all_calls_and_hands_on_errors_of_media(process, tmp_path):
    first = process.call(os.getpid)
    assert first != os.getpid()
    with pytest.raises(MediaError, match="does not exist") as raised:
        process.call(
            decode_media, tmp_path / "none", short_side=None, max_fps=None, sample_rate_hz=8000
        )
    assert raised.value.reason == "not_found"
    assert process.call(os.getpid) == first


def test_a_call_that_hangs_is_ended_and_the_next_made(process):
    first = process.call(os.getpid)
    process._limit_seconds = 0.2
    with pytest.raises(MediaProcessError, match=r"longer than 0\.2 s, the --max-decode-seconds"):
        process.call(*HANG)
    process._limit_seconds = LONG
    assert process.call(os.getpid) != first


def test_a_crash_is_named_and_the_next_call_made(process):
    for _ in range(2):
        with pytest.raises(MediaProcessError, match="ended with SIGSEGV"):
            process.call(signal.raise_signal, signal.SIGSEGV)
    assert process.call(abs, -3) == 3


def test_one_that_ended_between_two_calls_is_replaced(process):
    os.kill(process.call(os.getpid), signal.SIGKILL)
    process._running[0].join()
    assert process.call(abs, -3) == 3


def test_memory_has_an_end(process):
    assert process.call(bytes_taken, 1 << 30) == 1 << 30
    with pytest.raises(MediaError, match="too_large: more than 8 GB"):
        process.call(bytes_taken, 9 << 30)
    assert process.call(abs, -3) == 3


def test_a_mistake_of_ours_is_no_mistake_of_the_clip(process, capfd):
    with pytest.raises(RuntimeError, match="ended with 1"):
        process.call(math.sqrt, -1)
    assert "ValueError" in capfd.readouterr().err


def test_closing_ends_a_call(process):
    errors = []

    def call():
        try:
            process.call(*HANG)
        except MediaProcessError as error:
            errors.append(str(error))

    process.start()
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    process.close()
    thread.join(60)
    assert errors == ["the decoder ended with SIGKILL"]


@pytest.mark.parametrize("function", ["abs, (-3,)", "sum, (range(10**12),)"])
def test_it_outlives_a_killed_server_for_the_limit_at_most(function):
    code = (
        "import os\n"
        "from avcl_jax.fingerprint.web.media_process import MediaProcess\n"
        "process = MediaProcess(0.2)\n"
        "process.start()\n"
        f"process._running[1].send((0.2, {function}, {{}}))\n"
        "print('sent', flush=True)\n"
        "os._exit(0)\n"
    )
    # It returns when nobody has the pipe any more.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "sent\n"
    assert not done.stderr


def test_a_clip_that_takes_too_long_is_refused_and_the_next_found(library, tmp_path):
    index = FingerprintIndex.open(library.directory)
    desk = Desk(index, max_waiting=0, max_seconds=8.0, max_decode_seconds=SHORT)
    film = write(tmp_path / "film.mkv", excerpt(clip(1), 1.0, 5.0))
    try:
        with pytest.raises(
            Refusal, match=r"film cannot be compared: .* longer than 0\.0001 s"
        ) as no:
            asyncio.run(desk.ask(film, "film", (), lambda _: None))
        assert no.value.status == 422
        desk._media._limit_seconds = LONG
        found = asyncio.run(desk.ask(film, "film", (), lambda _: None))
        assert found.result.best.source == "clip 1"
    finally:
        desk.close()


def test_a_conversion_that_takes_too_long_leaves_nothing(tmp_path):
    film = write(tmp_path / "film.mkv", clip(1))
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(tmp_path / "shelf", max_decode_seconds=SHORT)
    try:
        assert asyncio.run(shelf.of_clip(film, 5.0)) is None
        assert not list((tmp_path / "shelf").iterdir())
        with pytest.raises(MediaProcessError):
            shelf._convert("name", film, 0.0, 5.0)
        assert not list((tmp_path / "shelf").iterdir())
        shelf._media._limit_seconds = LONG
        name, kind = asyncio.run(shelf.of_clip(film, 5.0))
        assert kind == "video/mp4"
        assert shelf.get(name).stat().st_size
    finally:
        shelf.close()

"""The process that decodes media of strangers may hang, crash or eat memory: only it ends."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avcl_jax.data.media import decode_media
from avcl_jax.fingerprint.web import preview
from avcl_jax.fingerprint.web.decoder import Decoder, DecoderError
from avcl_jax.fingerprint.web.preview import PreviewCache
from tests.conftest import ROOT
from tests.fingerprint.synthetic import bytes_taken, clip, write

# Hours in C, in which no handler of Python runs.
HANG = (sum, range(10**12))
LONG = 600.0


@pytest.fixture
def decoder(tmp_path):
    made = Decoder(LONG, tmp_path)
    yield made
    made.close()


def run(decoder, *call, **options):
    return asyncio.run(decoder.run(*call, **options))


def test_one_process_does_all_calls_and_hands_on_errors(decoder, tmp_path):
    first = run(decoder, os.getpid)
    assert first != os.getpid()
    options = {"short_side": None, "max_fps": None, "sample_rate_hz": 8000}
    with pytest.raises(DecoderError, match=r"^no such file .*none does not exist"):
        run(decoder, decode_media, tmp_path / "none", **options)
    # A mistake of ours is not one of the clip.
    with pytest.raises(ValueError, match="math domain error"):
        run(decoder, math.sqrt, -1)
    assert run(decoder, os.getpid) == first
    # One that ended between two calls is replaced.
    os.kill(first, signal.SIGKILL)
    while not decoder._executor._broken:
        time.sleep(0.01)
    assert run(decoder, os.getpid) != first


@pytest.mark.parametrize(
    ("limit", "call", "said"),
    [
        (0.2, HANG, r"longer than 0\.2 s, the --max-decode-seconds"),
        (LONG, (signal.raise_signal, signal.SIGSEGV), "it made the decoder crash"),
        (LONG, (bytes_taken, 9 << 30), "it needs more than 8 GB of memory"),
    ],
)
def test_a_call_that_cannot_end_well_is_ended_and_the_next_made(decoder, limit, call, said):
    run(decoder, os.getpid)
    for _ in range(2):
        decoder._limit_seconds = limit
        with pytest.raises(DecoderError, match=said):
            run(decoder, *call)
        decoder._limit_seconds = LONG
        assert run(decoder, bytes_taken, 1 << 30) == 1 << 30


def test_closing_ends_a_call(decoder, tmp_path):
    pipe = tmp_path / "clip.mp4"
    os.mkfifo(pipe)

    async def close_during_a_call():
        call = asyncio.ensure_future(decoder.run(Path.read_bytes, pipe))
        # Returns when the call has opened the other end, from which it then reads for ever.
        descriptor = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
        decoder.close()
        try:
            await call
        finally:
            os.close(descriptor)

    with pytest.raises(DecoderError, match="crash"):
        asyncio.run(close_during_a_call())


@pytest.mark.parametrize("function", ["abs, -3", "sum, range(10**12)"])
def test_it_outlives_a_killed_server_for_the_limit_at_most(function, tmp_path):
    directory = tmp_path / "uploads"
    directory.mkdir()
    (directory / "clip.mp4").touch()
    code = f"""
import asyncio, os, signal
from pathlib import Path
from avcl_jax.fingerprint.web.decoder import Decoder

async def main():
    decoders = [Decoder(0.2, Path({str(directory)!r})) for _ in range(2)]
    for decoder in decoders:
        await decoder.run(os.getpid)
    call = asyncio.ensure_future(decoder.run({function}))
    await asyncio.sleep(0.05)
    print("called", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""
    # It returns when no process has the pipe any more.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "called\n"
    assert "Traceback" not in done.stderr
    # The other process, which does not hang, deletes what the server has left.
    assert not directory.exists()


def test_conversions_leave_nothing_if_they_fail_and_the_oldest_make_room(
    tmp_path, decoder, monkeypatch
):
    film = write(tmp_path / "film.mkv", clip(1, 1.0))
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = PreviewCache(folder, decoder)
    run(decoder, os.getpid)
    decoder._limit_seconds = 1e-4
    with pytest.raises(DecoderError, match="takes longer than"):
        asyncio.run(cache.convert("1", film, 0.0, 1.0))
    assert not list(folder.iterdir())
    decoder._limit_seconds = LONG
    monkeypatch.setattr(preview, "_KEPT", 2)

    async def convert(*names):
        return [await cache.convert(name, film, 0.0, 1.0) for name in names]

    first, second, again, third = asyncio.run(convert("1", "2", "1", "3"))
    assert again == first
    assert [cache.get(name) for name in "1234"] == [first, None, third, None]
    assert [path.exists() for path in (first, second, third)] == [True, False, True]

"""A real server process of the page, the media it indexes, and a client without manners."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from avcl_jax.data.media import decode_media
from avcl_jax.fingerprint.benchmark.timeline import excerpt, joined
from avcl_jax.fingerprint.index import FingerprintIndex
from tests.conftest import ROOT
from tests.fingerprint.synthetic import SETTINGS, clip, write


def make_library(directory: Path, encoders: Path) -> FingerprintIndex:
    """Indexes a film that browsers play, others that they do not, a sound, and one from memory.

    All were coded: what coding does to a clip must not be what tells it from the others.
    """
    media = directory / "media"
    media.mkdir()
    index = FingerprintIndex.create(directory / "index", encoders, SETTINGS)
    index.add_files(
        [
            write(media / "film <b>.mp4", clip(0, 9.0)),
            write(media / "old film.mkv", clip(1, 14.0)),
            write(media / "sound.wav", clip(2, video=False)),
            *(write(media / f"other {n}.mkv", clip(n)) for n in range(3, 11)),
            # With a trailer that one of the others is.
            write(media / "trailer.mkv", joined([clip(3), clip(16)])),
        ]
    )
    memory = decode_media(write(directory / "memory.mkv", clip(15)), **index.segmenter.decoding)
    index.add([("from memory", memory)])
    return index


def make_clips(directory: Path) -> Path:
    """Writes what is asked for: pieces of what is indexed, and others."""
    directory.mkdir()
    silent = excerpt(clip(4), 1.0, 5.0)
    for name, media in {
        "film.mp4": excerpt(clip(0, 9.0), 3.0, 7.0),
        "old.mkv": excerpt(clip(1, 14.0), 8.0, 12.0),
        "sound.wav": excerpt(clip(2, video=False), 0.5, 5.0),
        "dubbed.mkv": dataclasses.replace(clip(4), frames=clip(78).frames),
        "silent.mkv": dataclasses.replace(silent, waveform=np.zeros_like(silent.waveform)),
        "trailer.mkv": excerpt(clip(3), 1.0, 5.0),
        "foreign.mp4": clip(77, 4.0),
        "memory.mkv": excerpt(clip(15), 1.0, 4.0),
        "short.mkv": clip(0, 0.25),
    }.items():
        write(directory / name, media)
    (directory / "notes.mp4").write_text("this is no film\n" * 40)
    whole = (directory / "old.mkv").read_bytes()
    (directory / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (directory / "empty.mp4").touch()
    return directory


@dataclasses.dataclass
class Server:
    """A running `avcl-fingerprint serve`."""

    process: subprocess.Popen[str]
    port: int
    temporary: Path  # its TMPDIR
    messages: list[str]  # on standard error

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def request(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Returns status, headers and body of an answer; asks by POST where there is a body."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def ask(
        self, path: Path, name: str | None = None, options: str = ""
    ) -> tuple[int, dict[str, Any]]:
        """Asks for the source of a clip."""
        address = f"/api/query?name={quote(name or path.name)}{options}"
        status, _, body = self.request(address, path.read_bytes())
        return status, json.loads(body)

    def media_processes(self) -> list[int]:
        """Ids of its processes that read media."""
        children = [
            int(child)
            for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")
            for child in path.read_text().split()
        ]
        return [n for n in children if b"spawn_main" in Path(f"/proc/{n}/cmdline").read_bytes()]

    def uploads(self) -> list[str]:
        """Names of the uploads that lie in its directory."""
        return [path.name for path in self.temporary.rglob("clip-*")]

    def wait_until_no_upload_is_left(self) -> None:
        """Asks for something else until then; as often as to find out that it never will be."""
        for _ in range(20_000):
            self.request("/page.css")
            if not self.uploads():
                return
        raise AssertionError(f"left: {self.uploads()}")


@contextlib.contextmanager
def running(index: Path, temporary: Path, *options: str) -> Iterator[Server]:
    """Starts a server on a free port, and ends it by two signals, as `timeout` does."""
    temporary.mkdir()
    command = [sys.executable, "-m", "avcl_jax.fingerprint", "serve", f"--index={index}"]
    process = subprocess.Popen(
        [*command, "--port=0", *options],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    messages: list[str] = []
    # Read all along: a full pipe would stop the server.
    reader = threading.Thread(target=messages.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, messages
        port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        yield Server(process, port, temporary, messages)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        process.wait(timeout=600)
        reader.join()
        process.stdout.close()
        process.stderr.close()

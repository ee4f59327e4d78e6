"""Draws the pictures of pages in docs/: the report of a run, and the pages of avcl-fingerprint.

.venv-interop/bin/python docs/page_pictures.py RUN FILMS

RUN is a run that was evaluated, FILMS a folder with at least 12 videos, one of which is
big_buck_bunny_0_30.webm. Needs the system's Chromium; `make interop` makes the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import decode_media

DOCS = Path(__file__).parent
FILM = "big_buck_bunny_0_30.webm"
CLIP_SECONDS = (16.0, 26.0)
# Playwright's own way to wait is against the content security policy of the page.
_LOADED = """() => Promise.all([clip, source].map((video) => video.readyState >= 2 ||
    new Promise((resolve) => video.addEventListener("loadeddata", resolve))))"""
_FINGERPRINT = (sys.executable, "-m", "avcl_jax.fingerprint")


def save(page: Page, name: str, height: int, width: int = 1000) -> None:
    """Writes the upper part of a page."""
    page.set_viewport_size({"width": width, "height": height})
    Image.open(io.BytesIO(page.screenshot())).save(DOCS / name, quality=80, method=6)


def make_clip(film: Path, path: Path) -> None:
    """Writes a part of a film: cropped, with a caption, encoded again."""
    start, end = CLIP_SECONDS
    media = decode_media(
        film,
        short_side=None,
        max_fps=None,
        sample_rate_hz=44_100,
        start_seconds=start,
        end_seconds=end,
    )
    height, width = (side * 4 // 5 // 2 * 2 for side in media.frames.shape[1:3])
    frames = np.ascontiguousarray(media.frames[:, -height:, :width])
    times = media.frame_seconds - media.frame_seconds[0]
    for frame in frames:
        band = (width // 12, height * 5 // 6), (width * 11 // 12, height * 31 // 32)
        cv2.rectangle(frame, *band, (0, 0, 0), cv2.FILLED)
        place, size = (width // 6, height * 15 // 16), height / 350
        font, white, line = cv2.FONT_HERSHEY_SIMPLEX, (255, 255, 255), max(1, height // 180)
        cv2.putText(frame, "seen on the web", place, font, size, white, line, cv2.LINE_AA)
    write_mp4(
        path,
        zip(times, frames, strict=True),
        media.waveform,
        fps=24,
        sample_rate_hz=media.sample_rate_hz,
        audio_bits_per_second=64_000,
        video_options={"crf": "32"},
        variable_rate=True,
    )


@contextlib.contextmanager
def served(index: Path) -> Iterator[str]:
    """Serves an index; yields the address."""
    command = [*_FINGERPRINT, "serve", f"--index={index}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield re.findall(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.terminate()


def hide_folder(page: Page, folder: Path) -> None:
    """Shows the path of a temporary folder as that of a user."""
    page.evaluate(
        """(folder) => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                walker.currentNode.data = walker.currentNode.data.replaceAll(folder, "/home/user");
            }
        }""",
        str(folder),
    )


def main() -> None:
    """Draws all pictures."""
    parser = argparse.ArgumentParser(description="Draws the pictures of pages.")
    parser.add_argument("run", type=Path)
    parser.add_argument("films", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()

        page.goto((arguments.run.resolve() / "report.html").as_uri())
        save(page, "report.webp", height=1140)

        shutil.copytree(arguments.films, folder / "films")
        make_clip(folder / "films" / FILM, folder / "clip.mp4")
        index = folder / "films.index"
        command = [*_FINGERPRINT, "index", folder / "films", f"--index={index}"]
        subprocess.run(command, check=False)  # some of the films may be damaged
        with served(index) as address:
            page.goto(address)
            page.set_input_files("#file", folder / "clip.mp4")
            expect(page.locator("#headline")).to_contain_text(FILM, timeout=60_000)
            page.evaluate(_LOADED)
            hide_folder(page, folder)
            save(page, "fingerprint_page.webp", height=1375)

        shutil.copy(folder / "clip.mp4", folder / "films" / "seen on the web.mp4")
        shutil.copy(folder / "films" / FILM, folder / "films" / f"copy of {FILM}")
        subprocess.run([*_FINGERPRINT, "add", folder / "films", f"--index={index}"], check=False)
        report = folder / "duplicates.html"
        command = [*_FINGERPRINT, "duplicates", f"--index={index}", f"--report={report}"]
        subprocess.run(command, check=True)
        page.goto(report.as_uri())
        save(page, "duplicates.webp", height=1250)


if __name__ == "__main__":
    main()

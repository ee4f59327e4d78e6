"""A writer that dies: `python -m tests.fingerprint.killed_writer INDEX`.

Each time a new process adds one medium and removes another, and kills itself before some line of
the modules that write. The index is then as a transaction left it, and the next writer cleans up.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from avcl_jax.data.media import DecodedMedia, no_frames
from avcl_jax.fingerprint import database, index, library
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.segments import SegmentFeatures

_WATCHED = {module.__file__ for module in (database, index, library)}
_DEATHS = 60  # some of them after the end


class Segmenter:
    """Gives each medium eight segments of its own."""

    spans: ClassVar = {"video": 0.5}

    def of(self, media: DecodedMedia) -> SegmentFeatures:
        features = np.random.default_rng(int(media.waveform[0])).normal(size=(8, 6))
        present = {"video": np.ones(8, bool)}
        return SegmentFeatures({"video": features.astype(np.float32)}, present, 2.0)


def change(directory: Path, new: str, gone: list[str]) -> None:
    opened = FingerprintIndex.open(directory)
    opened.__dict__["segmenter"] = Segmenter()
    audio = np.full(9, len(new), np.int16)
    opened.add([(new, DecodedMedia(no_frames(), np.empty(0), audio, 8000, 0.0, 2.0))])
    if gone:
        opened.remove(gone)


def die_at(moment: int | None) -> Callable[[], int]:
    """Kills this process before a line; returns how many lines were run, where it is None."""
    count = 0

    def entered(frame: types.FrameType, event: str, _: object) -> object:
        nonlocal count
        if frame.f_code.co_filename not in _WATCHED:
            return None
        if event == "line":
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return entered

    sys.settrace(entered)
    return lambda: count


def names(directory: Path) -> list[str]:
    return sorted(source.name for source in FingerprintIndex.open(directory).sources())


def main(directory: Path) -> None:
    directory.mkdir()
    settings = {
        "encoder": {"path": "", "fingerprint": ""},
        "settings": {"rates": [1.0], "dimensions": 4, "hop_seconds": 0.25, "kind": "flat"},
        "dimensions": {"video": 6},
        "calibration": {"segments": 0, "by_modalities": {}},
    }
    database.create(directory, settings)
    change(directory, "first", [])
    change(directory, "old", [])
    count = die_at(None)
    change(directory, "new", ["old"])
    sys.settrace(None)
    met = set()
    for moment in np.unique(np.linspace(1, count() + 100, _DEATHS).astype(int)).tolist():
        before, new = names(directory), f"new {moment}"
        child = os.fork()
        if child == 0:
            die_at(moment)
            change(directory, new, [name for name in before if name != "first"])
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        after = names(directory)
        states = [before, sorted([*before, new]), ["first", new]]
        assert after in states
        assert library.verify(directory) == []
        if not survived:
            met.add(states.index(after))
        change(directory, f"next {moment}", [name for name in after if name != "first"])
        assert names(directory) == ["first", f"next {moment}"]
        assert library.verify(directory) == []
        files = sorted(path.name.partition("-")[0] for path in directory.iterdir())
        assert files == ["cache", "index.sqlite"]
    # Each state was met by a kill; the last process came to its end.
    assert met == {0, 1, 2}
    assert survived


if __name__ == "__main__":
    main(Path(sys.argv[1]))

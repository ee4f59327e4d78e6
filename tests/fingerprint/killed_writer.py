"""A writer that dies: `python -m tests.fingerprint.killed_writer INDEX` prints one line per death.

Each time a new process takes the lock, adds a medium and removes another, and kills itself at one
of the moments at which Python opens, renames, makes or deletes a file, or is about to run a line of
what replaces the manifest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np

from avcl_jax.fingerprint import changing
from avcl_jax.fingerprint.part import SourceRow, open_part
from avcl_jax.fingerprint.snapshot import Snapshot
from avcl_jax.fingerprint.store import (
    FORMAT_VERSION,
    delete_leftovers,
    one_writer,
    read_manifest,
    replace_manifest,
)
from avcl_jax.fingerprint.verification import verify

_WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def medium(name: str, segments: int) -> changing.Media:
    rng = np.random.default_rng(len(name))
    features = {"video": rng.normal(size=(segments, 6)).astype(np.float32)}
    return SourceRow(name, name, 1.0, None), features, {"video": np.ones(segments, bool)}


def change(directory: Path, new: str, gone: list[str]) -> None:
    with one_writer(directory):
        delete_leftovers(directory)
        manifest, snapshot = load(directory)
        changing.commit(directory, manifest, snapshot, [medium(new, 8)], gone)
        delete_leftovers(directory)


def load(directory: Path):
    manifest = read_manifest(directory)
    parts = [open_part(directory / part["name"], ["video"]) for part in manifest["parts"]]
    removed = [part["removed"] for part in manifest["parts"]]
    return manifest, Snapshot(parts, removed, changing.load_projections(directory, manifest))


def names(directory: Path) -> list[str]:
    return sorted(source.name for source in load(directory)[1].sources())


def die_at(moment: int) -> None:
    """Kills this process at the n-th touch of a file, or line of what replaces the manifest."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def touched(event: str, _: object) -> None:
        if event in _WATCHED:
            tick()

    def entered(frame: types.FrameType, event: str, _: object) -> object:
        # With the lines of pathlib: a file is open and empty before it is written.
        callers = {frame.f_code, frame.f_back.f_code if frame.f_back else None}
        if event == "line" and replace_manifest.__code__ in callers:
            tick()
        return entered

    sys.addaudithook(touched)
    sys.settrace(entered)


def main(directory: Path) -> None:
    settings = {"dimensions": 4, "kind": "flat"}
    directory.mkdir()
    replace_manifest(
        directory,
        {
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "dimensions": {"video": 6},
            "projection": None,
            "parts": [],
            "next_part": 1,
            "encoder": {"path": "", "fingerprint": ""},
            "calibration": {"segments": 0, "by_modalities": {}},
        },
    )
    change(directory, "first", [])
    change(directory, "old", [])
    moment = 0
    survived = False
    while not survived:
        moment += 1
        before = names(directory)
        new = f"new {moment}"
        gone = [name for name in before if name != "first"]
        child = os.fork()
        if child == 0:
            die_at(moment)
            change(directory, new, gone)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        left = len(list(directory.iterdir()))
        print(
            json.dumps(
                {
                    "before": before,
                    "intended": sorted(["first", new]),
                    "after": names(directory),
                    "problems": verify(directory),
                    "left": left,
                    "survived": survived,
                }
            ),
            flush=True,
        )
        if not survived:
            change(directory, f"next {moment}", [n for n in names(directory) if n != "first"])
            print(
                json.dumps(
                    {
                        "next": names(directory),
                        "problems": verify(directory),
                        "files": sorted(p.name for p in directory.iterdir()),
                        "named": [part["name"] for part in read_manifest(directory)["parts"]],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

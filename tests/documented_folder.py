"""A copy of the repository in which the commands of the documents run: media, lists and a run."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from avcl_jax.data.encode import write_mp4
from tests.documented import ROOT
from tests.test_every_command import COMMANDS, FEW_VIDEOS
from tests.training import small

LISTS = ROOT.parent / "shared" / "data" / "annotations"
# Settings that are appended to a command of `avcl_jax.main`, by its config: nothing else about the
# commands of the documents is changed.
SHORTER = {
    name: (small.OVERRIDES if command.of_a_run else {}) | dict(command.overrides)
    for name, command in COMMANDS.items()
    if name not in ("export.py", "evaluate.py")  # which read the run's own config
}
SHORTER["pretrain.py"] |= {"global_batch_size": 4, "steps": 2}
SHORTER["pretrain.py:records"] = SHORTER["pretrain.py"]
# What commands are called by, and how Python is told of the overrides.
_PYTHON = """#!{executable}
import json, os, sys
words = sys.argv[1:]
if words[:2] == ["-m", "avcl_jax.main"]:
    config = next(word for word in words if word.startswith("--config=configs/"))
    shorter = json.loads({shorter!r}).get(config.removeprefix("--config=configs/"), {{}})
    words += [f"--config.{{name}}={{value}}" for name, value in shorter.items()]
os.execv({executable!r}, [{executable!r}, *words])
"""
_COMMAND = '#!/bin/sh\nexec "{executable}" -m avcl_jax.{package} "$@"\n'


def tracked_files() -> list[str]:
    """Returns the files of the repository, without those that git ignores."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).exists()]


def copy_repository(folder: Path) -> None:
    """Copies the files of the repository."""
    for name in tracked_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


class Folder:
    """A folder that commands run in.

    Attributes:
        path: of the copy of the repository.
    """

    def __init__(self, parent: Path):
        """Copies the repository, makes media and a run by commands, and the names of the pages."""
        # A space: what a person has on a desktop.
        self.path = parent / "my copy" / "avcl-jax"
        copy_repository(self.path)
        self._write_programs()
        videos = " ".join(FEW_VIDEOS)
        self.run(f"avcl-data demo --out data/foley {videos}")
        few = "--train=0 --test=12 --null=0 --seed=2"
        self.run(f"avcl-data demo --out data/foley_fingerprint {few}")
        self.run("python -m avcl_jax.main --config=configs/pretrain.py --workdir=runs/demo")
        self.run("python -m avcl_jax.main --config=configs/export.py --workdir=runs/demo")
        films = sorted((self.path / "data/foley/media/train").glob("*.mp4"))
        self._write_media(films)
        self._write_collections(films)

    def run(self, script: str) -> str:
        """Runs a script of bash in the folder; returns its output; fails if a command fails."""
        environment = {
            "PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.path.parent),
            "PYTHONPATH": str(self.path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def _write_programs(self) -> None:
        python = _PYTHON.format(executable=sys.executable, shorter=json.dumps(SHORTER, default=str))
        programs = {"python": python}
        packages = {"data": "data_prep", "embed": "embed", "fingerprint": "fingerprint"}
        for name, package in packages.items():
            programs[f"avcl-{name}"] = _COMMAND.format(executable=sys.executable, package=package)
        for name, text in programs.items():
            program = self.path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def _copy(self, source: Path, *names: str) -> None:
        for name in names:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def _write(self, name: str, rows: Iterable[object]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row}\n" for row in rows))

    def _write_media(self, films: list[Path]) -> None:
        """Media under the names of README.md, docs/fingerprint.md and docs/data."""
        for number, film in enumerate(films[:8]):
            self._copy(film, f"VIDEOS/{number}.mp4", f"FILMS/{number}.mp4")
        self._copy(films[0], "films/old.mp4", "clip.mp4")
        self._copy(films[1], "more/film.mkv", "clips/first.mp4")
        self._copy(films[2], "new/one.mp4", "clips/second.mp4")
        header = "query_id,ref_id,query_start,query_end,ref_start,ref_end"
        self._write("matches.csv", [header, "first,film,0,4,0,4", "second,one,0,4,0,4"])
        for number, film in enumerate(films[8:14]):
            self._copy(film, f"HELD_OUT/{number}.mp4")
        # 13 minutes, of which the page asks for the last three.
        scenes = np.random.default_rng(0).integers(0, 256, (26, 32, 32, 3), np.uint8)
        write_mp4(
            self.path / "evening.mp4",
            ((number / 2, scenes[number // 60]) for number in range(26 * 60)),
            np.random.default_rng(0).normal(0, 0.1, 780 * 8000).astype(np.float32),
            fps=2,
            sample_rate_hz=8000,
            audio_bits_per_second=96_000,
            video_options={"preset": "veryfast", "threads": "1"},
        )
        self._copy(next((LISTS.parent / "esc10/audio").iterdir()), "song.ogg")
        self._write("clips.csv", ["path", *(f"{number}.mp4" for number in range(8))])
        examples = ROOT / "tests/data_prep/testdata"
        for part in ("train", "test"):
            self._copy(examples / "media_sequence.tfrecord", f"k600/{part}-00000-of-00001")
        shutil.copytree(
            examples / "tiny", self.path.parent / "tensorflow_datasets/ucf101/ucf101_1/2.0.0"
        )

    def _write_collections(self, films: list[Path]) -> None:
        """Four clips of each collection, and the lines of lists that name them."""
        short = films[0]
        ids = [f"id-{number}_abcdef" for number in range(4)]
        # UCF101 and HMDB51: official class list and splits, cut to the clips that are there.
        lists = [
            f"ucfTrainTestlist/{part}list0{n}.txt" for part in ("train", "test") for n in "123"
        ]
        self._copy(LISTS / "ucf101/classInd.txt", "ucfTrainTestlist/classInd.txt")
        for name in lists:
            lines = (LISTS / "ucf101" / Path(name).name).read_text().splitlines()
            self._write(name, [line for line in lines if "ApplyEyeMakeup_g0" in line])
            for line in filter(lambda line: "ApplyEyeMakeup_g0" in line, lines):
                self._copy(short, f"UCF-101/{line.split()[0]}")
        for path in sorted((LISTS / "hmdb51").glob("*_test_split*.txt")):
            line = path.read_text().splitlines()[0]
            self._write(f"testTrainMulti_7030_splits/{path.name}", [line])
            self._copy(short, f"hmdb51_org/{line.split()[0]}")
        header, *rows = (LISTS / "kinetics/kinetics-400_val.csv").read_text().splitlines()
        for split, part in (("train", rows[:4]), ("val", rows[4:8])):
            chosen = [row.replace(",val,", f",{split},") for row in part]
            self._write(f"annotations/{split}.csv", [header, *chosen])
            for _, name, start, end, *_ in csv.reader(chosen):
                self._copy(short, f"k400/{name}_{int(start):06d}_{int(end):06d}.mp4")
        self._write("vggsound.csv", [f"{i},30,toilet flushing,train" for i in ids])
        for i in ids:
            self._copy(short, f"videos/{i}_000030.mp4", f"media/{i}_30_40.mp4")
        self._copy(LISTS / "audioset/class_labels_indices.csv", "class_labels_indices.csv")
        comments = ["# Segments", "# num", "# YTID, start_seconds, end_seconds, labels"]
        for number, name in enumerate(("balanced_train", "unbalanced_train", "eval")):
            row = f'{ids[number]}, 30.000, 40.000, "/m/09x0r,/m/05zppz"'
            self._write(f"{name}_segments.csv", [*comments, row])
        header, *rows = (LISTS.parent / "esc10/meta/esc50.csv").read_text().splitlines()
        self._write("ESC-50/meta/esc50.csv", [header, *rows[::8]])
        for name, *_ in csv.reader(rows[::8]):
            self._copy(LISTS.parent / "esc10/audio" / name, f"ESC-50/audio/{name}")

"""`python -m data_prep foley`: write the demo's media and their manifest."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from pathlib import Path

import cv2
from tqdm import tqdm

from avcl_jax.errors import UserError, one_line
from avcl_jax.paths import local_path
from data_prep.foley.encode import write_mp4
from data_prep.foley.null_media import render_null
from data_prep.foley.picture import render_picture
from data_prep.foley.scene import SAMPLE_RATE_HZ, VIDEO_FPS, classes_of, draw_scene
from data_prep.foley.sound import render_sound

# Rises with every change of what is written, so that old files are not taken for new ones.
GENERATOR_VERSION = 5
RECIPE_NAME = "foley.json"
MANIFEST_NAME = "manifest.csv"
COLUMNS = ("path", "split", "id", "source", "label_motion", "label_material")


class FoleyError(UserError):
    """The request cannot be met; the message says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command.

    Args:
        parser: Parser of the `foley` subcommand.
    """
    parser.add_argument(
        "--out", type=local_path, required=True, help="folder for media and manifest.csv"
    )
    parser.add_argument("--train", type=int, default=600, help="training videos")
    parser.add_argument("--test", type=int, default=200, help="test videos")
    parser.add_argument(
        "--null",
        type=int,
        default=0,
        help="noise videos in each of null_train and null_test, for the null controls",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every file")
    parser.add_argument("--workers", type=int, default=2, help="processes")


def run(args: argparse.Namespace) -> int:
    """Write what the parsed options ask for; the exit status is 1 after an error line.

    Args:
        args: Namespace with the attributes that `add_arguments` declares.
    """
    counts = {
        "train": args.train,
        "test": args.test,
        "null_train": args.null,
        "null_test": args.null,
    }
    try:
        print(write_collection(args.out, counts, seed=args.seed, workers=args.workers))
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def write_collection(out: Path, counts: dict[str, int], *, seed: int, workers: int) -> Path:
    """Write the media that are not there yet, then the manifest.

    Args:
        out: Folder; created if missing.
        counts: Videos of each split.
        seed: Seed of every file, at least 0.
        workers: Processes, at least 1; they change nothing in the files.

    Returns:
        Path of the manifest.

    Raises:
        FoleyError: A count is out of range, or the folder holds another seed's files.
        OSError: A file could not be written.
    """
    if workers < 1 or seed < 0 or min(counts.values()) < 0 or not sum(counts.values()):
        raise FoleyError(
            f"foley: counts {counts}, seed {seed}, workers {workers}: ask for at least one video, "
            "one worker and a seed of 0 or more"
        )
    out.mkdir(parents=True, exist_ok=True)
    _check_recipe(out, seed)
    items = [(split, index) for split, count in counts.items() for index in range(count)]
    for split in counts:
        (out / split).mkdir(exist_ok=True)
    missing = [(out, seed, *item) for item in items if not (out / _relative(*item)).exists()]
    with tqdm(
        total=len(items),
        initial=len(items) - len(missing),
        unit="video",
        desc="foley",
        mininterval=0.5 if sys.stderr.isatty() else 20,  # a log file is no place for animation
    ) as bar:
        if workers == 1 or len(missing) < 2:
            for task in missing:
                _write_one(task)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
                for _ in pool.imap_unordered(_write_one, missing, chunksize=4):
                    bar.update()
    return _write_manifest(out, items, seed)


def _relative(split: str, index: int) -> str:
    return f"{split}/{split}_{index:05d}.mp4"


def _write_one(task: tuple[Path, int, str, int]) -> None:
    out, seed, split, index = task
    if split.startswith("null"):
        frames, waveform = render_null(seed, split, index)
    else:
        scene = draw_scene(seed, split, index)
        frames, waveform = render_picture(scene), render_sound(scene)
    write_mp4(
        out / _relative(split, index),
        frames,
        waveform,
        video_fps=VIDEO_FPS,
        sample_rate_hz=SAMPLE_RATE_HZ,
    )


def _check_recipe(out: Path, seed: int) -> None:
    recipe = {"generator": "foley", "version": GENERATOR_VERSION, "seed": seed}
    path = out / RECIPE_NAME
    if path.exists():
        found = json.loads(path.read_text())
        if found != recipe:
            raise FoleyError(
                f"foley: {out} holds the files of {found}, not of {recipe}: "
                "choose another --out, or delete that folder"
            )
    else:
        _replace_text(path, json.dumps(recipe) + "\n")


def _write_manifest(out: Path, items: list[tuple[str, int]], seed: int) -> Path:
    path = out / MANIFEST_NAME
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for split, index in items:
            name = f"{split}_{index:05d}"
            labels = ("", "") if split.startswith("null") else classes_of(seed, split, index)
            rows.writerow((_relative(split, index), split, name, name, *labels))
    os.replace(partial, path)
    return path


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

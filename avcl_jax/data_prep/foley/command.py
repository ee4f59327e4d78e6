"""`avcl-data foley`: writes the demo's media and their manifest."""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from avcl_jax.data.encode import write_mp4
from avcl_jax.data_prep.foley.audio import render_audio
from avcl_jax.data_prep.foley.null_media import render_null
from avcl_jax.data_prep.foley.scene import SAMPLE_RATE_HZ, VIDEO_FPS, classes_of, draw_scene
from avcl_jax.data_prep.foley.video import render_video
from avcl_jax.data_prep.manifest import COUNT, NATURAL
from avcl_jax.errors import UserError
from avcl_jax.paths import local_path, write_bytes

# Rises with every change of the files, so that old ones are not taken for new ones.
GENERATOR_VERSION = 5
RECIPE_NAME = "foley.json"
MANIFEST_NAME = "manifest.csv"
# Every frame is an intra frame at one quantiser, and audio has neither noise substitution nor
# temporal noise shaping: groups of frames, a rate control that settles or B frames would be a cue
# for speed, direction or order that is not in the scene.
_X264_OPTIONS = {"preset": "veryfast", "qp": "16", "g": "1", "x264-params": "threads=1"}
_AAC_OPTIONS = {"aac_coder": "fast", "aac_pns": "0", "aac_tns": "0"}
COLUMNS = ("path", "split", "id", "source", "label_motion", "label_material")


def add_arguments(
    parser: argparse.ArgumentParser, *, out: str | None = None, null: int = 0, workers: int = 2
) -> None:
    """Declares the options of the command, with some defaults."""
    add = parser.add_argument
    add("--out", type=local_path, default=out, required=out is None, help="folder for the files")
    noise = "noise videos in each of null_train and null_test, for the null controls"
    add("--train", type=NATURAL, default=600, help="training videos")
    add("--test", type=NATURAL, default=200, help="test videos")
    add("--null", type=NATURAL, default=null, help=noise)
    add("--seed", type=NATURAL, default=0, help="seed of every file")
    add("--workers", type=COUNT, default=workers, help="processes")


def run(args: argparse.Namespace) -> int:
    """Writes the files; returns the exit status."""
    print(write_requested(args, args.out))
    return 0


def write_requested(args: argparse.Namespace, out: Path) -> Path:
    """Writes the videos that the options name into a folder; returns their manifest."""
    counts = {"train": args.train, "test": args.test}
    counts |= {"null_train": args.null, "null_test": args.null}
    return write_collection(out, counts, seed=args.seed, workers=args.workers)


def write_collection(out: Path, counts: dict[str, int], *, seed: int, workers: int) -> Path:
    """Writes the media that are not there yet, then the manifest; returns its path.

    Raises UserError without videos or if the folder has another seed's files, OSError if a file
    cannot be written.
    """
    if not any(counts.values()):
        raise UserError("foley: --train, --test and --null are 0: ask for at least one video")
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
        mininterval=0.5 if sys.stderr.isatty() else 20,  # rarely in a log file
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
        frames, waveform = render_video(scene), render_audio(scene)
    write_video(out / _relative(split, index), frames, waveform)


def write_video(path: Path, frames: np.ndarray, waveform: np.ndarray) -> None:
    """Writes a file of the demo from uint8 [frames, height, width, 3] and float32 [samples].

    It gets its name only when complete.
    """
    planes = (cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420) for rgb in frames)
    write_mp4(
        path,
        ((number / VIDEO_FPS, image) for number, image in enumerate(planes)),
        waveform,
        fps=VIDEO_FPS,
        sample_rate_hz=SAMPLE_RATE_HZ,
        audio_bits_per_second=96_000,
        video_options=_X264_OPTIONS,
        audio_options=_AAC_OPTIONS,
    )


def _check_recipe(out: Path, seed: int) -> None:
    recipe = {"generator": "foley", "version": GENERATOR_VERSION, "seed": seed}
    path = out / RECIPE_NAME
    if not path.exists():
        write_bytes(path, (json.dumps(recipe) + "\n").encode())
    elif (found := json.loads(path.read_text())) != recipe:
        raise UserError(
            f"foley: {out} holds the files of {found}, not of {recipe}: "
            "choose another --out, or delete that folder"
        )


def _write_manifest(out: Path, items: list[tuple[str, int]], seed: int) -> Path:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for split, index in items:
        name = f"{split}_{index:05d}"
        labels = ("", "") if split.startswith("null") else classes_of(seed, split, index)
        rows.writerow((_relative(split, index), split, name, name, *labels))
    path = out / MANIFEST_NAME
    write_bytes(path, text.getvalue().encode())
    return path

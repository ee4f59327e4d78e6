"""Features of media files against those of their records.

    python -m benchmarks.record_features MEDIA/ --encoder runs/demo --json F

The first ten seconds of every file, once as decoded and once from a record of the default settings,
which is smaller, coded as JPEG and resampled; both through an exported encoder.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.data.media import DecodedMedia, MediaError, decode_media, decode_record, probe
from avcl_jax.errors import UserError
from avcl_jax.export import Encoder, load_encoder
from avcl_jax.paths import local_path
from benchmarks.measure import Row, print_table, run_command, writable_path, write_json
from data_prep.clip import ClipOptions, prepare_clip
from data_prep.manifest import Entry
from data_prep.prepare import add_arguments, clip_options

SECONDS = 10.0


def inputs(media: DecodedMedia, modality: str) -> tuple[np.ndarray, float]:
    """Returns frames and their rate, or the waveform and its rate."""
    if modality == "video":
        return media.frames, media.fps
    return media.waveform, float(media.sample_rate_hz)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarity along the last axis."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray(np.sum(first * second, axis=-1) / norms)


def lowest_psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Lowest peak signal-to-noise ratio of a pair of uint8 clips, in dB."""
    error = np.square(first.astype(float) - second).mean(axis=(1, 2, 3, 4)).max()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def measure(
    path: Path, encoders: Mapping[str, Encoder], options: ClipOptions
) -> dict[str, tuple[np.ndarray, np.ndarray, float | None]]:
    """Returns features [clips, C] of a file and of its record, and PSNR of video, by modality.

    Raises:
        MediaError: if the file cannot be prepared.
    """
    entry = Entry(str(path), "train", path.name, path.name, 0.0, SECONDS, {})
    record, _ = prepare_clip(entry, options)
    info = probe(path)
    original = decode_media(
        path,
        short_side=None,
        max_fps=None,
        sample_rate_hz=info.audio[1] if info.audio else record.sample_rate_hz or 16_000,
        end_seconds=SECONDS,
    )
    decoded = decode_record(record)
    present = {"video": record.has_video and len(record.frames) > 1, "audio": record.has_audio}
    results: dict[str, tuple[np.ndarray, np.ndarray, float | None]] = {}
    for modality, encoder in encoders.items():
        if not present[modality]:
            continue
        forms = [inputs(media, modality) for media in (original, decoded)]
        clips = [encoder.preprocess(*form) for form in forms]
        first, second = (encoder(*form) for form in forms)
        count = min(len(first), len(second))  # a codec's padding may add a clip at the end
        psnr = lowest_psnr(*(c[:count] for c in clips)) if modality == "video" else None
        results[modality] = first[:count], second[:count], psnr
    return results


def summarise(
    modality: str, results: Mapping[str, tuple[np.ndarray, np.ndarray, float | None]]
) -> list[Row]:
    """Returns the rows of a modality, from the results of `measure` by file.

    Features that are never negative have a high cosine similarity with any others. For comparison
    there are the cosine of different files and that of mean-centred features.
    """
    rows = []
    for path, (first, second, psnr) in results.items():
        cosines = cosine(first, second)
        detail = {"lowest": float(cosines.min()), "psnr": psnr}
        rows.append(Row(f"{modality} {path}", float(cosines.mean()), "cosine", None, detail))
    files = [first.mean(axis=0) for first, _, _ in results.values()]
    centre = np.mean(files, axis=0)
    first, second = (np.concatenate([r[k] for r in results.values()]) for k in range(2))
    others = [cosine(a, b) for a, b in itertools.combinations(files, 2)]
    centred = cosine(first - centre, second - centre)
    for name, value in (
        ("mean of files", np.mean([row.value or 0.0 for row in rows])),
        ("lowest clip", cosine(first, second).min()),
        ("less their mean, median clip", np.median(centred)),
        ("less their mean, lowest clip", centred.min()),
        ("different files, mean", np.mean(others)),
    ):
        rows.append(Row(f"{modality}: {name}", float(value), "cosine", None, {}))
    if modality == "video":
        worst = min(r[2] for r in results.values() if r[2] is not None)
        rows.append(Row("video: lowest PSNR of a clip", worst, "dB", None, {}))
    return rows


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.record_features", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("media", type=local_path, help="folder of media files")
    parser.add_argument(
        "--encoder", type=local_path, required=True, help="finished run with an export"
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    args = parser.parse_args(arguments)
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    options = clip_options(defaults.parse_args(["--out=unused"]))
    encoders = {name: load_encoder(args.encoder / "export" / name) for name in ("video", "audio")}
    results: dict[str, dict[str, Any]] = {name: {} for name in encoders}
    for path in sorted(args.media.iterdir()):
        try:
            for modality, result in measure(path, encoders, options).items():
                results[modality][path.name] = result
        except MediaError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
    for name, found in results.items():
        if len(found) < 2:
            raise UserError(
                f"{args.media} has {len(found)} files with {name} that can be prepared, two are "
                "needed: name another folder"
            )
    rows = [row for name in encoders for row in summarise(name, results[name])]
    write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    run_command(main)

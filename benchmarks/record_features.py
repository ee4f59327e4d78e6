"""Features of media files compared with those of their records.

    python -m benchmarks.record_features MEDIA/ --encoder runs/demo --json F

The first ten seconds of each file, once as decoded and once from a record with the default
settings, which is smaller, JPEG-compressed and resampled; both through an exported encoder.
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
from avcl_jax.data_prep.clip import ClipOptions, prepare_clip
from avcl_jax.data_prep.manifest import Entry
from avcl_jax.data_prep.prepare import add_arguments, clip_options
from avcl_jax.errors import UserError
from avcl_jax.export import Encoder, load_encoder
from avcl_jax.paths import local_path
from benchmarks.measure import Row, command_parser, report, run_command

SECONDS = 10.0
# Features [clips, C] of a file and of its record, and the lowest PSNR of a clip of video in dB.
Compared = tuple[np.ndarray, np.ndarray, float | None]


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
) -> dict[str, Compared]:
    """Compares a file with its record, by modality.

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
    sides = (original, decode_record(record))
    present = {"video": record.has_video and len(record.frames) > 1, "audio": record.has_audio}

    def inputs(decoded: DecodedMedia, modality: str) -> tuple[np.ndarray, float]:
        if modality == "video":
            return decoded.frames, decoded.fps
        return decoded.waveform, float(decoded.sample_rate_hz)

    results: dict[str, Compared] = {}
    for modality, encoder in encoders.items():
        if not present[modality]:
            continue
        arrays = [inputs(side, modality) for side in sides]
        first, second = (encoder(*side) for side in arrays)
        count = min(len(first), len(second))  # a codec's padding may add a clip at the end
        psnr = None
        if modality == "video":
            psnr = lowest_psnr(*(encoder.preprocess(*side)[:count] for side in arrays))
        results[modality] = first[:count], second[:count], psnr
    return results


def summarise(modality: str, results: Mapping[str, Compared]) -> list[Row]:
    """Rows of a modality, from the results of `measure` by file.

    Features that are never negative have a high cosine similarity with any others. The cosine
    similarity of different files and that of mean-centred features allow a comparison.
    """

    def row(name: str, value: Any) -> Row:
        return Row(f"{modality}: {name}", float(value), "cosine")

    rows = []
    for path, (first, second, psnr) in results.items():
        cosines = cosine(first, second)
        detail = {"lowest": float(cosines.min()), "psnr": psnr}
        rows.append(Row(f"{modality} {path}", float(cosines.mean()), "cosine", detail=detail))
    files = [first.mean(axis=0) for first, _, _ in results.values()]
    centre = np.mean(files, axis=0)
    first, second = (np.concatenate([r[k] for r in results.values()]) for k in range(2))
    others = [cosine(a, b) for a, b in itertools.combinations(files, 2)]
    centred = cosine(first - centre, second - centre)
    rows += [
        row("mean of files", np.mean([row.value or 0.0 for row in rows])),
        row("lowest clip", cosine(first, second).min()),
        row("mean-centred, median clip", np.median(centred)),
        row("mean-centred, lowest clip", centred.min()),
        row("different files, mean", np.mean(others)),
    ]
    if modality == "video":
        lowest = min(psnr for _, _, psnr in results.values() if psnr is not None)
        rows.append(Row("video: lowest PSNR of a clip", lowest, "dB"))
    return rows


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("record_features", __doc__)
    parser.add_argument("media", type=local_path, help="folder of media files")
    parser.add_argument(
        "--encoder", type=local_path, required=True, help="finished run with an export"
    )
    args = parser.parse_args(arguments)
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    options = clip_options(defaults.parse_args(["--out=unused"]))
    encoders = {name: load_encoder(args.encoder / "export" / name) for name in ("video", "audio")}
    results: dict[str, dict[str, Compared]] = {name: {} for name in encoders}
    for path in sorted(args.media.iterdir()):
        try:
            for modality, compared in measure(path, encoders, options).items():
                results[modality][path.name] = compared
        except MediaError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
    for name, by_file in results.items():
        if len(by_file) < 2:
            raise UserError(
                f"{args.media} has {len(by_file)} files with {name} that can be prepared, but the "
                "comparison needs two: name another folder"
            )
    report(
        args.json, [row for name, by_file in results.items() for row in summarise(name, by_file)]
    )


if __name__ == "__main__":
    run_command(main)

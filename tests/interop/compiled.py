"""A small step of the full-size preset, compiled for devices that are not there.

A small network of the same kind, everything else of the preset: what the tests check are properties
of the program, which do not depend on its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import run_child

OVERRIDES = {
    "views.num_frames": "4",
    "crop.image_size": "32",
    "spectrogram.frames": "16",
    "model.embedding_dim": "32",
    "model.projection_hidden": "32",
    "model.temporal_hidden": "32",
    "model.video.name": "resnet",
    "model.video.resnet.widths": "(16, 24)",
    "model.video.resnet.depths": "(0, 1)",
    "model.video.resnet.factorisation": "r2plus1d",
    "model.video.resnet.stem": "r2plus1d",
    "model.video.subtract_time_mean": "False",
    "model.audio.name": "resnet",
    "model.audio.resnet.widths": "(16, 24)",
    "model.audio.resnet.depths": "(0, 1)",
    "model.audio.resnet.stem": "resnet",
    "bank.size": "4096",
    "bank.num_negatives": "16",
    "bank.negative_candidates": "256",
}


def small_step(
    topology: str, videos: int, cache: Path, environment: Mapping[str, str], **overrides: str
) -> dict[str, Any]:
    """Metrics of `benchmarks.aot.compile_step`, in its own process; `a__b=1` sets `config.a.b`."""
    arguments = {
        "topology": topology,
        "preset": "kinetics400",
        "overrides": OVERRIDES | {name.replace("__", "."): v for name, v in overrides.items()},
        "videos_per_chip": videos,
        "cache": str(cache),
    }
    return run_child("benchmarks.aot:compile_step", arguments, environment=environment)

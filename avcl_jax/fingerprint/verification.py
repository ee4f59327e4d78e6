"""Whether the files of an index are those that were written, and agree with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.fingerprint.changing import load_projections
from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.part import Part, file_sha256, open_part
from avcl_jax.fingerprint.projection import Projection
from avcl_jax.fingerprint.store import read_manifest

_SAMPLES = 64


def verify(directory: Path) -> list[str]:
    """Checks checksums, counts, and that FAISS and the tables mean the same segments.

    Returns:
        What is wrong, one line each; empty for a sound index.

    Raises:
        FingerprintError: if the manifest itself cannot be read.
    """
    manifest = read_manifest(directory)
    problems = []
    if manifest["projection"]:
        path = directory / manifest["projection"]["file"]
        problems += _check_file(path, manifest["projection"]["sha256"])
    for entry in manifest["parts"]:
        found = []
        for name, digest in entry["files"].items():
            found += _check_file(directory / entry["name"] / name, digest)
        # What is damaged is not opened: its checksum has said so.
        problems += found or _check_part(directory, manifest, entry)
    return problems


def _check_file(path: Path, digest: str) -> list[str]:
    if not path.exists():
        return [f"{path} is missing"]
    if file_sha256(path) != digest:
        return [f"{path} is damaged: its checksum is not the one of the manifest"]
    return []


def _check_part(directory: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    place = directory / entry["name"]
    try:
        part = open_part(place, list(manifest["dimensions"]))
        projections = load_projections(directory, manifest)
    except FingerprintError as error:
        return [str(error)]
    except FileNotFoundError as error:
        return [f"{error.filename} is missing"]
    problems = []
    counted = (len(part.sources), int(part.first_segment[-1]))
    if counted != (entry["sources"], entry["segments"]):
        problems.append(
            f"{place} holds {counted[0]} sources and {counted[1]} segments, the manifest says "
            f"{entry['sources']} and {entry['segments']}"
        )
    if entry["removed"] and max(entry["removed"]) >= len(part.sources):
        problems.append(f"{place}: the manifest removes source {max(entry['removed'])}")
    for modality, projection in projections.items():
        problems += _check_vectors(part, modality, projection)
    return problems


def _check_vectors(part: Part, modality: str, projection: Projection) -> list[str]:
    """Whether what FAISS holds under a number is the vector of that row's features."""
    features, searcher = part.features[modality], part.searchers[modality]
    if searcher.d != projection.matrix.shape[1] or features.shape[1] != len(projection.mean):
        return [f"{part.directory}: {modality} vectors are not of this projection's size"]
    if not hasattr(searcher, "nprobe"):  # flat: vectors are held as they are
        rows = np.unique(np.linspace(0, len(features) - 1, _SAMPLES).astype(int))
        rows = rows[: len(features)]
        held = np.array([searcher.reconstruct(int(row)) for row in rows])
        if len(rows) and not np.allclose(held, projection(features[rows]), atol=1e-4):
            return [f"{part.directory}: FAISS and the features disagree about {modality}"]
    return []

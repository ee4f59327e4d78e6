"""Changes to an index: each writes new parts and then replaces the manifest, so that it is whole.

Parts are merged so that their number grows with the logarithm of the index. The projection is
fitted to what the index holds, and again when it has grown fourfold, until it was fitted to many:
an index to which films are added one by one ends up as one made of them all.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.part import Part, SourceRow, file_sha256, make_durable, write_part
from avcl_jax.fingerprint.projection import Projection, fit_projection
from avcl_jax.fingerprint.snapshot import Snapshot
from avcl_jax.fingerprint.store import replace_manifest

Media = tuple[SourceRow, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]

_FIT_ENOUGH = 50_000
_FIT_GROWTH = 4
_MAX_REMOVED = 0.25


def commit(
    directory: Path,
    manifest: dict[str, Any],
    snapshot: Snapshot,
    media: Sequence[Media],
    removed: Sequence[str],
) -> dict[str, Any]:
    """Adds and removes media in one step.

    Args:
        directory: of the index, held by `one_writer`.
        manifest: what it names now.
        snapshot: the same, opened.
        media: new ones, each its description, features and presence.
        removed: names of sources that go; of those that are replaced too.

    Returns:
        The manifest that is in place now.
    """
    manifest = {**manifest, "parts": [dict(part) for part in manifest["parts"]]}
    gone = set(removed)
    for entry, part in zip(manifest["parts"], snapshot.parts, strict=True):
        now = {n for n, source in enumerate(part.sources) if source.name in gone}
        entry["removed"] = sorted({*entry["removed"], *now})
    projections = dict(snapshot.projections)
    refitted = _needs_fit(manifest, projections, media)
    if refitted:
        projections = _fit(manifest, snapshot, media)
        manifest["projection"] = _write_projection(directory, projections)
    # Merged away: all parts that the old projection made, or those about as large as what is new.
    merged = _to_merge(manifest, sum(_length(m) for m in media), refitted)
    kept = [entry for n, entry in enumerate(manifest["parts"]) if n not in merged]
    for n in reversed(merged):
        media = [*_live_media(snapshot.parts[n], manifest["parts"][n]["removed"]), *media]
    manifest["parts"] = kept
    if media:
        name = f"part-{manifest['next_part']:06d}"
        manifest["next_part"] += 1
        files = write_part(directory / name, media, projections, manifest["settings"]["kind"])
        manifest["parts"].append(
            {
                "name": name,
                "sources": len(media),
                "segments": sum(_length(m) for m in media),
                "files": files,
                "removed": [],
            }
        )
    replace_manifest(directory, manifest)
    return manifest


def load_projections(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Projection]:
    """Reads the projections that an index was made with; none while it is empty.

    Raises:
        FileNotFoundError: if the file is missing.
        FingerprintError: if it is damaged.
    """
    if not manifest["projection"]:
        return {}
    path = directory / manifest["projection"]["file"]
    try:
        # Opened here, because numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file) as arrays:
            return {
                m: Projection(
                    arrays[f"{m}_mean"], arrays[f"{m}_matrix"], int(arrays[f"{m}_fitted"])
                )
                for m in manifest["dimensions"]
            }
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FingerprintError(f"{path} is damaged: index the media again") from error


def _length(media: Media) -> int:
    return len(next(iter(media[2].values())))


def _needs_fit(
    manifest: Mapping[str, Any], projections: Mapping[str, Projection], media: Sequence[Media]
) -> bool:
    new = sum(_length(m) for m in media)
    if not new:
        return False
    if not manifest["projection"]:
        return True
    # The first film is added to an index of songs.
    if any(
        p.fitted_to == 0 and any(m[2][name].any() for m in media) for name, p in projections.items()
    ):
        return True
    fitted = manifest["projection"]["segments"]
    total = new + sum(part["segments"] for part in manifest["parts"])
    return fitted < _FIT_ENOUGH and total >= _FIT_GROWTH * fitted


def _fit(
    manifest: Mapping[str, Any], snapshot: Snapshot, media: Sequence[Media]
) -> dict[str, Projection]:
    rng = np.random.default_rng(0)
    projections = {}
    for modality, width in manifest["dimensions"].items():
        features = [part.features[modality] for part in snapshot.parts]
        features += [f[modality][p[modality]] for _, f, p in media]
        rows = np.concatenate([np.zeros((0, width), np.float32), *features])
        if len(rows) > _FIT_ENOUGH:
            rows = rows[rng.choice(len(rows), _FIT_ENOUGH, replace=False)]
        projections[modality] = fit_projection(rows, manifest["settings"]["dimensions"])
    return projections


def _write_projection(directory: Path, projections: Mapping[str, Projection]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for modality, projection in projections.items():
        arrays[f"{modality}_mean"] = projection.mean
        arrays[f"{modality}_matrix"] = projection.matrix
        arrays[f"{modality}_fitted"] = projection.fitted_to
    new = directory / "projection-new.npz"
    np.savez(new, **arrays)
    make_durable(new)
    digest = file_sha256(new)
    name = f"projection-{digest[:12]}.npz"
    new.replace(directory / name)
    segments = max(p.fitted_to for p in projections.values())
    return {"file": name, "sha256": digest, "segments": max(segments, 1)}


def _to_merge(manifest: Mapping[str, Any], new: int, everything: bool) -> list[int]:
    parts = manifest["parts"]
    if everything:
        return list(range(len(parts)))
    chosen = {n for n, p in enumerate(parts) if len(p["removed"]) > _MAX_REMOVED * p["sources"]}
    size = new + sum(parts[n]["segments"] for n in chosen)
    for n in reversed(range(len(parts))):
        if size == 0 or parts[n]["segments"] > 2 * size:
            break
        if n not in chosen:
            chosen.add(n)
            size += parts[n]["segments"]
    return sorted(chosen)


def _live_media(part: Part, removed: Sequence[int]) -> list[Media]:
    media: list[Media] = []
    for number, source in enumerate(part.sources):
        if number not in set(removed):
            both = {m: part.features_of(m, number) for m in part.features}
            media.append(
                (source, {m: f for m, (f, _) in both.items()}, {m: p for m, (_, p) in both.items()})
            )
    return media

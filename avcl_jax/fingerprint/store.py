"""An index on disk: a manifest that is replaced as a whole, what it names, one writer at a time.

The manifest is the index. Whatever it does not name was left by a writer that did not finish, is
never read, and is deleted by the next writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avcl_jax.fingerprint.error import FingerprintError
from avcl_jax.fingerprint.part import make_durable

MANIFEST, _LOCK = "manifest.json", "writer.lock"
FORMAT_VERSION = 1
_KEYS = ("settings", "encoder", "dimensions", "parts", "next_part", "projection", "calibration")
# Names that a writer gives.
_MADE = re.compile(r"part-\d{6,}|projection-.*\.npz|manifest\.json\.new")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads what an index consists of.

    Raises:
        FingerprintError: if there is no index, or its manifest is damaged or of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FingerprintError(
            f"there is no fingerprint index in {directory}: make one with "
            f"`avcl-fingerprint index VIDEOS --index {directory} --encoder PATH`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FingerprintError(f"{path} is damaged: index the media again") from error
    if version != FORMAT_VERSION:
        raise FingerprintError(
            f"{directory} has format {version}, this version reads {FORMAT_VERSION}: index the "
            "media again"
        )
    if missing := [key for key in _KEYS if key not in manifest]:
        raise FingerprintError(
            f"{path} is damaged, it lacks {', '.join(missing)}: index the media again"
        )
    return manifest


def replace_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Makes `manifest` what every reader that opens the index from now on sees."""
    new = directory / f"{MANIFEST}.new"
    new.write_text(json.dumps(manifest, indent=1) + "\n")
    make_durable(new)
    os.replace(new, directory / MANIFEST)
    make_durable(directory)


def delete_leftovers(directory: Path) -> list[str]:
    """Deletes what the manifest does not name; only for the one writer.

    Returns:
        Names of what was deleted.
    """
    manifest = read_manifest(directory)
    named = {MANIFEST, _LOCK, *(part["name"] for part in manifest["parts"])}
    if manifest["projection"]:
        named.add(manifest["projection"]["file"])
    deleted = []
    for path in sorted(directory.iterdir()):
        # Nothing but what a writer makes: the directory may hold what someone else put there.
        if path.name not in named and _MADE.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            deleted.append(path.name)
    return deleted


@contextlib.contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Holds the index for writing; the system lets go of it when the process ends, however.

    Raises:
        FingerprintError: if another process writes.
    """
    with (directory / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FingerprintError(
                f"{directory} is being written by process {file.read().strip() or 'unknown'}: wait "
                "until it has ended"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
        file.truncate(0)

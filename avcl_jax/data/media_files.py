"""Media files by their names: in the folders that a command is given, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path, is_remote, store_of

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
AUDIO_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
    *(".weba", ".wma"),
)
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *AUDIO_SUFFIXES)


def walk(folder: epath.PathLike) -> Iterator[tuple[str, list[str]]]:
    """Searches a local or remote folder; hidden files are left out, circles of links are safe.

    Yields:
        Absolute path of a folder, and names of its files.

    Raises:
        UserError: if a folder cannot be listed: its files would otherwise be missing silently.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}")

    if is_remote(folder):
        files_of, root = store_of(folder)
        for directory, _, files in files_of.walk(root):
            yield files_of.unstrip_protocol(directory), [n for n in files if n and n[0] != "."]
        return
    seen = set()
    for directory, subdirectories, files in os.walk(
        absolute_path(folder), followlinks=True, onerror=fail
    ):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a parent
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield directory, [name for name in files if not name.startswith(".")]


def media_files(paths: Iterable[Path]) -> list[Path]:
    """Returns files as they are named, whatever their suffix, and the media files in folders.

    Raises:
        UserError: if a path does not exist, or a folder has no media file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (Path(directory, name) for directory, names in walk(path) for name in names)
            media = sorted(file for file in inside if file.suffix.lower() in MEDIA_SUFFIXES)
            if not media:
                raise UserError(f"the folder {path} has no media file")
            files += media
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist")
    return files

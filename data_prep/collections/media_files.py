"""The media files of a folder, found by one search and looked up by name.

Collections have up to two million files: asking the file system for each name that a list implies
takes hours on network storage, one listing of the folders takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import fsspec
from etils import epath

from avcl_jax.paths import absolute_path, is_remote
from data_prep.manifest import PrepareError

_PICTURE_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
_SOUND_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
    *(".weba", ".wma"),
)
MEDIA_SUFFIXES = (*_PICTURE_SUFFIXES, *_SOUND_SUFFIXES)


def walk(folder: epath.Path) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder, and those below it, with their files; nothing hidden, no circles of links.

    Args:
      folder: A local one, or gs://, s3://.

    Yields:
      Absolute path of a folder, and names of its files.

    Raises:
      PrepareError: If one cannot be listed: its files would otherwise be missing silently.
    """

    def fail(error: OSError) -> None:
        raise PrepareError(f"cannot list the folder {error.filename}: {error.strerror}")

    if is_remote(folder):
        files_of, root = fsspec.core.url_to_fs(os.fspath(folder))
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


class MediaFiles:
    """The media files of a folder by their names without suffix, wherever in it they are.

    Of files with one name, those with a picture come first, then the first in the order of paths.

    Attributes:
      count: Of the files in the folder, media or not.
    """

    def __init__(self, folder: epath.Path, *, ignore_case: bool = False):
        """Searches the folder; raises PrepareError if it cannot be listed."""
        self.count = 0
        self._ignore_case = ignore_case
        self._paths: dict[str, str] = {}
        for directory, files in walk(folder):
            self.count += len(files)
            for name in files:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() not in MEDIA_SUFFIXES:
                    continue
                key = stem.casefold() if ignore_case else stem
                path = os.path.join(directory, name)
                other = self._paths.get(key)
                if other is None or _preference(path) < _preference(other):
                    self._paths[key] = path

    def find(self, names: Iterable[str]) -> str | None:
        """Returns the absolute path of the first name that is there, None without any."""
        for name in names:
            path = self._paths.get(name.casefold() if self._ignore_case else name)
            if path is not None:
                return path
        return None


def _preference(path: str) -> tuple[bool, bytes]:
    return os.path.splitext(path)[1].lower() in _SOUND_SUFFIXES, os.fsencode(path)

"""What the page plays: the index's own files, and small conversions kept for a while."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from avcl_jax.data.media import decode_audio
from avcl_jax.data.media_error import MediaError
from avcl_jax.fingerprint.part import SourceRow
from avcl_jax.fingerprint.web import preview, sound
from avcl_jax.fingerprint.web.media_process import MediaProcess, MediaProcessError
from avcl_jax.fingerprint.web.refusal import Refusal

_T = TypeVar("_T")
_KEPT = 12
# Seconds shown around the part that matches, where a source is converted.
_MARGIN_SECONDS = 5.0


class Shelf:
    """Conversions in a directory, the oldest of which make room for new ones."""

    def __init__(self, directory: Path, *, max_decode_seconds: float):
        """Takes the directory, which someone else deletes, and the limit of one conversion."""
        self._directory = directory
        self._kept: OrderedDict[str, Path] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "fingerprint-preview")
        self._media = MediaProcess(max_decode_seconds)

    def close(self) -> None:
        """Converts no more."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._media.close()

    async def of_clip(self, path: Path, seconds: float) -> tuple[str, str] | None:
        """Converts a clip if browsers do not play it.

        Args:
            path: of the clip.
            seconds: how much of it was compared.

        Returns:
            Name of the conversion in `get`, empty where none is needed, and its media type. None
            where it cannot be shown.
        """
        return await self._do(self._of_clip, path, seconds)

    async def of_source(self, row: SourceRow, start: float, end: float) -> tuple[Path, str]:
        """Returns a conversion of a part of a source, and its media type.

        Raises:
            Refusal: if the source cannot be shown.
        """
        return await self._do(self._of_source, row, start, end)

    async def type_of(self, row: SourceRow) -> str | None:
        """Returns the media type of a source that browsers play as it is; None of another.

        Raises:
            Refusal: if the source cannot be shown.
        """
        return await self._do(self._type_of, row)

    async def sound_of(
        self, row: SourceRow, start: float, end: float, sample_rate_hz: int
    ) -> dict[str, object]:
        """Returns a picture of the sound of a part of a source, see `sound.spectrogram`.

        Raises:
            Refusal: if there is none.
        """
        return await self._do(self._sound_of, row, start, end, sample_rate_hz)

    def get(self, name: str) -> Path | None:
        """Returns a conversion that `of_clip` made, None if it has made room for others."""
        return self._kept.get(name)

    async def _do(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    def _of_clip(self, path: Path, seconds: float) -> tuple[str, str] | None:
        try:
            kind = self._media.call(preview.playable_type, path)
            if kind is not None:
                return "", kind
            name = secrets.token_urlsafe(18)
            self._convert(name, path, 0.0, seconds)
        except (MediaError, MediaProcessError):
            # It was compared, so that only its rest can be at fault: the match stands without it.
            return None
        return name, "video/mp4"

    def _of_source(self, row: SourceRow, start: float, end: float) -> tuple[Path, str]:
        path = self._file_of(row)
        name = f"{row.content[:24]}-{start:.1f}-{end:.1f}"
        if name not in self._kept:
            try:
                self._convert(name, path, start, end)
            except (MediaError, MediaProcessError) as error:
                raise Refusal(422, f"{row.name} cannot be shown: {error}") from error
        self._kept.move_to_end(name)
        return self._kept[name], "video/mp4"

    def _type_of(self, row: SourceRow) -> str | None:
        try:
            return self._media.call(preview.playable_type, self._file_of(row))
        except (MediaError, MediaProcessError) as error:
            raise Refusal(422, f"{row.name} cannot be shown: {error}") from error

    def _sound_of(
        self, row: SourceRow, start: float, end: float, sample_rate_hz: int
    ) -> dict[str, object]:
        try:
            heard = self._media.call(
                decode_audio,
                self._file_of(row),
                sample_rate_hz=sample_rate_hz,
                start_seconds=start,
                end_seconds=min(end, start + preview.MAX_SECONDS),
            )
        except (MediaError, MediaProcessError) as error:
            raise Refusal(422, f"{row.name} cannot be shown: {error}") from error
        if heard is None:
            raise Refusal(422, f"{row.name} has no sound from {start:.1f} to {end:.1f} s")
        return sound.spectrogram(heard.waveform, sample_rate_hz, heard.start_seconds)

    def _convert(self, name: str, path: Path, start: float, end: float) -> None:
        out = self._directory / f"preview-{secrets.token_hex(12)}.mp4"
        try:
            self._media.call(preview.convert, path, out, start_seconds=start, end_seconds=end)
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        self._kept[name] = out
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)[1].unlink(missing_ok=True)

    def _file_of(self, row: SourceRow) -> Path:
        if row.path is None:
            raise Refusal(404, f"{row.name} was indexed from memory: there is no file to show")
        path = Path(row.path)
        if not path.is_file():
            raise Refusal(
                404, f"{path} is not there any more: put it back, or index it where it is now"
            )
        return path


def shown_interval(start: float, end: float, duration: float) -> tuple[float, float]:
    """Returns the part of a source that is converted for a match from `start` to `end`."""
    begin = max(0.0, start - _MARGIN_SECONDS)
    return begin, min(duration, end + _MARGIN_SECONDS, begin + preview.MAX_SECONDS)

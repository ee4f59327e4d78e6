"""An answer as JSON: what `POST /api/query` returns and the page shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from avcl_jax.fingerprint.answer import Match
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.part import SourceRow
from avcl_jax.fingerprint.web.desk import Answer, source_id
from avcl_jax.fingerprint.web.refusal import Refusal
from avcl_jax.fingerprint.web.shelf import shown_interval
from avcl_jax.fingerprint.web.sound import spectrogram


def describe_answer(
    answer: Answer,
    name: str,
    clip: tuple[str, str] | None,
    types: Mapping[str, str | Refusal | None],
) -> dict[str, Any]:
    """Returns what docs/fingerprint_page.md describes.

    Args:
        answer: of the desk.
        name: of the clip.
        clip: of `Shelf.of_clip`.
        types: of `Shelf.type_of`, of each source; or why it cannot be shown.
    """
    media, result = answer.media, answer.result
    candidates = [
        _describe_match(
            match, answer.sources[match.source], types[match.source], result.query_seconds
        )
        for match in result.matches
    ]
    return {
        "clip": {
            "name": name,
            "seconds": answer.clip_seconds,
            "compared_seconds": result.query_seconds,
            "has_video": answer.has_video,
            "has_audio": answer.has_audio,
            "empty": result.empty,
            "remark": result.remark,
            "type": None if clip is None else clip[1],
            "converted_url": f"/clips/{clip[0]}" if clip is not None and clip[0] else None,
            "sound": (
                spectrogram(media.waveform, media.sample_rate_hz, media.audio_start_seconds)
                if not answer.has_video
                else None
            ),
        },
        "threshold": result.threshold,
        "required": result.required,
        "verdict": result.verdict,
        "at_most": CANDIDATES,
        "sources": result.sources,
        "match": None if result.best is None else candidates[result.matches.index(result.best)],
        "candidates": candidates,
    }


def _describe_match(
    match: Match, row: SourceRow, kind: str | Refusal | None, query_seconds: float
) -> dict[str, Any]:
    start = match.offset_seconds
    begin, end = shown_interval(start, start + match.rate * query_seconds, row.duration_seconds)
    interval = f"?start={begin:.1f}&end={end:.1f}"
    identity = source_id(row)
    return {
        "id": identity,
        "name": match.source,
        "title": PurePath(match.source).name,
        "seconds": match.duration_seconds,
        "offset_seconds": match.offset_seconds,
        "rate": match.rate,
        "score": match.score,
        "accepted": match.accepted,
        "same_file": match.same_file,
        "matched": match.matched,
        "what_matched": match.what_matched,
        "shared_with": match.shared_with,
        "video_score": match.video_score,
        "audio_score": match.audio_score,
        "intervals": [dataclasses.asdict(interval) for interval in match.intervals],
        "segments": [dataclasses.asdict(segment) for segment in match.segments],
        "media": {
            # Of a file that browsers play; of any other there is only the converted part.
            "url": f"/media/{identity}" if isinstance(kind, str) else None,
            "converted_url": f"/media/{identity}/preview{interval}",
            "converted_start_seconds": round(begin, 1),
            "sound_url": f"/api/sources/{identity}/sound{interval}",
            "error": kind.message if isinstance(kind, Refusal) else None,
        },
    }

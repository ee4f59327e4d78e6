"""The page of `avcl-fingerprint duplicates`: what files share, side by side, in one HTML file."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avcl_jax.data.encode import frame_uri, spectrogram_uri
from avcl_jax.data.media import MediaError, decode_audio, decode_frames, probe
from avcl_jax.data.spectrogram import mel_decibels
from avcl_jax.errors import one_line
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.duplicates import describe
from avcl_jax.fingerprint.intervals import Seconds
from avcl_jax.fingerprint.relations import MANY, Pair, Sharing
from avcl_jax.page import page, section, text

# Of each kind; a library with more has them in the JSON.
_SHOWN, _OCCURRENCES = 50, 6
_STILLS, _SHORT_SIDE = 3, 120
_COPY = ("same file", "copy")
# Audio is drawn up to here.
_DRAWN_SECONDS, _RATE_HZ, _MELS, _HOP, _RANGE_DB = 30.0, 16_000, 48, 512, 60.0
_QUIET_DB = -20.0  # audio that stays below is drawn darker


def report(sharing: Sharing, size: str, min_seconds: float) -> str:
    """Returns the page; decodes stills of files that still exist.

    Args:
        size: size of the index in words.
    """
    groups = sharing.groups
    pairs: dict[str, list[Pair]] = {"contained": [], "partial": []}
    for pair in sharing.pairs:
        if pair.relation in pairs:
            pairs[pair.relation].append(pair)
    tiles = {
        "groups of copies": len(groups),
        "redundant files in them": sum(len(group) - 1 for group in groups),
        "files contained in others": len({pair.first.id for pair in pairs["contained"]}),
        "pairs with a common part": len(pairs["partial"]),
        f"parts shared by {MANY} or more": len(sharing.materials),
    }
    between = {(p.first.id, p.second.id): p for p in sharing.pairs}
    sections = [
        section(
            "Copies",
            "Each file shares most of its length with another of its group. The largest file comes "
            "first. Nothing was deleted.",
            *_limited([_group(group, between) for group in groups]),
        ),
        section(
            "Contained in others",
            "The file on the left is a part of the one on the right.",
            *_limited([_pair(pair) for pair in pairs["contained"]]),
        ),
        section(
            "Common parts",
            "Two files share a part, or only their video or audio.",
            *_limited([_pair(pair) for pair in pairs["partial"]]),
        ),
        section(
            "Shared by many",
            f"Parts that {MANY} or more files have that are not copies of each other, such as an "
            "intro, a logo or music.",
            *_limited(
                [
                    f"<h3>{' and '.join(m.matched)}, in {m.shared_by} files or more</h3>"
                    + _row([_card(s, seconds) for s, seconds in m.occurrences[:_OCCURRENCES]])
                    for m in sharing.materials
                ]
            ),
        ),
    ]
    shown = "".join(
        f'<div class="tile"><b>{count}</b><span>{name}</span></div>'
        for name, count in tiles.items()
    )
    lead = (
        f"{size}, compared with each other for parts of {min_seconds:g} s or more. A click on the "
        "frames plays the file from there, if this page is opened on the machine with the files."
    )
    body = (
        f'<h1>What the files share</h1><p class="lead">{text(lead)}</p>'
        f'<div class="tiles">{shown}</div>{"".join(sections)}'
    )
    return page(title="Duplicates", body=body)


def _limited(parts: Sequence[str]) -> Iterable[str]:
    if not parts:
        return ['<p class="caption">None.</p>']
    left = len(parts) - _SHOWN
    more = f'<p class="caption">{left} more are in the JSON (--json).</p>' if left > 0 else ""
    return [*parts[:_SHOWN], more]


def _group(group: Sequence[SourceRow], between: Mapping[tuple[int, int], Pair]) -> str:
    """Returns a group as cards, the largest file first, with what each shares with another."""
    ordered = sorted(group, key=lambda source: (-_bytes(source), source.name))
    notes = []
    for source in ordered:
        own = [p for p in between.values() if source in (p.first, p.second) and p.relation in _COPY]
        same = any(pair.relation == "same file" for pair in own)
        pair = max(own, key=lambda pair: pair.seconds)
        notes.append("same file as another" if same else f"{' and '.join(pair.matched)} match")
    cards = [
        _card(source, Seconds(0.0, source.duration_seconds), note)
        for source, note in zip(ordered, notes, strict=True)
    ]
    return _row(cards)


def _pair(pair: Pair) -> str:
    """Returns the longest interval of a pair as two cards, and all of them in words."""
    longest = max(pair.intervals, key=lambda i: i.sides[0].end - i.sides[0].start)
    cards = [
        _card(source, seconds)
        for source, seconds in zip((pair.first, pair.second), longest.sides, strict=True)
    ]
    lines = "<br>".join(text(describe(interval)) for interval in pair.intervals)
    return f'{_row(cards, "pair")}<p class="caption">{lines}</p>'


def _row(cards: Sequence[str], kind: str = "") -> str:
    return f'<div class="scroll"><div class="row {kind}">{"".join(cards)}</div></div>'


def _card(source: SourceRow, seconds: Seconds, note: str = "") -> str:
    """Returns frames and spectrogram of a part of a source, which a click plays."""
    path = Path(source.path or source.name)
    ends = f"{_clock(seconds.start)} to {_clock(seconds.end)} of {_clock(source.duration_seconds)}"
    facts, media = _media(source.path, *seconds)
    stage = "disabled"
    if media:
        address = f"{path.as_uri()}#t={seconds.start:.2f},{seconds.end:.2f}"
        stage = f'data-clip="{text(address)}" aria-label="play {text(path.name)}"'
    lines = "".join(
        f'<span class="tag" title="{text(line)}">{text(line)}</span>'
        for line in (ends, facts, note)
        if line
    )
    # Copies often have one name in several folders.
    folder = f'<span class="tag folder">{text(path.parent)}</span>' if source.path else ""
    return (
        f'<div class="video"><span class="tag" title="{text(source.name)}"><b>{text(path.name)}</b>'
        f'</span><button class="stage" {stage}>{media}</button>{folder}{lines}</div>'
    )


# Copies are shown in several rows.
@functools.lru_cache(maxsize=1024)
def _media(name: str | None, start: float, end: float) -> tuple[str, str]:
    """Returns what a file is, and images of its video and audio; none if it is not there."""
    if name is None:
        return "added from memory", ""
    path = Path(name)
    if not path.exists():
        return "the file is no longer there", ""
    try:
        info = probe(path)
        stills = "".join(_stills(path, start, end)) if info.video else ""
        drawn = _spectrogram(path, start, min(end, start + _DRAWN_SECONDS)) if info.audio else ""
        size = path.stat().st_size
    except (MediaError, OSError) as error:
        return f"cannot be shown: {one_line(error)}", ""
    facts = [f"{info.video[1]}×{info.video[2]} {info.video[0]}"] if info.video else []
    facts += [info.audio[0]] if info.audio else []
    media = f'<span class="stills">{stills}</span>' if stills else ""
    media += f'<img alt="spectrogram" src="{drawn}">' if drawn else ""
    return ", ".join([*facts, f"{size / 1e6:.1f} MB"]), media


def _stills(path: Path, start: float, end: float) -> Iterator[str]:
    for part in (np.arange(_STILLS) + 0.5) / _STILLS:
        moment = start + float(part) * (end - start)
        interval = {"start_seconds": moment, "end_seconds": end}
        frames = decode_frames(path, short_side=_SHORT_SIDE, max_fps=None, **interval)
        if (frame := next(frames, None)) is not None:
            yield f'<img alt="" src="{frame_uri(frame.image)}">'


def _spectrogram(path: Path, start: float, end: float) -> str:
    audio = decode_audio(path, sample_rate_hz=_RATE_HZ, start_seconds=start, end_seconds=end)
    if audio is None or len(audio.waveform) < _HOP:
        return ""
    decibels = mel_decibels(audio.waveform, _RATE_HZ, window=2 * _HOP, hop=_HOP, mels=_MELS)
    loudest = max(float(decibels.max()), _QUIET_DB)
    return spectrogram_uri(decibels, low=loudest - _RANGE_DB, high=loudest)


def _bytes(source: SourceRow) -> int:
    path = Path(source.path) if source.path else None
    return path.stat().st_size if path and path.exists() else 0


def _clock(seconds: float) -> str:
    """Returns minutes and seconds; hours if there are any."""
    minutes, rest = divmod(round(max(seconds, 0.0), 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return (f"{hours}:{minutes:02d}" if hours else str(minutes)) + f":{rest:04.1f}"

"""`avcl-fingerprint query`: the sources of clips, in words or as JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from avcl_jax.compilation_cache import keep_compiled
from avcl_jax.data.media import MediaError, decode_media
from avcl_jax.data.media_files import media_files
from avcl_jax.errors import one_line, printable
from avcl_jax.export.encoder import MODALITIES
from avcl_jax.fingerprint.answer import Match, QueryResult
from avcl_jax.fingerprint.index import NOTHING_TO_COMPARE, FingerprintIndex, file_sha256
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.settings import REQUIREMENTS, THRESHOLD, FingerprintError
from avcl_jax.paths import local_path

_SCORES = (
    "score: -log10 of the chance that an unrelated clip finds as much in this index; 2 is one in a "
    f"hundred, 6 one in a million, {THRESHOLD:g} or more is a match. video, audio: evidence of "
    "each, 0 is chance. Several sources may match, each a part of the clip. Sources that match "
    "equally well, such as copies of one film or films with the same logo, are reported as shared."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.epilog = _SCORES
    add = parser.add_argument
    clips = "media files, or folders with media; ./-NAME for one that begins with a dash"
    add("clips", help=clips, nargs="+", metavar="CLIP", type=local_path)
    add("--json", action="store_true", help="answer with one JSON object per line and clip")
    add("--modality", choices=MODALITIES, help="compare only this one (default: both)")
    require = "accept only sources whose video, audio or both match (default: one is enough)"
    add("--require", choices=REQUIREMENTS, help=require)
    add("--encoder", metavar="PATH", help="where the encoders are now, if they were moved")
    number = "%(default)s"
    add("--count", type=int, default=5, help=f"matches shown per clip (default: {number})")
    start = f"second of each clip at which to begin (default: {number})"
    add("--start", type=float, default=0.0, help=start)
    seconds = f"seconds of it that are compared, all in memory (default: {number})"
    add("--max-seconds", type=float, default=120.0, help=seconds)


def run(args: argparse.Namespace) -> int:
    """Prints the sources of each clip; returns 1 if a clip has no answer, which says why."""
    clips = media_files(args.clips)
    index = FingerprintIndex.open(args.index, args.encoder)
    if not index.sources():
        raise FingerprintError(f"{args.index} is empty: `add` media to it")
    modalities = (args.modality,) if args.modality else MODALITIES
    required = REQUIREMENTS[args.require] if args.require else ()
    index.check_required(required, modalities)
    keep_compiled()
    decoding = index.segmenter.decoding  # wrong encoders are not a problem of a clip
    status = 0
    # The answers themselves are the progress where they can be seen.
    hidden = len(clips) == 1 or sys.stdout.isatty()
    for clip in tqdm(clips, unit="clip", disable=hidden or None):
        name = printable(str(clip))
        try:
            content = file_sha256(clip)  # first, because decoding a pipe may never end
            media = decode_media(
                clip,
                start_seconds=args.start,
                end_seconds=args.start + args.max_seconds,
                **decoding,
            )
            result = index.query(
                media,
                modalities,
                CANDIDATES,
                required=required,
                content=content,
                start_seconds=args.start,
            )
        except (MediaError, FingerprintError, OSError) as error:
            status = 1
            print(f"avcl-fingerprint: {name}: {one_line(error)}", file=sys.stderr)
            if args.json:
                print(json.dumps({"query": str(clip), "error": one_line(error)}), flush=True)
            continue
        if args.json:
            answer = {"query": str(clip), **_to_json(result, args.count)}
            print(json.dumps(answer), flush=True)
            continue
        if len(clips) > 1:
            print(f"{name}:")
        indent = "  " * (len(clips) > 1)
        lines = map(printable, _to_lines(result, args.count))
        print("\n".join(indent + line for line in lines), flush=True)
    return status


def _to_json(result: QueryResult, count: int) -> dict[str, Any]:
    best = result.best
    return {
        "verdict": result.verdict,
        "match": None if best is None else best.source,
        "sources": result.sources,
        "empty": result.empty,
        "threshold": result.threshold,
        "query_seconds": result.query_seconds,
        "matches": [dataclasses.asdict(match) for match in result.matches[:count]],
    }


def _to_lines(result: QueryResult, count: int) -> Iterator[str]:
    if result.remark:
        yield result.remark
    accepted = [match for match in result.matches if match.accepted]
    if result.verdict == "shared":
        sharing = (accepted[0].source, *accepted[0].shared_with)
        yield f"shared by {_sources(len(sharing))}, which match equally well: {', '.join(sharing)}"
    for match in accepted[:count]:
        yield _line(match)
        for i in match.intervals:
            shared = f", shared by {_sources(i.shared_by)}" if i.shared_by > 1 else ""
            yield (
                f"  {i.query_start:.1f} to {i.query_end:.1f} s of the clip: "
                f"{i.reference_start:.1f} to {i.reference_end:.1f} s of the source{shared}"
            )
    if len(accepted) > count:
        yield f"{len(accepted) - count} more: --count {len(accepted)}"
    if not accepted and result.matches:
        yield f"no match; nearest, not accepted: {_line(result.matches[0])}"
    elif not accepted:
        yield f"no match: {result.query_seconds:.2f} s {NOTHING_TO_COMPARE}"


def _line(match: Match) -> str:
    scores = (("video", match.video_score), ("audio", match.audio_score))
    shown = ", ".join(f"{name} {score:.1f}" for name, score in scores if score is not None)
    rate = "" if abs(match.rate - 1) < 0.03 else f" at {match.rate:.2f}x"
    by = " by details" if match.score_by.details > match.score_by.embeddings else ""
    return (
        f"{match.source} from {match.offset_seconds:.2f} s{rate}, score {match.score:.1f}{by}: "
        f"{match.what_matched} ({shown})"
    )


def _sources(count: int) -> str:
    return f"{'at least ' * (count >= CANDIDATES)}{count} sources"

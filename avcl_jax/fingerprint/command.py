"""`avcl-fingerprint COMMAND`: makes, changes, checks and searches an index of media.

Exit status: 0; 1 if a file could not be indexed or an index is damaged; 2 if nothing was done
because an argument, a file or a package is missing or wrong; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from tqdm import tqdm

from avcl_jax import weights
from avcl_jax.data.media import MediaError, decode_media
from avcl_jax.data.media_files import media_files
from avcl_jax.errors import UserError, one_line
from avcl_jax.export.runs import MODALITIES
from avcl_jax.fingerprint import serve
from avcl_jax.fingerprint.answer import Match, QueryResult
from avcl_jax.fingerprint.calibration import THRESHOLD
from avcl_jax.fingerprint.index import (
    NOTHING_TO_COMPARE,
    REQUIREMENTS,
    FingerprintIndex,
    file_sha256,
)
from avcl_jax.fingerprint.library import verify
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.settings import KINDS, FingerprintError, FingerprintSettings
from avcl_jax.paths import local_path

_SCORES = (
    "score: -log10 of the chance that an unrelated clip finds as much in this index; 2 is one in a "
    f"hundred, 6 one in a million, {THRESHOLD:g} or more is a match. video, audio: evidence of "
    "each, 0 is chance. Several sources may match, each a part of the clip. Sources that match "
    "equally well, such as copies of one film or films with the same logo, are reported as shared."
)
_LEAST = {"count": 1, "start": 0, "max_waiting": 0}
_POSITIVE = ("max_seconds", "max_decode_seconds", "max_upload_mb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    # Warnings of the libraries concern only themselves.
    logging.set_verbosity(logging.ERROR)
    try:
        _check_numbers(args)
        return _COMMANDS[args.command][0](args) or 0
    except (UserError, OSError) as error:
        print(f"avcl-fingerprint: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("avcl-fingerprint: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avcl-fingerprint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=summary, description=summary)
        for name, (_, summary) in _COMMANDS.items()
    }
    parsers["query"].epilog = _SCORES

    def option(names: str, flag: str, text: str, default: Any = None, **settings: Any) -> None:
        if default is not None:
            settings |= {"type": type(default), "default": default}
            text = f"{text} (default: %(default)s)"
        for name in names.split():
            parsers[name].add_argument(flag, help=text, **settings)

    every, path = " ".join(_COMMANDS), {"metavar": "PATH"}
    option(every, "--index", "the index", type=local_path, required=True, metavar="DIR")
    option("index add", "videos", "files, or folders with files", nargs="+", type=local_path)
    option("remove", "videos", "as they were named when indexed", nargs="+")
    known = f"encoders by name ({weights.DEFAULT}), a run, or what it exported"
    option("index", "--encoder", known, weights.DEFAULT, metavar="NAME_OR_PATH")
    dash = "./-NAME for one that begins with a dash"
    option("query", "clip", f"a media file, {dash}", type=local_path)
    option("query", "--json", "answer in JSON", action="store_true")
    option("query", "--modality", "compare only this one (default: both)", choices=MODALITIES)
    require = "accept only sources whose video, audio or both match (default: one is enough)"
    option("query", "--require", require, choices=REQUIREMENTS)
    option("add query serve", "--encoder", "where the encoders are now, if they were moved", **path)
    made = FingerprintSettings()
    kinds = "flat is exact, ivfpq small and fast, auto chooses by size"
    option("index", "--kind", kinds, made.kind, choices=KINDS)
    option("index", "--speed", "seconds of a segment per second of the encoder's clip", made.speed)
    option("index", "--hop-seconds", "seconds from one segment to the next", made.hop_seconds)
    option("query", "--count", "matches shown", 5)
    option("query", "--start", "second of the clip at which to begin", 0.0)
    option("query", "--max-seconds", "seconds of it that are compared, all in memory", 120.0)
    host = "address to listen at; any other lets other machines in"
    option("serve", "--host", host, "127.0.0.1")
    option("serve", "--port", "port to listen at, 0 for a free one", 8021)
    option("serve", "--max-upload-mb", "larger clips are refused unread", 200.0)
    seconds = "seconds of a clip that are compared, from its beginning"
    option("serve", "--max-seconds", seconds, 120.0)
    option("serve", "--max-decode-seconds", "seconds to decode or convert a clip", 120.0)
    option("serve", "--max-waiting", "clips that may wait while one is compared", 4)
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')} {value}"
        if name in _LEAST and not _LEAST[name] <= value < math.inf:
            raise FingerprintError(f"{option} must be at least {_LEAST[name]} and finite")
        if name in _POSITIVE and not 0 < value < math.inf:
            raise FingerprintError(f"{option} must be positive and finite")


def _add(args: argparse.Namespace) -> int:
    """Adds files, to a new index for the command `index`."""
    new = args.command == "index"
    if new:  # wrong settings and paths are refused before anything is made
        settings = FingerprintSettings(
            speed=args.speed, hop_seconds=args.hop_seconds, kind=args.kind
        )
    files = media_files(args.videos)
    index = (
        FingerprintIndex.create(args.index, args.encoder, settings)
        if new
        else FingerprintIndex.open(args.index, args.encoder)
    )
    report = index.add_files(tqdm(files, unit="file", disable=None))
    for name in report.replaced:
        print(f"{name}: its content changed, replaced")
    for name, reason in report.failed:
        print(f"{name}: not indexed, {reason}", file=sys.stderr)
    print(
        f"added {len(report.added)}, replaced {len(report.replaced)}, already there "
        f"{len(report.skipped)}, not indexed {len(report.failed)}; {index.directory} contains "
        f"{index.size}"
    )
    return 1 if report.failed else 0


def _remove(args: argparse.Namespace) -> None:
    index = FingerprintIndex.open(args.index)
    known = {source.name for source in index.sources()}
    # Files are named by their absolute paths, media added from memory by any name.
    names = [name if name in known else str(local_path(name)) for name in args.videos]
    index.remove(names)
    print(f"removed {len(names)}; {index.directory} contains {index.size}")


def _query(args: argparse.Namespace) -> None:
    index = FingerprintIndex.open(args.index, args.encoder)
    if not index.sources():
        raise FingerprintError(f"{args.index} is empty: `add` media to it")
    modalities = (args.modality,) if args.modality else MODALITIES
    required = REQUIREMENTS[args.require] if args.require else ()
    index.check_required(required, modalities)
    end = args.start + args.max_seconds
    options = {"start_seconds": args.start, "end_seconds": end, **index.segmenter.decoding}
    try:
        media = decode_media(args.clip, **options)
    except MediaError as error:
        raise FingerprintError(f"{args.clip} cannot be decoded: {error}") from error
    result = index.query(
        media,
        modalities,
        CANDIDATES,
        required=required,
        content=file_sha256(args.clip),
        start_seconds=args.start,
    )
    if args.json:
        print(json.dumps(_to_json(result, args.count), indent=1))
    else:
        print("\n".join(_to_lines(result, args.count)))


def _verify(args: argparse.Namespace) -> int:
    problems = verify(args.index)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    print(f"intact: {args.index} contains {FingerprintIndex.open(args.index).size}")
    return 0


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str]] = {
    "index": (_add, "make an index of media files"),
    "add": (_add, "add media files to an index, or replace those that changed"),
    "remove": (_remove, "remove media from an index"),
    "query": (_query, "find the source of a clip"),
    "verify": (_verify, "check the files of an index"),
    "serve": (serve.run, "show matches in a web page on this machine"),
}


def _to_json(result: QueryResult, count: int) -> dict[str, object]:
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
    return (
        f"{match.source} from {match.offset_seconds:.2f} s{rate}, score {match.score:.1f}: "
        f"{match.what_matched} ({shown})"
    )


def _sources(count: int) -> str:
    return f"{'at least ' * (count >= CANDIDATES)}{count} sources"

"""`avcl-fingerprint COMMAND`: makes, changes, checks and searches an index of media.

Exit status: 0; 1 if a file could not be indexed or an index is damaged; 2 if nothing was done
because an argument, a file or a package is missing or wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from avcl_jax.data.media import MediaError, decode_media
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
# In folders, where notes and images lie beside the films; a file that is named is always tried.
_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".aac", ".aif", ".aiff", ".flac", ".m4a"),
    *(".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".weba", ".wma"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    # Warnings of the libraries concern only themselves.
    logging.set_verbosity(logging.ERROR)
    try:
        return args.run(args) or 0
    except (UserError, OSError) as error:
        print(f"avcl-fingerprint: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avcl-fingerprint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int | None], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        added.add_argument(
            "--index", type=local_path, required=True, metavar="DIR", help="the index"
        )
        return added

    make = command("index", _index, "make an index of media files")
    add = command("add", _add, "add media files to an index, or replace those that changed")
    remove = command("remove", _remove, "remove media from an index")
    query = command("query", _query, "find the source of a clip")
    command("verify", _verify, "check the files of an index")
    served = command("serve", serve.run, "show matches in a web page on this machine")
    files, default = "files, or folders with files", FingerprintSettings()
    make.add_argument("videos", nargs="+", type=local_path, help=files)
    make.add_argument(
        "--encoder", required=True, metavar="PATH", help="a run, or the encoders it exported"
    )
    add.add_argument("videos", nargs="+", type=local_path, help=files)
    remove.add_argument("videos", nargs="+", help="as they were named when indexed")
    query.epilog = _SCORES
    query.add_argument(
        "clip", type=local_path, help="a media file, ./-NAME for one that begins with a dash"
    )
    query.add_argument("--json", action="store_true", help="answer in JSON")
    query.add_argument(
        "--modality", choices=MODALITIES, help="compare only this one (default: both)"
    )
    query.add_argument(
        "--require",
        choices=REQUIREMENTS,
        help="accept only sources whose video, audio or both match (default: one is enough)",
    )
    for opened in (add, query, served):
        opened.add_argument(
            "--encoder", metavar="PATH", help="where the encoders are now, if they were moved"
        )
    kinds = "flat is exact, ivfpq small and fast, auto chooses by size"
    make.add_argument(
        "--kind", choices=KINDS, default=default.kind, help=f"{kinds} (default: %(default)s)"
    )
    for target, name, value, text in (
        (make, "--speed", default.speed, "seconds of a segment per second of the encoder's clip"),
        (make, "--hop-seconds", default.hop_seconds, "seconds from one segment to the next"),
        (query, "--count", 5, "matches shown"),
        (query, "--start", 0.0, "second of the clip at which to begin"),
        (query, "--max-seconds", 120.0, "seconds of it that are compared, all in memory"),
        *((served, *option) for option in serve.OPTIONS),
    ):
        text = f"{text} (default: %(default)s)"
        target.add_argument(name, type=type(value), default=value, help=text)
    return parser


def _index(args: argparse.Namespace) -> int:
    settings = FingerprintSettings(speed=args.speed, hop_seconds=args.hop_seconds, kind=args.kind)
    files = list(_media_files(args.videos))  # before anything is made
    return _add_files(FingerprintIndex.create(args.index, args.encoder, settings), files)


def _add(args: argparse.Namespace) -> int:
    files = list(_media_files(args.videos))
    return _add_files(FingerprintIndex.open(args.index, args.encoder), files)


def _media_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields the files that are named, and those in folders, at any depth, by name."""
    for path in paths:
        if path.is_dir():
            every = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
            files = sorted(every)
            if not files:
                raise FingerprintError(f"the folder {path} has no media file")
            yield from files
        elif path.exists():
            yield path
        else:
            raise FingerprintError(f"{path} does not exist")


def _add_files(index: FingerprintIndex, files: Sequence[Path]) -> int:
    report = index.add_files(tqdm(files, unit="file", disable=None))
    for name in report.replaced:
        print(f"{name}: its content changed, replaced")
    for name, reason in report.failed:
        print(f"{name}: not indexed, {reason}", file=sys.stderr)
    print(
        f"added {len(report.added)}, replaced {len(report.replaced)}, already there "
        f"{len(report.skipped)}, not indexed {len(report.failed)}; {_size(index)}"
    )
    return 1 if report.failed else 0


def _remove(args: argparse.Namespace) -> None:
    index = FingerprintIndex.open(args.index)
    known = {source.name for source in index.sources()}
    # Files are named by their absolute paths, media added from memory by any name.
    names = [name if name in known else str(local_path(name)) for name in args.videos]
    index.remove(names)
    print(f"removed {len(names)}; {_size(index)}")


def _query(args: argparse.Namespace) -> None:
    index = FingerprintIndex.open(args.index, args.encoder)
    if args.count < 1:
        raise FingerprintError(f"--count {args.count} shows nothing: give 1 or more")
    if not index.sources():
        raise FingerprintError(f"{args.index} is empty: `add` media to it")
    modalities = (args.modality,) if args.modality else MODALITIES
    required = REQUIREMENTS[args.require] if args.require else ()
    index.check_required(required, modalities)
    try:
        media = decode_media(
            args.clip,
            start_seconds=args.start,
            end_seconds=args.start + args.max_seconds,
            **index.segmenter.decoding,
        )
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
    print(f"intact: {_size(FingerprintIndex.open(args.index))}")
    return 0


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


def _size(index: FingerprintIndex) -> str:
    return f"{index.directory} contains {len(index.sources())} media, {index.num_segments} segments"

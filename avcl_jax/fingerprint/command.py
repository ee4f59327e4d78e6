"""`avcl-fingerprint COMMAND`: makes, changes, checks and searches an index of media.

Exit status: 0; 1 if a file could not be indexed or compared, or an index is damaged; 2 if nothing
was done because an argument, a file or a package is missing or wrong; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging
from tqdm import tqdm

from avcl_jax import weights
from avcl_jax.command_line import Parser, ends_in_one_line, sigterm_as_interrupt
from avcl_jax.compilation_cache import keep_compiled
from avcl_jax.data.media_files import media_files
from avcl_jax.errors import printable
from avcl_jax.fingerprint import duplicates, evaluate, query, serve
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.library import verify
from avcl_jax.fingerprint.settings import KINDS, FingerprintError, FingerprintSettings
from avcl_jax.paths import local_path

_LEAST = {"count": 1, "start": 0, "max_waiting": 0}
_MEDIA = "media files, or folders with media; ./-NAME for one that begins with a dash"
_POSITIVE = ("max_seconds", "max_decode_seconds", "max_upload_mb")


@ends_in_one_line("avcl-fingerprint", failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    # Warnings of the libraries concern only themselves.
    logging.set_verbosity(logging.ERROR)
    try:
        _check_numbers(args)
        with sigterm_as_interrupt():
            return _COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print("avcl-fingerprint: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="avcl-fingerprint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.summary)
        own.add_argument("--index", type=local_path, required=True, metavar="DIR", help="the index")
        command.add_arguments(own)
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')} {value}"
        if name in _LEAST and not _LEAST[name] <= value < math.inf:
            raise FingerprintError(f"{option} must be at least {_LEAST[name]} and finite")
        if name in _POSITIVE and not 0 < value < math.inf:
            raise FingerprintError(f"{option} must be positive and finite")


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    made = FingerprintSettings()
    add = parser.add_argument
    add("media", help=_MEDIA, nargs="+", metavar="PATH", type=local_path)
    encoder = "encoders by name, a run, or an export (default: %(default)s)"
    add("--encoder", metavar="NAME_OR_PATH", default=weights.DEFAULT, help=encoder)
    kinds = "flat is exact, ivfpq small and fast, auto chooses by size (default: %(default)s)"
    add("--kind", default=made.kind, choices=KINDS, help=kinds)
    speed = "seconds of a segment per second of the encoder's clip (default: %(default)s)"
    add("--speed", type=int, default=made.speed, help=speed)
    hop = "seconds from one segment to the next (default: %(default)s)"
    add("--hop-seconds", type=float, default=made.hop_seconds, help=hop)


def _index(args: argparse.Namespace) -> int:
    # Wrong settings and paths are refused before anything is made.
    settings = FingerprintSettings(speed=args.speed, hop_seconds=args.hop_seconds, kind=args.kind)
    files = media_files(args.media)
    return _add_files(FingerprintIndex.create(args.index, args.encoder, settings), files)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("media", help=_MEDIA, nargs="+", metavar="PATH", type=local_path)
    add("--encoder", metavar="PATH", help="where the encoders are now, if they were moved")


def _add(args: argparse.Namespace) -> int:
    files = media_files(args.media)
    return _add_files(FingerprintIndex.open(args.index, args.encoder), files)


def _add_files(index: FingerprintIndex, files: Sequence[Path]) -> int:
    keep_compiled()
    report = index.add_files(tqdm(files, unit="file", disable=None))
    for name in report.replaced:
        print(f"{printable(name)}: its content changed, replaced")
    for name, reason in report.failed:
        print(f"{printable(name)}: not indexed, {reason}", file=sys.stderr)
    print(
        f"added {len(report.added)}, replaced {len(report.replaced)}, already there "
        f"{len(report.skipped)}, not indexed {len(report.failed)}; "
        f"{printable(str(index.directory))} contains {index.size}"
    )
    return 1 if report.failed else 0


def _remove_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("media", help="names in the index, or paths", nargs="+", metavar="PATH")


def _remove(args: argparse.Namespace) -> int:
    index = FingerprintIndex.open(args.index)
    known = {source.name for source in index.sources()}
    # Files are named by their absolute paths, media added from memory by any name.
    names = [name if name in known else str(local_path(name)) for name in args.media]
    index.remove(names)
    print(f"removed {len(names)}; {printable(str(index.directory))} contains {index.size}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    problems = verify(args.index)
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if problems:
        return 1
    size = FingerprintIndex.open(args.index).size
    print(f"intact: {printable(str(args.index))} contains {size}")
    return 0


class _Command(NamedTuple):
    """One command: what it takes beside `--index`, and what it does, to the exit status.

    Its module imports JAX in functions, so that `--help` and errors are shown at once.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


_COMMANDS = {
    "index": _Command("make an index of media files", _index_arguments, _index),
    "add": _Command(
        "add media files to an index, or replace those that changed", _add_arguments, _add
    ),
    "remove": _Command("remove media from an index", _remove_arguments, _remove),
    "query": _Command("find the sources of clips", query.add_arguments, query.run),
    "duplicates": _Command(
        "find copies and common parts among the media of an index",
        duplicates.add_arguments,
        duplicates.run,
    ),
    "evaluate": _Command(
        "measure answers to queries whose sources are known", evaluate.add_arguments, evaluate.run
    ),
    "verify": _Command("check the files of an index", lambda parser: None, _verify),
    "serve": _Command("show matches in a web page on this machine", serve.add_arguments, serve.run),
}

"""`avcl-fingerprint duplicates`: what indexed media share, in words, as JSON and as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from avcl_jax.errors import printable
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.intervals import Interval
from avcl_jax.fingerprint.relations import MANY, Pair, Sharing
from avcl_jax.fingerprint.settings import FingerprintError
from avcl_jax.paths import local_path, write_bytes

_RELATIONS = {
    "same file": "is the same file as",
    "copy": "is a copy of",
    "contained": "is contained in",
    "partial": "shares a part with",
}
_SOURCES_NAMED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.epilog = (
        "Copies share most of both files, also mirrored, at another speed, size or bit rate. What "
        f"{MANY} or more files share that are not copies of each other, such as an intro or music, "
        "is listed once and not by pairs. Frames of one colour and silence are not compared. "
        "Nothing is deleted."
    )
    add = parser.add_argument
    add("--json", type=local_path, metavar="FILE", help="write all pairs, groups and intervals")
    report = "write a page with frames of both files side by side"
    add("--report", type=local_path, metavar="FILE.html", help=report)
    seconds = "shortest part that is reported (default: %(default)s)"
    add("--min-seconds", type=float, default=3.0, help=seconds)
    add("--encoder", metavar="PATH", help="where the encoders are now, if they were moved")


def run(args: argparse.Namespace) -> int:
    """Prints what the sources of an index share."""
    for option, path in (("--json", args.json), ("--report", args.report)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
            raise FingerprintError(f"{option} {path} {problem}: name a file in an existing folder")
    index = FingerprintIndex.open(args.index, args.encoder)
    if not index.sources():
        raise FingerprintError(f"{args.index} is empty: `add` media to it")
    sharing = index.shared(
        args.min_seconds, lambda numbers: tqdm(numbers, unit="file", disable=None)
    )
    if args.json is not None:
        written = {"index": str(args.index), "min_seconds": args.min_seconds, **to_json(sharing)}
        write_bytes(args.json, f"{json.dumps(written, indent=1)}\n".encode())
    if args.report is not None:
        from avcl_jax.fingerprint.duplicates_page import report  # decodes media

        page = report(sharing, index.size, args.min_seconds)
        write_bytes(args.report, page.encode())
    print("\n".join(map(printable, _to_lines(sharing))))
    return 0


def to_json(sharing: Sharing) -> dict[str, Any]:
    """Returns all that was found as JSON; docs/fingerprint.md describes the fields."""
    return {
        "links": [{"name": link.name, "file": file.name} for link, file in sharing.links],
        "groups": [[source.name for source in group] for group in sharing.groups],
        "pairs": [
            {
                "first": pair.first.name,
                "second": pair.second.name,
                "relation": pair.relation,
                "matched": pair.matched,
                "seconds": round(pair.seconds, 2),
                "intervals": [_interval(interval) for interval in pair.intervals],
            }
            for pair in sharing.pairs
        ],
        "shared_material": [
            {
                "matched": material.matched,
                "shared_by": material.shared_by,
                "occurrences": [
                    {
                        "source": source.name,
                        "start": round(seconds.start, 2),
                        "end": round(seconds.end, 2),
                    }
                    for source, seconds in material.occurrences
                ],
            }
            for material in sharing.materials
        ],
    }


def _interval(interval: Interval) -> dict[str, Any]:
    ends = {
        f"{side}_{name}": round(value, 2)
        for side, seconds in zip(("first", "second"), interval.sides, strict=True)
        for name, value in seconds._asdict().items()
    }
    return {**ends, "matched": interval.matched, "shared_by": interval.shared_by}


def _to_lines(sharing: Sharing) -> Iterator[str]:
    for link, file in sharing.links:
        yield f"{link.name} is a link to {file.name}, not a copy"
    for group in sharing.groups:
        yield f"copies of each other, {len(group)}:"
        yield from (f"  {source.name}" for source in group)
    grouped = {source.id: n for n, group in enumerate(sharing.groups) for source in group}
    for pair in sharing.pairs:
        # The pairs of a group are in the JSON and in the page.
        if grouped.get(pair.first.id, -1) != grouped.get(pair.second.id, -2):
            yield from _pair_lines(pair)
    for material in sharing.materials:
        what = " and ".join(material.matched)
        yield f"{what} shared by {material.shared_by} or more:"
        for source, seconds in material.occurrences[:_SOURCES_NAMED]:
            yield f"  {seconds.start:.1f} to {seconds.end:.1f} s of {source.name}"
        if len(material.occurrences) > _SOURCES_NAMED:
            yield f"  and {len(material.occurrences) - _SOURCES_NAMED} more"
    yield summary(sharing)


def _pair_lines(pair: Pair) -> Iterator[str]:
    yield f"{pair.first.name} {_RELATIONS[pair.relation]} {pair.second.name}"
    for interval in pair.intervals:
        yield f"  {describe(interval)}"


def describe(interval: Interval) -> str:
    """Says which seconds are shared, what matches, and by how many."""
    first, second = (f"{s.start:.1f} to {s.end:.1f} s" for s in interval.sides)
    others = f", shared by {interval.shared_by}" if interval.shared_by > 2 else ""
    return f"{first} = {second}: {' and '.join(interval.matched)}{others}"


def summary(sharing: Sharing) -> str:
    """Counts what was found, in one line."""
    counts = {relation: 0 for relation in _RELATIONS}
    for pair in sharing.pairs:
        counts[pair.relation] += 1
    copies = sum(len(group) - 1 for group in sharing.groups)
    if not (sharing.pairs or sharing.groups or sharing.materials):
        return "no copies and no common parts"
    return (
        f"groups of copies: {len(sharing.groups)} (redundant files: {copies}); contained "
        f"in others: {counts['contained']}; pairs with a common part: {counts['partial']}; parts "
        f"shared by {MANY} or more: {len(sharing.materials)}"
    )

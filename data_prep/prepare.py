"""Clips of a manifest to a data set of records: what all commands that prepare have in common.

Exit status: 0 all clips prepared; 1 nothing usable was written, one line says why; 3 the data set
is complete but some files were rejected (`rejected.jsonl` lists them; `--allow-rejected` makes it
0); 130 interrupted. After 1 and 130 the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import simplejpeg
import tqdm

from avcl_jax.data.records import RecordError
from data_prep import publish
from data_prep.clip import REASONS, ClipOptions
from data_prep.manifest import Manifest, PrepareError
from data_prep.pool import Pool, describe_os_error
from data_prep.shards import Part, fingerprint, plan_parts, read_report

EXIT_FAILED, EXIT_REJECTED, EXIT_INTERRUPTED = 1, 3, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.epilog = "Reasons for rejecting a file: " + "; ".join(
        f"{reason}: {meaning}" for reason, meaning in REASONS.items()
    )
    parser.add_argument("--out", type=Path, required=True, help="local directory for the records")
    parser.add_argument("--name", default="clips", help="of the data set: part of the file names")
    parser.add_argument("--limit", type=int, help="prepare only the first clips of each split")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be prepared, and stop"
    )
    parser.add_argument("--short-side", type=int, default=128, help="of the frames, in pixels")
    parser.add_argument("--max-fps", type=float, help="drop frames of faster films")
    parser.add_argument("--sample-rate", type=int, default=16000, help="of the sound, in Hz")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG frames, 1 to 100")
    parser.add_argument("--min-seconds", type=float, default=0.0, help="reject shorter clips")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="reject longer clips")
    parser.add_argument("--min-side", type=int, default=16, help="reject smaller pictures")
    parser.add_argument(
        "--require", default="", metavar="video,audio", help="reject clips without these"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--shard-size", type=int, default=64, help="clips in a shard")
    parser.add_argument("--timeout-seconds", type=float, default=900.0, help="for one clip")
    parser.add_argument("--overwrite", action="store_true", help="replace the splits in --out")
    parser.add_argument("--allow-rejected", action="store_true", help="rejected files: status 0")


def run(args: argparse.Namespace, read: Callable[[argparse.Namespace], Manifest]) -> int:
    """Runs a command; returns the exit status and prints one line for what goes wrong.

    Args:
      args: Of `add_arguments`, and of the collection.
      read: The collection's clips.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args, read)
    except (PrepareError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(f"error: {describe_os_error(error, args.out)}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(
            "interrupted: finished shards are kept, run the same command again to go on",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace, read: Callable[[argparse.Namespace], Manifest]) -> int:
    begin = time.monotonic()
    options = _options(args)
    out = args.out
    manifest = _limit(read(args), args.limit)
    if not manifest.entries:
        raise PrepareError(
            f"none of the {len(manifest.missing)} listed clips is there; the first looked for was "
            f"{manifest.missing[0].expected!r}"
            if manifest.missing
            else "there is nothing to prepare"
        )
    if args.dry_run:
        _print_plan(out, manifest)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    incomplete = out / publish.INCOMPLETE
    with _locked(out):
        publish.finish_publication(out)
        before = _before(args, out)
        parts = plan_parts(manifest.entries, args.shard_size)
        prints = [fingerprint(part, options) for part in parts]
        plans = _plans(parts, prints)
        preparation = before or {"name": args.name, "splits": {}, "seconds": 0.0}
        if _finished(preparation, plans, manifest, args):
            print(f"{out} is up to date: {', '.join(plans)}")
            return _status({split: preparation["splits"][split] for split in plans}, args)
        incomplete.mkdir(exist_ok=True)
        for path in incomplete.glob("*.tmp"):  # of a run that was killed
            path.unlink()
        reports = _prepare(args, options, parts, prints, incomplete)
        if not any(report["num_records"] for report in reports):
            rejected = [line for report in reports for line in report["rejected"]]
            publish.write_lines(out / publish.REJECTED, rejected)
            first = rejected[0]
            raise PrepareError(
                f"none of {len(rejected)} clips could be prepared, {out}/rejected.jsonl says why; "
                f"the first is {first['path']!r}: {first['reason']}: {first['message']}"
            )
        kept = {
            split: infos
            for split, infos in (publish.read_splits(out) if before else {}).items()
            if split not in plans
        }
        splits = {split: preparation["splits"][split] for split in kept}
        for split, plan in plans.items():
            chosen = [r for p, r in zip(parts, reports, strict=True) if p.split == split]
            splits[split] = {"plan": plan, **_split_counts(chosen)}
        rejected = [
            *(r for r in publish.read_lines(out / publish.REJECTED) if r["split"] in kept),
            *(line for report in reports for line in report["rejected"]),
        ]
        preparation = {
            "name": args.name,
            "seconds": round(preparation["seconds"] * bool(kept) + time.monotonic() - begin, 3),
            "splits": splits,
            "class_names": {label: list(names) for label, names in manifest.class_names.items()},
            "multilabel": sorted(manifest.multilabel),
            "options": vars(options),
            "ignored_files": manifest.ignored,
            "versions": {"av": av.__version__, "simplejpeg": simplejpeg.__version__},
        }
        publish.publish(
            out,
            name=args.name,
            class_names=manifest.class_names,
            multilabel=manifest.multilabel,
            parts=list(zip(parts, reports, strict=True)),
            preparation=preparation,
            kept_splits=kept,
            rejected=rejected,
            missing=[
                *(m for m in publish.read_lines(out / publish.MISSING) if m["split"] in kept),
                *map(dataclasses.asdict, manifest.missing),
            ],
        )
    _print_table(out, {split: splits[split] for split in plans}, manifest, preparation["seconds"])
    return _status({split: splits[split] for split in plans}, args)


def _limit(manifest: Manifest, limit: int | None) -> Manifest:
    """Returns the first `limit` clips of each split."""
    if limit is None:
        return manifest
    counts: collections.Counter[str] = collections.Counter()
    chosen = []
    for entry in manifest.entries:
        if counts[entry.split] < limit:
            counts[entry.split] += 1
            chosen.append(entry)
    return dataclasses.replace(manifest, entries=tuple(chosen))


def _options(args: argparse.Namespace) -> ClipOptions:
    require = tuple(sorted(filter(None, args.require.split(","))))
    checks = (
        (re.fullmatch(r"[a-z][a-z0-9_]*", args.name), "--name", "a-z, 0-9 and _, a letter first"),
        (set(require) <= {"video", "audio"}, "--require", "video, audio or video,audio"),
        (1 <= args.quality <= 100, "--quality", "1 to 100"),
        (args.short_side >= 1, "--short-side", "at least 1"),
        (args.max_fps is None or args.max_fps > 0, "--max-fps", "above 0"),
        (args.sample_rate >= 1000, "--sample-rate", "at least 1000"),
        (args.workers >= 1, "--workers", "at least 1"),
        (args.shard_size >= 1, "--shard-size", "at least 1"),
        (args.limit is None or args.limit >= 1, "--limit", "at least 1"),
        (args.timeout_seconds > 0, "--timeout-seconds", "above 0"),
        ("://" not in os.fspath(args.out), "--out", "a local directory (copy it afterwards)"),
    )
    for good, name, allowed in checks:
        if not good:
            raise PrepareError(f"{name} must be {allowed}")
    return ClipOptions(
        short_side=args.short_side,
        max_fps=args.max_fps,
        quality=args.quality,
        sample_rate_hz=args.sample_rate,
        min_seconds=args.min_seconds,
        max_seconds=args.max_seconds,
        min_side=args.min_side,
        require=require,
    )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps a second preparation out of the same directory; the lock dies with the process."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PrepareError(f"another preparation is writing to {out}: wait for it") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _before(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """Returns preparation.json of what is already in `out`, None if that does not count."""
    try:
        before = publish.read_preparation(out)
    except PrepareError:
        if args.overwrite:
            return None
        raise
    return before


def _plans(parts: Sequence[Part], prints: Sequence[str]) -> dict[str, str]:
    hashes: dict[str, Any] = {}
    for part, part_print in zip(parts, prints, strict=True):
        hashes.setdefault(part.split, hashlib.sha256()).update(part_print.encode())
    return {split: digest.hexdigest() for split, digest in hashes.items()}


def _finished(
    preparation: Mapping[str, Any],
    plans: Mapping[str, str],
    manifest: Manifest,
    args: argparse.Namespace,
) -> bool:
    """Whether all is done already; raises PrepareError where something else is in the way."""
    existing = {split: entry["plan"] for split, entry in preparation["splits"].items()}
    if all(existing.get(split) == plan for split, plan in plans.items()):
        return preparation["name"] == args.name
    if args.overwrite or not existing:
        return False
    clash = sorted(set(existing) & set(plans))
    if clash:
        raise PrepareError(
            f"{args.out} already holds the split {clash[0]!r}, prepared from other files or with "
            "other options: use another --out, or --overwrite to replace it"
        )
    classes = {label: list(names) for label, names in manifest.class_names.items()}
    if preparation["name"] != args.name or preparation["class_names"] != classes:
        raise PrepareError(
            f"{args.out} holds a data set of another name or with other labels: use another "
            "--out, or one manifest with a split column for all splits"
        )
    return False


def _prepare(
    args: argparse.Namespace,
    options: ClipOptions,
    parts: Sequence[Part],
    prints: Sequence[str],
    incomplete: Path,
) -> list[dict[str, Any]]:
    """Prepares the parts that are not finished; returns the reports of all."""
    reports = [read_report(p, incomplete, f) for p, f in zip(parts, prints, strict=True)]
    todo = [
        (part, part_print)
        for part, part_print, report in zip(parts, prints, reports, strict=True)
        if report is None
    ]
    total = sum(len(part.entries) for part in parts)
    done = total - sum(len(part.entries) for part, _ in todo)
    # disable=None: no bar where nobody looks at one, such as in a log file.
    with tqdm.tqdm(total=total, initial=done, unit="clip", disable=None) as bar:
        Pool(
            workers=args.workers,
            options=options,
            directory=incomplete,
            timeout_seconds=args.timeout_seconds,
            progress=bar.update,
        ).run(todo)
    finished = []
    for part, part_print in zip(parts, prints, strict=True):
        report = read_report(part, incomplete, part_print)
        if report is None:
            raise PrepareError(f"the shard {part.shard_path(incomplete)} disappeared: run again")
        finished.append(report)
    return finished


def _split_counts(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rejected: dict[str, int] = {}
    for report in reports:
        for line in report["rejected"]:
            rejected[line["reason"]] = rejected.get(line["reason"], 0) + 1
    return {
        "records": sum(report["num_records"] for report in reports),
        "no_picture": sum(report["no_picture"] for report in reports),
        "no_sound": sum(report["no_sound"] for report in reports),
        "hours": round(sum(report["seconds"] for report in reports) / 3600, 4),
        "bytes": sum(report["num_bytes"] for report in reports),
        "rejected": dict(sorted(rejected.items())),
    }


def _status(splits: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> int:
    rejected = any(counts["rejected"] for counts in splits.values())
    return EXIT_REJECTED if rejected and not args.allow_rejected else 0


def _print_plan(out: Path, manifest: Manifest) -> None:
    """Says what a run would prepare."""
    print(f"{'split':<12}{'clips':>9}{'missing':>9}")
    clips = collections.Counter(entry.split for entry in manifest.entries)
    missing = collections.Counter(clip.split for clip in manifest.missing)
    for split in clips | missing:
        print(f"{split:<12}{clips[split]:>9}{missing[split]:>9}")
    for label, names in manifest.class_names.items():
        print(f"  label {label}: {len(names)} classes")
    print(f"nothing was written to {out} (--dry-run)")


def _print_table(
    out: Path, splits: Mapping[str, Mapping[str, Any]], manifest: Manifest, seconds: float
) -> None:
    print(
        f"{'split':<12}{'records':>9}{'rejected':>10}{'silent':>8}{'blind':>7}{'hours':>8}{'MB':>9}"
    )
    for split, counts in splits.items():
        print(
            f"{split:<12}{counts['records']:>9}{sum(counts['rejected'].values()):>10}"
            f"{counts['no_sound']:>8}{counts['no_picture']:>7}{counts['hours']:>8.2f}"
            f"{counts['bytes'] / 1e6:>9.1f}"
        )
    reasons: dict[str, int] = {}
    for counts in splits.values():
        for reason, number in counts["rejected"].items():
            reasons[reason] = reasons.get(reason, 0) + number
    for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"  {number} {reason}: {REASONS[reason]}")
    if reasons:
        print(f"  each file and what was found: {out}/rejected.jsonl")
    if manifest.missing:
        listed = len(manifest.missing) + len(manifest.entries)
        print(
            f"  {len(manifest.missing)} of {listed} listed clips are not there: {out}/missing.jsonl"
        )
    if manifest.ignored:
        print(f"  {manifest.ignored} files ignored: nothing asked for them")
    print(f"{out}: {seconds:.1f} s")

"""Clips of a manifest to a data set of records: what all commands that prepare have in common.

Exit status: 0 all clips prepared; 1 nothing usable was written, one line says why; 3 the data set
is complete but some files were rejected (`rejected.jsonl` lists them; `--allow-rejected` makes it
0); 130 interrupted. After 1 and 130 the same command goes on where it stopped. When files have
changed, were added or removed, the same command prepares those and keeps the rest.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import av
import simplejpeg
import tqdm
from etils import epath

from avcl_jax.errors import UserError, one_line
from avcl_jax.paths import is_remote
from data_prep import earlier as earlier_run
from data_prep import final_words, publish
from data_prep.arguments import clip_options
from data_prep.earlier import Earlier
from data_prep.manifest import Entry, Manifest, PrepareError
from data_prep.pool import Pool, describe_os_error
from data_prep.shards import Job, Part, may_pass, plan_parts, read_report
from data_prep.source_files import Duplicate, find_duplicates, state_of

EXIT_FAILED, EXIT_REJECTED, EXIT_INTERRUPTED = 1, 3, 130


def run(args: argparse.Namespace, read: Callable[[argparse.Namespace], Manifest]) -> int:
    """Runs a command; returns the exit status and prints one line for what goes wrong.

    Args:
      args: Of `data_prep.arguments`, and of the collection.
      read: The collection's clips.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args, read)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        one_line(error)  # raises it again if it is a bug
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
    options = clip_options(args)
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
        final_words.print_plan(out, manifest)
        return 0
    manifest, duplicates = _deduplicate(manifest, drop=args.deduplicate)
    parts = plan_parts(manifest.entries, args.shard_size)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        publish.finish_publication(out)
        earlier = _earlier(args, out)
        changes = earlier_run.compare(earlier, parts, options, overwrite=args.overwrite)
        splits = list(dict.fromkeys(part.split for part in parts))
        if earlier is not None and not args.overwrite:
            earlier_run.check_belongs(
                earlier,
                changes,
                splits,
                manifest,
                name=args.name,
                file_format=options.file_format,
            )
            if changes.none:
                print(f"{out} is up to date: {', '.join(splits)}")
                return _status({s: earlier.preparation["splits"][s] for s in splits}, args)
            if set(splits) & set(earlier.lines):
                print(f"{out}: {changes}")
        incomplete = out / publish.INCOMPLETE
        incomplete.mkdir(exist_ok=True)
        for path in list(incomplete.glob("*.tmp")):  # of a run that was killed
            path.unlink()
        jobs = earlier_run.jobs(parts, options, incomplete, earlier, changes)
        reports = _prepare(args, jobs)
        _check_any(out, reports)
        preparation = _preparation(args, manifest, earlier, parts, reports, options, begin)
        publish.publish(
            out,
            name=args.name,
            manifest=manifest,
            duplicates=duplicates,
            parts=list(zip(parts, reports, strict=True)),
            preparation=preparation,
            earlier=earlier,
        )
    prepared = {split: preparation["splits"][split] for split in splits}
    final_words.print_table(
        out,
        prepared,
        manifest,
        duplicates,
        dropped=args.deduplicate,
        seconds=time.monotonic() - begin,
    )
    return _status(prepared, args)


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


def _deduplicate(manifest: Manifest, *, drop: bool) -> tuple[Manifest, list[Duplicate]]:
    """Finds clips of the same content, and leaves out all but the first if asked to."""
    found = find_duplicates(manifest.entries)
    if drop:
        kept = tuple(e for number, e in enumerate(manifest.entries) if number not in found)
        manifest = dataclasses.replace(manifest, entries=kept)
    return manifest, list(found.values())


@contextlib.contextmanager
def _locked(out: epath.Path) -> Iterator[None]:
    """Keeps a second preparation out of the same directory; the lock dies with the process.

    Object stores have no locks: there it is for the user to run one preparation at a time.
    """
    if is_remote(out):
        yield
        return
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


def _earlier(args: argparse.Namespace, out: epath.Path) -> Earlier | None:
    """Returns what is already in `out`, None if that does not count."""
    try:
        return earlier_run.read_earlier(out)
    except PrepareError:
        if args.overwrite:
            return None
        raise


def _prepare(args: argparse.Namespace, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Does the jobs that are not done; returns the reports of all."""
    todo = [job for job in jobs if not _finished(job)]
    entries = [entry for job in jobs for entry in job.part.entries]
    sizes = {path: state_of(path) for path in dict.fromkeys(entry.path for entry in entries)}
    shares = collections.Counter(entry.path for entry in entries)

    def weight(entry: Entry) -> float:
        """Returns the bytes of a clip; those of one file share them."""
        size = sizes[entry.path]
        return size.bytes / shares[entry.path] if size else 0.0

    waiting = [entry for job in todo for entry in job.part.entries]
    total = sum(map(weight, entries))
    done = total - sum(map(weight, waiting))
    finished = len(entries) - len(waiting)
    # disable=None: no bar where nobody looks at one, such as in a log file.
    with tqdm.tqdm(
        total=round(total), initial=round(done), unit="B", unit_scale=True, disable=None
    ) as bar:

        def progress(entry: Entry, count: int) -> None:
            nonlocal finished
            finished += count
            bar.set_description(f"{finished}/{len(entries)} clips", refresh=False)
            bar.update(count * weight(entry))

        if args.runner == "local":
            Pool(workers=args.workers, timeout_seconds=args.timeout_seconds, progress=progress).run(
                todo
            )
        else:
            # Beam takes seconds to import, and is an extra.
            from data_prep.beam import run_on_beam

            run_on_beam(
                todo,
                runner=args.runner,
                options=args.beam_option,
                timeout_seconds=args.timeout_seconds,
            )
    reports = []
    for job in jobs:
        report = read_report(job)
        if report is None:
            raise PrepareError(
                f"the shard {job.shard_path} or a file of it changed meanwhile: run again"
            )
        reports.append(report)
    return reports


def _finished(job: Job) -> bool:
    """Whether an interrupted run did a job. What nobody could read may be readable now."""
    report = read_report(job)
    return report is not None and not any(
        may_pass(line, {"unreadable"}) for line in report["lines"]
    )


def _check_any(out: epath.Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Raises PrepareError, and lists the reasons, when nothing could be prepared."""
    if any(report["num_records"] for report in reports):
        return
    rejected = [
        clip for report in reports for line in report["lines"] for clip in publish.rejections(line)
    ]
    publish.write_lines(out / publish.REJECTED, rejected)
    first = rejected[0]
    raise PrepareError(
        f"none of {len(rejected)} clips could be prepared, {out}/rejected.jsonl says why; "
        f"the first is {first['path']!r}: {first['reason']}: {first['message']}"
    )


def _preparation(
    args: argparse.Namespace,
    manifest: Manifest,
    earlier: Earlier | None,
    parts: Sequence[Part],
    reports: Sequence[Mapping[str, Any]],
    options: Any,
    begin: float,
) -> dict[str, Any]:
    """Returns what preparation.json says."""
    prepared: dict[str, list[Mapping[str, Any]]] = {}
    for part, report in zip(parts, reports, strict=True):
        prepared.setdefault(part.split, []).append(report)
    splits = dict(earlier.preparation["splits"]) if earlier else {}
    splits |= {split: _counts(chosen) for split, chosen in prepared.items()}
    spent = earlier.preparation["seconds"] if earlier and len(splits) > len(prepared) else 0.0
    return {
        "name": args.name,
        "seconds": round(spent + time.monotonic() - begin, 3),
        "splits": splits,
        "class_names": {label: list(names) for label, names in manifest.class_names.items()},
        "multilabel": sorted(manifest.multilabel),
        "options": vars(options),
        "ignored_files": manifest.ignored,
        "versions": {"av": av.__version__, "simplejpeg": simplejpeg.__version__},
    }


def _counts(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what is known of a split."""
    lines = [line for report in reports for line in report["lines"]]
    rejected = collections.Counter(
        clip["reason"] for line in lines for clip in publish.rejections(line)
    )
    notes = collections.Counter(kind for line in lines for _, kind, _ in line["notes"])
    return {
        "records": sum(report["num_records"] for report in reports),
        "no_picture": sum(report["no_picture"] for report in reports),
        "no_sound": sum(report["no_sound"] for report in reports),
        "hours": round(sum(report["seconds"] for report in reports) / 3600, 4),
        "bytes": sum(report["num_bytes"] for report in reports),
        "source_bytes": sum({line["path"]: line["bytes"] or 0 for line in lines}.values()),
        "rejected": dict(sorted(rejected.items())),
        "notes": dict(sorted(notes.items())),
    }


def _status(splits: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> int:
    rejected = any(counts["rejected"] for counts in splits.values())
    return EXIT_REJECTED if rejected and not args.allow_rejected else 0

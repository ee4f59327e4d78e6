"""Preparation of a data set of records: arguments and run of all commands that list clips.

Exit status: 0 all clips prepared; 1 nothing usable was written, one line states the reason; 3 the
data set is complete but some files were rejected (`rejected.jsonl` lists them; `--allow-rejected`
makes it 0); 130 interrupted. After 1 and 130 the same command resumes. When files have changed,
were added or removed, the same command prepares those and keeps the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tqdm
from etils import epath

from avcl_jax.command_line import sigterm_as_interrupt
from avcl_jax.data.record_files import FILE_FORMATS
from avcl_jax.data_prep import publish
from avcl_jax.data_prep.clip import FORMS, NOTES, REASONS, ClipOptions, parse_cut
from avcl_jax.data_prep.manifest import COUNT, POSITIVE, Manifest, PrepareError, by_split, option
from avcl_jax.data_prep.pool import Pool, describe_os_error, run_on_beam
from avcl_jax.data_prep.publish import SOURCES, Earlier
from avcl_jax.data_prep.shards import (
    Finished,
    KnownEntries,
    Part,
    may_pass,
    plan_parts,
    read_finished,
    remove_temporary,
)
from avcl_jax.data_prep.source_files import content_of_equal_sizes, find_duplicates, states_of
from avcl_jax.errors import is_of_store, one_line
from avcl_jax.paths import absolute_path, ask_stores_anew, is_remote, locked

EXIT_REJECTED, EXIT_INTERRUPTED = 3, 130
_BEAM_RUNNERS = "DirectRunner, DataflowRunner, FlinkRunner, SparkRunner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments shared by all commands that prepare."""
    reasons = "".join(f"\n  {reason}: {meaning}" for reason, meaning in REASONS.items())
    parser.epilog = f"reasons for rejecting:{reasons}"
    add = parser.add_argument
    formats: dict[str, Any] = {"choices": FILE_FORMATS, "default": FILE_FORMATS[0]}
    add("--out", type=absolute_path, required=True, help="directory, or gs://, s3://")
    name = option(str, re.compile(r"[a-z][a-z0-9_]*").fullmatch, "a-z, 0-9 and _, a letter first")
    add("--name", type=name, default="clips", help="name of the data set: part of the file names")
    add("--limit", metavar="N", type=COUNT, help="prepare only the first clips of each split")
    add("--dry-run", action="store_true", help="print what would be prepared, and stop")
    add("--file-format", **formats, help="TFDS opens array_record without TensorFlow")
    add = parser.add_argument_group("clips").add_argument
    side: dict[str, Any] = {"metavar": "PIXELS", "type": COUNT}
    rate = option(int, lambda rate: rate >= 1000, "a whole number of at least 1000")
    quality = option(int, range(1, 101).__contains__, "a whole number from 1 to 100")
    seconds: dict[str, Any] = {"metavar": "SECONDS", "type": POSITIVE}
    shortest = option(
        float, lambda seconds: 0 <= seconds < math.inf, "a finite number of at least 0"
    )
    add("--short-side", **side, default=128, help="shorter side of the frames")
    add("--max-fps", metavar="RATE", type=POSITIVE, help="drop frames of faster videos")
    add("--sample-rate", metavar="HZ", type=rate, default=16000, help="sample rate of the audio")
    add("--quality", metavar="Q", type=quality, default=90, help="JPEG quality, 1 to 100")
    add("--min-seconds", metavar="SECONDS", type=shortest, default=0.0, help="reject shorter clips")
    add("--max-seconds", **seconds, default=600.0, help="reject longer clips")
    add("--min-side", **side, default=16, help="reject smaller frames")
    for flag, names, kind in (
        ("--require", ("video", "audio"), "without these"),
        ("--reject", NOTES, "with such a note"),
    ):
        some = option(_names, set(names).issuperset, f"some of {','.join(names)}")
        add(flag, type=some, default="", metavar=",".join(names), help=f"reject clips {kind}")
    cut = option(str, lambda text: not text or parse_cut(text), FORMS)
    add("--cut", type=cut, default="", metavar="FORM", help=f"cut videos into clips: {FORMS}")
    add("--deduplicate", action="store_true", help="leave out clips of the same content as others")
    add("--overwrite", action="store_true", help="prepare everything again")
    add("--allow-rejected", action="store_true", help="exit status 0 despite rejected files")
    add = parser.add_argument_group("work").add_argument
    options: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    options["type"] = option(str, re.compile(".+=.*").fullmatch, "NAME=VALUE")
    add("--workers", metavar="N", type=COUNT, default=os.cpu_count() or 1, help="processes")
    size = "clips per shard, the unit of work"
    add("--shard-size", metavar="N", type=COUNT, default=64, help=size)
    add("--timeout-seconds", **seconds, default=900.0, help="limit for one clip")
    add("--runner", default="local", help=f"local, or of Apache Beam (extra beam): {_BEAM_RUNNERS}")
    add("--beam-option", **options, help="for the Beam runner, as project=p; may be repeated")


def _names(text: str) -> tuple[str, ...]:
    return tuple(sorted(filter(None, text.split(","))))


def clip_options(args: argparse.Namespace) -> ClipOptions:
    """Returns the options that decide the content of a record."""
    values = {**vars(args), "sample_rate_hz": args.sample_rate}
    fields = dataclasses.fields(ClipOptions)
    return ClipOptions(**{field.name: values[field.name] for field in fields})


def _check_out(args: argparse.Namespace) -> None:
    """Raises PrepareError if the output directory is that of a run or of the media, or remote."""
    out = args.out
    if args.file_format == "array_record" and is_remote(out):
        raise PrepareError(
            f"--out {out}: --file-format array_record needs a local directory (copy it afterwards)"
        )
    for name in ("config.json", "checkpoints"):
        if (out / name).exists():
            raise PrepareError(f"--out {out} is the workdir of a run, with {name}: use another one")
    given = getattr(args, "root", None) or getattr(args, "folder", None) or args.input
    paths = [text.rpartition("=")[2] for text in given] if isinstance(given, list) else [given]
    for path in map(absolute_path, paths):
        folder = path if path.is_dir() else path.parent
        if os.path.realpath(folder) == os.path.realpath(out):
            raise PrepareError(f"--out {out} is the folder of the media: use another one")


def run(args: argparse.Namespace, read: Callable[[argparse.Namespace], Manifest]) -> int:
    """Runs a command, for clips that the function `read` of its collection lists.

    Returns the exit status; raises PrepareError if nothing usable was written.
    """
    ask_stores_anew()
    try:
        with sigterm_as_interrupt():
            return _run(args, read)
    except Exception as error:
        if is_of_store(error):
            raise PrepareError(one_line(error)) from error
        if not isinstance(error, OSError):
            raise
        one_line(error)  # raises it again if it is a bug
        raise PrepareError(describe_os_error(error, args.out)) from error
    except KeyboardInterrupt:
        kept = "finished shards are kept, run the same command again to resume"
        print(f"interrupted: {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(args: argparse.Namespace, read: Callable[[argparse.Namespace], Manifest]) -> int:
    begin = time.monotonic()
    options, out = clip_options(args), args.out
    _check_out(args)
    manifest = read(args)
    if args.limit is not None:
        of_splits = by_split(manifest.entries).values()
        first = {entry.record_id for entries in of_splits for entry in entries[: args.limit]}
        entries = tuple(entry for entry in manifest.entries if entry.record_id in first)
        manifest = dataclasses.replace(manifest, entries=entries)
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
    states = states_of(entry.path for entry in manifest.entries)
    if args.deduplicate:
        duplicates = find_duplicates(manifest.entries, content_of_equal_sizes(states))
        entries = tuple(e for n, e in enumerate(manifest.entries) if n not in duplicates)
        manifest = dataclasses.replace(manifest, entries=entries)
    incomplete = out / publish.INCOMPLETE
    splits = list(by_split(manifest.entries))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"another preparation is writing to {out}: wait for it"):
        publish.finish_publication(out)
        try:
            earlier = publish.read_earlier(out)
        except PrepareError:
            if not args.overwrite:
                raise
            earlier = Earlier(out)
        known: KnownEntries = {}
        if not args.overwrite:
            known, changes = earlier.compare(manifest.entries, options, states)
            earlier.check_accepts(manifest, changes, args.name, options.file_format)
            if not any(changes[kind] for kind in ("changed", "new", "gone", "rearranged")):
                print(f"{out} is up to date: {', '.join(splits)}")
                return _status([earlier.preparation["splits"][split] for split in splits], args)
            if earlier.splits.intersection(splits):
                kinds = ("unchanged", "changed", "new", "gone")
                print(f"{out}: {', '.join(f'{changes[kind]} {kind}' for kind in kinds)}")
        parts = plan_parts(manifest.entries, args.shard_size, options, incomplete, states, known)
        incomplete.mkdir(exist_ok=True)
        remove_temporary(incomplete)  # of a run that was killed
        finished = _prepare(args, parts, earlier)
        if not args.deduplicate:
            lines = publish.all_lines(finished)
            content = {line["path"]: line["sha256"] for line in lines}
            duplicates = find_duplicates(manifest.entries, content)
        counts = publish.publish(
            *(out, args.name, options, manifest, finished, earlier),
            duplicates=duplicates.values(),
            seconds=time.monotonic() - begin,
        )
    counts = {split: counts[split] for split in splits}
    _print_table(args, counts, manifest, len(duplicates))
    print(f"{out}: {time.monotonic() - begin:.1f} s")
    return _status(counts.values(), args)


def _prepare(args: argparse.Namespace, parts: Sequence[Part], earlier: Earlier) -> list[Finished]:
    """Prepares the parts that are not finished; returns the results of all."""
    results = [earlier.finished(part) for part in parts]
    there = {path.name for path in (args.out / publish.INCOMPLETE).glob("*.json")}
    begun = [
        n for n, part in enumerate(parts) if not results[n] and part.path("json").name in there
    ]
    for n, finished in zip(begun, _read_finished([parts[n] for n in begun]), strict=True):
        results[n] = finished
    for number, finished in enumerate(results):  # unreadable files may be readable now
        if finished and any(may_pass(line, {"unreadable"}) for line in finished.lines):
            results[number] = None
    numbers = [n for n, finished in enumerate(results) if finished is None]
    waiting = [parts[n] for n in numbers]
    total, left = (sum(len(part.entries) for part in some) for some in (parts, waiting))
    # disable=None: no bar where nobody looks at one, such as in a log file.
    with tqdm.tqdm(total=total, initial=total - left, unit="clip", disable=None) as bar:
        timeout = args.timeout_seconds
        if args.runner == "local":
            Pool(workers=args.workers, timeout_seconds=timeout, progress=bar.update).run(waiting)
        else:
            run_on_beam(waiting, args.runner, args.beam_option, timeout_seconds=timeout)
    # Files that changed meanwhile may have given other records.
    states = states_of(entry.path for part in waiting for entry in part.entries)
    today = [dataclasses.replace(part, states=states) for part in waiting]
    for n, part, finished in zip(numbers, waiting, _read_finished(today), strict=True):
        if not finished:
            raise PrepareError(f"the shard {part.shard} or a file of it changed: run again")
        results[n] = finished
    complete = [finished for finished in results if finished]
    if not any(finished.size[0] for finished in complete):
        rejected = publish.rejections(publish.all_lines(complete))
        publish.write_lines(args.out / publish.REJECTED, rejected)
        first = rejected[0]
        raise PrepareError(
            f"none of {len(rejected)} clips could be prepared, {args.out}/rejected.jsonl says why; "
            f"the first is {first['path']!r}: {first['reason']}: {first['message']}"
        )
    return complete


def _read_finished(parts: Sequence[Part]) -> list[Finished | None]:
    """Reads many parts at one time: in an object store each takes a while."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(read_finished, parts))


def _status(splits: Collection[Mapping[str, Any]], args: argparse.Namespace) -> int:
    rejected = any(counts["rejected"] for counts in splits)
    return EXIT_REJECTED if rejected and not args.allow_rejected else 0


def _print_plan(out: epath.Path, manifest: Manifest) -> None:
    """Prints what a run would prepare."""
    clips = Counter(entry.split for entry in manifest.entries)
    missing = Counter(clip.split for clip in manifest.missing)
    print(f"{'split':<12}{'clips':>9}{'missing':>9}")
    for split in clips | missing:
        print(f"{split:<12}{clips[split]:>9}{missing[split]:>9}")
    for label, names in manifest.class_names.items():
        several = ", several per clip" if label in manifest.multilabel else ""
        print(f"  label {label}: {len(names)} classes{several}")
    print(f"nothing was written to {out} (--dry-run)")


def _print_table(
    args: argparse.Namespace, splits: Mapping[str, Any], manifest: Manifest, duplicates: int
) -> None:
    """Prints counts of each split that was prepared, and the reasons for what was not."""
    out, missing = args.out, len(manifest.missing)
    columns = ("records", "rejected", "no audio", "no video", "hours", "MB", "source MB")
    print(f"{'split':<12}" + "".join(f"{name:>10}" for name in columns))
    for split, counts in splits.items():
        print(
            f"{split:<12}{counts['records']:>10}{sum(counts['rejected'].values()):>10}"
            f"{counts['no_sound']:>10}{counts['no_picture']:>10}{counts['hours']:>10.2f}"
            f"{counts['bytes'] / 1e6:>10.1f}{counts['source_bytes'] / 1e6:>10.1f}"
        )
    for key, prefix, meanings, place in (
        ("rejected", "", REASONS, f"{out}/{publish.REJECTED}"),
        ("notes", "prepared, but ", NOTES, f"notes in {out}/{SOURCES}"),
    ):
        total: Counter[str] = Counter()
        for counts in splits.values():
            total.update(counts[key])
        for kind, number in total.most_common():
            print(f"  {number} {prefix}{kind}: {meanings[kind]}")
        if total:
            print(f"  each file and what was found: {place}")
    if missing:
        listed = missing + len(manifest.entries)
        print(f"  {missing} of {listed} listed clips are not there: {out}/{publish.MISSING}")
    if duplicates:
        what = "were left out" if args.deduplicate else "are there; --deduplicate leaves them out"
        print(f"  {duplicates} exact duplicates of other clips {what}: {out}/{publish.DUPLICATES}")
    if manifest.ignored:
        plural = "s" * (manifest.ignored > 1)
        print(f"  {manifest.ignored} file{plural} ignored: not asked for")

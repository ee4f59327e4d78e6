"""Command-line arguments that all commands that prepare have in common."""

from __future__ import annotations

import argparse
import os
import re

from avcl_jax.data.records import FILE_FORMATS
from avcl_jax.paths import absolute_path, is_remote
from data_prep.clip import NOTES, REASONS, ClipOptions
from data_prep.cut import FORMS, parse_cut
from data_prep.manifest import PrepareError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    reasons = "; ".join(f"{reason}: {meaning}" for reason, meaning in REASONS.items())
    parser.epilog = "\n\n".join(filter(None, (parser.epilog, f"Reasons for rejecting: {reasons}")))
    add = parser.add_argument
    add(
        "--out",
        type=absolute_path,
        required=True,
        help="directory for the records; may be gs://, s3://",
    )
    add("--name", default="clips", help="of the data set: part of the file names")
    add("--limit", metavar="N", type=int, help="prepare only the first clips of each split")
    add("--dry-run", action="store_true", help="say what would be prepared, and stop")
    add(
        "--file-format",
        choices=FILE_FORMATS,
        default=FILE_FORMATS[0],
        help="of the shards; array_record is what TFDS opens without TensorFlow",
    )
    clips = parser.add_argument_group("clips")
    add = clips.add_argument
    add("--short-side", metavar="PIXELS", type=int, default=128, help="of the frames, in pixels")
    add("--max-fps", metavar="RATE", type=float, help="drop frames of faster films")
    add("--sample-rate", metavar="HZ", type=int, default=16000, help="of the sound, in Hz")
    add("--quality", metavar="Q", type=int, default=90, help="of the JPEG frames, 1 to 100")
    add("--min-seconds", metavar="SECONDS", type=float, default=0.0, help="reject shorter clips")
    add("--max-seconds", metavar="SECONDS", type=float, default=600.0, help="reject longer clips")
    add("--min-side", metavar="PIXELS", type=int, default=16, help="reject smaller pictures")
    add("--require", default="", metavar="video,audio", help="reject clips without these")
    add("--reject", default="", metavar=",".join(NOTES), help="reject clips with such a note")
    add("--cut", default="", metavar="HOW", help=f"cut videos into clips: {FORMS}")
    add("--deduplicate", action="store_true", help="leave out clips of the same content as others")
    add("--overwrite", action="store_true", help="prepare all again, whatever is there")
    add("--allow-rejected", action="store_true", help="rejected files: status 0")
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="processes")
    add(
        "--shard-size", metavar="N", type=int, default=64, help="clips in a shard: the unit of work"
    )
    add("--timeout-seconds", metavar="SECONDS", type=float, default=900.0, help="for one clip")
    add(
        "--runner",
        default="local",
        help="local, or an Apache Beam runner (DirectRunner, DataflowRunner, FlinkRunner, "
        "SparkRunner); needs the extra beam",
    )
    add(
        "--beam-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the Beam runner, for instance project=p; may be repeated",
    )


def clip_options(args: argparse.Namespace) -> ClipOptions:
    """Checks the arguments and returns those that decide what a record holds.

    Raises:
      PrepareError: If one makes no sense.
    """
    require, reject = (
        tuple(sorted(filter(None, text.split(",")))) for text in (args.require, args.reject)
    )
    checks = (
        (re.fullmatch(r"[a-z][a-z0-9_]*", args.name), "--name", "a-z, 0-9 and _, a letter first"),
        (set(require) <= {"video", "audio"}, "--require", "video, audio or video,audio"),
        (set(reject) <= set(NOTES), "--reject", f"some of {','.join(NOTES)}, with commas between"),
        (1 <= args.quality <= 100, "--quality", "1 to 100"),
        (args.short_side >= 1, "--short-side", "at least 1"),
        (args.max_fps is None or args.max_fps > 0, "--max-fps", "above 0"),
        (args.sample_rate >= 1000, "--sample-rate", "at least 1000"),
        (args.workers >= 1, "--workers", "at least 1"),
        (args.shard_size >= 1, "--shard-size", "at least 1"),
        (args.limit is None or args.limit >= 1, "--limit", "at least 1"),
        (args.timeout_seconds > 0, "--timeout-seconds", "above 0"),
        (
            args.file_format != "array_record" or not is_remote(args.out),
            "--out",
            "a local directory for --file-format array_record (copy it afterwards)",
        ),
        (all("=" in option for option in args.beam_option), "--beam-option", "NAME=VALUE"),
    )
    for good, name, allowed in checks:
        if not good:
            raise PrepareError(f"{name} must be {allowed}")
    if args.cut:
        parse_cut(args.cut)
    return ClipOptions(
        short_side=args.short_side,
        max_fps=args.max_fps,
        quality=args.quality,
        sample_rate_hz=args.sample_rate,
        min_seconds=args.min_seconds,
        max_seconds=args.max_seconds,
        min_side=args.min_side,
        require=require,
        file_format=args.file_format,
        cut=args.cut,
        reject=reject,
    )

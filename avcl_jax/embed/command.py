"""Features of media: `avcl-embed PATHS… --out features.parquet`.

Each file is cut into clips, one after another from its start to its end, and each clip is encoded.
The output is a table with one row per clip and modality, in the order of the paths:

  id        path within the given folder, path of a file as given, or id of a row or record
  start     beginning of the clip, in seconds of the file
  end       end of the clip, in seconds of the file
  speed     seconds of the file per second of the clip
  modality  video or audio
  vector    output of the encoder, averaged over time and space

With --out NAME.npz the same columns are NumPy arrays of each modality: video_id, video_vector,
audio_id and so on. A file without one of the modalities has rows of the other. A clip is as long as
the encoder's input (times --speed). The last one ends with the file; a file that is shorter than a
clip has one.

Exit status: 0; 1 if files could not be embedded, which are listed with the reasons; 2 if nothing
was written; 130 if interrupted. The same command then resumes, and writes the same table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from avcl_jax import weights
from avcl_jax.command_line import Help, Parser, ends_in_one_line, sigterm_as_interrupt
from avcl_jax.data_prep.manifest import COUNT, option
from avcl_jax.errors import FULL_DISK, UserError, printable
from avcl_jax.export.encoder import MODALITIES
from avcl_jax.paths import absolute_path, local_path, locked

EXIT_FAILED, EXIT_NOTHING, EXIT_INTERRUPTED = 1, 2, 130
_RESUME = "run the same command again to resume"
_SUFFIXES = (".parquet", ".npz")
# Below, there are more clips than frames.
_HOP = option(float, lambda hop: 0.01 <= hop < math.inf, "a number of seconds of at least 0.01")


@ends_in_one_line("avcl-embed", failed=EXIT_NOTHING)
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    Raises:
        SystemExit: with code 2 if the command line is wrong.
    """
    args = _parser().parse_args(arguments)
    try:
        with sigterm_as_interrupt():
            return _run(args)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        full = f"the disk of {args.out} is full: free some space, and {_RESUME}"
        raise UserError(full) from error
    except KeyboardInterrupt:
        print(f"avcl-embed: interrupted; {_RESUME}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="avcl-embed", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    paths = "media files, folders, tables of clips or directories of records, as for avcl-data"
    add(
        "paths", nargs="+", metavar="PATH", help=f"{paths}; ./-NAME for one that begins with a dash"
    )
    add("--out", type=local_path, required=True, metavar="FILE", help="features.parquet or .npz")
    known = f"encoders by name ({', '.join(weights.names())}), a run, or an export"
    add("--encoder", default=weights.DEFAULT, metavar="NAME_OR_PATH", help=known)
    add("--modality", choices=MODALITIES, help="encode only this one")
    add("--speed", type=COUNT, default=1, metavar="N", help="seconds of media per second of a clip")
    hop = "from the start of a clip to that of the next (default: the length of a clip)"
    add("--hop-seconds", type=_HOP, metavar="SECONDS", help=hop)
    mean = "one row per file, row of a table or record and modality: the mean of its clips"
    add("--per-file", action="store_true", help=mean)
    root = "folder of a table's relative paths (default: the table's own)"
    add("--root", type=absolute_path, metavar="FOLDER", help=root)
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=COUNT, default=cores, metavar="N", help="threads that decode")
    batch = "clips encoded at a time, over all devices"
    add("--batch-size", type=COUNT, default=16, metavar="N", help=batch)
    return parser


def _run(args: argparse.Namespace) -> int:
    out = args.out
    if out.suffix not in _SUFFIXES:
        raise UserError(f"--out {out} must end in {' or '.join(_SUFFIXES)}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file")
    from avcl_jax.compilation_cache import keep_compiled
    from avcl_jax.embed.cutting import Cutter
    from avcl_jax.embed.items import list_items
    from avcl_jax.embed.vectors import Job, Parts, compute, write
    from avcl_jax.export.runs import open_encoders

    items = list_items(args.paths, args.root)
    keep_compiled()
    source = open_encoders(args.encoder)
    if args.modality:
        encoder = source.require(args.modality)
        source = dataclasses.replace(source, encoders={args.modality: encoder})
    cutter = Cutter(source.encoders, speed=args.speed, hop=args.hop_seconds, threads=args.workers)
    job = Job(items, source, cutter, speed=args.speed, batch_size=args.batch_size)
    parts = Parts(out.with_name(f"{out.name}.parts"), job.key)
    try:
        parts.directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (parts.directory, *out.parents) if path.exists())
        raise UserError(f"--out {out}: {file} is a file, not a folder: give another name") from None
    with locked(parts.directory, f"another avcl-embed is writing to {out}: wait for it"):
        parts.open()
        compute(job, parts)
        failed = parts.failed
        if len(failed) == len(items):
            parts.remove()
            number, reason = next(iter(failed.items()))
            raise UserError(
                f"none of {len(items)} files could be embedded; the first is "
                f"{items[number].path!r}: {reason}"
            )
        rows = write(out, parts, job, per_file=args.per_file)
        parts.remove()
    for number, reason in sorted(failed.items()):
        print(f"{printable(items[number].name)}: {printable(reason)}", file=sys.stderr)
    lengths = ", ".join(f"{modality} {length}" for modality, length in job.lengths.items())
    print(
        f"{printable(str(out))}: {rows} vectors ({lengths} values) of "
        f"{len(items) - len(failed)} files, {len(failed)} failed"
    )
    return EXIT_FAILED if failed else 0

"""A command's process for each error: `python -m tests.raising`; prints what each process said.

The processes are forks of one that has imported the commands, so that a case costs milliseconds.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app
from fsspec.exceptions import FSTimeoutError
from gcsfs.retry import HttpError, validate_response

from avcl_jax import main
from avcl_jax.data.media import MediaError
from avcl_jax.data.record_files import RecordError
from avcl_jax.data_prep import __main__ as data_prep
from avcl_jax.data_prep import card, demo
from avcl_jax.data_prep.collections import folder_or_table
from avcl_jax.data_prep.foley import command as foley
from avcl_jax.data_prep.manifest import PrepareError
from avcl_jax.embed import command as embed
from avcl_jax.errors import UserError
from avcl_jax.evaluation import compare
from avcl_jax.fingerprint import command
from avcl_jax.fingerprint.settings import FingerprintError
from avcl_jax.training.run_steps import NonFiniteError


def _raise(error: Exception) -> Callable[[], object]:
    def function() -> object:
        raise error

    return function


ERRORS: dict[str, Callable[[], object]] = {
    "user": _raise(UserError("loss.temperature -1:\n  must be positive")),
    "record": _raise(RecordError("shard.tfrecord is damaged: prepare it again")),
    "media": _raise(MediaError("truncated", "clip.mp4 ends early")),
    "prepare": _raise(PrepareError("videos.csv has no column path")),
    "fingerprint": _raise(FingerprintError("films.index is not an index")),
    "not finite": _raise(NonFiniteError("loss is not finite between steps 1 and 2", (1, 2))),
    "no file": lambda: open("/nonexistent/file"),  # noqa: SIM115
    "no file, from an object store": _raise(FileNotFoundError("gs://bucket/run")),
    "no permission": _raise(PermissionError(errno.EACCES, "Permission denied", "/root/run")),
    "full disk": _raise(OSError(errno.ENOSPC, "No space left on device")),
    "no locks": _raise(OSError(errno.ENOLCK, "No locks available")),
    "memory": lambda: np.empty(1 << 60, np.uint8),
    "store": _raise(HttpError({"message": "try\nagain", "code": 503})),
    "store, proxy": lambda: validate_response(502, b"", "bucket/run"),
    "store, refusal": lambda: validate_response(403, b"no access", "bucket/run"),
    "store, timeout": _raise(FSTimeoutError()),
    "shapes": lambda: np.zeros(3) + np.zeros(4),
    "not in list": lambda: [1, 2].index(4),
    "closed file": lambda: os.fsync(999),
    "text alone": _raise(OSError("unexpected end")),
    "key": lambda: {}["encoder"],
}


def _main(raising: Callable[[], object]) -> None:
    main.function_of = lambda setting, task: lambda config, workdir: raising()
    sys.argv = ["main", "--config=configs/export.py", "--config.execution.compilation_cache="]
    app.run(main.main, flags_parser=main.parse_flags)


def _fingerprint(raising: Callable[[], object]) -> None:
    command.verify = lambda index: raising()
    sys.exit(command.main(["verify", "--index=films.index"]))


def _embed(raising: Callable[[], object]) -> None:
    embed._run = lambda args: raising()
    sys.exit(embed.main(["films", "--out=features.npz"]))


def _compare(raising: Callable[[], object]) -> None:
    compare.read_run = lambda run: raising()
    sys.exit(compare.main(["runs/a", "runs/b"]))


def _prepare(raising: Callable[[], object]) -> None:
    folder_or_table.read = lambda args: raising()
    sys.exit(data_prep.main(["prepare", "videos", "--out=records"]))


def _inspect(raising: Callable[[], object]) -> None:
    card.split_names = lambda path: raising()
    sys.exit(data_prep.main(["inspect", "records"]))


def _foley(raising: Callable[[], object]) -> None:
    foley.write_collection = lambda *args, **options: raising()
    sys.exit(data_prep.main(["foley", "--out=media"]))


def _demo(raising: Callable[[], object]) -> None:
    demo.foley.write_collection = lambda *args, **options: raising()
    sys.exit(data_prep.main(["demo", "--out=demo"]))


COMMANDS = {
    "main": _main,
    "avcl-embed": _embed,
    "avcl-fingerprint": _fingerprint,
    "compare": _compare,
    "data_prep prepare": _prepare,
    "data_prep inspect": _inspect,
    "data_prep foley": _foley,
    "data_prep demo": _demo,
}


def said(run: Callable[[Callable[[], object]], None], error: str) -> tuple[int, str]:
    """Runs a command in a process of its own; returns its exit status and its output."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                run(ERRORS[error])
            except SystemExit as ended:
                code = ended.code
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(70)
            os._exit(71)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return os.waitstatus_to_exitcode(status), file.read()


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    print(json.dumps({c: {e: said(run, e) for e in ERRORS} for c, run in COMMANDS.items()}))

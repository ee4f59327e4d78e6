"""Runs the task of a config: `python -m avcl_jax.main --config=configs/pretrain.py`.

`config.task` is the function that runs, `module:function` of (config, workdir). Media are prepared
before, by `avcl-data`. Exit status: 0; 1 after an error in one line; 75 where a signal stopped
training after saving, so that the same command resumes it; 130 after Ctrl-C elsewhere.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from avcl_jax import config_file, peers, processes
from avcl_jax.command_line import ends_unread
from avcl_jax.compilation_cache import keep_compiled
from avcl_jax.errors import UserError, ends_a_command, one_line
from avcl_jax.experiment import (
    check_inputs,
    check_numbers,
    check_used,
    flatten,
    function_of,
    with_absolute_paths,
)
from avcl_jax.paths import absolute_path
from avcl_jax.versions import versions

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File, or configs/NAME.py of this package, with `:preset` where it has presets.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, local or gs://; runs/NAME of the config if not given."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Call jax.distributed.initialize, which finds its peers on TPU pods and SLURM.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds until every process must have joined.", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout",
    120.0,
    "Seconds without a step, or a sign of life of another process, after which a process ends.",
    lower_bound=1.0,
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print every setting, with overrides applied, and stop."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")


def main(argv: Sequence[str]) -> None:
    """Runs the task of the config.

    Raises:
        SystemExit: with code 1 after one line about a user error, `STOPPED` after a signal.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {list(argv[1:])}: flags begin with --")
    # Libraries log about themselves, orbax every error that it also raises; our lines are printed.
    logging.set_verbosity(logging.FATAL)
    config = _CONFIG.value
    try:
        if config is None:
            raise UserError("--config is missing: try --config=configs/pretrain.py")
        if _PRINT_CONFIG.value:
            for setting, value in flatten(config.to_dict()).items():
                print(f"{setting} = {value!r}")
            return
        config = with_absolute_paths(config)
        if not config.name:
            config.name = epath.Path(config.data.directory).name
        workdir = absolute_path(_WORKDIR.value or f"runs/{config.name}")
        _join(config, workdir)
        function = function_of("task", config.task)
        check_numbers(config)
        check_inputs(config)
        keep_compiled(config.execution.compilation_cache)
        function(config, workdir)
        peers.leave()
    except processes.Stopped:
        peers.leave()
        raise SystemExit(processes.STOPPED) from None
    except KeyboardInterrupt as error:
        print("avcl_jax: interrupted", file=sys.stderr, flush=True)
        peers.fail(error, "interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if ends_a_command(error):
            line = one_line(error)
            if _DEBUG.value:
                traceback.print_exc()
            print(f"avcl_jax: error: {line}", file=sys.stderr, flush=True)
            peers.fail(error, line)
            raise SystemExit(1) from error
        peers.fail(error, " ".join(f"{type(error).__name__}: {error}".split()), bug=True)
        raise


def _join(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Joins the other processes if there are any, watches them, and compares them with this one."""
    client = None
    if _DISTRIBUTED.value or _COORDINATOR.value:
        client = processes.join(
            _COORDINATOR.value,
            _PROCESSES.value,
            _PROCESS.value,
            timeout_seconds=_JOIN_TIMEOUT.value,
            # Later than our own watch, which names the process.
            heartbeat_seconds=3 * _PEER_TIMEOUT.value,
        )
    peers.start(workdir, client, timeout_seconds=_PEER_TIMEOUT.value)
    if client is None:
        return
    facts = flatten({"config": config.to_dict()})
    # Machines may keep one data set in different places; its fingerprint is compared later.
    facts.pop("config.data.directory", None)
    processes.check_same(facts | flatten({"version": versions()}))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a mistake in it is printed as one line.

    Raises:
        SystemExit: with code 1 after that line.
    """
    try:
        config_file.check_arguments(argv, flags.FLAGS["config"].parser.parse)
        remaining = flags.FLAGS(config_file.with_files(argv))
        if _CONFIG.value is not None:
            check_used(_CONFIG.value, config_file.overrides(argv))
        return remaining
    except (UserError, flags.Error) as error:
        print(f"avcl_jax: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    with ends_unread():
        app.run(main, flags_parser=parse_flags)

"""Compiled programs, kept between starts of the commands."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from avcl_jax.paths import absolute_path, is_remote, write_bytes
from avcl_jax.versions import sources_digest

DIRECTORY = "~/.cache/avcl_jax/xla"
_DIRECTORY = "jax_compilation_cache_dir"
# What decides how a function is compiled, beside the function and its arguments.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


def keep_compiled(directory: epath.PathLike = DIRECTORY) -> None:
    """Keeps compiled programs in a directory for later starts, unless the environment names one.

    Entries are keyed by program, compiler options, versions and device; on a CPU also by its
    instruction set, so that machines of different make may share a directory.

    Args:
        directory: local or gs://; "" keeps none, as does one that cannot be written.
    """
    if not directory or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    path = absolute_path(directory)
    if not is_remote(path):
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            return
    import jax  # here, because configs take the name above and need no JAX

    jax.config.update(_DIRECTORY, str(path))
    # JAX would keep nothing that compiled in under 1 s. A start has few programs: six of the demo.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compiled(function: Any, arguments: tuple[Any, ...], identity: str) -> Callable[..., Any]:
    """Returns a jitted function compiled for arguments, from the directory of `keep_compiled`.

    JAX finds a program there by what it has traced, and tracing a network takes as long as
    importing JAX. Here it is found by its name, with versions, devices, compiler options and all
    sources of this package, and neither the network nor Flax is imported.

    Args:
        function: jitted, and pure: a function of arguments, identity and sources alone.
        arguments: arrays on their devices; later calls need the same shapes, types and shardings.
        identity: text that the function depends on.

    Returns:
        The program, or `function` itself where no programs are kept.
    """
    import jax
    from jax.experimental import serialize_executable

    directory = getattr(jax.config, _DIRECTORY)
    if not directory or jax.process_count() > 1:
        return function
    known = [
        identity,
        str(jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), arguments)),
        *[getattr(jax.config, name) for name in _OPTIONS],
        *[os.environ.get(name) for name in _VARIABLES],
        *_environment(),
    ]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    path = epath.Path(directory) / f"avcl_jax-{key}"
    # One that is missing, cut off or damaged is compiled again.
    unreadable = pickle.UnpicklingError, EOFError, ValueError, jax.errors.JaxRuntimeError
    with contextlib.suppress(OSError, *unreadable):
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))

    def new(*arguments: Any) -> Any:
        return function(*arguments)

    # A name that no other program has: one that JAX finds in its cache cannot be serialised again.
    new.__name__ = f"{function.__name__}_{secrets.token_hex(8)}"
    program = jax.jit(new).lower(*arguments).compile()
    with contextlib.suppress(OSError):  # a full disk, or a directory that cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, pickle.dumps(serialize_executable.serialize(program)))
    return program


@functools.cache
def _environment() -> tuple[str, ...]:
    """Describes this process: sources of the package, versions, devices, and the CPU."""
    import jax
    import jaxlib

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        instructions = platform.processor()
    devices = jax.devices()
    versions = jax.__version__, jaxlib.__version__, importlib.metadata.version("flax")
    kinds = [f"{device} {device.device_kind}" for device in devices]
    client = devices[0].client.platform_version
    return sources_digest(), *versions, *kinds, client, platform.platform(), instructions

"""Compiled programs, kept between starts of the commands."""

from __future__ import annotations

import os

from etils import epath

from avcl_jax.paths import absolute_path

DIRECTORY = "~/.cache/avcl_jax/xla"


def keep_compiled(directory: epath.PathLike = DIRECTORY) -> None:
    """Keeps compiled programs in a directory for later starts, unless the environment names one.

    Entries are keyed by program, compiler options, versions and device; on a CPU also by its
    instruction set, so that machines of different make may share a directory.

    Args:
        directory: local or gs://; "" keeps none.
    """
    if not directory or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax  # here, because configs take the name above and need no JAX

    jax.config.update("jax_compilation_cache_dir", str(absolute_path(directory)))
    # JAX would keep nothing that compiled in under 1 s. A start has few programs: six of the demo.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

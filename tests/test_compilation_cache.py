"""Programs that one process compiles and keeps, and others run without tracing them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from avcl_jax import compilation_cache
from avcl_jax.compilation_cache import compiled, keep_compiled

CODE = """
import sys
import jax
import jax.numpy as jnp
from avcl_jax.compilation_cache import compiled, keep_compiled

keep_compiled(sys.argv[1])
traces = []

@jax.jit
def function(weights, x):
    traces.append(x)
    return {"y": jnp.tanh(weights["w"] @ x) / jnp.sqrt(1 + x.sum())}

arguments = {"w": jnp.ones((2, 3))}, jnp.arange(3.0)
program = compiled(function, arguments, sys.argv[2])
print(len(traces), program(*arguments)["y"].tolist())
"""


@pytest.fixture
def start(tmp_path):
    """Function that starts a process; returns how often it traced, and what it computed."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def start(identity="a"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path), identity],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        traces, _, result = done.stdout.partition(" ")
        return int(traces), result

    return start


def test_a_program_is_traced_once_and_once_more_for_every_other_identity(start, tmp_path):
    traces, expected = start()
    assert traces == 1
    assert start() == (0, expected)
    # Another one of the same computation, which JAX finds in its own cache.
    assert start("b") == (1, expected)
    assert start("b") == (0, expected)
    for path in tmp_path.glob("avcl_jax-*"):
        path.write_bytes(path.read_bytes()[:100])
    assert start() == (1, expected)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Sets the directory of compiled programs for one test."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    yield lambda path: jax.config.update("jax_compilation_cache_dir", path and str(path))
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_function_is_jitted_as_usual_where_no_programs_are_kept(directory):
    directory(None)
    function = jax.jit(jnp.tanh)
    assert compiled(function, (jnp.ones(2),), "a") is function


def test_a_directory_that_cannot_be_written_keeps_no_programs(directory, tmp_path):
    (tmp_path / "file").touch()
    directory(None)
    keep_compiled(tmp_path / "file" / "xla")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_full_disk_does_not_end_a_command(directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compilation_cache, "write_bytes", full)
    directory(tmp_path)
    assert compiled(jax.jit(jnp.tanh), (jnp.zeros(2),), "full")(jnp.zeros(2)).tolist() == [0, 0]

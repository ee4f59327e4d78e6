"""Strictness for every test: shapes and types checked, no silent rank promotion, own warnings fail.

Tests see one CPU device, whatever the machine has. What needs more runs in a subprocess (fixture
`run_with_cpu_devices`), because XLA fixes the number of devices when it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before jax is imported: results are compared to 1e-6 and must not depend on the machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read as gcsfs is imported: it would ask Google itself for the kind of each bucket, over TLS.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent

# Checks every annotated shape at trace time; costs nothing outside the tests.
install_import_hook(["avcl_jax.objectives", "avcl_jax.models"], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Examples are a pure function of the test, so that a red run is red again; compiling makes the
# first example slow, and other programs make all of them slow: neither is a fault of the code.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

# Pure JAX: any warning at all is ours to fix. Elsewhere other people's code warns too.
NO_WARNINGS = (ROOT / "tests" / "objectives", ROOT / "tests" / "models")


def pytest_configure(config: pytest.Config) -> None:
    """Turns warnings that point into our own modules into errors."""
    config.addinivalue_line("filterwarnings", r"error:::avcl_jax(\..*)?$")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turns all warnings into errors where only JAX runs."""
    for item in items:
        if any(directory in item.path.parents for directory in NO_WARNINGS):
            # Files that a test of another directory left open are closed at any later moment.
            mark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
            item.add_marker(mark, append=False)


@pytest.fixture(autouse=True)
def _usual_priority() -> Iterator[None]:
    """Fails the test that leaves this process a real-time one, which all later ones suffer from."""
    yield
    assert os.sched_getscheduler(0) not in (os.SCHED_FIFO, os.SCHED_RR)


@pytest.fixture(scope="session")
def run_with_cpu_devices() -> Callable[..., str]:
    """Runs `python -m MODULE ARGUMENTS` on several virtual CPU devices and returns its output.

    It fails the test, with the whole output, if the process fails.
    """

    def run(devices: int, module: str, *arguments: str) -> str:
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"{module} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run

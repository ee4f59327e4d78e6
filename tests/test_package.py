"""The package as others install it: a source distribution, its wheel, and commands elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePath

import pytest
from packaging.metadata import Metadata

from tests.documented_folder import copy_repository, tracked_files
from tests.test_every_command import FEW_VIDEOS
from tests.training import small

pytestmark = pytest.mark.slow

_TRAINING = " ".join(f"'--config.{name}={value}'" for name, value in small.OVERRIDES.items())
# What someone does after the installation, in an empty folder.
_COMMANDS = f"""
avcl-data demo --out data/foley {" ".join(FEW_VIDEOS)}
python -m avcl_jax.main --config=configs/pretrain.py --workdir=runs/mine {_TRAINING}
python -m avcl_jax.main --config=configs/export.py --workdir=runs/mine
avcl-fingerprint index data/foley/media/test --index films.index
avcl-fingerprint query data/foley/media/test/*0.mp4 --index films.index
avcl-fingerprint duplicates --index films.index --report duplicates.html
avcl-fingerprint verify --index films.index
avcl-embed data/foley/media/test --out features.parquet --encoder runs/mine
"""
_PROGRAM = """
import numpy as np
from avcl_jax.export import load_encoder
print(load_encoder("runs/mine/export/video")(np.zeros((40, 48, 64, 3), np.uint8), 25.0).shape[1])
"""


def _run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Runs a command without this clone on Python's path; returns what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=kept | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def _wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("package")
    copy_repository(folder / "copy")
    _run([sys.executable, "-m", "build", "copy", "--outdir", "dist"], folder)
    _run([sys.executable, "-m", "build", "copy", "--outdir", "direct", "--wheel"], folder)
    return folder / "dist"


def test_the_wheel_has_all_files_of_the_package_and_nothing_beside_it(dist) -> None:
    wheel = _wheel(dist)
    names = set(wheel.namelist())
    assert {PurePath(name).parts[0] for name in names} == {"avcl_jax", "avcl_jax-0.1.0.dist-info"}
    assert {name for name in names if name.startswith("avcl_jax/")} == {
        name for name in tracked_files() if name.startswith("avcl_jax/")
    }
    assert "avcl_jax-0.1.0.dist-info/licenses/LICENSE" in names
    direct = _wheel(dist.with_name("direct"))
    assert {name: direct.read(name) for name in names} == {name: wheel.read(name) for name in names}


def test_the_metadata_are_valid_and_their_links_are_absolute(dist) -> None:
    text = _wheel(dist).read("avcl_jax-0.1.0.dist-info/METADATA")
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.license_expression == "Apache-2.0"
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.description)
    # Ranges, because a library must leave its users room to move.
    assert not [need for need in metadata.requires_dist if "==" in str(need.specifier)]


def test_the_wheel_works_in_a_fresh_environment(dist, tmp_path) -> None:
    environment, folder = tmp_path / "environment", tmp_path / "an empty folder"
    folder.mkdir()
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    _run([python, "-m", "pip", "install", "--quiet", *dist.glob("*.whl")], folder)
    assert _run([python, "-m", "pip", "check"], folder).strip() == "No broken requirements found."
    variables = {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    printed = _run(["bash", "-euo", "pipefail", "-c", _COMMANDS], folder, **variables)
    assert "same file" in printed
    assert "intact: " in printed
    assert _run([python, "-c", _PROGRAM], folder, **variables).split()[-1] == "12"

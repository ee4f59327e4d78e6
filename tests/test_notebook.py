"""The notebooks are what their sources say, and run from their first cells to their last."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
REPOSITORY = "https://github.com/avcl-jax/avcl-jax"
# What each notebook prints, and how many images it shows.
SHOWN = {
    "quickstart": (["trained to step 400", " <- ", "material from run/export: "], 3),
    "own_videos": (["broken.mp4: not_media", "looks like:", "label_motion from video:"], 2),
    "fingerprint": (
        ["cropped.mp4:", "library/test_00008.mp4 from 1.", "no match", " is contained in "],
        1,
    ),
    "downstream": (["fine-tuned", "from scratch"], 0),
}


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def install_cell(source: Path) -> str:
    return next(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code")


def execute(source: Path, folder: Path):
    """Runs a generated notebook in a folder; returns its outputs, and all that it printed."""
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    done = NotebookClient(notebook, timeout=1500, resources=resources).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    return outputs, "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for kernels, which import this working tree and write temporary files there too."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_generated_from_its_source_opens_in_colab_and_states_its_time(source):
    generated = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(generated) == cells(jupytext.read(source)), "run `make notebook`"
    opening = generated.cells[0].source
    place = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"]({place}/blob/main/notebooks/{source.stem}.ipynb)" in opening
    assert re.search(r"Runs in (about )?\w+ minutes? on 2 CPU cores", " ".join(opening.split()))
    assert install_cell(source) == install_cell(SOURCES[0]), "one way to install, in all of them"
    assert not any(cell.get("outputs") for cell in generated.cells)


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_an_older_package_in_the_kernel_asks_for_a_restart(name):
    """As in Colab, which has imported its own versions before the first cell runs."""
    older = f"import sys, types\nsys.modules['{name}'] = m = types.ModuleType('{name}')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{older}m.__version__ = '0.4.1'\n{install_cell(SOURCES[0])}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"an older {name} than is installed now: restart the kernel" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_from_another_folder(source, elsewhere):
    expected, images = SHOWN[source.stem]
    outputs, printed = execute(source, elsewhere)
    for text in expected:
        assert text in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == images
    assert not list(elsewhere.iterdir()), "files are written to a folder of their own"


@pytest.mark.torch
def test_weights_go_to_torchvision_and_back(elsewhere, tmp_path, monkeypatch):
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-interop.txt)")
    # As in test_torch_weights.py: torchvision may be built for another PyTorch than the CPU's.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "sys.modules['torchvision._meta_registrations'] = types.ModuleType('empty')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    _, printed = execute(ROOT / "notebooks" / "downstream.py", elsewhere)
    assert "<All keys matched successfully>" in printed
    difference = float(printed.partition("differ by at most ")[2].split()[0])
    assert difference < 1e-4

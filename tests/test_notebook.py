"""The quickstart notebook is what its source says, and runs from its first cell to its last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "notebooks" / "quickstart.py"


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_is_generated_from_its_source():
    generated = nbformat.read(SOURCE.with_suffix(".ipynb"), as_version=4)
    assert cells(generated) == cells(jupytext.read(SOURCE)), "run `make notebook`"


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_an_older_package_in_the_kernel_asks_for_a_restart(name):
    """As in Colab, which has imported its own versions before the first cell runs."""
    install = next(cell.source for cell in jupytext.read(SOURCE).cells if cell.cell_type == "code")
    older = f"import sys, types\nsys.modules['{name}'] = m = types.ModuleType('{name}')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{older}m.__version__ = '0.4.1'\n{install}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"an older {name} than is installed now: restart the runtime" in done.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_another_folder(tmp_path, monkeypatch):
    # Where a session in Colab is after its restart: beside the clone.
    elsewhere = tmp_path / "a folder"
    elsewhere.mkdir()
    (elsewhere / "avcl-jax").symlink_to(ROOT)
    monkeypatch.setenv("AVCL_JAX_SMALL", "1")
    monkeypatch.setenv("AVCL_JAX_OUT", str(tmp_path))
    notebook = nbformat.read(SOURCE.with_suffix(".ipynb"), as_version=4)
    resources = {"metadata": {"path": str(elsewhere)}}
    done = NotebookClient(notebook, timeout=1500, resources=resources).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "trained to step 20" in printed
    assert " <- " in printed

"""The quickstart notebook is what its source says, and runs from its first cell to its last."""

from __future__ import annotations

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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("AVCL_JAX_SMALL", "1")
    monkeypatch.setenv("AVCL_JAX_OUT", str(tmp_path))
    notebook = nbformat.read(SOURCE.with_suffix(".ipynb"), as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    done = NotebookClient(notebook, timeout=1500, resources=resources).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "trained to step 20" in printed
    assert " <- " in printed

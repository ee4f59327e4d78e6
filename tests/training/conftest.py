"""Small records, and a run on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.synthetic_records import make_record, write_records
from tests.training.small import Seen, arguments, run


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    made = [make_record(number, seconds=5.0, side=24) for number in range(24)]
    return write_records(tmp_path_factory.mktemp("runs") / "records", made)


@pytest.fixture(scope="module")
def whole_run(records, tmp_path_factory) -> Path:
    """A finished run, in a workdir where one with another seed had ended before a checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"seed": 5}))
    output = run(arguments(records, workdir))
    assert "step 6/6" in output
    return workdir


@pytest.fixture(scope="session")
def table() -> Iterator[list[tuple[str, str, float]]]:
    """Rows; written into the page that AVCL_JAX_TABLE names, between two comments."""
    rows: list[tuple[str, str, float]] = []
    yield rows
    if page := os.environ.get("AVCL_JAX_TABLE"):
        before, begin, rest = Path(page).read_text().partition("<!-- begin table -->\n")
        _, end, after = rest.partition("<!-- end table -->\n")
        assert begin, f"{page} has no place for the table"
        assert end, f"{page} has no end of the table"
        lines = [f"| {what} | {outcome} | {seconds:.1f} |\n" for what, outcome, seconds in rows]
        head = "| done | all processes | seconds |\n|---|---|---|\n"
        Path(page).write_text("".join([before, begin, head, *lines, end, after]))


@pytest.fixture
def seen(table) -> Seen:
    return Seen(table)

"""Small records, and a run on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.synthetic_records import make_record, write_records
from tests.training.small import arguments, run


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

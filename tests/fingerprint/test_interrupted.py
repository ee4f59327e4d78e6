"""A killed writer leaves the index as it was or as it was to be, and the next one cleans up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import ROOT


def test_killed_at_any_moment_the_index_is_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fingerprint.killed_writer", str(tmp_path / "index")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    deaths = [line for line in lines if "before" in line]
    assert len(deaths) > 15  # moments: else nothing was interrupted
    for death in deaths:
        assert death["problems"] == []
        assert death["after"] in (death["before"], death["intended"])
    # Both ends of the only step that counts were met, and leftovers were there to be cleaned.
    assert deaths[0]["after"] == deaths[0]["before"]
    assert deaths[-1]["survived"]
    assert deaths[-1]["after"] == deaths[-1]["intended"]
    assert any(death["left"] > 5 for death in deaths)
    for line in lines:
        if "next" in line:
            assert line["problems"] == []
            assert [f for f in line["files"] if f.startswith("part-")] == line["named"]
            assert len([f for f in line["files"] if f.startswith("projection-")]) == 1

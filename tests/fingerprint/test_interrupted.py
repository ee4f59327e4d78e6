"""A killed writer leaves the index as a transaction left it, and the next writer cleans up."""

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
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(deaths) > 40
    for death in deaths:
        assert death["problems"] == []
        assert death["after"] in death["states"]
        assert death["next"]
        assert death["files"] == ["cache", "index.sqlite"]
    # Each state was met by a kill; the last processes came to their end.
    met = {death["states"].index(death["after"]) for death in deaths if not death["survived"]}
    assert met == {0, 1, 2}
    assert deaths[-1]["survived"]

"""Cutting at scene changes (needs PySceneDetect, requirements-interop.txt)."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from avcl_jax.data_prep.clip import parse_cut, pieces
from avcl_jax.data_prep.manifest import Entry

pytestmark = pytest.mark.interop
pytest.importorskip("scenedetect", reason="PySceneDetect is not installed")

_FPS = 20
_CHANGES = (0.0, 2.0, 3.5, 3.7, 6.0)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Scenes of drifting patterns, each of its own colours."""
    rng = np.random.default_rng(0)
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for start, end in itertools.pairwise(_CHANGES):
            pattern = rng.integers(0, 255, (8, 8, 3)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
            for number in range(round((end - start) * _FPS)):
                drift = np.roll(pattern, number // 4, axis=1)[:64, :64]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(drift), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("scenes", [(0.0, 2.0), (2.0, 3.5), (3.7, 6.0)]),
        ("scenes:1.5", [(0.0, 1.0), (1.0, 2.0), (2.0, 3.5), (3.7, 4.85), (4.85, 6.0)]),
    ],
)
def test_no_clip_crosses_a_scene_change(
    film: Path, cut: str, expected: list[tuple[float, float]]
) -> None:
    entry = Entry(str(film), "train", "film", "film", 0.0, None, {})
    found = pieces(entry, parse_cut(cut), min_seconds=0.5)
    assert [(e.start_seconds, e.end_seconds) for e in found] == [
        (pytest.approx(start, abs=1e-3), pytest.approx(end, abs=1e-3)) for start, end in expected
    ]

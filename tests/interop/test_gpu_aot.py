"""The pretraining step compiled for a host of GPUs, on this machine without a GPU.

It needs requirements-gpu-aot.txt.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu_aot, measure
from tests.interop.compiled import small_step

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        measure.version("jax-cuda12-plugin") is None,
        reason="XLA's compiler for GPUs is not installed (requirements-gpu-aot.txt)",
    ),
]
TOPOLOGY, GPUS, VIDEOS = "h100:4", 4, 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("compiled")
    return small_step(TOPOLOGY, VIDEOS, cache, gpu_aot.ENVIRONMENT)


def test_convolutions_are_bfloat16_with_channels_last(found: dict[str, Any]) -> None:
    # Unchanged, those of the video encoder would have channels first.
    assert found["channels_last_flops"] == found["convolution_flops"] > 0


def test_every_gradient_is_exchanged_once(found: dict[str, Any]) -> None:
    reduced = found["reduced_elements"]
    scales = found["statistics"]
    assert reduced["bf16"] == found["parameters"] - scales
    assert scales <= reduced["f32"] <= 5 * scales


def test_devices_gather_embeddings_and_nothing_larger(found: dict[str, Any]) -> None:
    moved = {(e["kind"], e["part"]): e["bytes"] for e in found["collectives"]}
    # Two views of both modalities, float32 embeddings of 32; the windows of audio would be 0.8 MB.
    embeddings = GPUS * VIDEOS * 2 * 2 * 32 * 4
    assert moved.get(("all-gather", "step"), 0) <= embeddings
    bank = sum(bytes_ for (_, part), bytes_ in moved.items() if part == "bank")
    assert 0 < bank <= min(found["exchange"].values())


def test_the_state_is_donated(found: dict[str, Any]) -> None:
    assert found["aliased_parameters"] == found["state_arrays"]


def test_rows_are_told_with_their_targets(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "run_child", lambda *_, **__: found)
    rows = {row.name: row for row in gpu_aot.step_rows({"topology": TOPOLOGY})}
    assert rows["gpu_h100_4_channels_last_share"].verdict == "met"
    assert 0 < rows["gpu_h100_4_relayout_share"].value < 1
    assert 0 < rows["gpu_h100_4_hbm_share"].value < 0.01
    assert 0 < rows["gpu_h100_4_roofline_share_estimate"].value < 1
    collective = rows["gpu_h100_4_collective_mb"]
    assert collective.verdict == "met", collective
    assert f"exchanged {collective.value:.1f} MB" in capsys.readouterr().out

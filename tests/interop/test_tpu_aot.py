"""The pretraining step compiled for a TPU slice by libtpu, on this machine without a TPU.

A small network of the same kind, everything else of the full-size preset: what is checked are
properties of the program, which do not depend on its size (needs requirements-tpu-aot.txt).
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import tpu_aot
from benchmarks.measure import run_child
from benchmarks.tpu_chips import chip_of

pytestmark = pytest.mark.interop
pytest.importorskip("libtpu", reason="libtpu is not installed (requirements-tpu-aot.txt)")

TOPOLOGY, CHIPS, VIDEOS = "v5e:2x2", 4, 2
OVERRIDES = {
    "views.num_frames": "4",
    "crop.image_size": "32",
    "spectrogram.frames": "16",
    "model.embedding_dim": "32",
    "model.projection_hidden": "32",
    "model.temporal_hidden": "32",
    "model.video.name": "resnet",
    "model.video.resnet.widths": "(16, 24)",
    "model.video.resnet.depths": "(0, 1)",
    "model.video.resnet.factorisation": "r2plus1d",
    "model.video.resnet.stem": "r2plus1d",
    "model.video.subtract_time_mean": "False",
    "model.audio.name": "resnet",
    "model.audio.resnet.widths": "(16, 24)",
    "model.audio.resnet.depths": "(0, 1)",
    "model.audio.resnet.stem": "resnet",
    "bank.size": "4096",
    "bank.num_negatives": "16",
    "bank.negative_candidates": "256",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_child(
        "benchmarks.aot:compile_step",
        {
            "topology": TOPOLOGY,
            "preset": "kinetics400",
            "overrides": OVERRIDES,
            "videos_per_chip": VIDEOS,
            "cache": str(tmp_path_factory.mktemp("compiled")),
        },
        environment=tpu_aot.ENVIRONMENT,
    )


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_a_large_product_comes_near_the_peak_and_not_beyond(topology: str) -> None:
    product = run_child(
        "benchmarks.aot:compile_product",
        {"topology": topology, "size": 8192},
        environment=tpu_aot.ENVIRONMENT,
    )
    chip, _ = chip_of(topology)
    seconds = product["cycles"] / chip.clock_hz
    assert 0.6 < product["model_flops"] / seconds / chip.peak_flops <= 1


def test_every_gradient_is_exchanged_once(found: dict[str, Any]) -> None:
    reduced = found["reduced_elements"]
    # A normalisation has a scale and a shift, and as many statistics; what is left are kernels and
    # biases, which are used as bfloat16, and whose gradients the compiler sums as such.
    scales = found["statistics"]
    assert reduced["bf16"] == found["parameters"] - scales
    # float32: gradients of the scales, sums of normalisation forward and backward, and metrics.
    assert scales <= reduced["f32"] <= 5 * scales


def test_the_bank_exchanges_no_more_than_the_cheaper_way(found: dict[str, Any]) -> None:
    moved = sum(entry["bytes"] for entry in found["collectives"] if entry["part"] == "bank")
    assert 0 < moved <= min(found["exchange"].values())


def test_convolutions_are_bfloat16_and_direct(found: dict[str, Any]) -> None:
    assert all(name.startswith("bf16 x bf16,") for name in found["convolutions"])
    # Folded, those of the video encoder would be 2-D as those of the audio encoder are.
    assert found["convolutions"]["bf16 x bf16, 3-D"] > 0


def test_the_state_is_donated(found: dict[str, Any]) -> None:
    assert found["aliased_parameters"] == found["state_arrays"]


def test_cycles_memory_and_times_are_told(found: dict[str, Any]) -> None:
    estimated = tpu_aot.estimate(TOPOLOGY, found)
    assert found["cycles"] > 0
    assert found["cycles_by_part"]["video_encoder"] > 0
    # The rounds in which each of the four draws asks for what it picked; one, in general.
    assert found["loops_of_unknown_length"] == 4
    assert 0 < estimated["mfu"] < 1
    assert estimated["interconnect_ms"] > 0
    assert 0 < estimated["hbm_fraction"] < 0.1

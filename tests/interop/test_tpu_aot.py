"""The pretraining step compiled for a TPU slice by libtpu, on this machine without a TPU.

It needs requirements-tpu-aot.txt.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import tpu_aot
from benchmarks.measure import run_child
from benchmarks.tpu_chips import chip_of
from tests.interop.compiled import small_step

pytestmark = pytest.mark.interop
pytest.importorskip("libtpu", reason="libtpu is not installed (requirements-tpu-aot.txt)")

TOPOLOGY, CHIPS, VIDEOS = "v5e:2x2", 4, 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("compiled")
    # Single pixels: with packed ones, gradients and sums have further elements, those of the packs.
    lowering = {"model__video__lowering": "direct"}
    return small_step(TOPOLOGY, VIDEOS, cache, tpu_aot.ENVIRONMENT, **lowering)


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

"""Protocols over several devices and hosts, in real processes."""

from __future__ import annotations

import json

import pytest

from tests.training.small import run, run_processes


def _arguments(small_records, small_run, workdir, config="retrieval.py:demo"):
    return [
        f"--config=configs/{config}",
        f"--workdir={workdir}",
        f"--config.encoder={small_run[1]}",
        f"--config.data.directory={small_records}",
        "--config.data.make_demo=False",
        "--config.baselines.random=False",
        "--config.features.chunk=3",  # made a multiple of the devices
        "--config.features.clips=2",
        "--config.features.speeds=(1,2)",
        "--config.features.part_records=5",
        "--config.bootstrap.resamples=20",
    ]


@pytest.mark.slow
def test_hosts_share_the_records_and_find_what_one_finds(small_records, small_run, tmp_path):
    run(_arguments(small_records, small_run, tmp_path / "one"))
    outputs = run_processes(_arguments(small_records, small_run, tmp_path / "two"), devices=2)
    assert "R@1" in outputs[0]
    assert "R@1" not in outputs[1]  # one process ranks and writes
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    assert one["details"] == two["details"]
    parts = {n: sorted(p.name for p in (tmp_path / n).rglob("rows-*.npz")) for n in ("one", "two")}
    assert parts["one"] == parts["two"]
    assert len(parts["two"]) == 4 + 5  # of 16 and of 24 records


@pytest.mark.slow
def test_the_linear_probe_does_not_depend_on_the_number_of_devices(
    run_with_cpu_devices, small_records, small_run, tmp_path
):
    found = []
    for devices in (1, 5):  # 24 training records do not fill five devices
        workdir = tmp_path / str(devices)
        arguments = _arguments(small_records, small_run, workdir, "linear_probe.py:demo_audio")
        run_with_cpu_devices(devices, "avcl_jax.main", *arguments)
        results = json.loads((workdir / "results.json").read_text())
        found.append((results["metrics"], results["details"]))
    assert found[0] == found[1]

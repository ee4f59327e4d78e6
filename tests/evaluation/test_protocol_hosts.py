"""Protocols over several devices and hosts, in real processes."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.training.small import compilation_cache, run, run_processes


def _arguments(small_records, small_run, workdir, config="retrieval.py:demo"):
    return [
        f"--config=configs/{config}",
        f"--workdir={workdir}",
        f"--config.encoder={small_run[1]}",
        f"--config.data.directory={small_records}",
        "--config.baselines.random=False",
        "--config.execution.chunk=3",  # made a multiple of the devices
        "--config.features.clips=2",
        "--config.features.speeds=(1,2)",
        "--config.execution.part_records=5",
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


# By task, what shortens it; each is run by one process and by two.
TASKS = {
    "evaluate.py:demo": {
        "evaluation.speeds": (1, 2),
        "evaluation.clips": 1,
        "evaluation.probe.folds": 2,
        "evaluation.probe.costs": (0.1,),
        "evaluation.pairs_per_video": 6,
        "execution.part_records": 5,
        "execution.chunk": 3,
        "evaluation.null.train_split": "",
        "evaluation.supervised.video.views": 1,
        "evaluation.supervised.audio.views": 1,
        **{
            f"evaluation.supervised.{modality}.fit.{name}": value
            for modality in ("video", "audio")
            for name, value in (("epochs", 2), ("decay_epochs", 1), ("batch_size", 8))
        },
    },
    "cross_modal.py": {
        "features.speeds": (1, 2),
        "execution.part_records": 5,
        "execution.chunk": 3,
    },
    "temporal.py": {"execution.part_records": 5, "execution.chunk": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_processes_share_a_tasks_records_and_one_writes(small_records, small_run, tmp_path, name):
    overrides = TASKS[name] | {
        "data.directory": small_records,
        "execution.compilation_cache": compilation_cache(),
        "bootstrap.resamples": 20,
    }
    if not name.startswith("evaluate"):
        overrides |= {"encoder": small_run[1]}

    def arguments(workdir):
        if name.startswith("evaluate"):
            shutil.copytree(small_run[1], workdir)
            for path in workdir.glob("results.json"):
                path.unlink()
        return [
            f"--config=configs/{name}",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ]

    run(arguments(tmp_path / "one"))
    outputs = run_processes(arguments(tmp_path / "two"), devices=2)
    assert "results.json" in outputs[0]
    assert "results.json" not in outputs[1]
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    parts = {n: sorted(p.name for p in (tmp_path / n).rglob("rows-*.npz")) for n in ("one", "two")}
    assert parts["one"] == parts["two"]
    assert one["metrics"].keys() == two["metrics"].keys()
    for metric, figure in one["metrics"].items():
        assert two["metrics"][metric]["value"] == pytest.approx(figure["value"], abs=0.1), metric

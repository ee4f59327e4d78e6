"""Protocols over several devices and hosts, in real processes."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.training.small import compilation_cache, run, run_processes

# Settings that shorten each task; a batch of three is made a multiple of the devices.
PARTS = {"execution.part_records": 5, "execution.chunk": 3}
TASKS = {
    "evaluate.py:demo": {
        "evaluation.speeds": (1, 2),
        "evaluation.clips": 1,
        "evaluation.probe.folds": 2,
        "evaluation.probe.costs": (0.1,),
        "evaluation.pairs_per_video": 6,
        "evaluation.null.train_split": "",
        "evaluation.supervised.video.views": 1,
        "evaluation.supervised.audio.views": 1,
        **{
            f"evaluation.supervised.{modality}.fit.{name}": value
            for modality in ("video", "audio")
            for name, value in (("epochs", 2), ("decay_epochs", 1), ("batch_size", 8))
        },
    },
    "retrieval.py": {
        "features.speeds": (1, 2),
        "features.clips": 2,
        "baselines.random": False,
    },
    "cross_modal.py": {"features.speeds": (1, 2)},
    "temporal.py": {},
}


def _arguments(config, small_records, small_run, workdir, settings):
    overrides = (
        PARTS
        | settings
        | {
            "data.directory": small_records,
            "execution.compilation_cache": compilation_cache(),
            "bootstrap.resamples": 20,
        }
    )
    if config.startswith("evaluate"):
        shutil.copytree(small_run[1], workdir)
        (workdir / "results.json").unlink(missing_ok=True)
    else:
        overrides["encoder"] = small_run[1]
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [f"--config=configs/{config}", f"--workdir={workdir}", *settings]


def _results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_processes_share_a_tasks_records_and_one_writes(small_records, small_run, tmp_path, name):
    one, two = tmp_path / "one", tmp_path / "two"
    run(_arguments(name, small_records, small_run, one, TASKS[name]))
    arguments = _arguments(name, small_records, small_run, two, TASKS[name])
    outputs = run_processes(arguments, devices=2)
    assert "results.json" in outputs[0]
    assert "results.json" not in outputs[1]
    parts = [sorted(p.name for p in workdir.rglob("rows-*.npz")) for workdir in (one, two)]
    assert parts[0] == parts[1]
    metrics = [_results(workdir)["metrics"] for workdir in (one, two)]
    assert metrics[0].keys() == metrics[1].keys()
    for metric, entry in metrics[0].items():
        assert metrics[1][metric]["value"] == pytest.approx(entry["value"], abs=0.1), metric
    if name == "retrieval.py":
        assert len(parts[0]) == 4 + 5  # of 16 and of 24 records
        assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_the_linear_probe_does_not_depend_on_the_number_of_devices(
    run_with_cpu_devices, small_records, small_run, tmp_path
):
    found = []
    for devices in (1, 5):  # 24 training records do not fill five devices
        workdir = tmp_path / str(devices)
        config = "linear_probe.py:demo_audio"
        settings = TASKS["retrieval.py"]
        arguments = _arguments(config, small_records, small_run, workdir, settings)
        run_with_cpu_devices(devices, "avcl_jax.main", *arguments)
        found.append([_results(workdir)[key] for key in ("metrics", "details")])
    assert found[0] == found[1]

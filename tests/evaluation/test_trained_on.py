"""No protocol tests a run on records that it was pretrained on, unless it is told to."""

from __future__ import annotations

import shutil

import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.evaluation.finetune import finetune
from avcl_jax.evaluation.linear_probe import run_linear_probe
from avcl_jax.evaluation.retrieval import audio_video_retrieval, video_retrieval
from avcl_jax.evaluation.splits import check_not_trained_on
from avcl_jax.evaluation.temporal import temporal_tasks
from avcl_jax.training.checkpoint import Checkpoints, Progress
from configs import cross_modal, linear_probe, retrieval, temporal
from configs import finetune as finetune_config
from tests.evaluation.test_splits import _Records, _source

PROTOCOLS = {
    "retrieval": (retrieval, video_retrieval),
    "cross_modal": (cross_modal, audio_video_retrieval),
    "temporal": (temporal, temporal_tasks),
    "linear_probe": (linear_probe, run_linear_probe),
    "finetune": (finetune_config, finetune),
}


@pytest.fixture(scope="module")
def run_on_test(small_run, small_records, tmp_path_factory):
    """A run that says that it was pretrained on the records of the test split."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(small_run[1], workdir)
    shutil.rmtree(workdir / "checkpoints")
    checkpoints = Checkpoints(workdir, keep=1)
    said = RecordDataset(small_records, "test").fingerprint
    checkpoints.save(small_run[2], Progress(0, 1.0, said, 1))
    checkpoints.close()
    return workdir


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_run_on_its_own_test_records_is_refused(name, run_on_test, small_records, tmp_path):
    configs, protocol = PROTOCOLS[name]
    c = configs.get_config("demo")
    with c.unlocked():
        c.encoder = str(run_on_test)
        c.data.update({"directory": str(small_records)})
        if name in ("retrieval", "linear_probe"):
            c.features.speeds = (1,)
        elif name == "cross_modal":
            c.features.update({"speeds": (1, 2), "clips": 1})
        elif name == "finetune":
            c.update({"clip": {"seconds": 0.0}, "global_batch_size": 4})
    with pytest.raises(UserError, match=r"was pretrained, without labels, on \d+ of the"):
        protocol(c, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_is_allowed_is_said(capsys):
    records = _Records()
    source = _source("run", "esc-all-6-aa fold!=2")
    check_not_trained_on(source, records, [0, 3], allow=True, what="records")
    assert "runs/run was pretrained, without labels, on 1 of the 2 records" in (
        capsys.readouterr().out
    )
    check_not_trained_on(source, records, [2, 3], allow=False, what="records")

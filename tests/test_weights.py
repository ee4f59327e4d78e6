"""Shipped encoders: found by name from any folder, unless encoders are at that path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import avcl_jax
from avcl_jax import experiment, weights
from avcl_jax.configs import fingerprint, linear_probe
from avcl_jax.export import ExportError
from avcl_jax.export.runs import load_run, open_encoders
from avcl_jax.fingerprint import command
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.settings import FingerprintSettings
from avcl_jax.paths import PathError

MEDIA = {
    "video": (np.full((25, 40, 60, 3), 99, np.uint8), 25.0),
    "audio": (np.zeros(16_000, np.int16), 16_000),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shipped_encoders_are_listed_and_load(folder):
    listed = avcl_jax.encoders()
    assert [encoder.name for encoder in listed] == ["small/video", "small/audio"]
    assert 0 < sum(encoder.megabytes for encoder in listed) <= 8
    for shipped in listed:
        encoder = avcl_jax.load_encoder(shipped.name)
        assert encoder.modality == shipped.modality
        features = encoder(*MEDIA[shipped.modality])
        assert np.isfinite(features).all()
        assert features.any()


def test_listing_imports_no_jax():
    code = "import json, sys, avcl_jax; avcl_jax.encoders(); print(json.dumps([*sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"jax", "flax", "orbax", "librosa"}.isdisjoint(json.loads(run.stdout))


def test_a_pair_is_opened_by_name_and_recorded_by_it(folder):
    pair = open_encoders("small")
    assert (pair.path, set(pair.encoders)) == ("small", {"video", "audio"})
    assert open_encoders("small/").path == "small"
    assert open_encoders("small/audio").path == "small/audio"
    assert open_encoders(weights.find("small")).fingerprint == pair.fingerprint


@pytest.mark.parametrize("config", [fingerprint.get_config(), linear_probe.get_config()])
def test_the_default_encoder_of_a_config_stays_a_name(folder, config):
    assert config.encoder == "small"
    assert experiment.with_absolute_paths(config).encoder == "small"


@pytest.mark.parametrize("load", [avcl_jax.load_encoder, open_encoders])
def test_a_wrong_name_is_answered_with_the_names_that_there_are(folder, load):
    with pytest.raises(ExportError, match=r"smal: .*small, small/video, small/audio$") as error:
        load("smal")
    assert str(folder / "smal") in str(error.value)
    with pytest.raises(PathError, match="a path is empty"):
        load("")


def test_a_pair_is_not_one_encoder_and_a_shipped_one_not_a_run(folder):
    with pytest.raises(ExportError, match=r"contains \['audio', 'video'\]"):
        avcl_jax.load_encoder("small")
    with pytest.raises(ExportError, match=r"^small does not contain a pretraining run"):
        load_run("small")


def test_encoders_at_a_path_go_before_a_name(folder):
    (folder / "small").mkdir()
    (folder / "small" / "a clip.mp4").touch()
    assert open_encoders("small").path == "small"  # a folder of small videos
    shutil.copytree(weights.find("small/audio"), folder / "small" / "audio")
    mine = open_encoders("small")
    assert (mine.path, set(mine.encoders)) == (str(folder / "small"), {"audio"})


def test_an_index_needs_no_encoder(folder):
    pytest.importorskip("faiss")
    index = FingerprintIndex.create("films.index", "small", FingerprintSettings())
    assert index.segmenter.source.path == "small"
    arguments = command._parser().parse_args(["index", "films", "--index", "films.index"])
    assert arguments.encoder == "small"

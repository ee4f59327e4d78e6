"""Shipped encoders: found by name from any folder, unless encoders are at that path."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import avcl_jax
from avcl_jax import experiment, weights
from avcl_jax.configs import fingerprint, linear_probe
from avcl_jax.errors import UserError
from avcl_jax.export import ExportError
from avcl_jax.export.encoder import flatten
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


def test_the_card_describes_the_weights_that_are_there():
    card = (weights.find("small") / "README.md").read_text()
    pair = open_encoders("small")
    for encoder in pair.encoders.values():
        source = encoder.config["source"]
        assert f"seed {source['seed']}; records `{source['data']}`" in card
        count = sum(array.size for array in flatten(encoder.params["params"]).values())
        assert f"| {count:,} |" in card
    assert "It is **not**" in card


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
    with pytest.raises(ExportError, match=r"^small is not .* for instance small/video$"):
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


class FakeHub:
    """Stands for huggingface_hub: one repository, of which it copies what the patterns name."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache, self.asked = repository, cache, []

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        self.asked.append((repo_id, revision))
        if repo_id != "someone/small":
            raise OSError(f"404 Client Error.\n\nRepository Not Found for {repo_id}.")
        for path in self.repository.rglob("*"):
            name = str(path.relative_to(self.repository))
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(Path(weights.find("small")), tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_an_address_of_the_hub_is_fetched_by_its_own_library(fake_hub):
    encoder = avcl_jax.load_encoder("hf://someone/small@main/video")
    assert encoder.modality == "video"
    assert fake_hub.asked == [("someone/small", "main")]
    kept = {str(path.relative_to(fake_hub.cache)) for path in fake_hub.cache.rglob("*.*")}
    assert kept == {"video/config.json", "video/model.safetensors"}
    pair = open_encoders("hf://someone/small")
    assert (pair.path, set(pair.encoders)) == ("hf://someone/small", {"video", "audio"})
    assert pair.fingerprint == open_encoders("small").fingerprint
    config = fingerprint.get_config()
    config.encoder = "hf://someone/small"
    assert experiment.with_absolute_paths(config).encoder == "hf://someone/small"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://someone/else", r"^hf://someone/else cannot be fetched: 404 Client Error\.$"),
        ("hf://someone/small/text", r"the repository has no encoder in a folder text$"),
        ("hf://someone", r"^hf://someone is not hf://USER/REPO"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(fake_hub, address, message):
    with pytest.raises(UserError, match=message):
        avcl_jax.load_encoder(address)


def test_without_its_library_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"pip install huggingface-hub, or the extra avcl-jax\[hub\]"
    ):
        avcl_jax.load_encoder("hf://someone/small/video")

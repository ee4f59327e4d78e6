"""Paths as people give them: relative, below the home directory, with spaces, in object stores."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from avcl_jax import experiment
from avcl_jax.configs import fingerprint, pretrain
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.errors import one_line
from avcl_jax.paths import PathError, absolute_path, local_path, replacing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a space in its name, which is the home directory too."""
    folder = tmp_path / "my films"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("given", ["runs/demo", "~/runs/demo", "./runs/../runs/demo/"])
def test_local_paths_become_absolute(folder, given):
    for found in (absolute_path(given), absolute_path(Path(given)), local_path(given)):
        assert os.fspath(found) == f"{folder}/runs/demo"


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://bucket/a run/{fold}"])
def test_paths_in_object_stores_stay_as_they_are(folder, given):
    assert os.fspath(absolute_path(given)) == given
    assert absolute_path(absolute_path(given)) == absolute_path(given)
    with pytest.raises(PathError, match="copy it to a local disk"):
        local_path(given)


def test_an_empty_path_is_not_the_current_folder(folder):
    for resolve in (absolute_path, local_path):
        with pytest.raises(PathError, match="a path is empty"):
            resolve("")
    with pytest.raises(RecordError, match=r"set data\.directory"):
        RecordDataset("", "train")
    assert os.fspath(absolute_path(".")) == str(folder)


def test_an_error_of_a_full_disk_names_the_file(folder):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="space") as raised, replacing(folder / "a.html"):
        full()
    expected = f"{folder}/a.html: No space left on device; free some space"
    assert one_line(raised.value) == expected
    assert not list(folder.iterdir())


def test_paths_of_a_config_are_recorded_absolute(folder):
    config = pretrain.get_config()
    config.data.directory = "data/my records"
    assert experiment.with_absolute_paths(config).data.directory == f"{folder}/data/my records"
    config = fingerprint.get_config()
    config.encoder = "~/runs/fold{fold}"
    found = experiment.with_absolute_paths(config)
    assert (found.encoder, found.data.files) == (f"{folder}/runs/fold{{fold}}", "")
    config.encoder = "gs://bucket/run"
    assert experiment.with_absolute_paths(config).encoder == "gs://bucket/run"

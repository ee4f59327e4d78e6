"""Files of folders and of names that a person gives to a command."""

from __future__ import annotations

import pytest

from avcl_jax.data.media_files import AUDIO_SUFFIXES, VIDEO_SUFFIXES, media_files
from avcl_jax.errors import UserError


def test_media_of_folders_at_any_depth_and_named_files_of_any_suffix(tmp_path):
    inner = tmp_path / "films" / "a b"
    inner.mkdir(parents=True)
    for name in ("2.MP4", "-1.wav", "notes.txt", "._2.MP4"):
        (inner / name).touch()
    (tmp_path / "films" / "up").symlink_to(tmp_path / "films")
    (tmp_path / "films" / ".trash").mkdir()
    (tmp_path / "films" / ".trash" / "old.mp4").touch()
    named = inner / "notes.txt"
    assert media_files([named, tmp_path / "films"]) == [named, inner / "-1.wav", inner / "2.MP4"]


def test_a_path_without_media_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent does not exist"):
        media_files([tmp_path / "absent"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"the folder .* has no media file"):
        media_files([tmp_path])


def test_no_suffix_is_of_video_and_audio():
    assert not set(VIDEO_SUFFIXES) & set(AUDIO_SUFFIXES)

"""Which real files browsers play as they are, and that damage does not keep the rest from sight."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from avcl_jax.data.media import MediaError
from avcl_jax.fingerprint.web.preview import convert, playable_type

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "data" / "media"
pytestmark = pytest.mark.skipif(not MEDIA.exists(), reason=f"no real media in {MEDIA}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("big_buck_bunny_0_30.webm", "video/webm"),
        ("bigbuckbunny.mp4", "video/mp4"),
        ("chaplin.mp4", "video/mp4"),
        ("cockatoo.mp4", None),  # 4:4:4
        ("h264_10bits.mp4", None),
        ("h265_video.mp4", None),
        ("flipping_a_pancake.mkv", None),  # H.264 in Matroska
        ("no_duration.webm", None),  # nowhere to seek to
    ],
)
def test_what_all_browsers_play_is_told_by_container_codecs_and_pixels(name, kind):
    assert playable_type(MEDIA / name) == kind


def test_of_a_damaged_file_what_comes_before_is_converted(tmp_path):
    convert(MEDIA / "corrupted.mp4", tmp_path / "out.mp4", start_seconds=0.0, end_seconds=60.0)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(2.7, abs=0.3)


def test_a_picture_of_one_pixel_can_be_converted(tmp_path):
    source = MEDIA / "-video-with-dash-.mp4"
    convert(source, tmp_path / "out.mp4", start_seconds=0.0, end_seconds=60.0)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).width == 2


def test_what_cannot_be_written_or_is_after_the_end_is_one_kind_of_error(tmp_path):
    film = MEDIA / "chaplin.mp4"
    with pytest.raises(MediaError, match="no preview can be made"):
        convert(film, tmp_path / "none" / "out.mp4", start_seconds=0.0, end_seconds=1.0)
    with pytest.raises(MediaError, match="nothing in this interval"):
        convert(film, tmp_path / "out.mp4", start_seconds=60.0, end_seconds=70.0)

"""Written media: times as given, whole files or none, spectrograms the right way up."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from avcl_jax.data.encode import spectrogram_image, write_mp4
from avcl_jax.data.media import decode_audio, decode_frames

SETTINGS = {
    "fps": 10,
    "sample_rate_hz": 16_000,
    "audio_bits_per_second": 96_000,
    "video_options": {"qp": "4", "preset": "veryfast", "threads": "1"},
}


def _frames(count: int) -> np.ndarray:
    shades = np.linspace(20, 230, count).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, 32, 48, 3))


def test_frames_and_audio_come_back_at_their_times(tmp_path: Path) -> None:
    frames, seconds = _frames(6), [0.0, 0.1, 0.25, 0.3, 0.7, 0.75]
    tone = (8000 * np.sin(np.arange(8000) / 6)).astype(np.int16)
    path = tmp_path / "a.mp4"
    write_mp4(
        path,
        zip(seconds, frames, strict=True),
        tone,
        **SETTINGS,
        variable_rate=True,
        audio_start_seconds=0.5,
    )
    shown = list(decode_frames(path, short_side=None, max_fps=None))
    np.testing.assert_allclose([frame.seconds for frame in shown], seconds, atol=1e-3)
    np.testing.assert_allclose(np.stack([frame.image for frame in shown]), frames, atol=4)
    audio = decode_audio(path, sample_rate_hz=16_000)
    loud = np.flatnonzero(np.abs(audio.waveform) > 4000)[[0, -1]] / 16_000
    np.testing.assert_allclose(audio.start_seconds + loud, (0.5, 1.0), atol=0.01)


def test_planes_and_rgb_are_the_same_frames_and_either_stream_may_be_absent(tmp_path: Path) -> None:
    frames = _frames(4)
    planes = [cv2.cvtColor(frame.copy(), cv2.COLOR_RGB2YUV_I420) for frame in frames]
    found = []
    for name, images in (("rgb", frames), ("planes", planes)):
        path = tmp_path / f"{name}.mp4"
        write_mp4(path, ((n / 10, image) for n, image in enumerate(images)), None, **SETTINGS)
        found.append([f.image for f in decode_frames(path, short_side=None, max_fps=None)])
        assert decode_audio(path, sample_rate_hz=16_000) is None
    np.testing.assert_allclose(*np.array(found, float), atol=3)
    write_mp4(tmp_path / "audio.mp4", (), np.zeros(4000, np.float32), **SETTINGS)
    assert not list(decode_frames(tmp_path / "audio.mp4", short_side=None, max_fps=None))


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path) -> None:
    def frames():
        yield 0.0, _frames(1)[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_mp4(tmp_path / "a.mp4", frames(), None, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_low_bands_of_a_spectrogram_are_below_and_time_goes_right() -> None:
    levels = np.zeros((5, 3))
    levels[4, 0] = 1.0
    image = cv2.imdecode(
        np.frombuffer(spectrogram_image(levels, low=0.0, high=1.0), np.uint8), cv2.IMREAD_COLOR
    )
    assert image.shape == (3, 5, 3)
    assert np.unravel_index(image.sum(axis=-1).argmax(), (3, 5)) == (2, 4)
    assert (image.sum(axis=-1) == image[0, 0].sum()).sum() == 14

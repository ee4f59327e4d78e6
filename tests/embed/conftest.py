"""Small encoders, made without compiling anything."""

from __future__ import annotations

from unittest import mock

import pytest

from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.export import Encoder, export_encoder
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.models.video_resnet import VideoResNet
from tests.evaluation.labelled import drawn_weights
from tests.fingerprint.synthetic import RATE_HZ

SPAN = 0.5  # seconds of a clip
VIDEO = VideoPreprocessing(num_frames=8, clip_seconds=SPAN, image_size=16, mean=0.5, std=0.25)
AUDIO = AudioPreprocessing(LogMelSpec(RATE_HZ, 16, 24, SPAN, 50.0, 4000.0, 1e-6, -6.0, 3.0))


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Directory of a video and an audio encoder, whose vectors have 32 and 24 values."""
    directory = tmp_path_factory.mktemp("encoders")
    video = VideoResNet(
        widths=(16, 32),
        depths=(0, 1),
        factorisation="r2plus1d_plain",
        stem="patch4",
        subtract_time_mean=False,
    )
    audio = AudioResNet(widths=(16, 24), depths=(0, 1), stem="patch", patch=(2, 2))
    with mock.patch("avcl_jax.export.encoder._stablehlo", return_value=b""):
        for name, module, preprocessing in (("video", video, VIDEO), ("audio", audio, AUDIO)):
            empty = Encoder.of_module(module, {}, preprocessing, source={"step": 0})
            export_encoder(
                directory / name,
                encoder=module,
                params=drawn_weights(empty, 0),
                preprocessing=preprocessing,
                source={"step": 0},
            )
    return directory

"""Small encoders with drawn weights, and an index that holds media."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.export import export_encoder
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.library import Library, Vectors
from avcl_jax.fingerprint.projection import fit_projection
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.models.video_resnet import VideoResNet
from tests.fingerprint.page_server import make_clips, make_library
from tests.fingerprint.synthetic import RATE_HZ, SETTINGS, clip

VIDEO = VideoPreprocessing(num_frames=8, clip_seconds=0.5, image_size=16, mean=0.5, std=0.25)
LOG_MEL = LogMelSpec(RATE_HZ, 16, 24, 0.5, 50.0, 4000.0, 1e-6, -6.0, 3.0)


def export(directory, seed):
    video = VideoResNet(
        widths=(16, 32),
        depths=(0, 1),
        factorisation="r2plus1d_plain",
        stem="patch4",
        subtract_time_mean=False,
    )
    audio = AudioResNet(widths=(16, 32), depths=(1, 1), stem="patch", patch=(2, 2))
    for name, module, preprocessing, example in (
        ("video", video, VIDEO, jnp.zeros((1, 8, 16, 16, 3))),
        ("audio", audio, AudioPreprocessing(LOG_MEL), jnp.zeros((1, 16, 24))),
    ):
        variables = jax.jit(module.init, static_argnames="train")(
            jax.random.key(seed), example, train=False
        )
        export_encoder(
            directory / name,
            encoder=module,
            params=variables,
            preprocessing=preprocessing,
            source={"step": seed},
        )
    return directory


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Directory of a video and an audio encoder."""
    return export(tmp_path_factory.mktemp("encoders"), 0)


@pytest.fixture(scope="session")
def other_encoders(tmp_path_factory):
    """The same with other weights."""
    return export(tmp_path_factory.mktemp("other_encoders"), 1)


@pytest.fixture(scope="session")
def library(encoders, tmp_path_factory):
    """An index of sixteen clips, not to be changed; `clip(n)` is called `clip n`."""
    index = FingerprintIndex.create(tmp_path_factory.mktemp("library"), encoders, SETTINGS)
    index.add((f"clip {n}", clip(n)) for n in range(16))
    return index


@pytest.fixture(scope="session")
def references():
    """A library of two sources of 40 unrelated segments each; the first lacks its segment 16."""
    values = np.random.default_rng(0).normal(size=(80, 64)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    labels = np.concatenate([(1 << 32) + np.arange(40), (2 << 32) + np.arange(40)])
    kept = np.arange(80) != 16
    vectors = Vectors(fit_projection(values, 64), labels[kept], values[kept])
    stored = {"settings": {"rates": [1.0, 0.8, 1.25], "hop_seconds": 0.5}}
    sources = [SourceRow(name, name, 20.5, None, 40, int(name)) for name in "12"]
    return Library(stored, sources, {"video": vectors})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder of pieces of what `page_library` has, and of others."""
    return make_clips(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture(scope="module")
def page_library(encoders, tmp_path_factory):
    """An index of files as the page shows them."""
    return make_library(tmp_path_factory.mktemp("page"), encoders)

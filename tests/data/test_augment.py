"""Spectral augmentation and turned crops: the same for all frames of a clip, and off when off."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from avcl_jax.data.augment import SpectralSpec, spectral
from avcl_jax.data.images import Crop, apply_crop, random_crop
from avcl_jax.data.render_spec import CropSpec

OFF = SpectralSpec(equalizer=0.0, equalizer_knots=5, mask_mels=0, noise=0.0)


@pytest.fixture(scope="module")
def spectrogram():
    return jax.random.normal(jax.random.key(0), (4, 2, 12, 40))


def test_off_changes_nothing(spectrogram):
    np.testing.assert_array_equal(spectral(jax.random.key(1), spectrogram, OFF), spectrogram)


def test_the_equaliser_is_constant_in_time_keeps_the_mean_and_differs_between_views(spectrogram):
    spec = dataclasses.replace(OFF, equalizer=0.7)
    gain = np.asarray(spectral(jax.random.key(1), spectrogram, spec) - spectrogram)
    np.testing.assert_allclose(gain, gain[:, :, :1].repeat(12, axis=2), atol=1e-5)
    np.testing.assert_allclose(gain.mean(axis=-1), 0.0, atol=1e-5)
    assert 0.2 < np.abs(gain).max() <= 1.4
    assert np.abs(gain[:, 0] - gain[:, 1]).max(axis=(1, 2)).min() > 0.05


def test_a_mask_silences_one_band_for_the_whole_clip(spectrogram):
    spec = dataclasses.replace(OFF, mask_mels=6)
    out = np.asarray(spectral(jax.random.key(2), spectrogram, spec))
    changed = out != np.asarray(spectrogram)
    widths = []
    for row in range(4):
        for view in range(2):
            bands = np.flatnonzero(changed[row, view].any(axis=0))
            widths.append(len(bands))
            if len(bands):
                assert bands[-1] - bands[0] + 1 == len(bands) <= 6
                quiet = spectrogram[row, view].min()
                np.testing.assert_array_equal(out[row, view][:, bands], quiet)
    assert max(widths) > 0


def test_quarter_turns_turn_all_frames_alike():
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    turned = apply_crop(frames, Crop(0, 0, 20, False, turns=1), 20)
    for before, after in zip(frames, turned, strict=True):
        np.testing.assert_array_equal(after, np.rot90(before))
    rng = np.random.default_rng(1)
    spec = CropSpec(image_size=16, min_area=0.5, flip=False, quarter_turns=True)
    turns = [random_crop(rng, 20, 20, spec).turns for _ in range(200)]
    assert min(np.bincount(turns, minlength=4)) > 30
    upright = dataclasses.replace(spec, quarter_turns=False)
    assert not any(random_crop(rng, 20, 20, upright).turns for _ in range(20))

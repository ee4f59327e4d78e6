"""Null controls: the shipped rendering passes them, and a rendering that leaks is caught."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.evaluation.supervised import FitSpec, null_control, render_null_views
from avcl_jax.models.audio_encoders import AudioResNet
from tests.evaluation.test_views import SPEC

FIT = FitSpec(
    batch_size=64,
    learning_rate=5e-3,
    weight_decay=0.01,
    epochs=4,
    decay_epochs=1,
)
VIEWS = 35  # of each of 10 records, 3 speeds and 2 directions


@pytest.fixture(scope="module")
def rendered(small_records):
    return [
        render_null_views(
            UsableRecords(RecordDataset(small_records, split), SPEC),
            SPEC,
            views=VIEWS,
            seed=seed,
            threads=2,
        )
        for seed, split in enumerate(("null_train", "null_test"))
    ]


def _control(train, test):
    return null_control(
        train,
        test,
        encoders={"audio": AudioResNet(widths=(16,), depths=(1,), stem="patch", patch=(2, 2))},
        prepare={"audio": jnp.asarray},
        num_speeds=3,
        spec=FIT,
        seed=0,
    )


def test_the_shipped_rendering_of_sound_is_at_chance_on_noise(rendered):
    control = _control(*rendered)
    for task, chance in (("speed_audio", 1 / 3), ("direction_audio", 1 / 2)):
        assert control.scores[task].chance == pytest.approx(chance)
        assert abs(control.scores[task].accuracy - chance) < 0.05
        # Five points are more than three standard errors, or the control would prove nothing.
        error = np.sqrt(chance * (1 - chance) / control.scores[task].confusion.sum())
        assert 3 * error < 0.05
    assert control.views == 10 * 3 * 2 * VIEWS


def _leak(arrays):
    """The naive rendering: the faster the playback, the more frames are averaged."""
    spectrogram = arrays["spectrogram"].copy()
    for width in (1, 2):
        chosen = arrays["audio_speed"] == width
        smooth = [np.roll(spectrogram[chosen], shift, axis=-2) for shift in range(width + 1)]
        spectrogram[chosen] = np.mean(smooth, axis=0)
    return arrays | {"spectrogram": spectrogram}


def test_a_rendering_that_averages_skipped_frames_is_caught(rendered):
    control = _control(*(_leak(arrays) for arrays in rendered))
    assert control.scores["speed_audio"].accuracy > 1 / 3 + 0.2
    assert abs(control.scores["direction_audio"].accuracy - 1 / 2) < 0.05

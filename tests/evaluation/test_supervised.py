"""Training on labels, and on noise: null controls pass, and a rendering that leaks is caught."""

from __future__ import annotations

import dataclasses
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.evaluation.classifier import FitSpec, fit_classifier
from avcl_jax.evaluation.temporal import null_control, render_null_views
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.objectives.temporal import TASKS, Task
from tests.evaluation.test_views import SPEC as RENDERING

SPEC = FitSpec(16, 1e-2, 0.01, epochs=12, decay_epochs=3)
# A patch spans all bands: averaged over smaller ones, features would not know which band is loud.
ENCODER = AudioResNet(widths=(8,), depths=(0,), stem="patch", patch=(2, 6))


def _views(rng: np.random.Generator, items: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(items) % 3
    views = rng.normal(size=(items, 2, 8, 6)).astype(np.float32)
    views[np.arange(items), :, :, 2 * labels] += 3.0
    return views, np.repeat(labels[:, None], 2, axis=1)


def test_the_learning_rate_falls_to_zero_over_the_last_epochs():
    rates = SPEC.rates(steps=4)
    assert rates.shape == (48,)
    np.testing.assert_array_equal(rates[:37], np.float32(1e-2))
    np.testing.assert_allclose(np.diff(rates[36:]), -1e-2 / 12, rtol=1e-4)
    assert rates[-1] == pytest.approx(1e-2 / 12, rel=1e-4)


def _fit(views, labels, encoder=ENCODER, **spec):
    return fit_classifier(
        encoder,
        views,
        {"class": labels},
        classes={"class": 3},
        prepare=jnp.asarray,
        spec=dataclasses.replace(SPEC, **spec),
        seed=0,
    )


def test_it_learns_what_can_be_learned_and_generalises():
    rng = np.random.default_rng(0)
    fit = _fit(*_views(rng, 64), epochs=20)
    assert len(fit.losses) == 20
    assert fit.losses[-1] < 0.1 < fit.losses[0]
    test_views, test_labels = _views(rng, 50)
    logits = fit.predict(test_views[:, 0], batch_size=16)["class"]
    assert logits.shape == (50, 3)
    assert (logits.argmax(axis=-1) == test_labels[:, 0]).mean() > 0.9
    alone = fit.predict(test_views[7:8, 0], batch_size=16)["class"]
    np.testing.assert_allclose(alone[0], logits[7], atol=1e-5)
    assert set(fit.encoder_variables) == {"params", "batch_stats"}


class _Plain(nn.Module):
    """An encoder without batch statistics, as a transformer is."""

    @nn.compact
    def __call__(self, clips, *, train):
        del train
        return {"features": nn.Dense(4)(clips.reshape(len(clips), -1))}


def test_an_encoder_without_batch_norm_is_trained_and_handed_over():
    fit = _fit(*_views(np.random.default_rng(3), 16), _Plain(), epochs=2, decay_epochs=1)
    assert set(fit.encoder_variables) == {"params"}


def test_bad_input_says_what_and_which():
    views, labels = _views(np.random.default_rng(2), 32)
    with pytest.raises(ValueError, match="8 items do not fill one batch of 16"):
        _fit(views[:8], labels[:8])
    with pytest.raises(ValueError, match=r"labels class \(32, 1\)"):
        _fit(views, labels[:, :1])
    with pytest.raises(ValueError, match="training loss of epoch 0 is nan"):
        _fit(views * np.nan, labels, epochs=4)


FIT = FitSpec(64, 5e-3, 0.01, epochs=4, decay_epochs=1)
NETWORK = AudioResNet(widths=(16,), depths=(1,), stem="patch", patch=(2, 2))
AS_IT_IS = types.SimpleNamespace(standardise=jnp.asarray)
VIEWS = 35  # of each of 10 records, 3 speeds and 2 directions


@pytest.fixture(scope="module")
def rendered(small_records):
    return [
        render_null_views(
            UsableRecords(RecordDataset(small_records, split), RENDERING),
            RENDERING,
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
        encoders={"audio": types.SimpleNamespace(module=NETWORK, preprocess=AS_IT_IS)},
        num_speeds=3,
        spec=FIT,
        seed=0,
    )


def test_the_shipped_rendering_of_sound_is_at_chance_on_noise(rendered):
    control = _control(*rendered)
    for task, chance in (("speed_audio", 1 / 3), ("direction_audio", 1 / 2)):
        assert len(control.scores[task].confusion) == round(1 / chance)
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


def _pace(arrays):
    return (arrays["audio_speed"] > 0).astype(np.int32)


def test_a_rendering_that_averages_skipped_frames_is_caught_by_every_task_of_a_view(
    rendered, monkeypatch
):
    task = Task("pace", ("audio",), lambda _: ["slow", "fast"], "", _pace)
    monkeypatch.setitem(TASKS, task.name, task)
    control = _control(*(_leak(arrays) for arrays in rendered))
    assert control.scores.keys() == {"speed_audio", "direction_audio", "pace_audio"}
    assert control.scores["speed_audio"].accuracy > 1 / 3 + 0.2
    assert control.scores["pace_audio"].accuracy > 1 / 2 + 0.2
    assert abs(control.scores["direction_audio"].accuracy - 1 / 2) < 0.05

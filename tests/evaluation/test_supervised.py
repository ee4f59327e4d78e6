"""Training on labels, and on noise: null controls pass, and a rendering that leaks is caught."""

from __future__ import annotations

import types

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.evaluation import temporal
from avcl_jax.evaluation.classifier import fit_classifier
from avcl_jax.evaluation.temporal import noise_control
from avcl_jax.evaluation.views import random_views
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.objectives.temporal import TASKS, Task
from tests.evaluation.test_views import SPEC as RENDERING

SPEC = {"batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.01, "epochs": 12}
SPEC["decay_epochs"] = 3
AS_IT_IS = types.SimpleNamespace(standardise=jnp.asarray)
# A patch spans all bands: averaged over smaller ones, features would not know which band is loud.
ENCODER = AudioResNet(widths=(8,), depths=(0,), stem="patch", patch=(2, 6))


def _views(rng: np.random.Generator, items: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(items) % 3
    views = rng.normal(size=(items, 2, 8, 6)).astype(np.float32)
    views[np.arange(items), :, :, 2 * labels] += 3.0
    return views, np.repeat(labels[:, None], 2, axis=1)


def _fit(views, labels, encoder=ENCODER, **spec):
    return fit_classifier(
        types.SimpleNamespace(module=encoder, preprocess=AS_IT_IS),
        views,
        {"class": labels},
        classes={"class": 3},
        seed=0,
        **SPEC | spec,
    )


def test_the_learning_rate_falls_to_zero_over_the_last_epochs(monkeypatch):
    schedules, adamw = [], optax.adamw
    monkeypatch.setattr(optax, "adamw", lambda s, **o: schedules.append(s) or adamw(s, **o))
    _fit(*_views(np.random.default_rng(0), 64), epochs=2, decay_epochs=1)
    rates = [float(schedules[0](step)) for step in range(2 * 4 + 1)]
    assert rates == pytest.approx([1e-2] * 5 + [7.5e-3, 5e-3, 2.5e-3, 0])


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

    root_of_zero: bool = False  # finite, and its gradient is not

    @nn.compact
    def __call__(self, clips, *, train):
        del train
        features = nn.Dense(4)(clips.reshape(len(clips), -1))
        return {"features": features + jnp.sqrt(0 * features) if self.root_of_zero else features}


def test_an_encoder_without_batch_norm_is_trained_and_handed_over():
    fit = _fit(*_views(np.random.default_rng(3), 16), _Plain(), epochs=2, decay_epochs=1)
    assert set(fit.encoder_variables) == {"params"}


def test_bad_input_says_what_and_which():
    views, labels = _views(np.random.default_rng(2), 32)
    with pytest.raises(ValueError, match="8 items do not fill one batch of 16"):
        _fit(views[:8], labels[:8])
    with pytest.raises(ValueError, match="training loss of epoch 0 is nan"):
        _fit(views * np.nan, labels, epochs=4)
    with pytest.raises(ValueError, match="training gradient norm of epoch 0 is nan"):
        _fit(views[:16], labels[:16], _Plain(root_of_zero=True), epochs=1, decay_epochs=1)


FIT = SPEC | {"batch_size": 64, "learning_rate": 5e-3, "epochs": 4, "decay_epochs": 1}
NETWORK = AudioResNet(widths=(16,), depths=(1,), stem="patch", patch=(2, 2))
VIEWS = 35  # of each of 10 records, 3 speeds and 2 directions


def _control(directory):
    encoder = types.SimpleNamespace(module=NETWORK, preprocess=AS_IT_IS)
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(seed=0),
        spec=RENDERING,
        source=types.SimpleNamespace(encoders={"audio": encoder}),
    )
    settings = {"train_views": VIEWS, "test_views": VIEWS, "fit": FIT}
    noise = (
        UsableRecords(RecordDataset(directory, f"null_{role}"), RENDERING)
        for role in ("train", "test")
    )
    return noise_control(run, ml_collections.ConfigDict(settings), *noise, threads=2)


def test_the_shipped_rendering_of_sound_is_at_chance_on_noise(small_records):
    control = _control(small_records)
    for task, chance in (("speed_audio", 1 / 3), ("direction_audio", 1 / 2)):
        assert len(control.scores[task].confusion) == round(1 / chance)
        assert abs(control.scores[task].accuracy - chance) < 0.05
        # Five points are more than three standard errors, or the control would prove nothing.
        error = np.sqrt(chance * (1 - chance) / control.scores[task].confusion.sum())
        assert 3 * error < 0.05
    assert control.views == 10 * 3 * 2 * VIEWS


def _leaking(*args, **options):
    """The naive rendering: the faster the playback, the more frames are averaged."""
    arrays = random_views(*args, **options)
    spectrogram = arrays["spectrogram"].copy()
    for width in (1, 2):
        chosen = arrays["audio_speed"] == width
        smooth = [np.roll(spectrogram[chosen], shift, axis=-2) for shift in range(width + 1)]
        spectrogram[chosen] = np.mean(smooth, axis=0)
    return arrays | {"spectrogram": spectrogram}


def _pace(arrays):
    return (arrays["audio_speed"] > 0).astype(np.int32)


def test_a_rendering_that_averages_skipped_frames_is_caught_by_every_task_of_a_view(
    small_records, monkeypatch
):
    task = Task("pace", ("audio",), lambda _: ["slow", "fast"], "", _pace)
    monkeypatch.setitem(TASKS, task.name, task)
    monkeypatch.setattr(temporal, "random_views", _leaking)
    control = _control(small_records)
    assert control.scores.keys() == {"speed_audio", "direction_audio", "pace_audio"}
    assert control.scores["speed_audio"].accuracy > 1 / 3 + 0.2
    assert control.scores["pace_audio"].accuracy > 1 / 2 + 0.2
    assert abs(control.scores["direction_audio"].accuracy - 1 / 2) < 0.05

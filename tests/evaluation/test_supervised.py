"""Training on labels: the stated schedule, and that it learns."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.evaluation.supervised import FitSpec, fit_classifier
from avcl_jax.models.audio_encoders import AudioResNet

SPEC = FitSpec(
    batch_size=16,
    learning_rate=1e-2,
    weight_decay=0.01,
    epochs=12,
    decay_epochs=3,
)
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


def test_it_learns_what_can_be_learned_and_generalises():
    rng = np.random.default_rng(0)
    views, labels = _views(rng, 64)
    fit = fit_classifier(
        ENCODER,
        views,
        {"class": labels},
        classes={"class": 3},
        prepare=jnp.asarray,
        spec=dataclasses.replace(SPEC, epochs=20),
        seed=0,
    )
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
    views, labels = _views(np.random.default_rng(3), 32)
    fit = fit_classifier(
        _Plain(),
        views,
        {"class": labels},
        classes={"class": 3},
        prepare=jnp.asarray,
        spec=dataclasses.replace(SPEC, epochs=2, decay_epochs=1),
        seed=0,
    )
    assert set(fit.encoder_variables) == {"params"}


def test_bad_input_says_what_and_which():
    views, labels = _views(np.random.default_rng(2), 32)

    def fit(views, labels, spec=SPEC):
        return fit_classifier(
            ENCODER,
            views,
            {"class": labels},
            classes={"class": 3},
            prepare=jnp.asarray,
            spec=spec,
            seed=0,
        )

    with pytest.raises(ValueError, match="8 items do not fill one batch of 16"):
        fit(views[:8], labels[:8])
    with pytest.raises(ValueError, match=r"labels class \(32, 1\)"):
        fit(views, labels[:, :1])
    with pytest.raises(ValueError, match="training loss of epoch 0 is nan"):
        fit(views * np.nan, labels, dataclasses.replace(SPEC, epochs=4))
